"""Comparisons: what is paired, what the statistics mean, what is refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from rich.console import Console
from runs import BLOCK, FakeRun, make_run

from eaptk.comparison import compare, relative_change
from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.metrics import METRICS, measure
from eaptk.resampling import Contributions, Difference, Resampling, holm, paired_differences

QUICK = Resampling(n_resamples=1000)


def two_runs(n=30, seed=1, **fields):
    """Independent noise around one pattern of edges: no true difference."""
    a, b = make_run(n, 2 * seed), make_run(n, 2 * seed + 1)
    return replace(a, path=Path("runs/sft"), **fields), replace(b, path=Path("runs/rl"), **fields)


def by_metric(comparison):
    return {d.metric: d for d in comparison.differences}


@pytest.mark.parametrize("dense", [False, True])
def test_values_are_the_metrics_of_the_shared_samples(dense):
    a, b = two_runs()
    b.ids = [f"q{i + 5}" for i in range(30)]
    a.done[7] = 0
    found = compare([a, b], dense=dense, resampling=QUICK)
    assert found.sample_ids == tuple(f"q{i}" for i in range(5, 30) if i != 7)
    assert (found.n_dropped, found.n_unfinished) == ((5, 6), (1, 0))
    upper = found.metrics[0].upper
    alone_a = measure(a, rows=[i for i in range(5, 30) if i != 7], upper=upper, dense=dense)
    alone_b = measure(b, rows=[i - 5 for i in range(5, 30) if i != 7], upper=upper, dense=dense)
    for metric in METRICS:
        difference = by_metric(found)[metric]
        assert difference.value_baseline == pytest.approx(getattr(alone_a, metric), rel=1e-12)
        assert difference.value == pytest.approx(getattr(alone_b, metric), rel=1e-12)
        assert difference.difference == pytest.approx(difference.value - difference.value_baseline)
        assert difference.n_pairs == 24


def test_samples_are_paired_by_id_not_by_position():
    a, b = two_runs()
    order = np.random.default_rng(0).permutation(30)
    shuffled = replace(b, scores=b.scores[order], loss=b.loss[order], ids=[b.ids[i] for i in order])
    straight, crossed = compare([a, b], resampling=QUICK), compare([a, shuffled], resampling=QUICK)
    for metric, difference in by_metric(straight).items():
        other = by_metric(crossed)[metric]
        for name in ("difference", "low", "high", "p"):
            assert getattr(other, name) == pytest.approx(getattr(difference, name), rel=1e-9, abs=1e-15)


def test_the_histogram_range_is_shared():
    a, b = two_runs()
    b.scores *= 3
    found = compare([a, b], resampling=QUICK)
    assert found.metrics[0].upper == found.metrics[1].upper == float(np.abs(b.scores).max())


def test_a_planted_difference_is_found_and_its_direction():
    a, b = two_runs()
    before = by_metric(compare([a, b], resampling=QUICK))
    b.scores *= 2
    b.loss[:] = 0.25
    found = by_metric(compare([a, b], resampling=QUICK))
    assert found["intensity"].direction == "up"
    assert found["intensity"].low > 0
    assert found["intensity"].p_holm < 0.01
    assert found["intensity"].effect > 1
    assert replace(found["kurtosis"], p_holm=None) == replace(before["kurtosis"], p_holm=None)
    assert found["loss"].difference == 0.25
    assert found["loss"].p_holm is None
    assert by_metric(compare([b, a], resampling=QUICK))["intensity"].direction == "down"


def test_a_planted_loss_of_diversity_is_found():
    a, b = two_runs()
    b.scores += 3 * a.scores[0]
    diversity = by_metric(compare([a, b], resampling=QUICK))["diversity"]
    assert diversity.direction == "down"
    assert diversity.p_holm < 0.01


def test_a_run_against_itself_differs_in_nothing():
    a, _ = two_runs()
    same = replace(a, path=Path("runs/copy"))
    for difference in compare([a, same], resampling=QUICK).differences:
        assert (difference.difference, difference.low, difference.high) == (0, 0, 0)
        assert (difference.p, difference.effect, difference.direction) == (1, None, "unresolved")


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


@pytest.fixture(scope="module")
def null_comparisons():
    return [
        compare(
            two_runs(40, seed),
            resampling=Resampling(confidence=0.9, n_resamples=400, seed=seed),
            upper=0.02,
            bins=20,
        )
        for seed in range(800)
    ]


@pytest.mark.parametrize("metric", METRICS)
def test_without_a_true_difference_intervals_cover_zero_at_their_nominal_rate(metric, null_comparisons):
    found = [by_metric(comparison)[metric] for comparison in null_comparisons]
    covered = np.mean([d.low <= 0 <= d.high for d in found])
    significant = np.mean([d.p < 0.1 for d in found])
    # Both have a standard deviation of 0.011; percentile intervals of 40 pairs are a little short (0.88).
    assert 0.84 <= covered <= 0.93
    assert 0.07 <= significant <= 0.14


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


def test_groups_come_from_the_samples_and_a_sample_without_one_stands_alone():
    groups = ["x", "x", "y", "y", None, None] * 5
    found = compare(two_runs(groups=groups), resampling=QUICK)
    assert by_metric(found)["intensity"].n_groups == 12


def test_the_same_call_gives_the_same_numbers_and_another_seed_others():
    runs = two_runs()
    first, again = compare(runs, resampling=QUICK), compare(runs, resampling=QUICK)
    assert first.differences == again.differences
    other = compare(runs, resampling=Resampling(n_resamples=1000, seed=1))
    assert other.differences != first.differences


def test_holm_multiplies_by_the_hypotheses_left():
    base = by_metric(compare(two_runs(), resampling=QUICK))["intensity"]
    ps = {"intensity": 0.01, "complexity": 0.04, "kurtosis": 0.03, "diversity": 0.9, "loss": 0.001}
    corrected = holm([replace(base, metric=metric, p=p) for metric, p in ps.items()])
    assert [d.p_holm for d in corrected] == [0.04, pytest.approx(0.09), pytest.approx(0.09), 0.9, None]


def test_a_sample_that_is_constant_in_one_run_leaves_kurtosis_and_diversity_of_both():
    a, b = two_runs()
    b.scores[4] = 0
    found = by_metric(compare([a, b], resampling=QUICK))
    without = [FakeRun(np.delete(run.scores, 4, axis=0), path=run.path) for run in (a, b)]
    others = by_metric(compare(without, resampling=QUICK))
    assert {m: d.n_pairs for m, d in found.items()} == {
        "intensity": 30,
        "complexity": 30,
        "kurtosis": 29,
        "diversity": 29,
        "loss": 30,
    }
    for metric in ("kurtosis", "diversity"):
        assert found[metric].difference == pytest.approx(others[metric].difference, rel=1e-12)


def test_three_runs_are_each_held_against_the_first_and_corrected_together():
    a, b = two_runs()
    c = replace(b, path=Path("runs/dpo"), scores=b.scores * 2)
    found = compare([a, b, c], resampling=QUICK)
    assert [(d.run, d.baseline) for d in found.differences] == [("rl", "sft")] * 5 + [("dpo", "sft")] * 5
    intensity = found.differences[5]
    assert intensity.p_holm >= 7 * intensity.p


def test_relative_change_is_per_edge_and_undefined_where_the_baseline_is_zero():
    np.testing.assert_array_equal(relative_change([2.0, 4.0, 0.0], [3.0, 1.0, 1.0]), [0.5, -0.75, np.nan])


def test_files_hold_the_comparison(tmp_path):
    runs = two_runs()
    found = compare(runs, resampling=QUICK)
    csv, as_json, edges = found.write(tmp_path / "out")
    frame = pd.read_csv(csv)
    assert frame["metric"].tolist() == [*METRICS, "loss"]
    assert frame["low"].tolist() == [d.low for d in found.differences]
    assert frame["direction"].tolist() == [d.direction for d in found.differences]
    kept = json.loads(as_json.read_text())
    assert kept["resampling"] == {"confidence": 0.95, "n_resamples": 1000, "seed": 0}
    assert kept["metrics"]["rl"]["bins"] == 100
    table = pd.read_parquet(edges)
    assert len(table) == BLOCK.n_edges
    strengths = [np.abs(run.scores.astype(np.float64)).mean(0) for run in runs]
    np.testing.assert_allclose(table["strength rl"], strengths[1], rtol=1e-12)
    np.testing.assert_allclose(
        table["relative change rl"], relative_change(strengths[0], strengths[1]), rtol=1e-9
    )


def test_a_folder_that_cannot_be_written_ends_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EaptkError, match="cannot write the comparison to"):
        compare(two_runs(), resampling=QUICK).write(tmp_path / "file" / "out")


@pytest.mark.parametrize("n_runs", [2, 3])
def test_the_table_shows_both_values_and_the_interval_of_every_metric(n_runs):
    a, b = two_runs()
    runs = [a, b, replace(b, path=Path("runs/dpo"))][:n_runs]
    found = compare(runs, resampling=QUICK)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(found.to_table())
    text = console.export_text()
    for d in found.differences:
        for shown in (d.metric, f"{d.value:.3g}", f"[{d.low:+.3g}, {d.high:+.3g}]"):
            assert shown in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"graph": Graph(3, 4, 4, qkv="merged")},
            r"differ in graph: runs/sft has n_kv_heads=2, qkv='split', runs/rl",
        ),
        ({"manifest": {"ablation": "mean", "loss": "nll", "cut": None}}, "'zero', runs/rl has 'mean'"),
        ({"manifest": {"ablation": "zero", "loss": "kl", "cut": None}}, "differ in loss: runs/sft has 'nll'"),
        ({"manifest": {"ablation": "zero", "loss": "nll", "cut": 8}}, "differ in cut: runs/sft has None"),
        ({"ids": [f"other{i}" for i in range(30)]}, "share 0 finished samples"),
        ({"groups": ["g"] * 30}, "sample 'q0' belongs to group None in runs/sft and 'g' in runs/rl"),
        ({"path": Path("runs/sft")}, "run runs/sft is given twice"),
    ],
)
def test_runs_that_do_not_compare_are_refused_with_both_values(change, message):
    a, b = two_runs()
    with pytest.raises(EaptkError, match=message):
        compare([a, replace(b, **change)], resampling=QUICK)


def test_one_run_or_one_group_is_no_comparison():
    a, b = two_runs(groups=["g"] * 30)
    with pytest.raises(EaptkError, match="at least two runs"):
        compare([a])
    with pytest.raises(EaptkError, match="all 30 shared samples belong to one group"):
        compare([a, b])


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"n_resamples": 10}, {"seed": -1}])
def test_resampling_that_gives_no_interval_is_refused(wrong):
    with pytest.raises(EaptkError, match=next(iter(wrong))):
        Resampling(**wrong)


def test_directions_follow_the_interval():
    base = Difference("intensity", "b", "a", 1.0, 2.0, 1.0, 0.5, 1.5, 0.01, 0.04, 1.0, 9, 9)
    assert base.direction == "up"
    assert replace(base, low=-1.5, high=-0.5).direction == "down"
    assert replace(base, low=-0.5).direction == "unresolved"
