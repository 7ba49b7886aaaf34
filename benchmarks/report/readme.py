"""The README's figure and table, between two marks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.floor.tables import fault_of, interval_text
from benchmarks.report.floor import right
from benchmarks.report.markdown import table
from benchmarks.report.peers import timed
from eaptk.errors import EaptkError

_FLOOR = "`python -m benchmarks.floor`"
_REGION = re.compile(r"(?<=<!-- benchmarks -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


def update(path: Path, region: str) -> None:
    """Put `region` between the marks.

    Raises:
        EaptkError: they are not there.
    """
    text, found = _REGION.subn(lambda match: region, path.read_text())
    if found != 1:
        raise EaptkError(f"{path} must have one <!-- benchmarks --> … <!-- end -->; it has {found}")
    path.write_text(text)


def region(records: dict[str, Any], figure: str | None) -> str:
    """Markdown of what there are records of."""
    lines = [f"![eaptk beside the bare passes or its peers]({figure})\n"] if figure else []
    rows = [*_floor(records.get("floor")), *_peers(records.get("peers"))]
    return "\n".join([*lines, table(["", "measured", "command"], rows)])


def _floor(record: dict[str, Any] | None) -> list[list[str]]:
    if record is None:
        return []
    rows = []
    cases = right(record["cases"])
    for level in ("block", "head"):
        judged = [case for case in cases if case[level]["target"] and case[level]["ratio"]["interval"]]
        if not judged:
            continue
        ratios = sorted((case[level]["ratio"]["median"], case["name"]) for case in judged)
        (low, _), (high, name) = ratios[0], ratios[-1]
        what = f"{level} level ÷ bare forward + activation backward, {len(judged)} models and batches"
        missing = {"failed": len(record["cases"]) - len(cases)}
        missing["in too few rounds"] = sum(bool(case[level]["target"]) for case in cases) - len(judged)
        if more := [f"{n} more {why}" for why, n in missing.items() if n]:
            what += f" ({', '.join(more)})"
        rows.append([what, f"{low:.2f} to {high:.2f}× (most: {name})", _FLOOR])
    narrow = [case for case in cases if case["shape"] == "Qwen2, narrow"]
    if narrow:
        head = narrow[0]["head"]
        rows.append(
            [
                f"memory above the bare pass, head level, {narrow[0]['name']}",
                f"{head['bytes_above_bare'] / 1e6:.0f} MB",
                _FLOOR,
            ]
        )
    sweeping, storing = record.get("sweeping"), record.get("storing")
    if sweeping and fault_of(sweeping) is None:
        speed = sweeping["gigabytes_per_second"]
        share = sweeping["share_of_reading"]
        rows.append(
            [
                "metrics sweep over rows",
                f"{speed['sweep']:.0f} GB/s, {share:.0%} of reading and summing them",
                _FLOOR,
            ]
        )
    if storing and fault_of(storing) is None:
        ratio = storing["ratio"]
        rows.append(
            [
                "rows to disk ÷ plain sequential writes of the same bytes",
                f"{ratio['median']:.2f}× ({interval_text(ratio, 2)})",
                _FLOOR,
            ]
        )
    return rows


def _peers(record: dict[str, Any] | None) -> list[list[str]]:
    if record is None:
        return []
    rows = []
    for shape in record["shapes"]:
        of_shape = timed([each for each in record["comparisons"] if each["shape"] == shape])
        failed = [each for each in record["comparisons"] if each["shape"] == shape and each not in of_shape]
        for level in ("head", "block"):
            found = [each for each in of_shape if each["form"]["granularity"] == level]
            if not found:
                continue
            times = ", ".join(
                f"{each['peer'].removesuffix('-block')} {_times(each['seconds']['ratio']['peer / eaptk'])}"
                for each in found
            )
            lost = [each["peer"] for each in failed if each["form"]["granularity"] == level]
            times += f"; failed: {', '.join(lost)}" if lost else ""
            tokens = record["settings"]["tokens"]
            what = f"peers ÷ eaptk, {level} level, {shape}, {tokens} tokens"
            rows.append([what, times, "`python -m benchmarks.peers`"])
    return rows


def _times(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.1f}×" + " (one round)" * (len(ratio["each"]) == 1)
