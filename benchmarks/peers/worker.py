"""The process of one tool: loads a model, then scores and measures what it is asked for.

Runs in the tool's own environment, where eaptk need not be installed: `python worker.py '{…}'`. Questions come as
one JSON object a line on standard input, answers go to standard output, after {"ready": true}:

    {"do": "load", "folder": F, "dtype": D, "form": {…}}    → {}
    {"do": "score", "tokens": T}                 → {"seconds": of the tool's own call}
    {"do": "score", "tokens": T, "save": PATH}   → the same, and the scores, by name, in a .npz file
    {"do": "peak", "tokens": T}                  → {"bytes": of resident memory above the loaded model, at most}

A peak should not be of a first run: that pages in weights and code, starts threads and grows pools, in a process that
has run nothing else far more than in one that has. What a tool keeps between runs is therefore not in it.

A tool is a module of tools/ with three functions:

    load(folder, dtype, form) → model               whatever it works on, from the saved weights
    score(model, ids, other) → result               what is timed; ids and other are [1, T]
    edges(model, result) → scores, sources, destinations    [n_sources, n_destinations], and the names of both

Gradients are taken on `ids`; `other` is what patching takes the replacements from.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def resident(name: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (at most, since it was last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


class Tool:
    """The tool, and the model it has loaded."""

    def __init__(self, name: str) -> None:
        self._module = importlib.import_module(name)

    def load(self, folder: str, dtype: str, form: dict[str, Any]) -> dict[str, Any]:
        import torch

        self._model = None  # not beside the next
        prompts = json.loads((Path(folder) / "tokens.json").read_text())
        order = ("corrupt", "clean") if form["gradient_on"] == "corrupt" else ("clean", "corrupt")
        self._prompts = [prompts[name] for name in order]
        self._model = self._module.load(Path(folder), getattr(torch, dtype), form)
        return {}

    def score(self, tokens: int, save: str | None = None) -> dict[str, Any]:
        import numpy as np
        import torch

        ids, other = (torch.tensor([prompt[:tokens]]) for prompt in self._prompts)
        start = time.perf_counter()
        result = self._module.score(self._model, ids, other)
        seconds = time.perf_counter() - start
        if save is not None:
            scores, sources, destinations = self._module.edges(self._model, result)
            np.savez(save, scores=scores, sources=sources, destinations=destinations)
        return {"seconds": seconds}

    def peak(self, tokens: int) -> dict[str, Any]:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        self.score(tokens)
        return {"bytes": max(0, resident("VmHWM") - before)}


def serve(spec: dict[str, Any], answers: Any) -> None:
    import torch

    torch.set_num_threads(spec["threads"])
    tool = Tool(spec["tool"])
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "load": tool.load,
        "score": tool.score,
        "peak": tool.peak,
    }
    answer(answers, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        answer(answers, actions[request.pop("do")](**request))


def answer(answers: Any, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=answers, flush=True)


def main() -> None:
    spec = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_DATA, (spec["most_bytes"], resource.RLIM_INFINITY))
    # Libraries print as they like: standard output is theirs from here on, on the side of errors.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(spec, answers)
    except Exception as error:
        answer(answers, {"error": one_line(error)})
        raise


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
