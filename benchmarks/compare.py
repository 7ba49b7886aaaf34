"""What changed between two records, beyond noise.

    python -m benchmarks.compare A B

A and B are commits (their benchmarks/results/), folders of records, or one record each. What machines, versions,
settings and peers' packages differ in is said first.

A ratio to what ran in the same rounds is made to travel, and is better or worse if the intervals of its medians do not
meet and the medians are further apart than 3 % and than those of the first and the last half of the rounds, on either
side. Intervals take rounds for independent, which rounds of one process are not: what drifts within one record by more
than it differs from the other has not been seen to change. What is the same all through one process and another in the
next (where memory lies, say) is in no interval; only repeated records show it. Under six rounds there is no interval,
and no verdict: such a ratio is named as undecided.

Seconds and rates are of a machine on a day, its neighbours included: where they moved, by the same measure as far as
there are rounds, is shown and is neither better nor worse. Nor is what is a peer's own.

Bytes that an allocator has counted, batches and FLOPs change by more than 1 %. Resident memory is what the system
gave, which in peers' records differs by up to 30 % from one measurement to the next: more than 25 % is a change there,
and more than 5 % in benchmarks.memory's, whose lines are straight within 1.3 %. A relative error is another when it is
half as large again or two thirds. A gate that turned and an error that came or went, in place of a figure too, always
count; one error in place of another does not.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from benchmarks import record
from benchmarks.console import wide_console
from benchmarks.timing import interval
from eaptk.errors import EaptkError

Records = dict[str, dict[str, Any]]
Kind = Literal["ratio", "seconds", "counted", "resident", "peak", "error", "failure"]
Verdict = Literal["same", "better", "worse", "moved", "undecided"]
#: Relative differences up to which two figures are the same.
LEAST = {"ratio": 0.03, "seconds": 0.03, "counted": 0.01, "resident": 0.25, "peak": 0.05, "error": 0.5}
#: Of longer lists the rest is counted.
MOST_NAMED = 8
_MORE_IS_BETTER = ("share", "processor_share", "share_of_reading", "times_the_twin", "peer / eaptk")
_RATIOS = ("ratio", *_MORE_IS_BETTER)
_COUNTED = ("bytes", "bytes_above_bare", "batches", "flop_ratio", "flop_ratio_full_depth")
_ERRORS = ("errors", "alone_errors", "contraction_errors", "accuracy")
_CLOCKS = ("seconds", "gigabytes_per_second", "best", "starting")
#: Whose numbers are no work of this code's: a peer's, and those by which its scores are held to be the same.
_PEERS_OWN = ("peer", "peer / bare", "check")
#: What a record says of how it was made, and how it is called in a line.
_MADE = {"environment": "", "settings": "", "selection": "selection", "shape": "shape", "shapes": ""}
#: Packages that matter most, and are named where not all are.
_FIRST = ("transformer-lens", "auto-circuit", "nnsight", "captum", "torch", "transformers", "numpy")
#: Medians are of what is beside them.
_NO_FIGURES = (*_MADE, "packages", "install_seconds", "profile", "median")


@dataclass(frozen=True)
class Value:
    """One figure of a record.

    Args:
        value: of a failure, in words what it is, or None where all is well.
        rounds: of what was measured in rounds, in their order.
        interval: of their median.
    """

    kind: Kind
    value: Any
    rounds: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Change:
    name: str
    before: Any
    after: Any
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Args:
    changes: figures that differ, undecided ones included.
    same: how many do not.
    only_before, only_after: names of figures that one side alone has, but not where a failure says why.
    """

    changes: list[Change]
    same: int
    only_before: list[str]
    only_after: list[str]

    def having(self, verdict: Verdict) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]


def load(where: str) -> Records:
    """Records by name.

    Raises:
        EaptkError: it is no folder, file or commit that has one.
    """
    path = Path(where)
    if path.is_file():
        return {path.stem: json.loads(path.read_text())}
    if path.is_dir():
        found = {each.stem: json.loads(each.read_text()) for each in sorted(path.glob("*.json"))}
    else:
        names = _git("ls-tree", "--name-only", where, "benchmarks/results/")
        if names is None:
            raise EaptkError(f"{where!r} is neither a folder, a file nor a commit")
        chosen = [name for name in names.split() if name.endswith(".json")]
        found = {Path(name).stem: json.loads(_git("show", f"{where}:{name}") or "{}") for name in chosen}
    if not found:
        raise EaptkError(f"{where!r} has no record of a benchmark")
    return found


