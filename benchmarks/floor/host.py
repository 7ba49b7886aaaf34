"""What needs no model: rows on their way to the disk, rows that are measured, and starting up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import sweep
from benchmarks.timing import clocked, in_turns, ratios, summary
from eaptk import Graph
from eaptk.store import Run, RunWriter

#: Qwen2.5-7B at head level: rows of 1.6 MB.
GRAPH = Graph(28, 28, 4, "head")
ROWS_A_BATCH = 8
#: What a new process is asked to do, from nothing to a command of eaptk's that reads no model.
STARTS = {
    "python": ["-c", "pass"],
    "import eaptk": ["-c", "import eaptk"],
    "eaptk --help": ["-m", "eaptk", "--help"],
    "eaptk score --help": ["-m", "eaptk", "score", "--help"],
    "import torch and transformers' models": ["-c", "import torch, transformers.modeling_utils"],
    "the same, and all of eaptk that scores": ["-c", "import torch, transformers.modeling_utils, eaptk.run"],
}


def storing(megabytes: int, seconds: float, folder: Path | None = None) -> dict[str, Any]:
    """Rows written as `eaptk.score` writes them, beside the same bytes written one after the other to one file.

    Both until all is on disk. Neither the table of edges nor the first folder of the run is counted: a run of any size
    has these once.
    """
    n_rows = max(ROWS_A_BATCH, megabytes * 10**6 // (4 * GRAPH.n_edges))
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((ROWS_A_BATCH, GRAPH.n_edges), dtype=np.float32)
    loss = np.zeros(ROWS_A_BATCH)
    stretches = [
        list(range(first, min(first + ROWS_A_BATCH, n_rows))) for first in range(0, n_rows, ROWS_A_BATCH)
    ]

    with tempfile.TemporaryDirectory(dir=folder) as work:
        run, plain = Path(work) / "run", Path(work) / "plain"

        def store() -> float:
            shutil.rmtree(run, ignore_errors=True)
            with RunWriter(run, _manifest(n_rows)) as writer:
                writer.begin(_samples(n_rows))

                def write() -> None:
                    for number, rows in enumerate(stretches):
                        writer.write(rows, batch[: len(rows)], loss[: len(rows)])
                        writer.close_stretch(number)
                    writer.commit()

                taken = clocked(write)()
                writer.finish()
            return taken

        def write_plainly() -> None:
            with plain.open("wb", buffering=0) as file:
                for rows in stretches:
                    file.write(batch[: len(rows)].data)
                os.fdatasync(file.fileno())

        def sequential() -> float:
            plain.unlink(missing_ok=True)
            return clocked(write_plainly)()

        taken = in_turns({"store": store, "sequential": sequential}, seconds, warm_up=1)
        written = Run.open(run).scores[-1]
        passed = bool(np.array_equal(written, batch[len(stretches[-1]) - 1]))
    return {
        "gate": {"passed": passed},
        "bytes": n_rows * GRAPH.n_edges * 4,
        "seconds": {name: summary(each) for name, each in taken.items()},
        "ratio": ratios(taken, "store", "sequential"),
    }


def sweeping(gigabytes: float, repetitions: int) -> dict[str, Any]:
    """`benchmarks.sweep`, on rows of one distribution, with its result checked against the numpy twin."""
    rows = np.random.default_rng(0).standard_normal((16, sweep.WIDTH), dtype=np.float32)
    ours, twin = (
        sweep.sweep(rows, bins=sweep.BINS, upper=4.0, backend=backend) for backend in ("native", "numpy")
    )
    passed = bool(np.array_equal(ours.histogram, twin.histogram))
    return {"gate": {"passed": passed}, **sweep.measure("gaussian", gigabytes, repetitions)}


def starting(seconds: float) -> dict[str, Any]:
    """Seconds until a new process has done each of `STARTS`, files in the page cache."""

    def start(arguments: list[str]) -> Callable[[], float]:
        command = [sys.executable, *arguments]
        return clocked(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))

    taken = in_turns({name: start(each) for name, each in STARTS.items()}, seconds, warm_up=1, most=9)
    return {name: summary(each) for name, each in taken.items()}


def _manifest(n_rows: int) -> dict[str, Any]:
    return {
        "model": {"id": "none", "weights": "none", "dtype": "float32"},
        "dataset": {"samples": n_rows},
        "graph": GRAPH.to_dict(),
        "ablation": "zero",
        "loss": "nll",
        "row_dtype": "float32",
        "metrics_only": None,
    }


def _samples(n_rows: int) -> pa.Table:
    tokens = pa.array([[0]] * n_rows, pa.list_(pa.int32()))
    ids = [str(i) for i in range(n_rows)]
    group = pa.array([None] * n_rows, pa.string())
    return pa.table({"id": ids, "group": group, "prompt_ids": tokens, "answer_ids": tokens})
