"""A run of metrics only, written as `eaptk.score` does, of rows made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from eaptk.graph import Graph
from eaptk.statistics import Histogram, Summary, summarise
from eaptk.store import Run, RunWriter

GRAPH = Graph(n_layers=2, n_heads=4, n_kv_heads=2)
N = 6
#: In the order of a plan: not that of the samples.
BATCHES = [[2, 0], [3, 1], [5, 4]]


def make_scores(n: int = N, graph: Graph = GRAPH, seed: int = 0) -> np.ndarray:
    """Heavy-tailed rows that share a pattern; all scores of the last but one are equal, of the last all are 0."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_t(4, size=graph.n_edges) + rng.standard_t(4, size=(n, graph.n_edges))
    scores[-2], scores[-1] = 0.3, 0
    return scores.astype(np.float32)


SCORES = make_scores()
LOSS = np.arange(N) / 2
#: Some scores lie above it.
HISTOGRAM = Histogram(bins=20, upper=float(np.abs(SCORES).max()) * 0.6)


def manifest(graph: Graph = GRAPH, n: int = N, histogram: Histogram | None = HISTOGRAM) -> dict[str, Any]:
    return {
        "model": {"id": "m", "weights": "sha256:aa", "dtype": "float32"},
        "tokenizer": "sha256:0",
        "dataset": {"samples": n},
        "graph": graph.to_dict(),
        "ablation": "zero",
        "loss": "nll",
        "cut": None,
        "max_new_tokens": None,
        "row_dtype": "float32",
        "metrics_only": None if histogram is None else vars(histogram),
    }


def samples(n: int = N) -> pa.Table:
    ids = [f"q{i}" for i in range(n)]
    tokens = pa.array([[i] for i in range(n)], pa.list_(pa.int32()))
    group = pa.array([None] * n, pa.string())
    return pa.table({"id": ids, "group": group, "prompt_ids": tokens, "answer_ids": tokens})


def summary(scores: np.ndarray, graph: Graph = GRAPH, histogram: Histogram = HISTOGRAM) -> Summary:
    return summarise(torch.from_numpy(scores), graph, histogram)


def write_run(path: Path | str) -> None:
    """Batches that are not done, in order, each committed."""
    with RunWriter(path, manifest()) as writer:
        if not writer.begun:
            writer.begin(samples())
        for number, rows in enumerate(BATCHES):
            if not writer.done[rows].all():
                writer.write(rows, summary(SCORES[rows]), LOSS[rows])
                writer.close_stretch(number)
        writer.finish()


def make_run(
    path: Path, scores: np.ndarray, graph: Graph = GRAPH, histogram: Histogram | None = HISTOGRAM
) -> Run:
    """A complete run of these rows: of metrics only, or with rows where `histogram` is None."""
    n = len(scores)
    with RunWriter(path, manifest(graph, n, histogram)) as writer:
        writer.begin(samples(n))
        for i in range(n):
            kept = scores[[i]] if histogram is None else summary(scores[[i]], graph, histogram)
            writer.write([i], kept, np.array([np.abs(scores[i]).max()], dtype=np.float64))
            writer.close_stretch(i)
        writer.finish()
    return Run.open(path)


def fill_disk_and_go_on(path: str) -> None:
    """Target: the disk has no room for the second commit, then it has again."""
    from eaptk.errors import EaptkError

    filler = Path(path).with_name("filler")
    try:
        with RunWriter(path, manifest()) as writer:
            writer.begin(samples())
            writer.write(BATCHES[0], summary(SCORES[BATCHES[0]]), LOSS[BATCHES[0]])
            writer.close_stretch(0)
            with open(filler, "wb", buffering=0) as file:
                while file.write(b"\0" * 512):
                    pass
    except OSError:
        pass
    try:
        write_run(path)
    except EaptkError as error:
        print(error)
    print(Run.open(path).done.sum())
    filler.unlink()
    write_run(path)


if __name__ == "__main__":
    import sys

    fill_disk_and_go_on(sys.argv[1])