def values(name: str, found: Any) -> Iterator[tuple[str, Value]]:
    """Every figure in a record that can be compared, by a name that says where it stands."""
    kind = _kind(name.split(": "))
    if isinstance(found, dict):
        if "median" in found and isinstance(found.get("each"), list):
            between = tuple(found["interval"]) if found["interval"] else None
            yield name, Value(kind or "seconds", found["median"], tuple(found["each"]), between)
            return
        for key, value in found.items():
            rounds = _rounds(key, found)
            if rounds:
                yield f"{name}: {key}", _in_rounds("ratio", rounds)
            elif key not in _NO_FIGURES:
                yield from values(f"{name}: {key}", value)
    elif isinstance(found, list):
        for value in found:
            if isinstance(value, dict) and (called := _called(value)):
                yield from values(f"{name}: {called}", value)
        if found and kind and all(isinstance(value, (int, float)) for value in found):
            yield name, _in_rounds(kind, found) if kind == "seconds" else Value(kind, found[-1])
    elif kind == "failure":
        fault = (None if found else "not passed") if isinstance(found, bool) else found
        yield name, Value("failure", fault)
    elif kind and isinstance(found, str):
        yield name, Value("failure", found)
    elif kind and isinstance(found, (int, float)):
        yield name, Value(kind, found)


def _kind(parts: Sequence[str]) -> Kind | None:
    last, above = parts[-1], parts[:-1]
    if last in ("error", "passed"):
        return "failure"
    if "bytes" in above:
        return "resident"
    if last in _COUNTED:
        return "peak" if parts[0] == "memory" else "counted"
    if any(part in _ERRORS for part in above):
        return "error"
    if last in _RATIOS or "ratio" in above:
        return "ratio"
    is_clock = any(part in _CLOCKS for part in parts) or last.endswith(("_seconds", "_per_second"))
    return "seconds" if is_clock else None


def _rounds(key: str, found: dict[str, Any]) -> list[float]:
    """Those that a ratio which is written as one number is of."""
    if key == "share_of_reading":
        reading, sweeping = found["seconds"]["read and sum"], found["seconds"]["sweep"]
        return [a / b for a, b in zip(reading, sweeping, strict=True)]
    several = found.get(f"{key}s")
    return several if key in _RATIOS and isinstance(several, list) else []


def _in_rounds(kind: Kind, rounds: Sequence[float]) -> Value:
    between = interval(rounds)
    return Value(
        kind, statistics.median(rounds), tuple(rounds), (between[0], between[1]) if between else None
    )


def _called(found: dict[str, Any]) -> str | None:
    if "name" in found:
        return str(found["name"])
    if isinstance(found.get("peer"), str):
        return f"{found['shape']}: {found['peer']}"
    if {"samples", "budget"} <= set(found):
        return f"{found['samples']} samples, budget {found['budget']}"
    return found["rows"] if isinstance(found.get("rows"), str) else None


def compare(before: Records, after: Records) -> Comparison:
    old, new = (
        dict(pair for name, found in side.items() for pair in values(name, found)) for side in (before, after)
    )
    _complete(old, new)
    _complete(new, old)
    shared = [name for name in old if name in new]
    verdicts = {name: _verdict(name, old[name], new[name]) for name in shared}
    changes = [
        Change(name, old[name].value, new[name].value, verdict)
        for name, verdict in verdicts.items()
        if verdict != "same"
    ]
    failing = tuple(
        name.removesuffix("error")
        for name in shared
        if old[name].value != new[name].value and _is_error(name)
    )
    only_before, only_after = (
        [name for name in one if name not in other and not name.startswith(failing)]
        for one, other in ((old, new), (new, old))
    )
    return Comparison(changes, len(shared) - len(changes), only_before, only_after)


def _is_error(name: str) -> bool:
    return name.endswith(": error")


def _complete(some: dict[str, Value], other: dict[str, Value]) -> None:
    """Some records name an error only where there is one: what the other side has without, went well there."""
    for name in [name for name in some if _is_error(name) and name not in other]:
        if any(each.startswith(name.removesuffix("error")) for each in other):
            other[name] = Value("failure", None)


def _verdict(name: str, old: Value, new: Value) -> Verdict:
    failed, fails = (side.kind == "failure" and side.value is not None for side in (old, new))
    if failed or fails:
        return "same" if failed and fails else "worse" if fails else "better"
    if old.kind == "failure":
        return "same"
    least = max(math.log1p(LEAST[old.kind]), _drift(old.rounds), _drift(new.rounds))
    if _apart(old.value, new.value) <= least:
        return "same"
    if old.interval and new.interval:
        if old.interval[0] <= new.interval[1] and new.interval[0] <= old.interval[1]:
            return "same"
    elif old.kind == "ratio":
        return "undecided"
    parts = name.split(": ")
    if old.kind == "seconds" or any(part in _PEERS_OWN for part in parts):
        return "moved"
    return "better" if (new.value > old.value) == (parts[-1] in _MORE_IS_BETTER) else "worse"


