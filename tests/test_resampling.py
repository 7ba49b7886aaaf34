"""Resampling: what intervals, p-values and effect sizes mean."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from eaptk.errors import EaptkError
from eaptk.resampling import (
    Contributions,
    Difference,
    Resampling,
    benjamini_hochberg,
    differences_at_equal_loss,
    paired_differences,
    student_quantile,
)

QUICK = Resampling(n_resamples=1000)


def contributions(values):
    """One metric that is a mean."""
    return Contributions({"intensity": values}, np.ones((len(values), 1), np.int64))


def one_difference(a, b, groups=None, resampling=QUICK):
    groups = np.arange(len(a)) if groups is None else groups
    found = paired_differences(
        ["intensity"], ("a", "b"), contributions(a), contributions(b), groups, 2.0, resampling
    )
    return found[0]


def test_for_a_mean_interval_p_and_effect_are_the_textbooks():
    rng = np.random.default_rng(5)
    a = rng.normal(size=80)
    b = a + 0.2 + rng.normal(size=80)
    found = one_difference(a, b, resampling=Resampling(n_resamples=20_000))
    d = b - a
    t = scipy.stats.ttest_rel(b, a)
    expected = t.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert found.p == pytest.approx(t.pvalue, abs=0.01)
    assert found.effect == pytest.approx(d.mean() / d.std(ddof=1))


def test_permutation_p_values_are_exact_for_few_pairs():
    d = np.array([0.5, 1.0, 2.0, 1.5, 0.25])
    found = one_difference(np.zeros(5), d, resampling=Resampling(n_resamples=20_000))
    assert found.p == pytest.approx(2 / 2**5, abs=0.005)


def test_groups_are_drawn_whole():
    """Ten copies of each question are ten times the samples and not one bit more evidence."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 20))
    alone = one_difference(a, b)
    copied = one_difference(np.repeat(a, 10), np.repeat(b, 10), np.repeat(np.arange(20), 10))
    assert (copied.n_pairs, copied.n_groups) == (200, 20)
    for name in ("difference", "low", "high", "p"):
        assert getattr(copied, name) == pytest.approx(getattr(alone, name), rel=1e-9)
    ungrouped = one_difference(np.repeat(a, 10), np.repeat(b, 10))
    assert ungrouped.high - ungrouped.low < 0.5 * (alone.high - alone.low)


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"n_resamples": 10}, {"seed": -1}])
def test_resampling_that_gives_no_interval_is_refused(wrong):
    with pytest.raises(EaptkError, match=next(iter(wrong))):
        Resampling(**wrong)


@pytest.mark.parametrize(
    ("change", "direction"),
    [
        ({}, "up"),
        ({"low": -1.5, "high": -0.5}, "down"),
        ({"low": -0.5}, "unresolved"),
        ({"p_holm": 0.06}, "unresolved"),
        ({"p_holm": 0.06, "confidence": 0.9}, "up"),
        ({"p_holm": None}, "up"),
        ({"p_holm": None, "p": 0.06}, "unresolved"),
        ({"low": None, "high": None}, "unresolved"),
        ({"p_holm": 0.06, "q": 0.04}, "up"),
        ({"q": 0.06}, "unresolved"),
    ],
)
def test_a_direction_needs_the_interval_and_the_corrected_test(change, direction):
    base = Difference("intensity", "b", "a", 1.0, 2.0, 1.0, 0.5, 1.5, 0.01, 0.04, 1.0, 9, 9, 0.95)
    assert replace(base, **change).direction == direction


def test_a_difference_that_is_equal_but_for_rounding_has_no_effect_size():
    a = np.random.default_rng(0).normal(size=30)
    assert one_difference(a, a + 1.1).effect is None
    assert one_difference(a, a + 1.1 + 1e-6 * a**2).effect > 1e4


