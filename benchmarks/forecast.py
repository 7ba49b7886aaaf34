"""What scoring a dataset will take: seconds, bytes of a card, bytes on disk. On paper first.

One batch of B samples × T tokens, on a card of so many FLOPs and bytes a second:

    seconds = (passes + recomputation) / rate + traffic / bandwidth
            + expansion / products + expanded / bandwidth + max(contraction / products, operands / bandwidth)

FLOPs and operands are those of `eaptk.plan.Work`, which tests hold to what is counted. *Traffic* is what the passes
move besides their products: what autograd keeps of each layer is written once and read once, gradients inside a
layer are written, and of each logit four float32 are written and read. On a CPU attention's scores move as well, each
time they are formed, and so do expanded heads; on a GPU neither leaves the chip. A machine's two constants, rate and
bandwidth, are what it reaches in effect: fitted to measured batches where there is a machine
(`benchmarks.calibration`), spec sheet × the shares that `eaptk.cards` assumes where there is none.

A model larger than a card is spread over k of them. By a device map its layers lie on different cards, which work one
after the other: memory is divided, time is not. By tensor parallelism each layer is divided: products take a k-th,
each layer costs two sums over the cards in each pass, [B, T, D] elements of which each card sends and receives
2(k−1)/k, and what every card holds of the stream is not divided. At block level each card contracts all, as each has
all sources; at head level each has its own heads.

Replicas of the model claim stretches of batches from one queue (`benchmarks.claims`) and exchange nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch
from transformers import LlamaConfig, Qwen2Config

from eaptk.budget import _LEAST as LEAST
from eaptk.budget import _MOST_OF_A_CARD as MOST_OF_A_CARD
from eaptk.cards import CARDS, COPIES, PASSES, PRODUCTS, Card
from eaptk.errors import EaptkError
from eaptk.graph import Granularity, Graph
from eaptk.keep import Keep
from eaptk.plan import Plan, Work, without_weights
from eaptk.sites import Sites
from eaptk.statistics import DEFAULT_BINS, MOMENTS, SUMS, Histogram

#: Bytes of one logit that are written, and read again: itself, in float32, its softmax and its gradient.
LOGIT = 2 * 4 * 4
#: Share of a sample's tokens that carry loss: the answer's.
LOSS_SHARE = 0.5
#: Assumed of a cluster: bytes a second that one node reads weights with, and that the run's disk takes.
READING, WRITING = 2e9, 2e9
#: Assumed: bytes a second between two cards of a node, each way (NVLink of an H100 or H200 by its spec sheet).
LINK = 450e9
#: Assumed: seconds until a process has imported its libraries and met the others, and cores of a node for each card.
LAUNCH, CORES = 60.0, 8
#: Cards of a node: a replica of the model is not spread further.
NODE = 8

How = Literal["device map", "tensor parallel"]


def _config(kind: Any, layers: int, width: int, heads: tuple[int, int], inner: int, vocabulary: int) -> Any:
    return kind(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )


#: Shapes as their published configs have them.
SHAPES: dict[str, Callable[[], Any]] = {
    "Qwen2.5-7B": lambda: _config(Qwen2Config, 28, 3584, (28, 4), 18944, 152064),
    "Llama-3-70B": lambda: _config(LlamaConfig, 80, 8192, (64, 8), 28672, 128256),
    "Llama-3.1-405B": lambda: _config(LlamaConfig, 126, 16384, (128, 8), 53248, 128256),
}


@dataclass(frozen=True)
class Machine:
    """What one card, or core, reaches.

    Args:
        rate, products: FLOPs a second of the model's own passes, and of expansion and contraction.
        bandwidth: bytes a second of its memory.
        link: bytes a second to another card, each way.
    """

    rate: float
    products: float
    bandwidth: float
    link: float = LINK * COPIES

    @classmethod
    def of(cls, card: Card, itemsize: int = 2) -> Machine:
        """By its spec sheet and assumed shares; nothing of it is measured."""
        rate = card.rate(itemsize)
        return cls(rate * PASSES, rate * PRODUCTS, card.bandwidth * COPIES)


@dataclass(frozen=True)
class Replica:
    """One model on so many cards of a node."""

    cards: int = 1
    how: How = "device map"

    def peak(self, plan: Plan) -> int:
        """Most bytes that one card holds beside its weights; of several cards an upper bound."""
        work = plan.work
        whole = work.peak(plan.flush_layers, plan.checkpoint)
        layers = work.graph.n_layers
        if self.how == "tensor parallel":
            heads = work.sources - work.stream * (layers + 1) if work.graph.granularity == "head" else 0
            return whole - heads * (self.cards - 1) // self.cards
        kept = work.stream if plan.checkpoint else work.kept + (work.stream if work.itemsize < 4 else 0)
        inside = work.backward + (work.kept if plan.checkpoint else 0)
        scratch = max(work.scratch(now) for _, now in work.flushes(plan.flush_layers))
        share = -(-layers // self.cards)
        spread = work.sources * share // layers + work.rows + share * kept
        return min(whole, spread + max(work.logits, plan.waiting + max(inside, scratch)))

    def plan(self, work: Work, memory: int, checkpoint: bool | None = None) -> Plan:
        """The fastest dials that fit into one card's `memory`, weights included; the most frugal if none do."""
        free = memory - work.weights // self.cards
        plans = []
        for recompute in (False, True) if checkpoint is None else (checkpoint,):
            layers = work.graph.n_layers
            while layers:
                plan = Plan(work, free, layers, recompute, 0)
                plans.append(replace(plan, peak=self.peak(plan)))
                if plans[-1].fits:
                    return plans[-1]
                layers = (layers + 1) // 2 if layers > 1 else 0
        return min(plans, key=lambda plan: plan.peak)

    def seconds(self, plan: Plan, machine: Machine) -> dict[str, float]:
        """Of each part of one batch."""
        work, dials = plan.work, plan.flush_layers
        shared = 1 / self.cards if self.how == "tensor parallel" else 1.0
        contraction = max(
            work.contraction_flops(dials) / machine.products,
            work.contraction_bytes(dials) / machine.bandwidth,
        )
        again = work.recompute_flops if plan.checkpoint else 0
        # However few the tokens, both passes read all weights.
        passes = max(work.bare_flops / machine.rate, 2 * work.weights / machine.bandwidth)
        parts = {
            "passes": shared * passes,
            "recomputation": shared * again / machine.rate,
            "traffic": shared * traffic(work, plan.checkpoint) / machine.bandwidth,
            "expansion": shared
            * (work.expansion_flops(dials) / machine.products + expanded(work) / machine.bandwidth),
            "contraction": contraction * (shared if work.graph.granularity == "head" else 1.0),
        }
        if self.how == "tensor parallel" and self.cards > 1:
            sums = work.graph.n_layers * 2 * (3 if plan.checkpoint else 2)
            parts["exchange"] = sums * work.stream * 2 * (1 - 1 / self.cards) / machine.link
        return parts


