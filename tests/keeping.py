"""Runs on disk of rows made by hand, whatever is kept of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from summaries import manifest, samples

from eaptk import Graph, Run
from eaptk.keep import Keep
from eaptk.statistics import Histogram
from eaptk.store import RunWriter

GRAPHS = {
    "block": Graph(3, 4, 2),
    "head": Graph(2, 4, 2, "head"),
    "merged": Graph(2, 2, 2, "head", "merged"),
    "parallel": Graph(3, 2, 1, parallel=True),
}
GRAPH = GRAPHS["head"]
HISTOGRAM = Histogram(40, 6.0)
#: Every third edge, and the last.
SOME = np.union1d(np.arange(0, GRAPH.n_edges, 3), [GRAPH.n_edges - 1])


def make_rows(n: int = 8, graph: Graph = GRAPH, seed: int = 0) -> np.ndarray:
    """[n, n_edges] heavy-tailed rows that share a pattern, of float32 with many ties in size."""
    pattern = np.random.default_rng(99).standard_t(4, size=graph.n_edges)
    rows = pattern + np.random.default_rng(seed).standard_t(4, size=(n, graph.n_edges))
    return (np.round(rows * 16) / 16).astype(np.float32)


def write_run(path: Path, rows: np.ndarray, keep: Keep, seed: int = 0) -> Run:
    """A complete run of these rows, in two batches."""
    n = len(rows)
    names = [f"q{i}" for i in range(n)]
    loss = np.random.default_rng(seed).random(n)
    with RunWriter(path, manifest(keep.graph, n, None), keep=keep) as writer:
        writer.begin(samples(n))
        for batch in np.array_split(np.arange(n), 2):
            part = batch.tolist()
            kept = keep.of(torch.from_numpy(rows[part]), [names[i] for i in part])
            writer.write(part, kept, loss[part])
        writer.close_stretch(0)
        writer.finish()
    return Run.open(path)


def make_run(path: Path, rows: np.ndarray, graph: Graph = GRAPH, **how: Any) -> Run:
    return write_run(path, rows, Keep(graph, **how))
