"""A study's tables: what stands in a cell, when an arrow does, and which rows there are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from studies import make_experiment, make_study

from eaptk.comparison import Comparison
from eaptk.experiment import Experiment, Stage
from eaptk.study_tables import (
    Cell,
    StudyTable,
    all_differences,
    conventions,
    facts_table,
    funnels,
    glance,
    headline,
    markdown,
    notes,
    percent,
    reasons,
    validations,
)

BASE = make_experiment(validated=False)
SERIES = make_experiment("along", "along", names=("0", "1", "2"), steps=(0, 1, 2), validated=False)


def with_difference(experiment: Experiment, metric: str = "intensity", **fields: Any) -> Experiment:
    """The experiment with one of its differences, over real edges, made to measure."""

    def change(comparison: Comparison) -> Comparison:
        found = (replace(d, **fields) if d.metric == metric else d for d in comparison.differences)
        return replace(comparison, differences=tuple(found))

    return replace(experiment, real=change(experiment.real))


def seeds(*differences: float, **fields: Any) -> list[Experiment]:
    """One method with as many seeds, from intensity 2 to 2 + each difference, resolved unless told otherwise."""
    return [
        with_difference(
            replace(BASE, family=f"GRPO seed {seed}"),
            **{
                "value_baseline": 2.0,
                "value": 2 + d,
                "difference": d,
                "low": d - 0.02,
                "high": d + 0.02,
                "p_holm": 0.001,
                "q": 0.001,
                **fields,
            },
        )
        for seed, d in enumerate(differences)
    ]


def cell(table: StudyTable, row: str, column: str) -> Cell:
    found = next(each for each in table.rows if each[0].text == row)
    return found[table.head.index(column)]


def test_a_difference_is_shown_beside_all_that_is_needed_to_judge_it() -> None:
    (table,) = headline(make_study(seeds(0.5, effect=1.234, p_holm=0.0123)))
    shown = cell(table, "GRPO seed 0", "intensity")
    assert shown.text == "↑ +25%"
    assert shown.small == ("[+24%, +26%]", "2 → 2.5", "d +1.23, Holm 0.012")
    assert shown.direction == "up"
    assert cell(table, "GRPO seed 0", "family").small == ("16 pairs", "cut 12")


@pytest.mark.parametrize(
    "fields",
    [{"q": 0.2}, {"low": -0.1}, {"low": None, "high": None}],
    ids=["not after correction", "interval holds 0", "no interval"],
)
def test_what_is_not_resolved_has_no_arrow(fields: dict[str, Any]) -> None:
    (table,) = headline(make_study(seeds(0.5, **fields)))
    shown = cell(table, "GRPO seed 0", "intensity")
    assert shown.text == "? +25%"
    assert shown.direction == "unresolved"
    assert (shown.small[0] == "no interval") == ("high" in fields)


def test_a_share_of_what_is_not_positive_is_not_taken() -> None:
    fields = {"value_baseline": -1.0, "value": -0.5, "difference": 0.5, "low": 0.4, "high": 0.6, "q": 0.01}
    (table,) = headline(make_study([with_difference(BASE, "kurtosis", **fields)]))
    shown = cell(table, "GRPO seed 0", "kurtosis")
    assert shown.text == "↑ +0.5"
    assert shown.small[0] == "[+0.4, +0.6]"


def test_seeds_stand_below_the_mean_of_their_method() -> None:
    (table,) = headline(make_study([*seeds(0.5, 0.4, 0.6), replace(BASE, family="DPO", method="DPO")]))
    names = [row[0].text for row in table.rows]
    assert names == ["GRPO", "GRPO seed 0", "GRPO seed 1", "GRPO seed 2", "DPO"]
    assert table.kinds == ("summary", "member", "member", "member", "")


def named(experiment: Experiment, *names: str, **fields: Any) -> Experiment:
    """The same with its runs called otherwise."""
    new = dict(zip(experiment.names, names, strict=True))

    def renamed(side: Any) -> Any:
        differences = tuple(replace(d, run=new[d.run], baseline=new[d.baseline]) for d in side.differences)
        return replace(side, names=names, differences=differences)

    return replace(
        experiment, names=names, real=renamed(experiment.real), dense=renamed(experiment.dense), **fields
    )


def test_seeds_with_several_runs_are_held_together_by_place_whatever_their_names() -> None:
    first = make_experiment("seed 0", names=("SFT", "a0", "b0"))
    second = named(make_experiment("seed 1", names=("SFT", "a0", "b0"), seed=1), "SFT", "a1", "b1")
    (table,) = headline(make_study([first, second]))
    names = [row[0].text for row in table.rows]
    assert names == ["GRPO: a0, a1", "seed 0: a0", "seed 1: a1", "GRPO: b0, b1", "seed 0: b0", "seed 1: b1"]
    for place, row in ((1, "GRPO: a0, a1"), (2, "GRPO: b0, b1")):
        both = [
            next(d for d in e.real.differences if d.metric == "intensity" and d.run == e.names[place])
            for e in (first, second)
        ]
        mean = sum(d.difference for d in both) / sum(d.value_baseline for d in both)
        assert cell(table, row, "intensity").text.endswith(percent(mean))


def test_series_of_unlike_ends_have_no_mean_though_they_share_a_step() -> None:
    first = make_experiment("seed 0", names=("SFT", "x"), steps=(0, 10))
    second = make_experiment("seed 1", names=("SFT", "x", "y"), steps=(0, 10, 20), seed=1)
    (table,) = headline(make_study([first, second]))
    assert cell(table, "GRPO", "intensity").text == "–"
    again = make_experiment("seed 1", names=("SFT", "w", "y"), steps=(0, 5, 10), seed=1)
    (table,) = headline(make_study([first, again]))
    assert cell(table, "GRPO", "intensity").text != "–"


def test_the_mean_of_seeds_says_how_many_of_them_are_resolved() -> None:
    mixed = [*seeds(0.5, 0.6), *seeds(-0.4, 0.1, q=0.9)[1:]]
    experiments = [replace(e, family=f"GRPO seed {k}") for k, e in enumerate(mixed)]
    (table,) = glance(make_study(experiments))
    shown = cell(table, "intensity", "GRPO")
    assert shown.text == "? +20%"
    assert shown.small[0].endswith("] 2↑ 1?")


def test_the_mean_of_seeds_has_an_arrow_only_if_it_would_hold_for_new_seeds() -> None:
    directions = []
    for values in ((0.5, 0.52, 0.48), (0.1, 0.5, 0.9)):
        (table,) = glance(make_study(seeds(*values)))
        shown = cell(table, "intensity", "GRPO")
        assert shown.small[0].endswith("] 3↑")
        directions.append(shown.direction)
    assert directions == ["up", "unresolved"]


def test_each_data_set_and_each_share_has_its_place() -> None:
    places = [("a", 0.1), ("a", 0.3), ("b", 0.1)]
    results = make_study([replace(BASE, dataset=name, alpha=alpha) for name, alpha in places])
    assert [table.title for table in headline(results)] == ["a, α = 0.1", "a, α = 0.3", "b, α = 0.1"]
    assert [table.title for table in glance(results)] == ["a", "b"]
    assert [row[1].text for row in glance(results)[0].rows[:2]] == ["0.1", "0.3"]


def test_a_series_is_summed_up_by_its_last_checkpoint() -> None:
    (table,) = headline(make_study([SERIES]))
    last = next(d for d in SERIES.real.differences if d.run == "2" and d.metric == "intensity")
    assert [row[0].text for row in table.rows] == ["along"]
    assert percent(last.difference / last.value_baseline) in cell(table, "along", "intensity").text


def test_several_models_without_steps_each_have_a_row() -> None:
    (table,) = headline(make_study([replace(SERIES, steps=None)]))
    assert [row[0].text for row in table.rows] == ["along: 1", "along: 2"]


def test_both_conventions_stand_side_by_side() -> None:
    (table,) = conventions(make_study([BASE]))
    assert table.head[:3] == ("family", "intensity, real", "intensity, dense")
    real, dense = (cell(table, "GRPO seed 0", f"intensity, {side}") for side in ("real", "dense"))
    assert real.text == dense.text
    assert real.small[1] != dense.small[1]


def test_a_funnel_that_is_the_same_for_every_share_is_shown_once() -> None:
    other = replace(BASE, alpha=0.5, funnel=(*BASE.funnel[:-1], Stage("sampled", 90, 7, "not drawn")))
    (same,) = funnels(make_study([BASE, replace(BASE, alpha=0.5)]))
    assert [each.text for each in same.rows[0]] == [
        "GRPO seed 0",
        "SFT 70.0% · GRPO 75.0%",
        "200",
        "140",
        "140",
        "90",
        "16",
    ]
    assert [each.small for each in same.rows[0][3:5]] == [("−60",), ()]
    (differing,) = funnels(make_study([BASE, other]))
    assert [row[0].small for row in differing.rows] == [("α = 0.3",), ("α = 0.5",)]


def test_a_stage_that_nobody_left_needs_no_reason() -> None:
    assert reasons(make_study([BASE, replace(BASE, alpha=0.5)])) == {
        "right": ["an answer is wrong or missing"],
        "length": ["mean length outside 0.5 to 1.5 of the reference"],
        "sampled": ["not drawn"],
    }


def test_a_note_names_every_experiment_it_is_about() -> None:
    noted = replace(BASE, real=replace(BASE.real, notes=("few groups",)), dense=replace(BASE.dense, notes=()))
    found = notes(make_study([noted, replace(noted, alpha=0.5)]))
    assert found == [("few groups", ["GRPO seed 0, arithmetic, α = 0.3", "GRPO seed 0, arithmetic, α = 0.5"])]


def test_a_study_that_validated_nothing_has_no_table_of_it() -> None:
    assert validations(make_study([BASE])) is None
    table = validations(make_study([make_experiment()]))
    assert table is not None
    assert [each.text for each in table.rows[1][1:4]] == ["GRPO", "20 × 3", "0.980"]


def test_facts_are_words() -> None:
    table = facts_table({"seeds": [0, 1], "versions": {"torch": "2.13", "numpy": "2.4"}, "limit": None})
    assert [row[1].text for row in table.rows] == ["0, 1", "torch: 2.13; numpy: 2.4", "none"]


def test_every_difference_says_where_it_was_measured() -> None:
    table = all_differences(make_study([BASE, SERIES]))
    assert list(table.columns[:5]) == ["family", "method", "dataset", "alpha", "convention"]
    assert list(table["convention"].unique()) == ["real", "dense"]
    assert {"p", "p_holm", "q", "effect", "low", "high", "direction"} <= set(table)
    assert set(table.loc[table["family"] == "along", "run"]) == {"1", "2"}


def test_html_is_escaped_and_markdown_too() -> None:
    table = StudyTable("<t>", ("<h>",), ((Cell("<b>a|b</b>", ("<i>",), "up"),),))
    assert "<b>" not in table.to_html()
    assert "&lt;b&gt;a|b&lt;/b&gt;<small>&lt;i&gt;</small>" in table.to_html()
    assert table.to_markdown().splitlines()[-1] == r"| \<b\>a\|b\</b\><br>\<i\> |"
    assert markdown("a_1\n*b*") == r"a\_1 \*b\*"
    assert markdown("&lt;") == r"\&lt;", "no entity"


@pytest.mark.parametrize(
    ("share", "shown"), [(0.1914, "+19.1%"), (-0.0004321, "-0.0432%"), (12.345, "+1,234%"), (0.0, "+0%")]
)
def test_a_share_has_three_digits(share: float, shown: str) -> None:
    assert percent(share) == shown
