"""The Triton kernels on a GPU: right, as fast as the card allows, and cheap beside the model's own passes.

Measured: error against float64; bytes a second of the block contraction beside a device copy; useful FLOPs a
second of the head contraction (2·T·D·edges, all its other work charged to it) beside a bfloat16 matrix product;
attribution beside the bare forward and backward pass, random weights. Without a GPU everything runs at toy size
in Triton's interpreter, which says that the script works and nothing about speed; no result is written.

    python -m benchmarks.gpu
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import record
from benchmarks.cost import bare_pass
from eaptk import Batch, Graph, attribute
from eaptk.graph import Granularity
from eaptk.kernels import Destination, Norm, Source, contract
from eaptk.sites import Sites

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
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
TOY_TOKENS = [3]
GRANULARITIES: tuple[Granularity, ...] = ("block", "head")


def operands(of: Shape, tokens: int, granularity: Granularity) -> tuple[list[Source], list[Destination]]:
    """Random bfloat16 operands as a model of this shape hands them over."""
    layers, heads, kv_heads = of["num_hidden_layers"], of["num_attention_heads"], of["num_key_value_heads"]
    width = of["hidden_size"]
    head_dim, by_head = width // heads, granularity == "head"

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.bfloat16, device=DEVICE)

    sources, destinations, reach = [Source(random(1, tokens, width))], [], 1
    for _ in range(layers):
        norm = Norm(random(1, tokens, width), random(width), 1e-6, False)
        for n in (heads, kv_heads, kv_heads):
            tail, weight = ((n, head_dim), random(n, head_dim, width)) if by_head else ((width,), None)
            destinations.append(Destination(random(1, tokens, *tail), reach, weight, norm))
        if by_head:
            weight = random(width, width).T.unflatten(0, (heads, head_dim))
            sources.append(Source(random(1, tokens, heads, head_dim), weight))
        else:
            sources.append(Source(random(1, tokens, width)))
        reach += heads if by_head else 1
        destinations.append(Destination(random(1, tokens, width), reach))
        sources.append(Source(random(1, tokens, width)))
        reach += 1
    return sources, [*destinations, Destination(random(1, tokens, width), reach)]


def in_float64(
    sources: list[Source], destinations: list[Destination]
) -> tuple[list[Source], list[Destination]]:
    """The same operands, wider."""
    wide = [
        replace(s, value=s.value.double(), weight=None if s.weight is None else s.weight.double())
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


def seconds(work: Callable[[], Any], rounds: int = 7) -> float:
    """Median of `rounds` after two that warm up."""
    taken = []
    for i in range(rounds + 2 if GPU else 1):
        _wait()
        start = time.perf_counter()
        work()
        _wait()
        if i >= 2 or not GPU:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def limits() -> dict[str, float]:
    """What the card does at best: bytes a second of a copy, FLOPs a second of a bfloat16 product."""
    size = 8192 if GPU else 64
    block = torch.empty(size * size * 4, dtype=torch.uint8, device=DEVICE)
    square = torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE)
    return {
        "copy": 2 * block.numel() / seconds(block.clone),
        "product": 2 * size**3 / seconds(lambda: square @ square),
    }


def kernel_rates(of: Shape, tokens: int, best: dict[str, float]) -> dict[str, Any]:
    """Error and rate of both contractions, the rate as a share of the card's best."""
    found: dict[str, Any] = {}
    for granularity in GRANULARITIES:
        small = operands({**of, "num_hidden_layers": 2}, min(tokens, 100), granularity)
        lengths = [min(tokens, 100)]
        expected = contract(*in_float64(*small), lengths, backend="reference")
        error = (contract(*small, lengths, backend="triton") - expected).norm() / expected.norm()
        sources, destinations = operands(of, tokens, granularity)
        taken = seconds(
            lambda s=sources, d=destinations: contract(s, d, [tokens], backend="triton")  # type: ignore[misc]
        )
        if granularity == "block":
            streams = of["num_hidden_layers"]
            moved = 2 * tokens * of["hidden_size"] * (len(sources) + len(destinations) + streams)
            share = moved / taken / best["copy"]
        else:
            n_edges = sum(d.rows * d.reach for d in destinations)
            share = 2 * tokens * of["hidden_size"] * n_edges / taken / best["product"]
        found[granularity] = {"error": error.item(), "seconds": taken, "share_of_best": share}
    return found


def end_to_end(of: Shape, tokens: int) -> dict[str, float]:
    """Seconds of the bare passes, and attribution's as a multiple of them."""
    model = Qwen2ForCausalLM(Qwen2Config(**of)).to(torch.bfloat16).to(DEVICE)
    batch = Batch.from_mapping({"input_ids": torch.randint(0, of["vocab_size"], (1, tokens))})
    graphs = {name: Graph.from_model(model, granularity=name) for name in GRANULARITIES}
    sites = Sites(model, graphs["block"])
    on_device = batch.to(DEVICE)
    bare = seconds(lambda: bare_pass(model, sites, on_device), rounds=5)
    ratios = {
        name: seconds(lambda g=graph: attribute(model, batch, g), rounds=5) / bare  # type: ignore[misc]
        for name, graph in graphs.items()
    }
    return {"bare": bare, **ratios}


def guarded(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """A size that does not fit is a result too."""
    try:
        return work(*args)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        if GPU:
            torch.cuda.empty_cache()


def main() -> None:
    torch.manual_seed(0)
    os.environ["EAPTK_BACKEND"] = "triton"
    if not GPU:  # read when the first contraction imports triton
        os.environ["TRITON_INTERPRET"] = "1"
    best, console = limits(), Console()
    rows = []
    for name, of in (SHAPES if GPU else TOY).items():
        for tokens in TOKENS if GPU else TOY_TOKENS:
            row = {"shape": name, "tokens": tokens, "kernels": guarded(kernel_rates, of, tokens, best)}
            row["ratio_to_bare"] = guarded(end_to_end, of, tokens)
            console.print(row)
            rows.append(row)
    if not GPU:
        console.print("no GPU: toy size, interpreted; nothing written")
        return
    card = {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": version("triton")}
    console.print(str(record.write("gpu", {**card, "best": best, "rows": rows})))


if __name__ == "__main__":
    main()