def traffic(work: Work, checkpoint: bool) -> int:
    """Bytes that the model's own passes move besides the operands of their products."""
    layer = (3 if checkpoint else 2) * work.kept + work.backward
    found = work.graph.n_layers * layer + LOGIT * work.n_loss * work.unembedding // work.width
    if not work.on_gpu:
        # Formed by the forward pass, by the backward pass, and their gradients: each written and read.
        scores = work.attention * work.graph.n_heads // (4 * work.query_width)
        found += (4 if checkpoint else 3) * 2 * work.itemsize * scores
    return found


def expanded(work: Work) -> int:
    """Bytes of heads at the model's width, written and read, where they do not stay in the chip's own memory."""
    if work.on_gpu or work.graph.granularity == "block":
        return 0
    rows = work.graph.n_sources + work.graph.n_destinations
    return 2 * rows * work.stream


@cache
def _meta(shape: str, dtype: torch.dtype) -> Any:
    return without_weights(SHAPES[shape](), dtype)


@cache
def work_of(shape: str, granularity: Granularity, n_samples: int, n_tokens: int, on_gpu: bool = True) -> Work:
    """One batch of a published shape, in bfloat16 on a GPU, in float32 on a CPU."""
    model = _meta(shape, torch.bfloat16 if on_gpu else torch.float32)
    sites = Sites(model, Graph.from_model(model, granularity))
    n_loss = max(1, round(LOSS_SHARE * n_tokens)) * n_samples
    return Work.of(model, sites, n_samples, n_tokens, n_loss=n_loss, on_gpu=on_gpu)


@dataclass(frozen=True)
class Law:
    """Seconds of a batch: all its parts grow with B·T, but those of attention with B·T²."""

    per_token: float
    per_square: float
    least: float

    @classmethod
    def of(cls, seconds: Callable[[int], float], least: float, short: int, long: int) -> Law:
        """Through the seconds of two single samples, both long enough not to be bound by reading weights."""
        a, b = seconds(short) / short, seconds(long) / long
        square = (b - a) / (long - short)
        return cls(a - square * short, square, least)

    def of_batch(self, n_samples: int, n_tokens: int) -> float:
        return max(self.least, n_samples * n_tokens * (self.per_token + self.per_square * n_tokens))


#: Ways to spread a model over the cards of a node.
REPLICAS = (
    Replica(),
    *(Replica(n, how) for n in (2, 4, NODE) for how in ("tensor parallel", "device map")),  # type: ignore[arg-type]
)


