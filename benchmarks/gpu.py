"""The Triton kernels on a GPU: right, as fast as the card allows, and cheap beside the model's own passes.

Gates, each printed PASS or FAIL; one that fails makes the exit code 1:

- every kernel's error against float64 is at most that of plain PyTorch on the same operands, and an allowance;
- the block contraction moves bytes at 80 % of a device copy's rate;
- the head contraction does useful FLOPs (2·T·D·edges, all its other work charged to it) at 60 % of a bfloat16
  matrix product's rate;
- attribution takes at most 1.05 (block) and 1.30 (head) times the bare passes, random weights, 0.5B and 7B shapes,
  512 to 32,768 tokens, the last 256 of which carry loss; where memory asks for checkpointing, on both sides;
- scores equal those of the usual scripts (`benchmarks.dense`), which at head level take 5 times as long for 512
  tokens of the 7B shape, or run out of memory.

Without a GPU the same code runs at toy size in Triton's interpreter: gates of speed say nothing there and are left
out, and no result is written. Under 8 minutes on a card, compilation included.

    python -m benchmarks.gpu
"""

# ruff: noqa: E402
from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal

import torch

GPU = torch.cuda.is_available()
if not GPU:  # read when triton is imported, which transformers does
    os.environ["TRITON_INTERPRET"] = "1"

from rich.console import Console
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import record
from benchmarks.cost import TARGETS, bare_pass
from benchmarks.dense import dense_scores
from eaptk import Batch, Graph, Sample, attribute, collate
from eaptk.batch import NO_TARGET
from eaptk.graph import Granularity
from eaptk.kernels import Destination, Norm, Source, contract, row_statistics
from eaptk.plan import Plan, Work, free_memory
from eaptk.sites import Sites

DEVICE = torch.device("cuda" if GPU else "cpu")
GRANULARITIES: tuple[Granularity, ...] = ("block", "head")
#: Shares of the card's best, and how many times as long the usual scripts take.
COPY, PRODUCT, PEER = 0.8, 0.6, 5.0
LOSS_TOKENS = 256
Shape = dict[str, int]


def shape(layers: int, heads: int, kv_heads: int, width: int, inner: int, vocabulary: int) -> Shape:
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": width,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
    }


SHAPES = {"0.5B": shape(24, 14, 2, 896, 4864, 151936), "7B": shape(28, 28, 4, 3584, 18944, 152064)}
TOKENS = [512, 4096, 32768]
TOY = {"toy": shape(2, 2, 1, 64, 96, 128)}
TOY_TOKENS = [5]


@dataclass
class Gates:
    """What must hold, printed as it is found."""

    console: Console
    found: list[dict[str, Any]] = field(default_factory=list)

    def check(
        self, name: str, value: float, limit: float, of: Literal["at most", "at least"] = "at most"
    ) -> None:
        passed = value <= limit if of == "at most" else value >= limit
        self.found.append({"gate": name, "value": value, "limit": limit, "of": of, "passed": passed})
        verdict = "[green]PASS[/]" if passed else "[bold red]FAIL[/]"
        self.console.print(f"{verdict} {name}: {value:.4g}, {of} {limit:.4g}", highlight=False)

    @property
    def passed(self) -> bool:
        return all(gate["passed"] for gate in self.found)


