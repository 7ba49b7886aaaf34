"""What edge attribution takes of memory beside the bare forward and activation-only backward pass, by length.

A deep, narrow model with a wide vocabulary: 16 layers × width 64, 8,192 tokens in the vocabulary, four times as many
columns in the stream as in keys (2 heads and 1 of width 16, so that attention over 32,768 tokens is done on a CPU in
minutes); every position carries loss. Each figure is the height of resident memory (`VmHWM`) of a process of its own
over what was resident before, after a first short pass; glibc is told to give freed memory back, so that resident means
live. Bare passes are measured the same way, with the same loss, which is chunked.

Settings: `kept`, what attribution does by itself where memory abounds; `checkpointed`, each layer run again in the
backward pass, and flush groups of one layer; `segments`, 128 tokens at a time (`eaptk.segments`). The bare pass with
checkpointing is what the latter two are held against: a bare pass that keeps everything takes several times as much.

Prediction, in tensors [T, 64]: a bare pass keeps about 12 a layer, 190 in all; with checkpointing its 16 inputs, and
about 25 of the layer at hand. Attribution has 33 sources at block level, and gradients that wait: 65, or 5 in groups
of one layer. So `kept` about 1.5 times the bare pass; `checkpointed` 80 against 40, about twice: to keep every source
is to keep two tensors a layer where the bare pass keeps one, and no order of contraction avoids it, as each source is
wanted by all destinations above it. `segments` keeps keys, values and their gradients alone, a quarter of a tensor
each, 16 in all, and some of one layer (masks, keys of all heads): below the bare pass. Nothing grows faster than T:
neither [T, T] nor [T, V] is there at any time.

Outcome at 32,768 tokens, block and head: `kept` 1.17 and 1.09 times the bare pass, which kept 195 tensors as
predicted while fewer of attribution's were there at its height; `checkpointed` 2.25 and 1.79 times the bare pass with
checkpointing (83 tensors and 66 against 37), so that the target is missed as foreseen; `segments` .59 of it. Lines are
straight within 1.3 %.

    python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 176,
    "vocab_size": 8192,
    "max_position_embeddings": 32768,
}
TOKENS = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
#: Level, or none; and how.
SETTINGS = {
    "bare": (None, {"checkpoint": False}),
    "block": ("block", {"checkpoint": False}),
    "head": ("head", {"checkpoint": False}),
    "bare, checkpointed": (None, {"checkpoint": True}),
    "block, checkpointed": ("block", {"checkpoint": True, "flush_layers": 1}),
    "head, checkpointed": ("head", {"checkpoint": True, "flush_layers": 1}),
    "block, segments": ("block", {"segment": 128}),
    "head, segments": ("head", {"segment": 128}),
}
#: Most that attribution takes over the bare checkpointed pass, all told.
TARGET = 1.2
#: Blocks of 64 kB and more come from the system one by one, and go back to it when they are freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def resident(field: str) -> int:
    """Bytes: ``VmRSS`` now, or ``VmHWM`` at its height."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def height(setting: str, n_tokens: int) -> int:
    """Bytes that one pass takes at its height, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.cost import bare_pass
    from eaptk import Batch, Graph, attribute
    from eaptk.sites import Sites

    level, dials = SETTINGS[setting]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    ids = torch.randint(0, SHAPE["vocab_size"], (1, n_tokens))
    graph = Graph.from_model(model, level or "block")
    sites = Sites(model, graph)

    def work(tokens: int) -> None:
        batch = Batch.from_mapping({"input_ids": ids[:, :tokens]})
        if level is not None:
            attribute(model, batch, graph, **dials)
            return
        bare_pass(model, sites, batch, dials["checkpoint"])

    work(64)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work(n_tokens)
    return resident("VmHWM") - before


def measure(setting: str, n_tokens: int) -> int:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", setting, str(n_tokens)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **ENVIRONMENT})
    bytes_ = int(json.loads(found.stdout.splitlines()[-1]))
    print(f"{n_tokens:6d} tokens  {setting:22s}{bytes_ / 1e6:9.1f} MB", flush=True)
    return bytes_


def growth(tokens: list[int], bytes_: list[int]) -> tuple[float, float]:
    """Bytes a token, and how far from the line through the longest and the one a fourth as long those between are."""
    low = tokens.index(tokens[-1] // 4)
    slope = (bytes_[-1] - bytes_[low]) / (tokens[-1] - tokens[low])
    middle = bytes_[low] + slope * (tokens[low + 1] - tokens[low])
    return slope, abs(bytes_[low + 1] / middle - 1)


def report(tokens: list[int], heights: dict[str, list[int]]) -> dict[str, Any]:
    """Print the tables; the numbers in them."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Height of memory, MB (all that the pass takes; bare passes included)")
    shown.add_column("tokens", justify="right")
    for setting in heights:
        shown.add_column(setting, justify="right")
    for i, n in enumerate(tokens):
        shown.add_row(f"{n:,}", *(f"{found[i] / 1e6:.1f}" for found in heights.values()))
    rows = {}
    claims = Table(title=f"At {tokens[-1]:,} tokens")
    for heading in (
        "setting",
        "bytes a token",
        "off the line",
        "× bare",
        "× bare, checkpointed",
        f"≤ {TARGET}",
    ):
        claims.add_column(heading, justify="right")
    for setting, found in heights.items():
        slope, off = growth(tokens, found)
        plain, checkpointed = (found[-1] / heights[name][-1] for name in ("bare", "bare, checkpointed"))
        rows[setting] = {
            "bytes": found,
            "bytes_a_token": slope,
            "off_the_line": off,
            "over_bare": plain,
            "over_bare_checkpointed": checkpointed,
        }
        held = "" if setting.startswith("bare") else "yes" if checkpointed <= TARGET else "no"
        claims.add_row(setting, f"{slope:,.0f}", f"{off:.2%}", f"{plain:.3f}", f"{checkpointed:.3f}", held)
    console = Console(width=160)
    console.print(shown, claims)
    return rows


