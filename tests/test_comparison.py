"""Comparisons: what is paired, what the statistics mean, what is refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from runs import BLOCK, MANIFEST, FakeRun, make_run

from eaptk.comparison import compare, relative_change
from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.metrics import METRICS, measure
from eaptk.resampling import (
    Resampling,
    holm,
)

QUICK = Resampling(n_resamples=1000)


def two_runs(n=30, seed=1, **fields):
    """Independent noise around one pattern of edges: no true difference."""
    a, b = make_run(n, 2 * seed), make_run(n, 2 * seed + 1)
    return replace(a, path=Path("runs/sft"), **fields), replace(b, path=Path("runs/rl"), **fields)


def as_text(comparison, width=160):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison.to_table())
    return console.export_text()


def by_metric(comparison):
    return {d.metric: d for d in comparison.differences}


@pytest.mark.parametrize("dense", [False, True])
def test_values_are_the_metrics_of_the_shared_samples(dense):
    a, b = two_runs()
    b = replace(b, ids=[f"q{i + 5}" for i in range(30)], prompts=None, answers=None)
    a.done[7] = 0
    found = compare([a, b], dense=dense, resampling=QUICK)
    assert found.sample_ids == tuple(f"q{i}" for i in range(5, 30) if i != 7)
    assert (found.n_dropped, found.n_unfinished) == ((5, 6), (1, 0))
    assert compare([a, b], ids=found.sample_ids[:4], resampling=QUICK).n_dropped == (0, 0)
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
    ids = [b.ids[i] for i in order]
    shuffled = replace(b, scores=b.scores[order], loss=b.loss[order], ids=ids, prompts=None, answers=None)
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


def test_an_edge_whose_strength_is_unknown_leaves_the_changes_of_others():
    np.testing.assert_array_equal(
        relative_change([2.0, np.nan, 4.0], [3.0, 1.0, np.nan]), [0.5, np.nan, np.nan]
    )
    assert np.isnan(relative_change([np.nan], [np.nan])).all()


def test_scores_above_a_range_that_was_given_are_counted_in_a_note():
    a, b = two_runs()
    found = compare([a, b], upper=float(np.quantile(np.abs(a.scores), 0.9)), resampling=QUICK)
    above = [int((np.abs(run.scores) > found.metrics[0].upper).sum()) for run in (a, b)]
    for name, n in zip(found.names, above, strict=True):
        assert any(
            note.startswith(f"complexity leaves out the {n:,} scores of {name}") for note in found.notes
        )
    assert not any("leaves out" in note for note in compare([a, b], resampling=QUICK).notes)


def test_the_change_of_an_edge_that_is_noise_in_both_runs_is_no_finding():
    changes = relative_change([1e4, 0.9, 0.9, 2.0], [1e3, 0.1, 1.8, 0.5])
    np.testing.assert_allclose(changes, [-0.9, np.nan, 1.0, -0.75])


@pytest.mark.parametrize(("ablation", "is_zero"), [("zero", True), ("patching", False)])
def test_edges_that_are_zero_by_identity_have_no_change(ablation, is_zero, tmp_path):
    found = compare(two_runs(manifest=MANIFEST | {"ablation": ablation}), resampling=QUICK)
    undefined = np.flatnonzero(np.isnan(found.relative_change()))
    names = [BLOCK.edge_name(int(column)) for column in undefined]
    assert names == (["input→a0<q>", "input→a0<k>", "input→a0<v>"] if is_zero else [])
    found.write(tmp_path)
    assert pd.read_parquet(tmp_path / "edges.parquet")["relative change rl"].isna().sum() == len(names)


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
    np.testing.assert_allclose(table["relative change rl"], found.relative_change(), rtol=1e-9)


def test_a_folder_that_cannot_be_written_ends_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EaptkError, match="cannot write the comparison to"):
        compare(two_runs(), resampling=QUICK).write(tmp_path / "file" / "out")


@pytest.mark.parametrize("n_runs", [2, 3])
def test_the_table_shows_both_values_and_the_interval_of_every_metric(n_runs):
    a, b = two_runs()
    runs = [a, b, replace(b, path=Path("runs/dpo"))][:n_runs]
    found = compare(runs, resampling=QUICK)
    text = as_text(found)
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
        ({"manifest": MANIFEST | {"ablation": "mean"}}, "'zero', runs/rl has 'mean'"),
        ({"manifest": MANIFEST | {"loss": "kl"}}, "differ in loss: runs/sft has 'nll'"),
        ({"manifest": MANIFEST | {"cut": 8}}, "differ in cut: runs/sft has None"),
        ({"manifest": MANIFEST | {"max_new_tokens": 8}}, "differ in max_new_tokens: runs/sft has None"),
        ({"ids": [f"other{i}" for i in range(30)]}, "share 0 finished samples"),
        (
            {"groups": ["g"] * 30},
            "sample 'q0' belongs to group None in runs/sft and 'g' in runs/rl; give it one group in both",
        ),
        (
            {"prompts": [[1]] * 30},
            "sample 'q0' has one prompt in runs/sft and another in runs/rl; .* give the records .* an 'id'",
        ),
        ({"answers": [[1]] * 30}, "sample 'q0' has one answer in runs/sft and another in runs/rl"),
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


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_with_six_pairs_and_no_difference_arrows_are_as_rare_as_promised(confidence):
    """Family-wise: the share of comparisons in which any metric gets an arrow."""
    resampling = Resampling(confidence=confidence, n_resamples=300)
    wrong = [
        any(
            d.direction != "unresolved" for d in compare(two_runs(6, seed), resampling=resampling).differences
        )
        for seed in range(300)
    ]
    # The rate has a standard deviation of at most 0.023.
    assert np.mean(wrong) <= 1 - confidence + 0.05


def test_few_groups_are_said_to_show_little():
    few = compare(two_runs(12, groups=[f"g{i % 6}" for i in range(12)]), resampling=QUICK)
    assert few.notes == (
        "only 6 independent groups: intervals are rough, and no p can be below 0.031 before correction",
    )
    assert compare(two_runs(12), resampling=QUICK).notes == ()


@pytest.mark.parametrize(("n", "has_interval"), [(3, False), (4, True)])
def test_the_diversity_of_three_samples_has_no_interval(n, has_interval, tmp_path):
    found = compare(two_runs(n), resampling=QUICK)
    diversity = by_metric(found)["diversity"]
    assert (diversity.low is not None, diversity.high is not None) == (has_interval, has_interval)
    assert (diversity.direction == "unresolved") or has_interval
    kept = json.loads(found.write(tmp_path)[1].read_text())["differences"]
    assert {d["metric"] for d in kept if d["low"] is None} == (set() if has_interval else {"diversity"})
    assert pd.read_csv(tmp_path / "comparison.csv")["low"].isna().sum() == (not has_interval)


def test_samples_of_different_datasets_whose_ids_are_line_numbers_are_not_paired():
    a, b = two_runs()
    b.prompts[7] = [1, 2, 3]
    with pytest.raises(EaptkError, match="sample 'q7' has one prompt"):
        compare([a, b])
    # Unless it does not take part.
    b.done[7] = 0
    assert len(compare([a, b], resampling=QUICK).sample_ids) == 29


def test_answers_may_differ_where_each_model_gives_its_own():
    a, b = two_runs(manifest=MANIFEST | {"loss": "self_nll"})
    b.answers = [[1]] * 30
    assert compare([a, b], resampling=QUICK).notes == ()


def test_what_could_not_be_verified_is_said():
    a, b = two_runs()
    b = replace(b, manifest=MANIFEST | {"tokenizer": "sha256:1", "model": {"dtype": "bfloat16"}})
    b.prompts = [[1]] * 30
    found = compare([a, b], resampling=QUICK)
    assert found.notes == (
        "tokenizers differ: that rl had the prompts of sft could not be verified",
        "model dtypes differ: float32 (sft), bfloat16 (rl); part of a difference may be rounding",
    )
    assert found.to_dict()["notes"] == list(found.notes)
    shown = " ".join(as_text(found).split())
    assert all(f"note: {note}" in shown for note in found.notes)


def test_a_run_by_two_paths_is_one_run():
    a, b = two_runs()
    with pytest.raises(EaptkError, match=r"run runs/x/\.\./sft is given twice"):
        compare([replace(a, path=Path("runs/x/../sft")), replace(b, path=Path("runs/sft"))], resampling=QUICK)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a"], "there are 1 names for 2 runs"), (["a", "a"], "the name 'a' is given twice")],
)
def test_names_that_do_not_fit_the_runs_are_refused(names, message):
    with pytest.raises(EaptkError, match=message):
        compare(two_runs(), names=names)


def test_names_are_printed_as_they_are():
    text = as_text(compare(two_runs(), names=["[red]x", "[/]y"], resampling=QUICK))
    assert "[/]y against [red]x: 30 pairs" in text


def test_groups_stand_in_the_title_where_they_are_the_same_for_all_metrics():
    found = compare(two_runs(14, groups=[f"g{i // 2}" for i in range(14)]), resampling=QUICK)
    text = as_text(found, width=80)
    assert "rl against sft: 14 pairs in 7 groups" in text
    assert "14 in 7" not in text
    for d in found.differences:
        assert f"[{d.low:+.3g}, {d.high:+.3g}]" in text


def test_control_for_the_loss_adds_two_hypotheses_beside_the_metrics_they_adjust():
    a, b = two_runs()
    a.loss, b.loss = np.random.default_rng(0).normal(size=(2, 30))
    found = compare([a, b], resampling=QUICK, control_loss=True)
    plain = compare([a, b], resampling=QUICK)
    assert [d.metric for d in found.differences] == [
        "intensity",
        "intensity at equal loss",
        "complexity",
        "kurtosis",
        "kurtosis at equal loss",
        "diversity",
        "loss",
    ]
    smallest = min((d for d in found.differences if d.metric != "loss"), key=lambda d: d.p)
    assert smallest.p_holm == pytest.approx(min(1, 6 * smallest.p))
    assert [replace(d, p_holm=None) for d in found.differences if "equal" not in d.metric] == [
        replace(d, p_holm=None) for d in plain.differences
    ]
    assert found.notes == ()
    assert as_text(found).count("eq. loss") == 3


def test_at_equal_loss_beyond_all_pairs_is_called_an_extrapolation():
    a, b = two_runs()
    b.loss = np.linspace(0.5, 1, 30)
    found = compare([a, b], resampling=QUICK, control_loss=True)
    assert found.notes == ("every loss of rl is above that of sft: values at equal loss are extrapolated",)


def test_a_loss_that_differs_alike_in_all_pairs_cannot_be_controlled_for():
    a, b = two_runs()
    b.loss = a.loss + 0.1
    with pytest.raises(
        EaptkError, match="the loss of rl differs from that of sft by the same amount in all 30"
    ):
        compare([a, b], resampling=QUICK, control_loss=True)
