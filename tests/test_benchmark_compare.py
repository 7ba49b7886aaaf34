"""What changed between two records: what noise explains is no change, and what it does not is one."""

from __future__ import annotations

import json
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import benchmarks.record
from benchmarks.compare import changes, load, main
from benchmarks.timing import summary
from eaptk.errors import EaptkError

STEADY = [1.0, 1.01, 0.99, 1.005, 0.995, 1.0, 1.002]
LOOSE = [1.0, 1.3, 0.8, 1.1, 0.9, 1.2, 0.85]


def record(rounds: list[float], **fields: Any) -> dict[str, Any]:
    one = {
        "name": "a case",
        "gate": {"errors": {"head": 1e-6}, "passed": True},
        "head": {"ratio": summary(rounds), "bytes_above_bare": 1000, "share": summary(rounds)},
        "error": None,
    }
    return {"floor": {"environment": {"processor": "A", "date": "1"}, "cases": [one | fields]}}


def names(before: Any, after: Any) -> dict[str, bool]:
    """Changed figures, and whether for the better."""
    return {change.name: change.better for change in changes(before, after)[0]}


def times(factor: float, rounds: list[float]) -> list[float]:
    return [factor * value for value in rounds]


def test_a_record_is_as_itself() -> None:
    found, same, alone = changes(record(STEADY), record(STEADY))
    assert (found, same, alone) == ([], 6, [])


@pytest.mark.parametrize(("factor", "better"), [(1.1, False), (0.9, True)])
def test_a_change_beyond_the_spread_is_one(factor: float, better: bool) -> None:
    found = names(record(STEADY), record(times(factor, STEADY)))
    # A ratio is better when it is smaller, a share of the machine's best when it is larger.
    assert found == {
        "floor: cases: a case: head: ratio": better,
        "floor: cases: a case: head: share": not better,
    }


@pytest.mark.parametrize(
    ("factor", "rounds"),
    [(1.1, LOOSE), (1.02, STEADY), (1.1, LOOSE[:2])],
    ids=["within the spread", "too small to matter", "two rounds that cross"],
)
def test_what_noise_explains_is_none(factor: float, rounds: list[float]) -> None:
    assert not names(record(rounds), record(times(factor, rounds)))


def test_bytes_are_counted_and_errors_are_rough() -> None:
    before, after = record(STEADY), record(STEADY)
    case = after["floor"]["cases"][0]
    case["head"]["bytes_above_bare"] = 1020
    case["gate"]["errors"]["head"] = 1.4e-6
    assert names(before, after) == {"floor: cases: a case: head: bytes_above_bare": False}
    case["gate"]["errors"]["head"] = 1.6e-6
    assert names(before, after)["floor: cases: a case: gate: errors: head"] is False


def test_a_gate_that_turns_and_an_error_that_comes_are_changes() -> None:
    before = record(STEADY)
    after = record(STEADY, gate={"errors": {"head": 1e-6}, "passed": False}, error="out of memory")
    prefix = "floor: cases: a case: "
    assert names(before, after) == {prefix + "gate: passed": False, prefix + "error": False}
    assert names(after, before) == {prefix + "gate: passed": True, prefix + "error": True}


def test_what_one_side_lacks_is_counted() -> None:
    before, after = record(STEADY), deepcopy(record(STEADY))
    after["floor"]["cases"][0]["name"] = "another"
    _, same, alone = changes(before, after)
    assert same == 0
    assert len(alone) == 12


def test_records_are_had_from_folders_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "floor.json").write_text(json.dumps(record(STEADY)["floor"]))
    other = record(times(2, STEADY))["floor"] | {"environment": {"processor": "B", "date": "2"}}
    (tmp_path / "floor.json").write_text(json.dumps(other))
    main([str(tmp_path / "a"), str(tmp_path / "floor.json")])
    printed = capsys.readouterr().out
    assert "floor: processor A → B" in printed
    assert "+100.0%, worse" in printed
    assert "2 changed beyond noise" in printed
    with pytest.raises(EaptkError, match="neither a folder, a file nor a commit"):
        load(str(tmp_path / "none"))


def test_a_commit_has_the_records_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], check=True, cwd=tmp_path, capture_output=True)

    monkeypatch.setattr(benchmarks.record, "ROOT", tmp_path)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    git("init")
    for factor in (1, 2):
        (results / "floor.json").write_text(json.dumps(record(times(factor, STEADY))["floor"]))
        git("add", ".")
        git("commit", "-m", "a record")
    found = names(load("HEAD~1"), load("HEAD"))
    assert found["floor: cases: a case: head: ratio"] is False
    with pytest.raises(EaptkError, match="neither a folder, a file nor a commit"):
        load("no-such-commit")
