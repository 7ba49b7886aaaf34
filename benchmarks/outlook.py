"""Published shapes on clusters of up to 512 cards: what to ask for, what a replica makes, and how it scales.

All of it is predicted (`benchmarks.forecast`, `benchmarks.claims`) from spec sheets and assumed shares of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from benchmarks.claims import Batch, Outcome, lengths_of, queue_of, simulate
from benchmarks.forecast import (
    NODE,
    SHAPES,
    WRITING,
    Machine,
    Replica,
    Setup,
    choose,
    keeping,
    run_arrays,
    sample_bytes,
    work_of,
)
from eaptk.cards import CARDS as CARDS_BY_NAME
from eaptk.errors import EaptkError
from eaptk.graph import Granularity, Graph

#: Samples and their mean tokens that the table answers for; the longest has twice as many.
DATASETS = ((1_000, 512), (100_000, 512), (1_000_000, 512), (1_000, 16_384))
#: Samples, of 512 tokens, that the curves by cards are of.
N_SCALING = 20_000
#: Kinds of cards, the first that a node of which holds the model is taken.
CARDS = ("H100", "H200", "B200")
#: What a run is to end within, with so many cards at most.
HOURS, MOST_CARDS = 1.0, 512
#: Bytes of rows that one may want to keep: more, and sums over layer pairs are.
ROOM = 2e12
LEVELS: tuple[Granularity, ...] = ("block", "head")


@dataclass(frozen=True)
class Forecast:
    """One row of the table.

    Args:
        card_bytes: at the height of a card's memory.
        cards: that it ends within `HOURS` on, if that many suffice.
        alone: hours on one replica.
        efficiency: share of the replicas' time spent computing, from the first batch on.
        kept: way of keeping, and bytes of it; `rows` are those of float32 rows.
    """

    shape: str
    level: str
    n_samples: int
    tokens: int
    replica: str = ""
    checkpoint: bool = False
    tokens_per_batch: int = 0
    card_bytes: int = 0
    cards: int = 0
    hours: float = 0.0
    alone: float = 0.0
    efficiency: float = 0.0
    rows: int = 0
    kept: str = ""
    kept_bytes: int = 0


def forecast(shape: str, level: Granularity, n_samples: int, tokens: int, hashing: float) -> Forecast:
    """What the table says of one shape and dataset.

    Args:
        hashing: bytes a second at which one core hashes weights.
    """
    graph = Graph.from_config(SHAPES[shape](), level)
    rows, kept = (sum(run_arrays(keeping(graph, w), n_samples).values()) for w in ("float32", "layer pairs"))
    way = "all" if rows <= ROOM else "layer pairs"
    common: dict[str, Any] = {
        "shape": shape,
        "level": level,
        "n_samples": n_samples,
        "tokens": tokens,
        "rows": rows,
        "kept": way,
        "kept_bytes": rows if way == "all" else kept,
    }
    try:
        setup = choose(shape, level, (tokens // 2, tokens, 2 * tokens), CARDS)
    except EaptkError:
        return Forecast(**common)
    queue = _queue(n_samples, tokens, setup.tokens_per_batch)
    writes = sample_bytes(keeping(graph, "float32" if way == "all" else way)) / WRITING
    work = batches_of(setup, queue, writes)
    if sum(map(len, work)) > 20_000:  # then a stretch is as good as a batch, and an eighth of the events
        work = [[Batch(sum(b.compute for b in part), sum(b.write for b in part))] for part in work]
    total = sum(batch.compute for part in work for batch in part) / 3600
    cards = setup.replica.cards
    while True:
        replicas = cards // setup.replica.cards
        start = setup.start(replicas, hashing) / 3600
        found = simulate(work, replicas)
        hours = start + found.seconds / 3600
        # Nor are cards asked for that only wait.
        if hours <= HOURS or 2 * cards > MOST_CARDS or found.efficiency < 0.5:
            break
        cards = max(2 * cards, _power_of_two(total / HOURS) * setup.replica.cards // 2)
        cards = min(cards, MOST_CARDS)
    return Forecast(
        **common,
        replica=_replica(setup.replica, setup.card),
        checkpoint=setup.plan.checkpoint,
        tokens_per_batch=setup.tokens_per_batch,
        card_bytes=setup.card_bytes,
        cards=cards,
        hours=hours,
        alone=setup.start(1, hashing) / 3600 + total,
        efficiency=found.efficiency,
    )


def batches_of(setup: Setup, queue: Sequence[Sequence[tuple[int, int]]], writes: float) -> list[list[Batch]]:
    """Seconds of each batch of each stretch; `writes`: that the disk takes for a sample."""
    law = setup.law
    return [[Batch(law.of_batch(n, tokens), n * writes) for n, tokens in part] for part in queue]


@cache
def _queue(n_samples: int, tokens: int, tokens_per_batch: int) -> list[list[tuple[int, int]]]:
    return queue_of(lengths_of(n_samples, tokens), tokens_per_batch)


def _power_of_two(at_least: float) -> int:
    return 1 << max(0, math.ceil(math.log2(max(at_least, 1))))


@dataclass(frozen=True)
class Scaling:
    """One dataset on 1 … 512 cards.

    Args:
        outcomes: by number of cards, start-up apart; with all rows kept, and with sums over layer pairs alone.
    """

    shape: str
    level: str
    outcomes: dict[int, tuple[Outcome, Outcome]]


def scaling(shape: str, level: Granularity, n_samples: int = N_SCALING, tokens: int = 512) -> Scaling:
    setup = choose(shape, level, (tokens // 2, tokens, 2 * tokens), CARDS)
    graph = Graph.from_config(SHAPES[shape](), level)
    queue = _queue(n_samples, tokens, setup.tokens_per_batch)
    works = [
        batches_of(setup, queue, sample_bytes(keeping(graph, way)) / WRITING)
        for way in ("float32", "layer pairs")
    ]
    outcomes, cards = {}, setup.replica.cards
    while cards <= MOST_CARDS:
        dense, pairs = (simulate(work, cards // setup.replica.cards) for work in works)
        outcomes[cards] = (dense, pairs)
        cards *= 2
    return Scaling(shape, level, outcomes)


@dataclass(frozen=True)
class Pace:
    """What one replica makes of samples of 512 tokens.

    Args:
        overhead: seconds over those of the bare passes.
        row_bytes: of a sample's row in float32.
        rate: samples a second.
        longest: tokens of the longest sample that a node's cards hold by a device map, a power of two.
    """

    shape: str
    level: str
    replica: str
    overhead: float
    row_bytes: float
    rate: float
    longest: int

    @property
    def until_full(self) -> float:
        """Replicas that together make rows as fast as the disk takes them."""
        return WRITING / (self.rate * self.row_bytes)


def pace(shape: str, level: Granularity, tokens: int = 512) -> Pace:
    setup = choose(shape, level, (tokens // 2, tokens, 2 * tokens), CARDS)
    n_samples = max(1, setup.tokens_per_batch // tokens)
    plan = replace(setup.plan, work=work_of(shape, level, n_samples, tokens))
    parts = setup.replica.seconds(plan, Machine.of(CARDS_BY_NAME[setup.card]))
    own = parts["expansion"] + parts["contraction"]
    return Pace(
        shape=shape,
        level=level,
        replica=_replica(setup.replica, setup.card),
        overhead=1 + own / (sum(parts.values()) - own),
        row_bytes=sample_bytes(keeping(plan.work.graph, "float32")),
        rate=n_samples / setup.law.of_batch(n_samples, tokens),
        longest=longest_sample(shape, level, setup.card),
    )


def longest_sample(shape: str, level: Granularity, card: str) -> int:
    """Tokens, a power of two, that a node's cards hold by a device map."""
    whole, n_tokens = Replica(NODE, "device map"), 1024
    while whole.plan(work_of(shape, level, 1, 2 * n_tokens), CARDS_BY_NAME[card].memory).fits:
        n_tokens *= 2
    return n_tokens


def _replica(replica: Replica, card: str) -> str:
    return f"{replica.cards} × {card}" + (f", {replica.how}" if replica.cards > 1 else "")
