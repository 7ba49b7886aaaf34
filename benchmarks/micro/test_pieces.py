"""The pieces: what a run does a batch, a row or once, each by itself.

The first words a test hands over say what is timed; assertions say that it was done.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cost import bare_pass
from benchmarks.floor.passes import caught, distance
from benchmarks.floor.shapes import SHAPES, Case, Shape
from eaptk import Graph, Sample, attribute, collate
from eaptk.content import SampleArray, checksums
from eaptk.dataset import plan_batches
from eaptk.graph import Granularity
from eaptk.sites import Sites
from eaptk.sweep import sweep

#: Of a 7B model: 28 layers, 28 query and 4 key/value heads.
SEVEN = (28, 28, 4)
LEVELS: tuple[Granularity, ...] = ("block", "head")
#: So narrow that a pass is Python, hooks and launches: what a layer costs whatever its width.
SHAPES["narrow as can be"] = Shape("qwen2", 24, 32, (4, 2), 48)
PYTHON = Case("narrow as can be", 24, 1, 16)
OPERANDS = Case("Qwen2, narrow", 8, 1, 256)

Timed = Callable[..., Any]


@pytest.fixture
def timed(benchmark: Any) -> Timed:
    """Time a call, named in a line, and return its result."""

    def run(what: str, work: Callable[[], Any]) -> Any:
        benchmark.extra_info["what"] = what
        return benchmark(work)

    return run


def test_graph(timed: Timed) -> None:
    table = timed("edges of a 7B model at head level as a table", lambda: Graph(*SEVEN, "head").to_frame())
    assert len(table) == 408_227


def test_plan(timed: Timed) -> None:
    lengths = np.random.default_rng(0).integers(8, 1024, 100_000).tolist()
    plan = timed("batches planned of 100,000 samples", lambda: plan_batches(lengths, 8192))
    assert sorted(row for batch in plan for row in batch) == list(range(100_000))


def test_collate(timed: Timed) -> None:
    samples = [Sample(str(i), tuple(range(1, 60 + i)), tuple(range(1, 40))) for i in range(32)]
    batch = timed("32 samples of 97 to 128 tokens collated", lambda: collate(samples))
    assert batch.lengths.tolist() == [59 + i + 38 for i in range(32)]


@pytest.mark.parametrize("level", LEVELS)
def test_contraction(timed: Timed, level: Granularity) -> None:
    graph = Graph.from_model(OPERANDS.model, level)
    with caught() as calls:
        rows = attribute(OPERANDS.model, OPERANDS.batch(), graph).rows
    found = timed(f"contraction, {level} level, 8 layers × 512, 256 tokens", calls[0].run)
    assert distance(found, rows) < 1e-6


def test_bare_python(timed: Timed) -> None:
    sites = Sites(PYTHON.model, Graph.from_model(PYTHON.model))
    batch = PYTHON.batch()
    timed("bare passes of 24 layers × 32: launches", lambda: bare_pass(PYTHON.model, sites, batch))


@pytest.mark.parametrize("level", LEVELS)
def test_python(timed: Timed, level: Granularity) -> None:
    graph, batch = Graph.from_model(PYTHON.model, level), PYTHON.batch()
    found = timed(f"attribution of the same, {level} level", lambda: attribute(PYTHON.model, batch, graph))
    assert found.rows.shape == (1, graph.n_edges)


def test_checksums(timed: Timed) -> None:
    rows = np.random.default_rng(0).standard_normal((4, 408_227), dtype=np.float32)
    found = timed("checksums of 4 rows of 1.6 MB", lambda: checksums([rows]))
    assert len(set(found.tolist())) == 4


def test_sweep(timed: Timed) -> None:
    rows = np.random.default_rng(0).standard_normal((16, 408_227), dtype=np.float32)
    found = timed("metrics' statistics of 16 rows of 1.6 MB", lambda: sweep(rows, bins=100, upper=5.0))
    assert np.allclose(found.sum, rows.sum(1, dtype=np.float64))


def test_keep_rows(timed: Timed, tmp_path: Path) -> None:
    array = SampleArray(tmp_path / "scores.npy", (64, 408_227), np.float32)
    array.reserve(array.path)
    rows = np.random.default_rng(0).standard_normal((4, 408_227), dtype=np.float32)
    with ExitStack() as files:
        array.open(files)
        timed("4 rows of 1.6 MB written to the page cache", lambda: array.write([3, 1, 0, 2], rows))
        assert np.array_equal(array.read(0, 4), rows[[2, 1, 3, 0]])
