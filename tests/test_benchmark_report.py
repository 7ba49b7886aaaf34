"""Records as a page: what is wrong is said and not drawn, and nothing else than the record is."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from benchmarks.floor.tables import PARTS
from benchmarks.peers.catalogue import PEERS as CATALOGUE
from benchmarks.report import __main__ as command
from benchmarks.report import figures, readme
from benchmarks.timing import summary
from eaptk.errors import EaptkError

ENVIRONMENT = {
    "date": "2031-02-03T04:05:06+00:00",
    "commit": "abc1234",
    "processor": "a processor",
    "cores": 2,
    "python": "3",
    "torch": "t",
    "transformers": "u",
}
BOTH = {"block": 1e-6, "head": 2e-6}
MARKED = "before\n<!-- benchmarks -->\nold\n<!-- end -->\nafter\n"


def rounds(value: float) -> dict[str, Any]:
    return summary([value * (1 + i / 1000) for i in range(9)])


def level(ratio: float, target: float | None, kind: str) -> dict[str, Any]:
    return {
        "seconds": rounds(ratio),
        "ratio": rounds(ratio),
        "target": target,
        "flop_ratio": 1.01,
        "flop_ratio_full_depth": 1.02,
        "bytes_above_bare": 5_000_000,
        "contraction": {"seconds": rounds(0.01), "of": kind, "best": 2e10, "share": rounds(0.5)},
    }


def case(name: str, block: float, head: float) -> dict[str, Any]:
    found = {
        "name": name,
        "shape": name,
        "gate": {
            "errors": BOTH,
            "alone_errors": BOTH,
            "limit": 1e-5,
            "contraction_errors": {"block": 2e-7, "head": 3e-7},
        }
        | {"contraction_limit": 1e-5, "passed": True},
        "bare": {"seconds": rounds(1.0), "bytes": 100},
        "block": level(block, 1.05, "copy"),
        "head": level(head, 1.30, "product"),
    }
    for each in (found["block"], found["head"]):
        if each["ratio"]["median"] > each["target"]:
            each["profile"] = [{"operator": "aten::culprit", "seconds": 0.002, "calls": 7}]
    return found


def wrong(name: str) -> dict[str, Any]:
    found = {key: value for key, value in case(name, 1, 1).items() if key in ("name", "shape", "gate")}
    return found | {"gate": found["gate"] | {"errors": BOTH | {"block": 0.5}, "passed": False}}


FLOOR = {
    "environment": ENVIRONMENT,
    "complete": True,
    "settings": {
        "quick": False,
        "device": "CPU",
        "threads": 2,
        "minutes": 1,
        "only": [],
        "parts": list(PARTS),
    },
    "cases": [
        case("kept", 1.02, 1.2),
        case("missed", 1.02, 1.4),
        wrong("spoilt"),
        {"name": "huge", "error": "no memory"},
    ],
}
SHAPE = {"shape": "some shape", "layers": 3, "what": "its own way"}
PEERS = {
    "environment": ENVIRONMENT,
    "complete": True,
    "settings": {"peers": list(CATALOGUE), "tokens": 256, "threads": 2, "gigabytes": 8.0},
    "environments": {"fine-2": {"packages": {"fine": "2.0"}}, "gone": {"error": "no such package"}},
    "shapes": {"some shape": {}},
    "comparisons": [
        SHAPE
        | {
            "peer": "fine",
            "form": {"granularity": "head", "ablation": "patching"},
            "error": None,
            "check": {"errors": {"all": 1e-6}, "share": 1.0, "limit": 1e-4, "passed": True},
            "seconds": {
                "median": {"peer": 12.0, "eaptk": 1.0, "bare": 0.8},
                "ratio": {
                    "peer / eaptk": rounds(12),
                    "peer / bare": rounds(15),
                    "eaptk / bare": rounds(1.25),
                },
            },
            "memory": {"bytes": {"peer": [5, 900], "eaptk": [5, 200], "bare": [5, 100]}},
            "largest": {"peer": 1000, "eaptk": None},
            "accuracy": {
                who: {"float32": 1e-6, "bfloat16": 0.02, "float16": "RuntimeError: not implemented"}
                for who in ("peer", "eaptk")
            },
        },
        SHAPE | {"peer": "gone", "form": {"granularity": "head"}, "error": "no such package"},
    ],
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write records, run the command; the folder it wrote to."""

    def run(**records: Any) -> Path:
        monkeypatch.setattr(record, "ROOT", tmp_path)
        monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(command, "DOCS", tmp_path)
        monkeypatch.setattr(command, "README", tmp_path / "README.md")
        (tmp_path / "README.md").write_text(MARKED)
        record.RESULTS.mkdir(exist_ok=True)
        for name, found in records.items():
            (record.RESULTS / f"{name}.json").write_text(json.dumps(found))
        command.main([])
        return tmp_path

    return run