@dataclass(frozen=True)
class Setup:
    """A shape at one level on a kind of card, its batches of at most so many tokens (a longer sample is one alone)."""

    shape: str
    granularity: Granularity
    card: str
    replica: Replica
    tokens_per_batch: int
    usual: int
    longest: int

    @cached_property
    def plan(self) -> Plan:
        """Dials of most batches."""
        return self._plan(self.usual)

    @property
    def fits(self) -> bool:
        return self.plan.fits and self._plan(self.longest).fits

    @property
    def card_bytes(self) -> int:
        """At the height of a card's memory."""
        peak = max(self.plan.peak, self._plan(self.longest).peak)
        return self.plan.work.weights // self.replica.cards + peak

    def _plan(self, n_tokens: int) -> Plan:
        n_samples = max(1, self.tokens_per_batch // n_tokens)
        work = work_of(self.shape, self.granularity, n_samples, n_tokens)
        return self.replica.plan(work, CARDS[self.card].memory)

    @cached_property
    def law(self) -> Law:
        machine = Machine.of(CARDS[self.card])

        def seconds(n_tokens: int) -> float:
            work = work_of(self.shape, self.granularity, 1, n_tokens)
            return sum(self.replica.seconds(replace(self.plan, work=work), machine).values())

        weights = self.plan.work.weights
        divided = self.replica.cards if self.replica.how == "tensor parallel" else 1
        return Law.of(seconds, 2 * weights / machine.bandwidth / divided, 4096, 16384)

    def start(self, n_replicas: int, hashing: float) -> float:
        """Seconds before the first batch: weights read from disk once a node, copied, and hashed by each process.

        Args:
            hashing: bytes a second of one core.
        """
        weights = self.plan.work.weights
        on_node = min(n_replicas, NODE // self.replica.cards)
        cores = CORES * self.replica.cards * on_node
        return LAUNCH + weights / READING + on_node * weights / (hashing * cores)


def choose(
    shape: str, granularity: Granularity, lengths: tuple[int, int, int], cards: Sequence[str]
) -> Setup:
    """The replica that costs the fewest seconds × cards a token, on the first kind of card of which a node holds it.

    Tokens of a batch are as `eaptk.score` takes them: as many as fit without checkpointing.

    Args:
        lengths: tokens of the shortest sample, of most, and of the longest.

    Raises:
        EaptkError: it fits on no node of any of these cards.
    """
    shortest, usual, longest = lengths
    for card in cards:
        memory, fitting = CARDS[card].memory, []
        for replica in REPLICAS:
            if work_of(shape, granularity, 1, longest).weights >= replica.cards * memory:
                continue
            tokens = _tokens_that_fit(shape, granularity, replica, memory, shortest, longest)
            setup = Setup(shape, granularity, card, replica, tokens, usual, longest)
            if setup.fits:
                n_samples = max(1, tokens // usual)
                cost = setup.law.of_batch(n_samples, usual) * replica.cards / n_samples
                fitting.append((cost, replica.cards, setup))
        if fitting:
            return min(fitting, key=lambda found: found[:2])[2]
    raise EaptkError(f"{shape} with {longest:,} tokens fits on no node of {', '.join(cards)}")


def _tokens_that_fit(
    shape: str, granularity: Granularity, replica: Replica, memory: int, shortest: int, longest: int
) -> int:
    tokens = MOST_OF_A_CARD
    while tokens > LEAST:
        # Those longer than a batch are scored alone, with dials of their own.
        lengths = {shortest, min(longest, max(tokens, shortest))}
        works = [work_of(shape, granularity, max(1, tokens // n), n) for n in lengths]
        plans = [replica.plan(work, memory, checkpoint=False) for work in works]
        if all(plan.fits for plan in plans):
            break
        tokens //= 2
    return tokens


def keeping(graph: Graph, way: str) -> Keep:
    """One of `WAYS` of keeping rows of a graph, without lists of its edges: for sizes alone."""
    if way == "layer pairs":
        recorded = {"edges": None, "layer_pairs": graph.layers().n_edges}
        return Keep(graph, layer_pairs=True, recorded=recorded)
    options: dict[str, dict[str, Any]] = {
        "float32": {},
        "float16": {"row_dtype": "float16"},
        "top 1000": {"top": 1000},
        "metrics only": {"histogram": Histogram(DEFAULT_BINS, 1.0)},
    }
    return Keep(graph, **options[way])


WAYS = ("float32", "float16", "top 1000", "layer pairs", "metrics only")


def run_arrays(keep: Keep, n_samples: int) -> dict[str, int]:
    """Bytes of each array that a complete run holds, to the byte. (Its tables depend on what is in them.)"""
    found: dict[str, tuple[tuple[int, ...], Any]] = {"checksums": ((n_samples,), np.uint32)}
    if keep.histogram is None:
        found |= {name: ((n_samples, width), dtype) for name, (width, dtype) in keep.arrays.items()}
        found["done"] = ((n_samples,), np.uint8)
    else:
        sums = ("sums", np.float64, (len(SUMS), keep.n_edges))
        found["moments"] = ((n_samples, len(MOMENTS)), np.float64)
        found["histogram"] = ((n_samples, keep.histogram.bins), np.uint32)
        found["pooled"] = ((1,), [sums, ("done", np.uint8, (n_samples,)), ("checksum", np.uint32)])
    return {f"{name}.npy": array_bytes(*array) for name, array in found.items()}


def sample_bytes(keep: Keep) -> float:
    """Bytes that a run grows by with each sample."""
    return (sum(run_arrays(keep, 2 * 10**6).values()) - sum(run_arrays(keep, 10**6).values())) / 10**6


def array_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Of an .npy file."""
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.tell() + int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