def plot(tokens: list[int], heights: dict[str, list[int]], path: Path) -> None:
    """Height by length, both axes logarithmic: what is linear rises at 45°."""
    import matplotlib as mpl

    mpl.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    colours = {"kept": "#0072b2", "checkpointed": "#d55e00", "segments": "#009e73"}
    for panel, level in zip(panels, ("block", "head"), strict=True):
        for setting, found in heights.items():
            kind, _, how = setting.partition(", ")
            if kind not in ("bare", level):
                continue
            style = {"linestyle": "--", "marker": ""} if kind == "bare" else {"marker": "o", "markersize": 4}
            label = f"{'bare pass' if kind == 'bare' else 'eaptk'}, {how or 'all kept'}"
            megabytes = [b / 1e6 for b in found]
            panel.plot(tokens, megabytes, color=colours[how or "kept"], label=label, **style)
        panel.set(xscale="log", yscale="log", xlabel="tokens", title=f"{level} level")
        panel.set_xticks(tokens, [f"{n:,}" for n in tokens], rotation=45, minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel("height of memory, MB")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--at-once", type=int, default=2, help="processes that measure side by side")
    parser.add_argument("--one", nargs=2, metavar=("SETTING", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(height(options.one[0], int(options.one[1])))
        return
    longest = max(options.tokens)
    options.tokens = sorted(set(options.tokens))
    if longest // 4 not in options.tokens or options.tokens[-2] == longest // 4:
        parser.error(
            f"--tokens needs {longest // 4}, a fourth of the longest, and a length between, for the line through them"
        )
    # The longest first: none is left to wait for alone at the end.
    todo = [(setting, n) for n in sorted(options.tokens, reverse=True) for setting in SETTINGS]
    with ThreadPoolExecutor(options.at_once) as pool:
        found = dict(zip(todo, pool.map(lambda each: measure(*each), todo), strict=True))
    heights = {setting: [found[setting, n] for n in options.tokens] for setting in SETTINGS}
    rows = report(options.tokens, heights)

    from benchmarks import record

    path = record.write("memory", {"shape": SHAPE, "tokens": options.tokens, "target": TARGET, "rows": rows})
    plot(options.tokens, heights, path.with_suffix(".png"))
    print(f"written to {path.relative_to(path.parents[2])}, and the same in .png")


if __name__ == "__main__":
    main()
