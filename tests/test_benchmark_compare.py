"""What changed between two records: what noise explains is no change, and what it does not is one."""

from __future__ import annotations

import json
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import benchmarks.record
from benchmarks.compare import compare, differences, load, main
from benchmarks.timing import summary
from eaptk.errors import EaptkError

STEADY = [1.0, 1.01, 0.99, 1.005, 0.995, 1.0, 1.002]
LOOSE = [1.0, 1.3, 0.8, 1.1, 0.9, 1.2, 0.85]
CASE = "floor: cases: a case: "
PEER = "peers: comparisons: a shape: a tool: "


def record(rounds: list[float], **fields: Any) -> dict[str, Any]:
    one = {
        "name": "a case",
        "gate": {"errors": {"head": 1e-6}, "passed": True},
        "head": {"ratio": summary(rounds), "bytes_above_bare": 1000, "share": summary(rounds)},
    }
    return {"floor": {"environment": {"processor": "A", "date": "1"}, "cases": [one | fields]}}


def peers(
    *, seconds: list[float] = STEADY, peak: int = 1000, error: float | str = 0.01, torch: str = "1"
) -> dict[str, Any]:
    """A record of one peer, whose own figures these are."""
    one = {
        "peer": "a tool",
        "shape": "a shape",
        "error": None,
        "seconds": {
            "each": {"peer": seconds, "eaptk": STEADY},
            "median": {"peer": 1.0, "eaptk": 1.0},
            "ratio": {"peer / eaptk": summary(STEADY), "peer / bare": summary(seconds)},
        },
        "memory": {"tokens": [64, 128], "bytes": {"peer": [500, 1000], "eaptk": [500, peak]}},
        "accuracy": {"peer": {"bfloat16": error}, "eaptk": {"bfloat16": 0.01}},
    }
    tools = {"a tool": {"packages": {"torch": torch, "numpy": "2"}, "install_seconds": 1.0}}
    return {"peers": {"environments": tools, "comparisons": [one]}}


def verdicts(before: Any, after: Any) -> dict[str, str]:
    """Of figures that differ."""
    return {change.name: change.verdict for change in compare(before, after).changes}


def printed(folder: Path, capsys: pytest.CaptureFixture[str], before: Any, after: Any) -> str:
    for name, side in (("a", before), ("b", after)):
        (folder / name).mkdir()
        for called, found in side.items():
            (folder / name / f"{called}.json").write_text(json.dumps(found))
    main([str(folder / "a"), str(folder / "b")])
    return capsys.readouterr().out


def times(factor: float, rounds: list[float]) -> list[float]:
    return [factor * value for value in rounds]


@pytest.mark.parametrize("found", [record(STEADY), peers()], ids=["floor", "peers"])
def test_a_record_is_as_itself(found: dict[str, Any]) -> None:
    compared = compare(found, deepcopy(found))
    assert (compared.changes, compared.only_before, compared.only_after) == ([], [], [])
    assert compared.same > 4


@pytest.mark.parametrize(("factor", "less", "more"), [(1.1, "worse", "better"), (0.9, "better", "worse")])
def test_a_ratio_beyond_its_spread_is_another(factor: float, less: str, more: str) -> None:
    found = verdicts(record(STEADY), record(times(factor, STEADY)))
    # A ratio is better when it is smaller, a share of the machine's best when it is larger.
    assert found == {CASE + "head: ratio": less, CASE + "head: share": more}


@pytest.mark.parametrize(
    ("factor", "rounds"),
    [(1.1, LOOSE), (1.02, STEADY), (1.1, LOOSE[:2])],
    ids=["within the spread", "too small to matter", "two rounds that cross"],
)
def test_what_noise_explains_is_none(factor: float, rounds: list[float]) -> None:
    assert not verdicts(record(rounds), record(times(factor, rounds)))


def test_what_drifts_by_more_than_it_differs_is_no_change() -> None:
    """The same rounds, so the same interval, which is far from the other side's: only their order tells."""
    mixed = [1.06, 1.18, 1.1, 1.04, 1.2, 1.05, 1.17]
    assert verdicts(record(STEADY), record(mixed))[CASE + "head: ratio"] == "worse"
    assert not verdicts(record(STEADY), record(sorted(mixed)))
    assert not verdicts(record(sorted(mixed)), record(STEADY))


