"""One contrast over several seeds, and one correction over a whole study."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from studies import make_experiment, make_study

from eaptk.experiment import Experiment
from eaptk.replicates import Replicated, across, correct

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def experiments() -> list[Experiment]:
    grpo = [make_experiment(f"GRPO seed {seed}", seed=seed) for seed in SEEDS]
    return [*grpo, make_experiment("DPO seed 0", "DPO", seed=7), make_experiment(alpha=0.5, seed=8)]


def pick(found: list[Replicated], metric: str = "intensity", convention: str = "real") -> Replicated:
    (one,) = [r for r in found if r.metric == metric and r.convention == convention]
    return one


def test_only_what_is_replicated_is_held_together(experiments: list[Experiment]) -> None:
    found = across(experiments)
    assert {(r.method, r.dataset, r.alpha, r.place) for r in found} == {
        ("GRPO", "arithmetic", 0.3, ("position", 1))
    }
    assert {r.families for r in found} == {tuple(f"GRPO seed {seed}" for seed in SEEDS)}
    metrics = [d.metric for d in experiments[0].real.differences]
    assert [r.metric for r in found if r.convention == "real"] == metrics
    for r in found:
        sides = [getattr(e, r.convention) for e in experiments[:3]]
        assert r.differences == tuple(d for c in sides for d in c.differences if d.metric == r.metric)


def test_the_summary_of_replicates(experiments: list[Experiment]) -> None:
    r = pick(across(experiments))
    values = [d.difference for d in r.differences]
    assert r.mean == pytest.approx(np.mean(values))
    assert r.n_same_sign == 3
    assert r.ratio == pytest.approx(scipy.stats.gmean([d.value / d.value_baseline for d in r.differences]))
    student = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    below = np.mean([(d.difference - d.low) ** 2 for d in r.differences])
    above = np.mean([(d.high - d.difference) ** 2 for d in r.differences])
    assert r.mean - r.low == pytest.approx(np.hypot(r.mean - student.low, np.sqrt(below)))
    assert r.high - r.mean == pytest.approx(np.hypot(student.high - r.mean, np.sqrt(above)))


def with_differences(experiments: list[Experiment], **changes: list[Any]) -> list[Experiment]:
    """The intensity of each experiment with other fields."""
    changed = []
    for k, e in enumerate(experiments):
        fields = {name: values[k] for name, values in changes.items()}
        differences = [replace(d, **fields) if d.metric == "intensity" else d for d in e.real.differences]
        changed.append(replace(e, real=replace(e.real, differences=tuple(differences))))
    return changed


def test_seeds_that_disagree_are_not_resolved_however_sure_each_is(experiments: list[Experiment]) -> None:
    values = [1.0, 1.1, -0.4]
    ends = {"low": [v - 0.01 for v in values], "high": [v + 0.01 for v in values]}
    r = pick(across(with_differences(experiments[:3], difference=values, **ends)))
    assert (r.direction, r.n_same_sign) == ("unresolved", 2)


def test_seeds_that_agree_are_no_surer_than_the_questions_they_share(experiments: list[Experiment]) -> None:
    values = [1.0, 1.0, 1.0]
    unsure = with_differences(experiments[:3], difference=values, low=[-0.2] * 3, high=[2.0] * 3)
    r = pick(across(unsure))
    assert (r.direction, r.low, r.high) == ("unresolved", pytest.approx(-0.2), pytest.approx(2.0))
    sure = with_differences(experiments[:3], difference=values, low=[0.9] * 3, high=[1.1] * 3)
    assert pick(across(sure)).direction == "up"


def test_what_a_replicate_lacks_the_summary_lacks(experiments: list[Experiment]) -> None:
    lacking = with_differences(experiments[:3], low=[None, 0, 0], high=[None, 1, 1], value=[-1, 1, 1])
    r = pick(across(lacking))
    assert (r.low, r.high, r.ratio, r.direction) == (None, None, None, "unresolved")


def test_runs_of_a_series_are_held_together_at_the_same_step() -> None:
    series = [
        make_experiment(
            "seed 0", method="SFT", names=("start", "early", "middle", "end"), steps=(0, 50, 100, 200), seed=0
        ),
        make_experiment(
            "seed 1", method="SFT", names=("start", "middle", "end"), steps=(0, 100, 300), seed=1
        ),
    ]
    assert {r.place for r in across(series)} == {("step", 100)}


@pytest.mark.parametrize(("seeds", "questions"), [(1.0, 0.1), (0.1, 1.0), (1.0, 1.0)])
def test_the_interval_is_for_new_seeds_and_new_questions(
    experiments: list[Experiment], seeds: float, questions: float
) -> None:
    """Half of the error of a seed's own interval is that of the questions, which all seeds share."""
    rng = np.random.default_rng(0)
    bare = [
        replace(
            e,
            real=replace(e.real, differences=e.real.differences[:1]),
            dense=replace(e.dense, differences=()),
        )
        for e in experiments[:3]
    ]
    covered = []
    for _ in range(600):
        shared, own = rng.normal(0, questions / np.sqrt(2), (2, 3))
        values = rng.normal(0, seeds, 3) + shared[0] + own
        ends = {"low": (values - 1.96 * questions).tolist(), "high": (values + 1.96 * questions).tolist()}
        found = across(with_differences(bare, difference=values.tolist(), **ends))
        r = pick(found)
        covered.append(r.low <= 0 <= r.high)
    # The standard deviation of a share of 0.95 is 0.009.
    assert np.mean(covered) >= 0.925


def test_a_study_is_corrected_over_all_its_experiments_each_convention_by_itself(
    experiments: list[Experiment],
) -> None:
    study = correct(make_study(experiments))
    for convention in ("real", "dense"):
        found = [d for e in study.experiments for d in getattr(e, convention).differences]
        tested = [d for d in found if d.metric != "loss"]
        assert len(tested) == len(experiments) * (6 if convention == "real" else 4)
        expected = scipy.stats.false_discovery_control([d.p for d in tested])
        assert [d.q for d in tested] == pytest.approx(expected.tolist(), rel=1e-12)
    assert correct(study) == study
    before = experiments[1].real.differences
    assert tuple(replace(d, q=None) for d in study.experiments[1].real.differences) == before
