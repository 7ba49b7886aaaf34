"""Which questions are kept: each filter removes what it says, both protocols agree with a count of one's own."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import make_run

from eaptk.answers import Answers
from eaptk.comparison import compare
from eaptk.errors import EaptkError
from eaptk.experiment import Stage
from eaptk.resampling import Resampling
from eaptk.selection import (
    PROTOCOLS,
    Answered,
    Filter,
    Protocol,
    all_right,
    apply,
    balanced,
    equal_prompts,
    reaching,
    sample,
    select,
    within,
)

NO_DRAW = replace(PROTOCOLS["paper-code"], samples=1000)


def make_answers(
    name: str,
    lengths: list[int],
    right: list[bool] | None = None,
    prompts: list[int] | None = None,
    questions: str = "sha256:q",
    tokenizer: str = "sha256:t",
    finished: bool = True,
) -> Answers:
    n = len(lengths)
    table = pa.table(
        {
            "id": [f"q{i}" for i in range(n)],
            "prompt_ids": [[1] * k for k in prompts or [5] * n],
            "answer_ids": [[2] * k for k in lengths],
            "finished": [finished] * n,
            "right": [True] * n if right is None else right,
        }
    )
    facts = {"questions": {"fingerprint": questions}, "tokenizer": tokenizer, "max_new_tokens": 64}
    return Answers(Path(f"{name}.parquet"), facts, table)


def by_hand(a: Answers, b: Answers, protocol: Protocol) -> tuple[list[str], list[int]]:
    """The protocol for two models in plain Python, question by question: ids kept, and how many at each stage."""
    rows = list(
        zip(a.ids, a.prompt_lengths, b.prompt_lengths, a.lengths, b.lengths, a.right, b.right, strict=True)
    )
    counts = [len(rows)]
    rows = [row for row in rows if row[5] and row[6]]
    counts.append(len(rows))
    means = [sum(row[side] for row in rows) / len(rows) for side in (3, 4)]
    text = protocol.name == "paper-text"
    ref = sum(means) / 2 if text else min(means)
    rows = [row for row in rows if row[1] == row[2]]
    counts.append(len(rows))
    if text:
        rows = [r for r in rows if 0.5 * ref < r[3] < 1.5 * ref and 0.5 * ref < r[4] < 1.5 * ref]
    else:
        rows = [r for r in rows if int(0.5 * ref) <= (r[3] + r[4]) / 2 <= int(1.5 * ref)]
    counts.append(len(rows))
    far = [abs(r[3] - r[4]) / ((r[3] + r[4]) / 2) for r in rows]
    rows = [row for row, d in zip(rows, far, strict=True) if (d < 0.5 if text else d <= 0.5)]
    counts.append(len(rows))
    if protocol.samples < len(rows):
        random.seed(protocol.seed)
        rows = random.sample(rows, protocol.samples)
    counts.append(len(rows))
    return sorted(row[0] for row in rows), counts


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
@pytest.mark.parametrize("samples", [7, 100])
@pytest.mark.parametrize("seed", range(6))
def test_both_protocols_keep_what_a_count_by_hand_keeps(name: str, samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 80
    base = rng.integers(8, 40, n)
    a, b = (
        make_answers(
            side,
            np.maximum(base + rng.integers(-9, 10, n), 1).tolist(),
            (rng.random(n) < 0.8).tolist(),
            (5 + (rng.random(n) < 0.1)).tolist(),
        )
        for side in "ab"
    )
    protocol = replace(PROTOCOLS[name], samples=samples)
    found = select([a, b], protocol)
    ids, counts = by_hand(a, b, protocol)
    assert sorted(found.ids) == ids
    assert [found.funnel[0].n_in, *(stage.n_out for stage in found.funnel)] == counts


def test_each_filter_removes_the_rows_made_for_it() -> None:
    #          ok  wrong prompt  long short  apart  ok  edge
    a_lengths = [20, 20, 20, 40, 5, 15, 20, 25]
    b_lengths = [20, 20, 20, 40, 5, 27, 20, 15]
    a = make_answers("a", a_lengths, [True, False, *[True] * 6], [5, 5, 5, 5, 5, 5, 5, 5])
    b = make_answers("b", b_lengths, None, [5, 5, 6, 5, 5, 5, 5, 5])
    found = select([a, b], NO_DRAW)
    # ref = min(145, 152) / 7 = 20.7…: means of 10 to 31 tokens stay.
    assert found.reference == pytest.approx(145 / 7)
    assert [(s.name, s.n_in, s.n_out) for s in found.funnel] == [
        ("right", 8, 7),
        ("prompt", 7, 6),
        ("length", 6, 4),
        ("balance", 4, 3),
        ("sample", 3, 3),
    ]
    assert found.ids == ("q0", "q6", "q7"), "|25 − 15| / 20 = 0.5 is in by the code's protocol"
    strict = select([a, b], replace(PROTOCOLS["paper-text"], samples=1000))
    assert strict.ids == ("q0", "q6"), "and out by the text's"
    assert found.accuracy == (7 / 8, 1.0)
    assert found.lengths == (tuple(a_lengths[:1] + a_lengths[2:]), tuple(b_lengths[:1] + b_lengths[2:]))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 4),
        ({"low": 0.9}, 3),
        ({"high": 1.1}, 3),
        ({"high": 1.5}, 4),
        ({"high": 1.5, "bounded": "each"}, 3),
        ({"low": 0.57}, 4),
        ({"low": 0.57, "whole": False}, 3),
        ({"low": 0.6}, 4),
        ({"low": 0.6, "reference": "mean"}, 3),
        ({"balance": 0.05}, 2),
        ({"balance": 0.0}, 1),
        ({"balance": 0.0, "strict": True}, 0),
        ({"samples": 2}, 2),
    ],
)
def test_every_threshold_is_an_option(options: dict[str, Any], kept: int) -> None:
    # T̄ is 11, 20, 20.5 and 29; the reference length 19.5, or 20.125 as the mean.
    a, b = make_answers("a", [10, 20, 20, 28]), make_answers("b", [12, 20, 21, 30])
    protocol = replace(NO_DRAW, **{"low": 0.5, "high": 1.6} | options)
    if kept < 2:
        with pytest.raises(EaptkError, match=f"^{kept} questions are left"):
            select([a, b], protocol)
    else:
        assert len(select([a, b], protocol).ids) == kept


LENGTHS = st.integers(1, 60)


@st.composite
def answered(draw: st.DrawFn, models: int | None = None) -> Answered:
    k, n = draw(st.integers(1, 4)) if models is None else models, draw(st.integers(0, 25))

    def table(values: st.SearchStrategy[Any]) -> np.ndarray:
        flat = draw(st.lists(values, min_size=k * n, max_size=k * n))
        return np.array(flat, dtype=bool if flat and isinstance(flat[0], bool) else int).reshape(k, n)

    return Answered(
        tuple(f"m{i}" for i in range(k)),
        tuple(f"q{i}" for i in range(n)),
        table(st.integers(3, 5)),
        table(LENGTHS),
        table(st.booleans()).astype(bool),
    )


ROWWISE = st.sampled_from(
    [
        all_right(),
        equal_prompts(),
        within(10, 40),
        within(10, 40, "each", strict=True),
        balanced(0.5),
        balanced(0.5, strict=True),
        reaching(12),
    ]
)


@given(answered(), st.lists(ROWWISE, max_size=5), st.randoms(use_true_random=False))
def test_filters_commute_repeat_harmlessly_and_only_remove(
    everything: Answered, filters: list[Filter], shuffle: random.Random
) -> None:
    kept, funnel = apply(everything, filters)
    assert set(kept.ids) <= set(everything.ids)
    counts = [len(everything), *(stage.n_out for stage in funnel)]
    assert [stage.n_in for stage in funnel] == counts[:-1]
    assert counts == sorted(counts, reverse=True)
    shuffled = [*filters, *filters]
    shuffle.shuffle(shuffled)
    assert apply(everything, shuffled)[0].ids == kept.ids


@given(answered(), ROWWISE, st.randoms(use_true_random=False))
def test_no_filter_depends_on_the_order_of_models(
    everything: Answered, each: Filter, shuffle: random.Random
) -> None:
    order = list(range(len(everything.names)))
    shuffle.shuffle(order)
    turned = Answered(
        everything.names,
        everything.ids,
        everything.prompts[order],
        everything.lengths[order],
        everything.right[order],
    )
    assert np.array_equal(each.stays(everything), each.stays(turned))


@given(answered(models=2), st.floats(0, 2), st.booleans())
def test_for_two_models_balance_is_the_papers(everything: Answered, limit: float, strict: bool) -> None:
    mask = balanced(limit, strict).stays(everything)
    for (a, b), stays in zip(everything.lengths.T.tolist(), mask, strict=True):
        spread = abs(a - b) / ((a + b) / 2)
        assert stays == (spread < limit if strict else spread <= limit)


@given(answered(), st.integers(1, 30), st.integers(0, 5))
def test_the_draw_is_pythons_own_of_that_size_and_seed(everything: Answered, n: int, seed: int) -> None:
    kept, _ = apply(everything, [sample(n, seed)])
    random.seed(seed)
    drawn = random.sample(everything.ids, min(n, len(everything)))
    assert sorted(kept.ids) == sorted(drawn)


def test_filters_work_on_runs_whose_comparison_takes_the_ids_they_keep() -> None:
    runs = [make_run(n=12, seed=seed) for seed in range(2)]
    for run in runs:
        object.__setattr__(run, "prompts", [[1] * (3 + i % 3) for i in range(12)])
        object.__setattr__(run, "answers", [[2] * (5 + i) for i in range(12)])
    tables = [run.samples for run in runs]
    counted = [
        table.append_column("n_prompt_tokens", [[len(ids) for ids in table["prompt_ids"].to_pylist()]])
        .append_column("n_answer_tokens", [[len(ids) for ids in table["answer_ids"].to_pylist()]])
        for table in tables
    ]  # fmt: skip
    counted_runs = [_WithSamples(run, table) for run, table in zip(runs, counted, strict=True)]
    found = Answered.from_runs(counted_runs, ["a", "b"])  # type: ignore[arg-type]
    kept, _ = apply(found, [within(8, 14)])
    assert kept.ids == tuple(f"q{i}" for i in range(3, 10))
    compared = compare(runs, names=["a", "b"], ids=kept.ids, resampling=Resampling(n_resamples=100))
    assert compared.sample_ids == kept.ids
    alone = [replace(run, done=np.isin(np.arange(12), range(3, 10)).astype(np.uint8)) for run in runs]
    expected = compare(alone, names=["a", "b"], resampling=Resampling(n_resamples=100))
    assert compared.differences == expected.differences


class _WithSamples:
    """A run whose table has the token counts of a run on disk."""

    def __init__(self, run: Any, samples: pa.Table) -> None:
        self.path, self.done, self.samples = run.path, run.done, samples


def test_alpha_cuts_to_a_share_of_the_reference_and_says_what_is_shorter() -> None:
    found = select([make_answers("a", [20, 22, 12, 26]), make_answers("b", [20, 22, 16, 26])], NO_DRAW)
    assert found.reference == 20
    assert [found.cut(alpha) for alpha in (0.01, 0.3, 0.7, 1)] == [1, 6, 14, 20]
    assert found.at(0.3) == (found.ids, Stage("cut", 4, 4, "cut to 6 tokens"))
    whole, stage = found.at(0.7)
    assert whole == found.ids
    assert stage.why == "cut to 14 tokens; scored whole as they are shorter: 1"
    long, stage = found.at(0.7, drop_short=True)
    assert long == ("q0", "q1", "q3")
    assert (stage.n_in, stage.n_out) == (4, 3)
    with pytest.raises(EaptkError, match=r"at alpha 1\.3, 1 of 4 questions have answers of 26 tokens"):
        found.at(1.3, drop_short=True)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"right": [False] * 4}, {}, "a answered none of 4 questions right; see the column 'reason'"),
        (
            {"right": [True, True, False, False]},
            {"right": [False, False, True, True]},
            r"no question was answered right by all of 2 models \(a 50%, b 50%\)",
        ),
        ({}, {"questions": "sha256:other"}, "a.parquet and b.parquet answer different questions"),
        (
            {"prompts": [5] * 4},
            {"prompts": [6] * 4, "tokenizer": "sha256:u"},
            "0 questions are left for a and b, two .* lost at 'prompt' .*tokenizers or prompts differ",
        ),
        ({"lengths": [4, 4, 4, 4]}, {"lengths": [40, 40, 40, 40]}, "most were lost at 'length'"),
    ],
)
def test_what_leaves_nothing_to_compare_is_named(a: dict[str, Any], b: dict[str, Any], message: str) -> None:
    sides = [make_answers(name, **{"lengths": [20] * 4} | side) for name, side in (("a", a), ("b", b))]
    with pytest.raises(EaptkError, match=message):
        select(sides, NO_DRAW)


def test_answers_must_be_graded_first() -> None:
    answers = make_answers("a", [3, 3])
    ungraded = replace(answers, table=answers.table.drop_columns(["right"]))
    with pytest.raises(EaptkError, match=r"a.parquet is not graded yet; `eaptk grade a.parquet` does it"):
        select([ungraded, ungraded], NO_DRAW)


def test_other_tokenizers_and_answers_cut_off_are_noted() -> None:
    a = make_answers("a", [20] * 4)
    b = make_answers("b", [20] * 4, tokenizer="sha256:u", finished=False)
    assert select([a, b], NO_DRAW).notes == (
        "the tokenizer of b is not that of a; 0 of 4 kept prompts have other tokens",
        "4 of 4 answers of b were cut off at 64 tokens",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 2.0}, "bounds need 0 ≤ low < high"),
        ({"high": float("inf")}, "bounds need 0 ≤ low < high, both finite"),
        ({"balance": -1.0}, "balance is -1.0"),
        ({"balance": float("nan")}, "balance is nan"),
        ({"samples": 0}, "samples is 0"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EaptkError, match=message):
        replace(PROTOCOLS["paper-code"], **options)