def test_under_six_rounds_there_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = record(STEADY[:5]), record(times(2, STEADY))
    assert set(verdicts(before, after).values()) == {"undecided"}
    said = printed(tmp_path, capsys, before, after)
    assert "0 better, 0 worse" in said
    assert f"2 too few rounds to tell: {CASE}head: ratio; {CASE}head: share" in said


def test_seconds_move_and_are_neither_better_nor_worse() -> None:
    def micro(factor: float) -> dict[str, Any]:
        rounds = times(factor, STEADY)
        return {"micro": {"pieces": {"a piece": {"seconds": summary(rounds), "rounds": len(rounds)}}}}

    assert verdicts(micro(1), micro(2)) == {"micro: pieces: a piece: seconds": "moved"}
    assert not verdicts(micro(1), micro(1.02))


def test_sweeps_and_throughput_are_compared() -> None:
    def sweep(factor: float) -> dict[str, Any]:
        seconds = {"read and sum": STEADY, "sweep": times(factor, STEADY), "numpy twin": [100.0]}
        one = {"rows": "gaussian", "seconds": seconds, "gigabytes_per_second": {"sweep": 20 / factor}}
        return {
            "sweep": {"results": [one | {"share_of_reading": 1 / factor, "times_the_twin": 100 / factor}]}
        }

    prefix = "sweep: results: gaussian: "
    assert verdicts(sweep(1.5), sweep(2)) == {
        prefix + "seconds: sweep": "moved",
        prefix + "gigabytes_per_second: sweep": "moved",
        prefix + "share_of_reading": "worse",
        prefix + "times_the_twin": "undecided",
    }

    def throughput(factor: float, rounds: int = 2) -> dict[str, Any]:
        shares = times(0.8 * factor, STEADY[:rounds])
        row = {"tokens_per_second": 2000 * factor, "share": summary(shares)["median"], "shares": shares}
        plan = {"samples": 10, "budget": 64, "batches": round(100 / factor), "seconds": 0.1}
        return {"throughput": {"rows": {"block": row}, "plans": [plan]}}

    assert verdicts(throughput(1), throughput(1.1)) == {
        "throughput: rows: block: tokens_per_second": "moved",
        "throughput: rows: block: share": "undecided",
        "throughput: plans: 10 samples, budget 64: batches": "better",
    }
    assert verdicts(throughput(1, 7), throughput(1.1, 7))["throughput: rows: block: share"] == "better"


def test_bytes_are_counted_and_errors_are_rough() -> None:
    before, after = record(STEADY), record(STEADY)
    case = after["floor"]["cases"][0]
    case["head"]["bytes_above_bare"] = 1020
    case["gate"]["errors"]["head"] = 1.4e-6
    assert verdicts(before, after) == {CASE + "head: bytes_above_bare": "worse"}
    case["gate"]["errors"]["head"] = 1.6e-6
    assert verdicts(before, after)[CASE + "gate: errors: head"] == "worse"


def test_resident_memory_is_what_the_system_gave() -> None:
    assert not verdicts(peers(), peers(peak=1240))
    assert verdicts(peers(), peers(peak=1300)) == {PEER + "memory: bytes: eaptk": "worse"}

    def longest(peak: int) -> dict[str, Any]:
        return {"memory": {"tokens": [256, 512], "rows": {"block": {"bytes": [600, peak]}}}}

    assert not verdicts(longest(1000), longest(1040))
    assert verdicts(longest(1000), longest(1060)) == {"memory: rows: block: bytes": "worse"}


def test_what_is_a_peers_own_moves() -> None:
    assert verdicts(peers(), peers(seconds=times(2, STEADY), error=0.02)) == {
        PEER + "seconds: each: peer": "moved",
        PEER + "seconds: ratio: peer / bare": "moved",
        PEER + "accuracy: peer: bfloat16": "moved",
    }


