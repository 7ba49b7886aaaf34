"""What edge attribution costs beside the bare forward and activation-only backward pass of the same batch.

Prediction, from the counts of docs/architecture.md, for the Qwen2 shape below (26.2 M weights in matrix
products, 1024 tokens: 107 GFLOP bare): block level 0.6 GFLOP, memory-bound, +3 %; head level 10.7 GFLOP of
expansion and about 5 of contraction, +14 % if those products ran at the bare pass's rate, which ones this
narrow do not.

    python -m benchmarks.cost
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import record
from eaptk import Batch, Graph, attribute
from eaptk.capture import frozen
from eaptk.passes import sample_losses
from eaptk.sites import Sites

#: Rounds before the clock counts: a batch takes tens of thousands of page faults until the heap has grown to
#: what the pass needs, and in a run of many batches only the first few pay for them.
WARM_UP = 6
TARGETS = {"block": 1.05, "head": 1.30}


def bare_pass(model: torch.nn.Module, sites: Sites, batch: Batch) -> None:
    """The floor: the same forward, loss and gradient to the first layer's input, without a hook that reads."""
    root: list[torch.Tensor] = []

    def leaf(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        root.append(args[0].detach().requires_grad_())
        return (root[0], *args[1:])

    handle = sites.layers[0].block.register_forward_pre_hook(leaf)
    try:
        with frozen(model), torch.enable_grad():
            loss = sample_losses(model, sites, batch).sum()
            torch.autograd.grad(loss, root[0])
    finally:
        handle.remove()


def peak_bytes(work: Callable[[], Any]) -> int:
    """Largest sum of live tensor bytes that `work` allocates, from the allocator's own record."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def alternating(
    bare: Callable[[], Any], own: Callable[[], Any], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each, taken in turns, in a process that does what a run of many batches does."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(WARM_UP + rounds):
        for run, taken in zip((bare, own), seconds, strict=True):
            start = time.perf_counter()
            run()
            if i >= WARM_UP:
                taken.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11, help="alternating repetitions (median is reported)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1536,
        "vocab_size": 4096,
    }
    n_samples, n_tokens = 4, 256
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    batch = Batch.from_mapping({"input_ids": torch.randint(0, shape["vocab_size"], (n_samples, n_tokens))})
    graphs = {name: Graph.from_model(model, granularity=name) for name in TARGETS}
    sites = Sites(model, graphs["block"])
    work: dict[str, Callable[[], Any]] = {"bare": lambda: bare_pass(model, sites, batch)}
    for name, graph in graphs.items():
        work[name] = lambda graph=graph: attribute(model, batch, graph)

    seconds = {name: alternating(work["bare"], work[name], options.rounds) for name in TARGETS}
    peaks = {name: peak_bytes(run) for name, run in work.items()}

    width = n_samples * n_tokens * shape["hidden_size"] * 4
    limits = {
        "block": (graphs["block"].n_sources + graphs["block"].n_destinations) * width,
        "head": graphs["head"].n_sources * width // 4,
    }
    rows = {}
    table = Table(title=f"Qwen2 shape {n_samples}×{n_tokens} tokens, float32, {options.threads} threads")
    for heading in ("level", "bare s", "eaptk s", "ratio", "spread", "target", "MB extra", "limit"):
        table.add_column(heading, justify="right")
    for name, (bare, own) in seconds.items():
        ratios = [a / b for a, b in zip(own, bare, strict=True)]
        rows[name] = {
            "seconds": statistics.median(own),
            "bare_seconds": statistics.median(bare),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
            "target": TARGETS[name],
            "bytes_above_bare": peaks[name] - peaks["bare"],
            "bytes_limit": limits[name],
        }
        low, _, high = rows[name]["ratio_quartiles"]
        memory = (peaks[name] - peaks["bare"]) / 1e6
        table.add_row(
            name,
            f"{rows[name]['bare_seconds']:.3f}",
            f"{rows[name]['seconds']:.3f}",
            f"{rows[name]['ratio']:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"≤ {TARGETS[name]:.2f}",
            f"{memory:.1f}",
            f"≤ {limits[name] / 1e6:.1f}",
        )
    Console().print(table)
    path = record.write("cost", {"shape": shape, "tokens": [n_samples, n_tokens], "rows": rows})
    print(f"written to {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