def _apart(one: float, other: float) -> float:
    """Logarithm of the ratio of the larger to the smaller."""
    if one == other:
        return 0.0
    return abs(math.log(other / one)) if min(one, other) > 0 else math.inf


def _drift(rounds: Sequence[float]) -> float:
    """How far the medians of the first and the last half are apart; without the middle one of an odd number."""
    half = len(rounds) // 2
    return _apart(statistics.median(rounds[:half]), statistics.median(rounds[-half:])) if half else 0.0


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=record.ROOT)
    return done.stdout if done.returncode == 0 else None


def differences(before: Records, after: Records) -> list[str]:
    """In words, what machines, versions, settings and peers' packages differ in: a line a record or environment."""
    lines = []
    for name in before:
        if name not in after:
            continue
        if each := _differing(_made(before[name]), _made(after[name])):
            lines.append(f"{name}: {', '.join(each)}")
        old, new = (side[name].get("environments", {}) for side in (before, after))
        for tool in {**old, **new}:
            packages = [side.get(tool, {}).get("packages", {}) for side in (old, new)]
            if each := _differing(*packages):
                lines.append(f"{name}, {tool}: {_some(each)}")
    return lines


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    keys = [key for key in {**old, **new} if key != "date" and old.get(key) != new.get(key)]
    keys.sort(key=lambda key: key not in _FIRST)
    return [f"{key} {old.get(key, 'none')} → {new.get(key, 'none')}" for key in keys]


def _made(found: dict[str, Any]) -> dict[str, Any]:
    """What a record says of how it was made, by name."""
    made: dict[str, Any] = {}
    for key, value in found.items():
        if key in _MADE:
            made |= _leaves(_MADE[key], value)
        elif not isinstance(value, dict) and not _is_table(value):
            made[key] = value
    return made


def _is_table(found: Any) -> bool:
    return isinstance(found, list) and any(isinstance(row, dict) for row in found)


def _leaves(prefix: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        return {prefix: found}
    return {
        name: leaf
        for key, value in found.items()
        for name, leaf in _leaves(f"{prefix} {key}".strip(), value).items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="What changed between two commits, folders or records, beyond noise.",
    )
    parser.add_argument("before", metavar="A")
    parser.add_argument("after", metavar="B")
    options = parser.parse_args(arguments)
    try:
        before, after = load(options.before), load(options.after)
    except EaptkError as error:
        sys.exit(str(error))
    for line in differences(before, after):
        print(line)
    found = compare(before, after)
    table = Table(title=f"changed from {options.before} to {options.after}")
    for heading in ("figure", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading == "figure" else "right", overflow="fold")
    colours: dict[Verdict, str] = {"worse": "red", "better": "green", "moved": "dim"}
    for verdict, colour in colours.items():
        for change in found.having(verdict):
            row = (change.name, _text(change.before), _text(change.after))
            table.add_row(
                *map(Text, row), Text(_change(change), colour)
            )  # names may have what looks like markup
    if table.row_count:
        wide_console().print(table)
    print(
        f"{len(found.having('better'))} better, {len(found.having('worse'))} worse, "
        f"{len(found.having('moved'))} moved (seconds, rates, a peer's own), {found.same} did not change"
    )
    for what, names in (
        ("too few rounds to tell", [change.name for change in found.having("undecided")]),
        (f"only in {options.before}", found.only_before),
        (f"only in {options.after}", found.only_after),
    ):
        if names:
            print(f"{len(names)} {what}: {_some(names, '; ')}")


def _some(each: Sequence[str], between: str = ", ") -> str:
    more = [f"and {len(each) - MOST_NAMED} more"] if len(each) > MOST_NAMED else []
    return between.join([*each[:MOST_NAMED], *more])


def _text(value: Any) -> str:
    if value is None:
        return "fine"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _change(change: Change) -> str:
    numbers = [
        value for value in (change.before, change.after) if isinstance(value, (int, float)) and value > 0
    ]
    return (
        f"{change.after / change.before - 1:+.1%}, {change.verdict}" if len(numbers) == 2 else change.verdict
    )


if __name__ == "__main__":
    main()