def test_every_case_and_peer_is_on_the_page_with_its_figures_or_its_error(written: Any) -> None:
    page = (written(floor=FLOOR, peers=PEERS) / "benchmarks.md").read_text()
    assert "| kept | 1 | **1.02**" in page
    assert "spoilt. scores are 5.0e-01 from float64" in page
    assert "huge. no memory" in page
    assert "**12.0×**" in page
    assert "gone: its own way. no such package | head | failed" in page
    assert "fine 2.0; gone: no such package" in page
    assert "RuntimeError: not implemented" in page
    assert "| kept | 1e-06 | 2e-06 | 2e-07 | 3e-07 |" in page
    assert "`python -m benchmarks.micro` makes one" in page


def test_a_missed_target_is_said_with_what_the_time_went_to(written: Any) -> None:
    page = (written(floor=FLOOR) / "benchmarks.md").read_text()
    assert (
        "block level, at most 1.05× wanted: medians are 1.02 to 1.02; by the whole interval 2 of 2 cases"
        in page
    )
    assert (
        "head level, at most 1.30× wanted: medians are 1.20 to 1.41; by the whole interval 1 of 2 cases of 256 "
        "tokens or more keep it; missed: missed." in page
    )
    assert "| `aten::culprit` | 2,000 | +7 |" in page
    assert "The contraction by itself takes 1.0% to 1.0% of the bare passes' time." in page


def test_what_was_wrong_is_not_drawn(written: Any) -> None:
    figure = (written(floor=FLOOR, peers=PEERS) / "benchmarks" / "floor.svg").read_text()
    assert "kept" in figure
    assert "spoilt" not in figure
    folder = written(
        floor=FLOOR | {"cases": [wrong("spoilt")]}, peers=PEERS | {"comparisons": PEERS["comparisons"][1:]}
    )
    assert "![" not in (folder / "benchmarks.md").read_text()


def test_peers_are_dots_beside_the_bare_passes() -> None:
    times, memory = figures.peers_figure(PEERS["comparisons"], 256).axes
    for axes, start, values in ((times, 1, (15, 1.25)), (memory, 1e-4, (9e-4, 2e-4))):
        assert axes.get_xscale() == "log"
        assert not axes.patches
        bare, *lines = axes.collections
        assert [float(segment[0, 0]) for segment in bare.get_segments()] == pytest.approx([start])
        for dots, line, value in zip(axes.lines, lines, values, strict=True):
            assert dots.get_xdata()[0] == pytest.approx(value, rel=0.01)
            assert sorted(line.get_segments()[0][:, 0]) == pytest.approx(sorted([start, dots.get_xdata()[0]]))


def test_a_run_that_was_cut_off_or_of_a_part_says_so(written: Any) -> None:
    settings = FLOOR["settings"] | {"only": ["narrow"], "parts": ["passes"]}
    page = (written(floor=FLOOR | {"complete": False, "settings": settings}) / "benchmarks.md").read_text()
    assert (
        "Not of a whole run: the run was cut off; only cases with narrow were run; not run: yardstick, "
        in page
    )
    settings = PEERS["settings"] | {"peers": ["nnsight", "dense"]}
    page = (written(peers=PEERS | {"complete": False, "settings": settings}) / "benchmarks.md").read_text()
    assert "Not of a whole run: the run was cut off; not run: transformer-lens-4, " in page
    assert "Not of a whole run" not in (written(floor=FLOOR, peers=PEERS) / "benchmarks.md").read_text()


def test_the_same_records_give_the_same_bytes(written: Any) -> None:
    def files() -> dict[str, bytes]:
        folder = written(floor=FLOOR, peers=PEERS)
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".md", ".svg")}

    assert files() == files()
    assert set(files()) == {"benchmarks.md", "README.md", "floor.svg", "peers-some shape.svg"}


def test_the_readme_is_changed_between_its_marks_alone(written: Any) -> None:
    text = (written(floor=FLOOR, peers=PEERS) / "README.md").read_text()
    assert text.startswith("before\n<!-- benchmarks -->\n![")
    assert text.endswith("\n<!-- end -->\nafter\n")
    assert (
        "head level ÷ bare forward + activation backward, 2 models and batches (2 more failed) | 1.20 to 1.41× "
        "(most: missed)" in text
    )
    assert "fine 12.0×; failed: gone" in text
    assert "spoilt" not in text


def test_the_readme_has_the_marks(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((record.ROOT / "README.md").read_text())
    readme.update(copy, "new")
    assert "<!-- benchmarks -->\nnew\n<!-- end -->" in copy.read_text()
    copy.write_text("no marks")
    with pytest.raises(EaptkError, match="must have one"):
        readme.update(copy, "new")


def test_no_record_at_all_is_an_error_that_names_the_command(written: Any) -> None:
    with pytest.raises(EaptkError, match=r"run python -m benchmarks\.floor first"):
        written()


def test_a_record_is_left_as_it_was(written: Any) -> None:
    before = deepcopy(FLOOR)
    folder = written(floor=FLOOR)
    assert json.loads((folder / "results" / "floor.json").read_text()) == before