def operands(
    of: Shape,
    tokens: int,
    granularity: Granularity,
    dtype: torch.dtype = torch.bfloat16,
    centred: bool = False,
    patched: bool = False,
) -> tuple[list[Source], list[Destination]]:
    """Random operands as a model of this shape hands them over."""
    layers, heads, kv_heads = of["num_hidden_layers"], of["num_attention_heads"], of["num_key_value_heads"]
    width = of["hidden_size"]
    head_dim, by_head = width // heads, granularity == "head"

    def random(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=DEVICE)

    def source(weight: Tensor | None, *tail: int) -> Source:
        value = random(1, tokens, *tail)
        return Source(value, weight, replacement=random(1, tokens, *tail) if patched else None)

    sources, destinations, reach = [source(None, width)], [], 1
    for _ in range(layers):
        norm = Norm(random(1, tokens, width), random(width), 1e-6, centred)
        for n in (heads, kv_heads, kv_heads):
            tail, weight = ((n, head_dim), random(n, head_dim, width)) if by_head else ((width,), None)
            destinations.append(Destination(random(1, tokens, *tail), reach, weight, norm))
        if by_head:
            sources.append(source(random(width, width).T.unflatten(0, (heads, head_dim)), heads, head_dim))
        else:
            sources.append(source(None, width))
        reach += heads if by_head else 1
        destinations.append(Destination(random(1, tokens, width), reach))
        sources.append(source(None, width))
        reach += 1
    return sources, [*destinations, Destination(random(1, tokens, width), reach)]


def in_float64(
    sources: list[Source], destinations: list[Destination]
) -> tuple[list[Source], list[Destination]]:
    """The same operands, wider."""
    wide = [
        replace(
            s,
            value=s.value.double(),
            weight=None if s.weight is None else s.weight.double(),
            replacement=None if s.replacement is None else s.replacement.double(),
        )
        for s in sources
    ]
    return wide, [
        replace(
            d,
            gradient=d.gradient.double(),
            weight=None if d.weight is None else d.weight.double(),
            norm=d.norm and replace(d.norm, stream=d.norm.stream.double(), gain=d.norm.gain.double()),
        )
        for d in destinations
    ]


def plain(sources: list[Source], destinations: list[Destination]) -> Tensor:
    """[1, n_edges] in the operands' dtype: expand, back through the norm, multiply, sum in float32."""

    def written(value: Tensor, weight: Tensor | None) -> Iterator[Tensor]:
        rows = (value,) if weight is None else torch.einsum("bthd,hdw->hbtw", value, weight)
        yield from rows

    def read(d: Destination) -> Iterator[Tensor]:
        if d.norm is None:
            yield d.gradient
            return
        stream = d.norm.stream.detach().requires_grad_()
        wide = stream.float()
        wide = wide - wide.mean(-1, keepdim=True) if d.norm.centred else wide
        normed = wide * (wide.square().mean(-1, keepdim=True) + d.norm.eps).rsqrt()
        output = normed.to(stream.dtype) * d.norm.gain
        for u in written(d.gradient, d.weight):
            yield torch.autograd.grad(output, stream, u, retain_graph=True)[0]

    changes = []
    for s in sources:
        others = (
            [0.0] * s.rows if s.replacement is None else [o.float() for o in written(s.replacement, s.weight)]
        )
        changes += [other - o.float() for o, other in zip(written(s.value, s.weight), others, strict=True)]
    rows = []
    for d in destinations:
        for gradient in read(d):
            rows.append(torch.stack([(gradient.float() * o).sum() for o in changes[: d.reach]]))
    return torch.cat(rows)[None]


def kernel_errors(gates: Gates, of: Shape, tokens: int) -> None:
    """Every kind of kernel on operands of a model of two layers."""
    small = {**of, "num_hidden_layers": 2}
    for granularity in GRANULARITIES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for centred, patched in ((False, False), (True, True)) if GPU else ((True, dtype.itemsize > 2),):
                given = operands(small, tokens, granularity, dtype, centred, patched)
                exact = contract(*in_float64(*given), [tokens], backend="reference")

                def error(found: Tensor, exact: Tensor = exact) -> float:
                    return ((found - exact).norm() / exact.norm()).item()

                # float32 sums in another order; 16 bits of what is computed in float32 first.
                allowance = 2.0**-20 if dtype == torch.float32 else 2.0**-16
                if granularity == "head" and dtype == torch.float16:
                    allowance = torch.finfo(dtype).eps / 8  # expanded rows are rounded, by plain PyTorch too
                gates.check(
                    f"error, {granularity}, {str(dtype).removeprefix('torch.')}"
                    f"{', LayerNorm' * centred}{', patched' * patched}",
                    error(contract(*given, [tokens], backend="triton")),
                    min(1e-3, error(plain(*given)) + allowance),
                )

    rows = torch.randn(3, 1000, device=DEVICE)
    exact_statistics = row_statistics(rows.double(), 20, 3.0, backend="reference")
    found_statistics = row_statistics(rows, 20, 3.0, backend="triton")
    gates.check(
        "error, statistics of rows",
        max(
            ((getattr(found_statistics, name) - value).abs().max() / value.abs().max()).item()
            for name, value in vars(exact_statistics).items()
        ),
        1e-9,
    )


