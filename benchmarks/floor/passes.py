"""One case: are its scores right, what does attribution take beside the bare passes, and where does it go.

The contraction is timed once more by itself, on operands caught on their way into it, beside a copy of memory (block
level moves operands) or a square matrix product (head level multiplies them). What attribution takes above the bare
passes and the contraction is hooks, views and rows. Where a target is missed, operators are listed by what attribution
spends in them above the bare pass.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost import TARGETS, bare_pass, peak_bytes
from benchmarks.floor.shapes import DEVICE, SHAPES, Case, Shape, in_float64
from benchmarks.timing import clocked, in_turns, ratios, rounds, summary
from benchmarks.turns import in_slices
from eaptk import Graph, attribute, division
from eaptk.graph import Granularity
from eaptk.kernels import Destination, Source, contract
from eaptk.plan import Work, without_weights
from eaptk.sites import Sites

LEVELS: tuple[Granularity, ...] = ("block", "head")
CONTENDERS = ("bare", *LEVELS)
#: Fewest tokens of a batch that the targets are for: below it a pass is launches and page faults.
LEAST_TOKENS = 256
GATE_TOKENS = 24
#: Largest relative error of scores to those of the same weights in float64. In half precision the model's own
#: rounding is most of it.
LIMITS = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}
#: And of the contraction alone to that of the same operands in float64.
CONTRACTION_LIMITS = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-3}
#: Elements of the copy, and rows of the square product, that the contraction is held against.
COPIED, SQUARE = (2**28, 8192) if DEVICE.type == "cuda" else (2**26, 2048)
MOST_OPERATORS = 8


@dataclass(frozen=True)
class Call:
    """What one contraction was given."""

    sources: list[Source]
    destinations: list[Destination]
    lengths: list[int]

    def run(self) -> Tensor:
        with torch.no_grad():
            return contract(self.sources, self.destinations, self.lengths)

    def in_float64(self) -> Call:
        """The same operands, wider."""
        sources = [
            replace(
                s,
                value=s.value.double(),
                weight=_double(s.weight),
                replacement=_double(s.replacement),
                gain=_double(s.gain),
            )
            for s in self.sources
        ]
        destinations = [
            replace(
                d,
                gradient=d.gradient.double(),
                weight=_double(d.weight),
                norm=d.norm and replace(d.norm, stream=d.norm.stream.double(), gain=d.norm.gain.double()),
            )
            for d in self.destinations
        ]
        return Call(sources, destinations, self.lengths)

    @property
    def moved(self) -> int:
        """Bytes read when every operand is read once."""
        read = [s.value for s in self.sources] + [d.gradient for d in self.destinations]
        streams = {id(d.norm.stream): d.norm.stream for d in self.destinations if d.norm is not None}
        return sum(x.numel() * x.element_size() for x in [*read, *streams.values()])

    @property
    def flops(self) -> int:
        """2·D a token for every real edge, and 2·D·head_dim for every head that is expanded."""
        tokens = sum(self.lengths)
        width = next(s.value for s in self.sources if s.weight is None).shape[-1]
        edges = sum(d.rows * d.reach for d in self.destinations)
        heads = [x.weight for x in (*self.sources, *self.destinations) if x.weight is not None]
        return 2 * tokens * width * (edges + sum(w.shape[0] * w.shape[1] for w in heads))


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """What is recorded of a case; see `benchmarks.floor`.

    Args:
        seconds: that its repetitions may take, about.
    """
    found: dict[str, Any] = {"name": case.name, **asdict(case), "gate": gate(case)}
    if not found["gate"]["passed"]:
        return found
    work = {who: contender(case, who) for who in CONTENDERS}
    if DEVICE.type == "cuda":  # which knows nothing of slices
        timed = in_turns({who: clocked(run) for who, run in work.items()}, seconds * 0.8)
    else:
        timed = _in_processes(case, seconds * 0.8)
    bare_bytes = peak_bytes(work["bare"])
    found["bare"] = {"seconds": summary(timed["bare"]), "bytes": bare_bytes}
    for level in LEVELS:
        here, whole = _flop_ratio(case, level), _flop_ratio(case, level, SHAPES[case.shape].layers)
        ratio = ratios(timed, level, "bare")
        found[level] = {
            "seconds": summary(timed[level]),
            "ratio": ratio,
            "target": TARGETS[level] if case.n_samples * case.n_tokens >= LEAST_TOKENS else None,
            "flop_ratio": here,
            "flop_ratio_full_depth": whole,
            "bytes_above_bare": peak_bytes(work[level]) - bare_bytes,
            "contraction": _contraction(case, level, seconds * 0.1),
        }
        if found[level]["target"] and ratio["median"] > found[level]["target"]:
            found[level]["profile"] = profile(work["bare"], work[level])
    return found


def gate(case: Case) -> dict[str, Any]:
    """What is to be timed, beside float64 and beside itself.

    Of one sample's first tokens scores are held against the same model's in float64, and of the whole batch, run as it
    is timed, the contraction against that of the same operands in float64 and the first sample's row against that of
    the sample alone, of which every layer runs once, unless it is the batch.
    """
    model, few, batch = case.model, case.batch(1, GATE_TOKENS), case.batch()
    graphs = {level: Graph.from_model(model, level) for level in LEVELS}
    scores, contractions, alone = {}, {}, {}
    for level, graph in graphs.items():
        scores[level] = attribute(model, few, graph).rows
        with caught() as calls:
            row = attribute(model, batch, graph, checkpoint=case.checkpoint).rows[:1]
        contractions[level] = max(distance(call.run(), call.in_float64().run()) for call in calls)
        calls.clear()
        if case.n_samples > 1 or case.checkpoint:
            alone[level] = distance(row, attribute(model, case.batch(1), graph).rows)
    with in_float64(model):
        errors = {
            level: distance(scores[level], attribute(model, few, graph).rows)
            for level, graph in graphs.items()
        }
    limit, own = LIMITS[case.dtype], CONTRACTION_LIMITS[case.dtype]
    right = [error <= limit for error in (*errors.values(), *alone.values())]
    return {
        "errors": errors,
        "alone_errors": alone,
        "limit": limit,
        "contraction_errors": contractions,
        "contraction_limit": own,
        "passed": all(right) and all(error <= own for error in contractions.values()),
    }


def yardstick(case: Case, seconds: float) -> dict[str, Any]:
    """The bare pass, whose loss is eaptk's, beside one as anybody would write it: all logits, and cross entropy."""
    model, batch = case.model, case.batch()
    sites = Sites(model, Graph.from_model(model))
    targets = batch.ids[:, 1:].flatten()

    def by_hand() -> None:
        inputs = model.get_input_embeddings()(batch.ids).requires_grad_()
        logits = model(inputs_embeds=inputs, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
        torch.autograd.grad(loss, inputs)

    work = {"bare": lambda: bare_pass(model, sites, batch), "by hand": by_hand}
    taken = in_turns({name: clocked(run) for name, run in work.items()}, seconds)
    case.free()
    return {"case": case.name, "ratio": ratios(taken, "by hand", "bare")}


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@contextmanager
def caught() -> Iterator[list[Call]]:
    """What contractions are given meanwhile."""
    calls: list[Call] = []

    def catch(sources: list[Source], destinations: list[Destination], lengths: list[int]) -> Tensor:
        calls.append(Call(sources, destinations, lengths))
        return calls[-1].run()

    division.contract, before = catch, division.contract  # type: ignore[assignment]
    try:
        yield calls
    finally:
        division.contract = before


def profile(bare: Callable[[], Any], own: Callable[[], Any]) -> list[dict[str, Any]]:
    """Operators by the seconds that `own` spends in them above `bare`, the most first."""
    spent, calls = _by_operator(own)
    less, fewer = _by_operator(bare)
    spent.subtract(less)
    calls.subtract(fewer)
    return [
        {"operator": name, "seconds": seconds, "calls": calls[name]}
        for name, seconds in spent.most_common(MOST_OPERATORS)
    ]


def _by_operator(work: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
    work()
    with torch.profiler.profile() as profiled:
        clocked(work)()
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiled.key_averages():
        if DEVICE.type == "cuda":
            spent[event.key] = event.self_device_time_total / 1e6
        else:
            spent[event.key] = event.self_cpu_time_total / 1e6
        calls[event.key] = event.count
    return spent, calls


def contender(case: Case, who: str) -> Callable[[], Any]:
    """The bare pass, or attribution at a level."""
    model, batch = case.model, case.batch()
    if who == "bare":
        sites = Sites(model, Graph.from_model(model))
        return lambda: bare_pass(model, sites, batch, case.checkpoint)
    graph = Graph.from_model(model, who)  # type: ignore[arg-type]
    return lambda: attribute(model, batch, graph, checkpoint=case.checkpoint, on_device=True)


def in_a_process(case: Case, shape: Shape, who: str, threads: int) -> Callable[[], Any]:
    """The same where nothing was set up yet."""
    torch.set_num_threads(threads)
    SHAPES[case.shape] = shape
    return contender(case, who)


def _in_processes(case: Case, seconds: float) -> dict[str, list[float]]:
    """Seconds of contenders, by rounds in slices."""
    given = (replace(case), SHAPES[case.shape])  # a copy without its model
    threads = torch.get_num_threads()
    prepared = {who: partial(in_a_process, *given, who, threads) for who in CONTENDERS}
    with in_slices(prepared) as one_round:
        return rounds(list(CONTENDERS), one_round, seconds)


def _contraction(case: Case, level: Granularity, seconds: float) -> dict[str, Any]:
    with caught() as calls:
        attribute(case.model, case.batch(), Graph.from_model(case.model, level), checkpoint=case.checkpoint)
    if level == "block":
        kind, amount = "copy", sum(call.moved for call in calls)
        block = torch.ones(COPIED, device=DEVICE)
        other, best = torch.empty_like(block), 2 * block.nbytes
        yardstick: Callable[[], Any] = lambda: other.copy_(block)  # noqa: E731
    else:
        kind, amount = "product", sum(call.flops for call in calls)
        # On a CPU products are of float32, whatever is given.
        dtype = calls[0].sources[0].value.dtype if DEVICE.type == "cuda" else torch.float32
        square = torch.ones(SQUARE, SQUARE, dtype=dtype, device=DEVICE)
        best = 2 * SQUARE**3
        yardstick = lambda: square @ square  # noqa: E731
    taken = in_turns(
        {"contraction": clocked(lambda: [call.run() for call in calls]), "yardstick": clocked(yardstick)},
        seconds,
    )
    rates = [
        amount / own / (best / other)
        for own, other in zip(taken["contraction"], taken["yardstick"], strict=True)
    ]
    return {
        "seconds": summary(taken["contraction"]),
        "of": kind,
        "best": best / statistics.median(taken["yardstick"]),
        "share": summary(rates),
    }


def _flop_ratio(case: Case, level: Granularity, layers: int | None = None) -> float:
    """What attribution would take beside the bare passes if all FLOPs took the same time."""
    config = SHAPES[case.shape].config(layers or case.layers, case.n_tokens)
    model = without_weights(config, torch.float32)
    sites = Sites(model, Graph.from_model(model, level))
    n_loss = case.n_samples * (case.n_tokens - 1)
    work = Work.of(model, sites, case.n_samples, case.n_tokens, n_loss=n_loss, on_gpu=DEVICE.type == "cuda")
    own = work.contraction_flops(work.graph.n_layers) + work.expansion_flops(work.graph.n_layers)
    bare = work.bare_flops + (work.recompute_flops if case.checkpoint else 0)
    return 1 + own / bare


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()
