"""Comparisons of runs that keep statistics in place of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from summaries import HISTOGRAM, make_run, make_scores

from eaptk.comparison import compare
from eaptk.errors import EaptkError
from eaptk.resampling import Resampling
from eaptk.statistics import Histogram
from eaptk.store import Run

QUICK = Resampling(n_resamples=500)


def two_kinds(folder: Path, n: int = 20) -> dict[str, Run]:
    """Two runs of which the second is weaker, each with rows and without."""
    base, tuned = make_scores(n), 0.7 * make_scores(n, seed=1)
    runs = {}
    for name, scores in (("base", base), ("tuned", tuned)):
        runs[name] = make_run(folder / name / "rows", scores[:-2], histogram=None)
        runs[f"{name} kept"] = make_run(folder / name / "kept", scores[:-2])
    return runs


@pytest.mark.parametrize(
    "pair", [("base kept", "tuned kept"), ("base", "tuned kept"), ("base kept", "tuned")]
)
def test_a_comparison_is_that_of_the_rows_but_for_the_interval_of_diversity(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    runs = two_kinds(tmp_path)
    names = ["base", "tuned"]
    found = compare([runs[name] for name in pair], names=names, resampling=QUICK, control_loss=True)
    expected = compare(
        [runs[name] for name in names],
        bins=HISTOGRAM.bins,
        upper=HISTOGRAM.upper,
        resampling=QUICK,
        control_loss=True,
    )
    by_metric = {d.metric: d for d in expected.differences}
    diversity = by_metric.pop("diversity")
    assert [d.metric for d in found.differences] == list(by_metric)
    for ours in found.differences:
        theirs = by_metric[ours.metric]
        for name in ("value_baseline", "value", "difference", "low", "high", "p", "effect", "n_pairs"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-7), (ours.metric, name)
    np.testing.assert_allclose(found.relative_change(), expected.relative_change(), rtol=1e-9)
    note = next(note for note in found.notes if "kept no rows" in note)
    assert f"base {diversity.value_baseline:.4g}, tuned {diversity.value:.4g}" in note


def test_a_comparison_over_a_part_of_the_samples_says_what_is_unknown(tmp_path: Path) -> None:
    base, tuned = make_scores(20)[:18], make_scores(20, seed=1)[:12]
    runs = [make_run(tmp_path / "base", base), make_run(tmp_path / "tuned", tuned)]
    found = compare(runs, resampling=QUICK)
    assert [d.metric for d in found.differences] == ["intensity", "complexity", "kurtosis", "loss"]
    assert found.differences[0].value_baseline == pytest.approx(np.abs(base[:12]).mean(), rel=1e-6)
    assert np.isnan(found.relative_change()).all()
    notes = " ".join(found.notes)
    assert "values: base unknown, tuned 0." in notes
    assert "base kept no rows and has finished samples that are not shared" in notes


def test_runs_of_different_histograms_are_not_compared(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, make_scores(8, seed=seed), histogram=Histogram(20, upper))
        for name, seed, upper in (("a", 0, 2.0), ("b", 1, 3.0))
    ]
    with pytest.raises(EaptkError, match=r"20 bins on \[0, 3.0\], which cannot become 20 on \[0, 2.0\]"):
        compare(runs, resampling=QUICK)
