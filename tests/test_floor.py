"""The benchmark against the floor: nothing wrong is timed, and what is timed is what it says."""

from __future__ import annotations

import gc
import io
import json
import weakref
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accounting import flops

from benchmarks import record
from benchmarks.floor import __main__ as command
from benchmarks.floor import host, passes
from benchmarks.floor.shapes import SHAPES, Case, Shape, cases, in_float64
from benchmarks.floor.tables import host_lines, passes_table, verdict
from benchmarks.timing import MOST_ROUNDS, in_turns, interval, ratios, summary
from eaptk import Graph, _native, attribute
from kernels import native

TINY = {"tiny": Shape("qwen2", 3, 64, (4, 2), 96), "tiny gpt2": Shape("gpt2", 3, 64, (4, 4), 96)}
CASE = Case("tiny", layers=3, n_samples=2, n_tokens=40)


@pytest.fixture(autouse=True, scope="module")
def tiny_shapes() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, shape in TINY.items():
            patch.setitem(SHAPES, name, shape)
        yield


def turns(names: str, **arguments: Any) -> tuple[str, dict[str, list[float]]]:
    """Who ran, in order, and what in_turns made of each saying its place in it."""
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    taken = in_turns({name: lambda name=name: run(name) for name in names}, 60, **arguments)
    return "".join(order), taken


def test_contenders_take_turns_and_warm_up_does_not_count() -> None:
    order, taken = turns("ab", warm_up=1, most=3)
    assert order[:2] == "ab"
    assert [sorted(order[i : i + 2]) for i in (2, 4, 6)] == [["a", "b"]] * 3
    assert [each - 1 for each in taken["a"]] == [i for i, name in enumerate(order) if name == "a" and i > 1]


def test_everyone_comes_after_everyone_else_and_never_after_itself() -> None:
    order, _ = turns("abc", warm_up=0, most=25)
    followed = [order[i : i + 2] for i in range(len(order) - 1)]
    for pair in ("ab", "ac", "ba", "bc", "ca", "cb"):
        assert followed.count(pair) >= 6
    assert not {"aa", "bb", "cc"} & set(followed)
    assert order == turns("abc", warm_up=0, most=25)[0]


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 1), (1000, MOST_ROUNDS)])
def test_rounds_are_as_many_as_there_is_time_for(seconds: float, rounds: int) -> None:
    assert len(in_turns({"a": lambda: 1.0}, seconds)["a"]) == rounds


def test_ratios_are_of_one_round() -> None:
    found = ratios({"own": [2.0, 30.0, 5.0], "bare": [1.0, 10.0, 5.0]}, "own", "bare")
    assert found == {"median": 2.0, "interval": None, "each": [2.0, 3.0, 1.0]}


def test_an_interval_holds_the_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    median = float(torch.tensor(0.5).exp())
    for n in (6, 9, 25):
        draws = torch.rand(4000, n, generator=generator).exp().tolist()
        intervals = [interval(draw) or [0, 0] for draw in draws]
        share = sum(low <= median <= high for low, high in intervals) / len(intervals)
        assert 0.945 < share < 0.985
    assert interval([1.0] * 5) is None


def test_every_shape_of_the_suite_is_measured_quickly_and_at_length() -> None:
    published = set(SHAPES) - set(TINY)
    for quick in (True, False):
        assert {case.shape for case in cases(quick)} == published
        assert len({case.name for case in cases(quick)}) == len(list(cases(quick)))
    lengths = {case.n_tokens for case in cases(False)}
    assert {64, 8192} <= lengths


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_as_before_once_they_are_no_longer_wider(dtype: str) -> None:
    model = replace(CASE, dtype=dtype).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with in_float64(model):
        assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("level", passes.LEVELS)
