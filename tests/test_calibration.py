"""The statistics keep their promises: where nothing differs they say so as often as they claim, else they find it.

Rows are made like real ones: a few edges carry most of the score, samples differ in scale by factors, the scale goes
with the loss, and questions set most of it in both runs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import BLOCK, FakeRun

from eaptk.comparison import compare
from eaptk.resampling import Contributions, Resampling, paired_differences

PATTERN = np.random.default_rng(99).standard_t(2, size=BLOCK.n_edges)
N_STUDIES = 400


def paired_runs(n: int, seed: int, groups: bool) -> list[FakeRun]:
    """Two runs on the same questions without a true difference."""
    rng = np.random.default_rng(seed)
    group = np.sort(rng.integers(n // 2, size=n)) if groups else np.arange(n)
    question = rng.normal(0, 0.7, n)
    runs = []
    for name in ("sft", "rl"):
        scale = question + rng.normal(0, 0.5, n)
        if groups:
            scale += rng.normal(0, 0.5, n)[group]
        rows = PATTERN * rng.lognormal(0, 0.5, (n, BLOCK.n_edges)) + rng.standard_t(3, (n, BLOCK.n_edges))
        rows *= 1e-3 * np.exp(scale)[:, None]
        runs.append(
            FakeRun(
                rows.astype(np.float32),
                path=Path(f"runs/{name}"),
                loss=np.exp(0.7 * scale + rng.normal(0, 0.4, n) - 1),
                groups=[f"g{i}" for i in group] if groups else None,  # type: ignore[arg-type]
            )
        )
    return runs


METRICS = [
    "intensity",
    "intensity at equal loss",
    "complexity",
    "kurtosis",
    "kurtosis at equal loss",
    "diversity",
]


@pytest.fixture(scope="module", params=[False, True], ids=["questions", "groups"])
def null_studies(request: pytest.FixtureRequest) -> list[Any]:
    resampling = Resampling(confidence=0.9, n_resamples=200)
    return [
        compare(paired_runs(40, seed, request.param), resampling=resampling, control_loss=True, bins=30)
        for seed in range(N_STUDIES)
    ]


@pytest.mark.parametrize("metric", METRICS)
def test_without_a_true_difference_tests_reject_at_their_nominal_rate(
    null_studies: list[Any], metric: str
) -> None:
    found = [next(d for d in study.differences if d.metric == metric) for study in null_studies]
    for level in (0.05, 0.1):
        margin = 3 * np.sqrt(level * (1 - level) / N_STUDIES)
        assert np.mean([d.p <= level for d in found]) == pytest.approx(level, abs=margin)


@pytest.mark.parametrize("metric", METRICS)
def test_without_a_true_difference_intervals_hold_zero(null_studies: list[Any], metric: str) -> None:
    found = [next(d for d in study.differences if d.metric == metric) for study in null_studies]
    # The standard deviation of a share of 0.9 is 0.015; heavy tails cost an interval up to 0.03.
    assert 0.83 <= np.mean([d.low <= 0 <= d.high for d in found]) <= 0.94


def test_without_a_true_difference_arrows_are_rare(null_studies: list[Any]) -> None:
    """Family-wise: the share of comparisons in which any metric gets an arrow."""
    wrong = [
        any(d.direction != "unresolved" for d in study.differences if d.metric != "loss")
        for study in null_studies
    ]
    assert np.mean(wrong) <= 0.1 + 3 * 0.015


def planted(scores: np.ndarray, metric: str) -> np.ndarray:
    """Scores that differ in the metric."""
    rows = np.abs(scores).mean(1, keepdims=True)
    if metric in ("intensity", "complexity"):
        return scores * np.float32(2)
    if metric == "diversity":
        return scores + rows * np.random.default_rng(1).normal(size=BLOCK.n_edges).astype(np.float32)
    # Fewer edges stand out: the strong ones are weaker, and the row is as strong as before.
    flat = np.sign(scores) * np.sqrt(np.abs(scores))
    return flat * rows / np.abs(flat).mean(1, keepdims=True)


@pytest.mark.parametrize(
    ("metric", "direction"),
    [("intensity", "up"), ("kurtosis", "down"), ("complexity", "up"), ("diversity", "down")],
)
def test_planted_differences_are_found(metric: str, direction: str) -> None:
    found = []
    for seed in range(15):
        a, b = paired_runs(100, seed, groups=False)
        b = replace(b, scores=planted(b.scores, metric))
        study = compare([a, b], resampling=Resampling(n_resamples=300))
        found.append(next(d.direction for d in study.differences if d.metric == metric))
    assert found.count(direction) >= 13
    assert found.count(direction) + found.count("unresolved") == 15


def test_at_equal_loss_what_the_loss_explains_is_gone_and_what_it_does_not_is_found() -> None:
    explained, more = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        question = rng.normal(0, 0.7, 60)
        runs = []
        for shift in (0, 0.5):
            loss = np.exp(question + rng.normal(shift, 0.5, 60))
            rows = loss[:, None] * PATTERN * rng.lognormal(0, 0.5, (60, BLOCK.n_edges))
            runs.append(FakeRun(rows.astype(np.float32), path=Path(f"runs/{shift}"), loss=loss))
        a, driven = runs
        stronger = replace(driven, scores=driven.scores + a.scores)
        for run, outcome in ((driven, explained), (stronger, more)):
            study = compare([a, run], resampling=Resampling(n_resamples=200), control_loss=True)
            outcome.append({d.metric: d for d in study.differences})
    assert np.mean([d["intensity"].p <= 0.05 for d in explained]) > 0.9
    # Nominal 0.05, with a standard deviation of 0.028.
    assert np.mean([d["intensity at equal loss"].p <= 0.05 for d in explained]) < 0.14
    assert np.mean([d["intensity at equal loss"].direction == "up" for d in more]) > 0.9


@pytest.mark.parametrize("n", [10, 20, 40])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_intervals_of_few_pairs_are_no_shorter_than_they_say(tails: str, n: int) -> None:
    rng = np.random.default_rng(n)
    covered = []
    for _ in range(600):
        d = rng.normal(size=n) if tails == "normal" else rng.standard_t(3, size=n)
        sides = [Contributions({"intensity": x}, np.ones((n, 1), np.int64)) for x in (np.zeros(n), d)]
        resampling = Resampling(confidence=0.9, n_resamples=300)
        (found,) = paired_differences(["intensity"], ("a", "b"), *sides, np.arange(n), 2.0, resampling)
        covered.append(found.low <= 0 <= found.high)
    # Plain percentiles of ten pairs cover 0.85; the standard deviation is 0.012.
    assert 0.87 <= np.mean(covered) <= 0.93