def test_a_gate_that_turns_and_an_error_that_comes_are_changes() -> None:
    """A case that went well has no word of errors."""
    before = record(STEADY)
    after = record(STEADY, gate={"errors": {"head": 1e-6}, "passed": False}, error="out of memory")
    assert verdicts(before, after) == {CASE + "gate: passed": "worse", CASE + "error": "worse"}
    assert verdicts(after, before) == {CASE + "gate: passed": "better", CASE + "error": "better"}
    assert not verdicts(
        after, record(STEADY, gate=after["floor"]["cases"][0]["gate"], error="no such kernel")
    )


def test_a_case_that_fails_is_named_once() -> None:
    before, after = record(STEADY), {"floor": {"cases": [{"name": "a case", "error": "out of memory"}]}}
    compared = compare(before, after)
    assert [(change.name, change.verdict) for change in compared.changes] == [(CASE + "error", "worse")]
    assert (compared.only_before, compared.only_after) == ([], [])


def test_an_error_in_place_of_a_figure_is_a_change() -> None:
    fails = peers(error="NotImplementedError: no bfloat16")
    assert verdicts(peers(), fails) == {PEER + "accuracy: peer: bfloat16": "worse"}
    assert verdicts(fails, peers()) == {PEER + "accuracy: peer: bfloat16": "better"}
    assert not verdicts(fails, peers(error="another"))


def test_what_one_side_lacks_is_named() -> None:
    before, after = record(STEADY), record(STEADY, name="another")
    compared = compare(before, after)
    assert compared.same == 0
    assert len(compared.only_before) == len(compared.only_after) == 5
    assert CASE + "head: ratio" in compared.only_before
    assert "floor: cases: another: head: ratio" in compared.only_after


def test_settings_and_packages_are_said_and_are_no_figures() -> None:
    before, after = peers(), peers(torch="2")
    before["peers"] |= {"settings": {"threads": 1}, "complete": True, "shapes": {"a shape": {"n_layer": 3}}}
    after["peers"] |= {"settings": {"threads": 2}, "complete": False, "shapes": {"a shape": {"n_layer": 4}}}
    del after["peers"]["environments"]["a tool"]["packages"]["numpy"]
    assert differences(before, after) == [
        "peers: threads 1 → 2, complete True → False, a shape n_layer 3 → 4",
        "peers, a tool: torch 1 → 2, numpy 2 → none",
    ]
    assert compare(before, after).changes == []


def test_packages_that_matter_are_named_of_many() -> None:
    others = {f"a{number}": "1" for number in range(20)}
    before, after = (
        {"peers": {"environments": {"a tool": {"packages": {**others, "torch": "1"}}}}},
        {"peers": {"environments": {"a tool": {"packages": {"torch": "2"}}}}},
    )
    (line,) = differences(before, after)
    assert line.startswith("peers, a tool: torch 1 → 2, a0 1 → none, ")
    assert line.endswith(", and 13 more")


def test_long_lists_end_in_a_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = {f"contraction[{piece}]": {"seconds": summary(STEADY)} for piece in range(12)}
    said = printed(tmp_path, capsys, {"micro": {"pieces": pieces}}, {"micro": {"pieces": {}}})
    assert "micro: pieces: contraction[0]: seconds" in said
    assert "contraction[11]" not in said
    assert said.rstrip().endswith("and 4 more")


def test_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (
        {"micro": {"pieces": {"python[block]": {"seconds": summary(times(factor, STEADY))}}}}
        for factor in (1, 2)
    )
    assert "python[block]" in printed(tmp_path, capsys, before, after)


def test_records_are_had_from_folders_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "floor.json").write_text(json.dumps(record(STEADY)["floor"]))
    other = record(times(2, STEADY))["floor"] | {"environment": {"processor": "B", "date": "2"}}
    (tmp_path / "floor.json").write_text(json.dumps(other))
    main([str(tmp_path / "a"), str(tmp_path / "floor.json")])
    said = capsys.readouterr().out
    assert "floor: processor A → B" in said
    assert "+100.0%, worse" in said
    assert "1 better, 1 worse" in said
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
    found = verdicts(load("HEAD~1"), load("HEAD"))
    assert found[CASE + "head: ratio"] == "worse"
    with pytest.raises(EaptkError, match="neither a folder, a file nor a commit"):
        load("no-such-commit")
