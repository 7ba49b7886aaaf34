"""What edge attribution takes of memory beside the bare forward and activation-only backward pass, by length.

A deep, narrow model with a wide vocabulary: 24 layers × width 64, 8,192 tokens in the vocabulary; every position
carries loss. Each figure is the height of resident memory (`VmHWM`) of a process of its own over what was resident
before, after a first short pass; glibc is told to give freed memory back, so that resident means live. The bare pass
is measured the same way, with the same loss.

Prediction, in tensors [T, D] of 24 layers (T tokens, D width): a bare pass keeps about 15 a layer, one with
checkpointing 1 and the 25 of the layer at hand, so 360 and 50. Attribution adds 49 of sources at block level, and as
many gradients as a flush group has: 5 a layer, 120 where all wait for one contraction. So with checkpointing and
flush groups of one layer about 105: a third of the plain bare pass, twice the checkpointed one, whose every tensor
each of the two sources a layer doubles. All of it grows with T, and nothing faster: attention must not form [T, T],
nor the loss [T, V].

    python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 176,
    "vocab_size": 8192,
    "max_position_embeddings": 32768,
}
TOKENS = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
KINDS = ["bare", "block", "head"]
#: What attribution does by itself where memory abounds, and its most frugal setting.
DIALS = {"kept": {"checkpoint": False}, "checkpointed": {"checkpoint": True, "flush_layers": 1}}
#: Blocks of 64 kB and more come from the system one by one, and go back to it when they are freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
RESULTS = Path(__file__).parent / "results"


def resident(field: str) -> int:
    """Bytes: ``VmRSS`` now, or ``VmHWM`` at its height."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def one(kind: str, dials: str, n_tokens: int) -> dict[str, Any]:
    """Bytes that one pass takes at its height, in this process."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from benchmarks.cost import bare_pass
    from eaptk import Batch, Graph, attribute
    from eaptk.capture import run_again
    from eaptk.sites import Sites

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval()
    ids = torch.randint(0, SHAPE["vocab_size"], (1, n_tokens))
    graph = Graph.from_model(model, "head" if kind == "head" else "block")
    sites = Sites(model, graph)

    def work(tokens: int) -> None:
        batch = Batch.from_mapping({"input_ids": ids[:, :tokens]})
        if kind != "bare":
            attribute(model, batch, graph, **DIALS[dials])  # type: ignore[arg-type]
            return
        with ExitStack() as layers:
            if DIALS[dials]["checkpoint"]:
                for layer in sites.layers:
                    layers.enter_context(run_again(layer.block))
            bare_pass(model, sites, batch)

    work(64)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work(n_tokens)
    return {"bytes": resident("VmHWM") - before}


def measure(kind: str, dials: str, n_tokens: int) -> int:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", kind, dials, str(n_tokens)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **ENVIRONMENT})
    return int(json.loads(found.stdout.splitlines()[-1])["bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--one", nargs=3, metavar=("KIND", "DIALS", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, dials, n_tokens = options.one
        print(json.dumps(one(kind, dials, int(n_tokens))))
        return
    heights: dict[str, dict[str, list[int]]] = {dials: {kind: [] for kind in KINDS} for dials in DIALS}
    for n_tokens in options.tokens:
        for dials, kinds in heights.items():
            for kind, found in kinds.items():
                found.append(measure(kind, dials, n_tokens))
                print(f"{n_tokens:6d} tokens  {dials:13s}{kind:6s}{found[-1] / 1e6:9.1f} MB", flush=True)


if __name__ == "__main__":
    main()