def seconds(work: Callable[[], Any]) -> float:
    """Median of 3 to 15 rounds, as many as take about 4 s, after one that warms up."""
    work()
    taken: list[float] = []
    while (GPU and len(taken) < 15 and (len(taken) < 3 or sum(taken) < 4)) or not taken:
        _wait()
        start = time.perf_counter()
        work()
        _wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def seconds_or_inf(work: Callable[[], Any]) -> float:
    """The same; infinite where memory runs out."""
    try:
        return seconds(work)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return math.inf


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def limits() -> dict[str, float]:
    """What the card does at best: bytes a second of a copy, FLOPs a second of a bfloat16 product."""
    size = 8192 if GPU else 64
    block = torch.empty(size * size * 16, dtype=torch.uint8, device=DEVICE)
    square = torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE)
    return {
        "copy": 2 * block.numel() / seconds(block.clone),
        "product": 2 * size**3 / seconds(lambda: square @ square),
    }


def kernel_rate(of: Shape, tokens: int, granularity: Granularity, best: dict[str, float]) -> dict[str, float]:
    """Seconds of a contraction, and its rate as a share of the card's best."""
    sources, destinations = operands(of, tokens, granularity)
    taken = seconds(lambda: contract(sources, destinations, [tokens], backend="triton"))
    if granularity == "block":
        moved = 2 * tokens * of["hidden_size"] * (len(sources) + len(destinations) + of["num_hidden_layers"])
        return {"seconds": taken, "share": moved / taken / best["copy"]}
    n_edges = sum(d.rows * d.reach for d in destinations)
    return {"seconds": taken, "share": 2 * tokens * of["hidden_size"] * n_edges / taken / best["product"]}


def random_model(of: Shape, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Qwen2ForCausalLM:
    with torch.device(DEVICE):
        config = Qwen2Config(**of, max_position_embeddings=tokens, dtype=dtype)
        return Qwen2ForCausalLM._from_config(config, dtype=dtype).eval()


def random_batch(of: Shape, tokens: int) -> Batch:
    """One sample, of whose tokens the last `LOSS_TOKENS` carry loss."""
    ids = tuple(torch.randint(0, of["vocab_size"], (tokens + 1,)).tolist())
    answer = min(LOSS_TOKENS, tokens)
    return collate([Sample("0", ids[:-answer], ids[-answer:])])


def end_to_end(model: torch.nn.Module, of: Shape, tokens: int) -> dict[str, Any]:
    """Seconds of the bare passes, and attribution's as a multiple of them, by granularity."""
    batch = random_batch(of, tokens).to(DEVICE)
    found: dict[str, Any] = {}
    floors: dict[bool, float] = {}
    for granularity in GRANULARITIES:
        graph = Graph.from_model(model, granularity=granularity)
        sites = Sites(model, graph)
        n_loss = int((batch.targets != NO_TARGET).sum())
        plan = Plan.within(free_memory(DEVICE), Work.of(model, sites, 1, tokens, n_loss=n_loss))
        dials = {"flush_layers": plan.flush_layers, "checkpoint": plan.checkpoint}
        again = plan.checkpoint
        if again not in floors:
            floors[again] = seconds_or_inf(lambda s=sites, a=again: bare_pass(model, s, batch, a))  # type: ignore[misc]
        taken = seconds_or_inf(lambda g=graph, d=dials: attribute(model, batch, g, **d))  # type: ignore[misc]
        ratio = taken / floors[again] if math.isfinite(floors[again]) else math.nan
        found[granularity] = {"bare": floors[again], "ratio": ratio, **dials, "predicted_peak": plan.peak}
        if GPU and math.isfinite(taken):
            torch.cuda.reset_peak_memory_stats()
            attribute(model, batch, graph, **dials)
            found[granularity]["peak"] = torch.cuda.max_memory_allocated() - plan.work.weights
    return found


def peer_error(of: Shape, tokens: int) -> float:
    """Distance between eaptk's scores and the usual scripts', float32, two layers."""
    model = random_model({**of, "num_hidden_layers": 2}, tokens, torch.float32)
    graph, batch = Graph.from_model(model, granularity="head"), random_batch(of, tokens)
    theirs = dense_scores(model, batch, graph).cpu()
    ours = torch.from_numpy(attribute(model, batch, graph).matrix())
    return ((ours - theirs).norm() / theirs.norm()).item()


def against_peer(model: torch.nn.Module, of: Shape, tokens: int) -> dict[str, float]:
    """Seconds of both at head level; the usual scripts' are infinite where they run out of memory."""
    graph, batch = Graph.from_model(model, granularity="head"), random_batch(of, tokens).to(DEVICE)
    ours = seconds(lambda: attribute(model, batch, graph))
    theirs = seconds_or_inf(lambda: dense_scores(model, batch, graph))
    return {"eaptk": ours, "dense": theirs, "times": theirs / ours}


def card() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):  # AMD's card has other tools
        driver = "unknown"
    return {
        "card": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": version("triton"),
    }


