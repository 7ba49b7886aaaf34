"""Complexity under several histograms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from runs import BLOCK, make_run

from eaptk.comparison import compare
from eaptk.errors import EaptkError
from eaptk.resampling import Resampling
from eaptk.sensitivity import complexity_sensitivity


def two_runs():
    """The second lacks the baseline's first two samples, and has one that is not done."""
    runs = [replace(make_run(12, seed), path=Path(f"runs/{seed}")) for seed in (0, 1)]
    runs[1] = replace(runs[1], ids=[f"q{i + 2}" for i in range(12)], prompts=None, answers=None)
    runs[1].done[0] = 0
    return runs


@pytest.mark.parametrize("columns", [None, list(range(5, BLOCK.n_edges))], ids=["all", "some"])
@pytest.mark.parametrize("dense", [False, True])
def test_every_complexity_is_the_entropy_of_its_histogram_over_what_was_compared(dense, columns):
    runs = two_runs()
    comparison = compare(runs, dense=dense, columns=columns, resampling=Resampling(n_resamples=100))
    found = complexity_sensitivity(runs, comparison, bins=(20, 300), shares=(0.25, 1.0))
    top = comparison.metrics[0].upper
    assert [(s.bins, s.upper) for s in found] == [(20, top / 4), (300, top / 4), (20, top), (300, top)]
    kept = [np.arange(3, 12), np.arange(1, 10)]
    for s in found:
        for run, rows, value in zip(runs, kept, s.values, strict=True):
            w = np.abs(run.scores[rows].astype(np.float64)[:, columns or slice(None)])
            counts = np.histogram(w, s.bins, (0, s.upper))[0]
            counts[0] += len(rows) * (comparison.metrics[0].n_entries - w.shape[1])
            assert value == pytest.approx(scipy.stats.entropy(counts), rel=1e-9)


def test_with_the_comparisons_own_histogram_it_is_the_comparisons_own_value():
    runs = two_runs()
    comparison = compare(runs, bins=70, log_base=2, resampling=Resampling(n_resamples=100))
    (found,) = complexity_sensitivity(runs, comparison, bins=(70,), shares=(1.0,))
    assert found.values == tuple(m.complexity for m in comparison.metrics)


def test_what_cannot_be_counted_is_refused():
    runs = two_runs()
    comparison = compare(runs, resampling=Resampling(n_resamples=100))
    with pytest.raises(EaptkError, match="the comparison is of 2 runs; got 1"):
        complexity_sensitivity(runs[:1], comparison)
    with pytest.raises(EaptkError, match=r"no \|W\| of runs/0 is as small as"):
        complexity_sensitivity(runs, comparison, shares=(1e-12,))
    kept_no_rows = [replace(run, statistics="moments") for run in runs]
    with pytest.raises(EaptkError, match="run runs/0 keeps no rows"):
        complexity_sensitivity(kept_no_rows, comparison)