def test_memory_does_not_grow_with_draws_times_groups():
    a, b = np.random.default_rng(0).normal(size=(2, 100_000))
    tracemalloc.start()
    one_difference(a, b, resampling=Resampling(n_resamples=100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # One [draws, groups] array of doubles would be 80 MB.
    assert peak < 150e6


def loss_driven(n, slope, gap, seed=0, spread=1.0):
    """Pairs whose metric differs by `gap` and by `slope` a unit of loss, the loss by 0.3 on average."""
    rng = np.random.default_rng(seed)
    loss = 0.3 + spread * rng.normal(size=n)
    d = gap + slope * loss + 0.1 * rng.normal(size=n)
    zero, ones = np.zeros(n), np.ones((n, 1), np.int64)
    sides = [{"intensity": zero, "loss": zero}, {"intensity": d, "loss": loss}]
    return [Contributions(side, ones) for side in sides], d, loss


def test_at_equal_loss_is_the_intercept_of_least_squares():
    sides, d, loss = loss_driven(60, slope=2.0, gap=0.05)
    resampling = Resampling(n_resamples=5000)
    found = differences_at_equal_loss("intensity", ("a", "b"), *sides, np.arange(60), resampling)
    line = scipy.stats.linregress(loss, d)
    assert found.difference == pytest.approx(line.intercept)
    t = line.intercept / line.intercept_stderr
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(abs(t), 58), abs=0.01)
    margin = scipy.stats.t.ppf(0.975, 58) * line.intercept_stderr
    assert (found.low, found.high) == pytest.approx(
        (line.intercept - margin, line.intercept + margin), abs=0.01
    )


def test_at_equal_loss_groups_are_drawn_whole_too():
    sides, _, _ = loss_driven(20, slope=2.0, gap=0.05)
    copies = [side.keep(np.repeat(np.arange(20), 10)) for side in sides]
    alone = differences_at_equal_loss("intensity", ("a", "b"), *sides, np.arange(20), QUICK)
    copied = differences_at_equal_loss("intensity", ("a", "b"), *copies, np.repeat(np.arange(20), 10), QUICK)
    assert (copied.n_pairs, copied.n_groups) == (200, 20)
    for name in ("difference", "low", "high", "p"):
        assert getattr(copied, name) == pytest.approx(getattr(alone, name), rel=1e-9)


def test_numbers_do_not_depend_on_how_many_draws_are_worked_on_at_a_time(monkeypatch):
    a, b = np.random.default_rng(0).normal(size=(2, 37))
    whole = one_difference(a, b)
    monkeypatch.setattr("eaptk.resampling._CHUNK_BYTES", 8 * 37 * 17)
    assert one_difference(a, b) == whole


def test_what_the_loss_explains_is_no_difference_at_equal_loss():
    n_wrong = {"plain": 0, "at equal loss": 0}
    for seed in range(200):
        sides, d, _ = loss_driven(40, slope=1.0, gap=0.0, seed=seed, spread=0.3)
        adjusted = differences_at_equal_loss("intensity", ("a", "b"), *sides, np.arange(40), QUICK)
        n_wrong["at equal loss"] += adjusted.p <= 0.05
        n_wrong["plain"] += one_difference(np.zeros(40), d).p <= 0.05
    assert n_wrong["plain"] > 150
    # Nominal 10, standard deviation 3.
    assert n_wrong["at equal loss"] <= 20


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 18, 99, 100, 999, 1000, 1001, 100_000])
def test_quantiles_are_students(degrees):
    for p in (0.51, 0.8, 0.95, 0.975, 0.9995):
        assert student_quantile(p, degrees) == pytest.approx(scipy.stats.t.ppf(p, degrees), rel=1e-9)


def a_difference(p, metric="intensity"):
    return Difference(metric, "b", "a", 1.0, 2.0, 1.0, 0.5, 1.5, p, 1.0, 1.0, 9, 9, 0.95)


def test_the_false_discovery_rate_is_corrected_over_all_but_the_loss():
    ps = [0.01, 0.2, 0.03, 0.0004, 0.9, 0.03, 0.008]
    corrected = benjamini_hochberg([*map(a_difference, ps), a_difference(1e-6, "loss")])
    assert [d.p for d in corrected] == [*ps, 1e-6]
    expected = scipy.stats.false_discovery_control(ps)
    assert [d.q for d in corrected[:-1]] == pytest.approx(expected.tolist(), rel=1e-12)
    assert corrected[-1].q is None


def test_of_what_is_found_in_a_study_no_more_is_wrong_than_promised():
    """Four fifths of 200 hypotheses are true of nothing; five cuts of one answer go together."""
    rng = np.random.default_rng(0)
    wrong = []
    for _ in range(400):
        real = np.repeat(rng.random(40) < 0.2, 5)
        z = np.sqrt(0.6) * np.repeat(rng.normal(size=40), 5) + np.sqrt(0.4) * rng.normal(size=200)
        p = 2 * scipy.stats.norm.sf(np.abs(z + 4 * real))
        found = np.array([d.q <= 0.1 for d in benjamini_hochberg(map(a_difference, p))])
        wrong.append((found & ~real).sum() / max(found.sum(), 1))
    # The expectation is 0.08; its standard deviation here is 0.004.
    assert 0.05 < np.mean(wrong) <= 0.1