def without_infinity(value: Any) -> Any:
    """JSON has no number for what ran out of memory."""
    if isinstance(value, dict):
        return {key: without_infinity(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_infinity(inner) for inner in value]
    return "out of memory" if isinstance(value, float) and not math.isfinite(value) else value


def main() -> int:
    started = time.monotonic()
    torch.manual_seed(0)
    os.environ["EAPTK_BACKEND"] = "triton"
    console = Console(soft_wrap=True)
    gates, best = Gates(console), limits()
    shapes, sizes = (SHAPES, TOKENS) if GPU else (TOY, TOY_TOKENS)
    rows: list[dict[str, Any]] = []
    for name, of in shapes.items():
        kernel_errors(gates, of, 127 if GPU else 3)
        gates.check(f"distance to the usual scripts, {name}", peer_error(of, min(sizes[0], 64)), 1e-4)
        for tokens in sizes:
            for granularity, share in zip(GRANULARITIES, (COPY, PRODUCT), strict=True):
                found = kernel_rate(of, tokens, granularity, best)
                rows.append({"shape": name, "tokens": tokens, "kernel": granularity, **found})
                if GPU:
                    what = f"{granularity} kernel's share of the card's best, {name}, {tokens} tokens"
                    gates.check(what, found["share"], share, "at least")
                    torch.cuda.empty_cache()
        model = random_model(of, max(sizes))
        for tokens in sizes:
            whole = end_to_end(model, of, tokens)
            rows.append({"shape": name, "tokens": tokens, "end_to_end": whole})
            for granularity in GRANULARITIES if GPU else ():
                what = f"{granularity} ÷ bare, {name}, {tokens} tokens"
                gates.check(what, whole[granularity]["ratio"], TARGETS[granularity])
        peer = against_peer(model, of, sizes[0])
        rows.append({"shape": name, "tokens": sizes[0], "peer": peer})
        if name == "7B":
            gates.check("usual scripts ÷ eaptk, 7B, 512 tokens", peer["times"], PEER, "at least")
        del model
        if GPU:
            torch.cuda.empty_cache()
    if GPU:
        gates.check("seconds in all", time.monotonic() - started, 480)
        result = {**card(), "best": best, "gates": gates.found, "rows": rows}
        console.print(str(record.write("gpu", without_infinity(result))))
    else:
        console.print("no GPU: toy size, interpreted; speed says nothing and nothing is written")
    return 0 if gates.passed else 1


if __name__ == "__main__":
    sys.exit(main())