def test_what_is_caught_contracts_to_the_scores(
    shape: str, level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASE, shape=shape)
    graph = Graph.from_model(case.model, level)
    with passes.caught() as calls:
        rows = attribute(case.model, case.batch(), graph).rows
    (call,) = calls
    assert torch.equal(call.run(), rows)
    assert passes.distance(call.in_float64().run(), rows) < 1e-5
    # Groups multiply some pairs that are no edges; what is counted is those that are. Torch sees no compiled loops.
    monkeypatch.setenv("EAPTK_BACKEND", "reference")
    assert 0.4 * flops(call.run) < call.flops <= flops(call.run)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The record and the printed tables of a run over one case that is right, one wrong, one too large."""
    folder = tmp_path_factory.mktemp("floor")
    wrong = replace(CASE, dtype="bfloat16")
    huge = Case("tiny", layers=1, n_samples=1, n_tokens=2**40)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(record, "QUICK", folder)
        patch.setattr(record, "ROOT", folder)
        patch.setattr(command, "cases", lambda quick: [CASE, wrong, huge])
        patch.setitem(passes.LIMITS, "bfloat16", 1e-6)
        patch.setitem(passes.TARGETS, "head", 1e-3)
        patch.setattr(passes, "LEAST_TOKENS", 1)
        patch.setattr(passes, "COPIED", 2**16)
        patch.setattr(passes, "SQUARE", 64)
        patch.setattr(host, "GRAPH", Graph(2, 2, 2))
        patch.setattr(host, "STARTS", {"python": ["-c", "pass"]})
        patch.setenv("COLUMNS", "200")
        patch.delenv("EAPTK_BACKEND", raising=False)
        command.main(["--quick", "--minutes", "0.02", "--threads", "1", "--parts", "passes", "starting"])
    return json.loads((folder / "floor.json").read_text()), printed.getvalue()


def test_a_case_that_is_right_is_measured(whole_run: tuple[dict[str, Any], str]) -> None:
    (found,) = [case for case in whole_run[0]["cases"] if case["name"] == CASE.name]
    assert found["gate"]["passed"]
    for kind in ("errors", "alone_errors", "contraction_errors"):
        assert max(found["gate"][kind].values()) < 1e-5
    for level in passes.LEVELS:
        assert 0.8 < found[level]["ratio"]["median"] < 10
        assert 1 < found[level]["flop_ratio"] <= found[level]["flop_ratio_full_depth"]
        assert found[level]["bytes_above_bare"] > 0
        assert 0 < found[level]["contraction"]["share"]["median"] < 2
    assert len(found["block"]["ratio"]["each"]) == len(found["bare"]["seconds"]["each"])


def test_where_a_target_is_missed_it_is_said_what_the_time_went_to(
    whole_run: tuple[dict[str, Any], str],
) -> None:
    found = whole_run[0]["cases"][0]
    operators = {line["operator"] for line in found["head"]["profile"]}
    assert operators & ({native.NAME} if _native.lanes() else {"aten::bmm", "aten::baddbmm", "aten::mm"})


def test_a_case_with_wrong_scores_is_not_timed(whole_run: tuple[dict[str, Any], str]) -> None:
    found = whole_run[0]["cases"][1]
    assert not found["gate"]["passed"]
    assert "block" not in found
    assert "(limit 1e-06)" in whole_run[1]


def test_a_case_that_cannot_be_run_is_reported_and_not_dropped(whole_run: tuple[dict[str, Any], str]) -> None:
    found = whole_run[0]["cases"][2]
    assert set(found) == {"name", "error"}
    assert "1×1,099,511,627,776" in whole_run[1]
    assert len(passes_table(whole_run[0]).rows) == 4


def test_a_run_says_what_it_was_asked_for_and_that_it_came_to_its_end(
    whole_run: tuple[dict[str, Any], str],
) -> None:
    assert whole_run[0]["complete"]
    assert whole_run[0]["settings"]["parts"] == ["passes", "starting"]


def test_a_model_is_let_go_of_when_its_case_is_done() -> None:
    case = replace(CASE)
    model = weakref.ref(case.model)
    case.free()
    gc.collect()
    assert model() is None


def test_a_pass_written_by_hand_is_the_bare_pass() -> None:
    found = passes.yardstick(replace(CASE), 0.5)
    assert found["case"] == CASE.name
    assert 0.3 < found["ratio"]["median"] < 3


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([1.0] * 9, "kept"),
        ([1.2] * 9, "missed"),
        ([1.0, 1.2] * 5, "undecided"),
        ([1.0, 1.2, 1.0], "undecided"),
        ([1.2] * 5, "undecided"),
    ],
)
def test_a_target_is_kept_or_missed_only_by_the_whole_interval(rounds: list[float], said: str) -> None:
    assert verdict({"target": 1.05, "ratio": summary(rounds)}) == said
    assert verdict({"target": None, "ratio": summary(rounds)}) is None


def test_the_store_writes_what_the_plain_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "GRAPH", Graph(2, 2, 2))
    found = host.storing(0, 0.1, tmp_path)
    assert found["gate"]["passed"]
    assert found["bytes"] == host.ROWS_A_BATCH * host.GRAPH.n_edges * 4
    assert found["ratio"]["median"] > 0
    assert not list(tmp_path.iterdir())
    ((_, measured, beside),) = host_lines({"storing": found})
    assert "GB/s" in measured
    assert "plain writes" in beside
