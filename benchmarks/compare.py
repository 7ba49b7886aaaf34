"""What changed between two records, beyond noise.

    python -m benchmarks.compare A B

A and B are commits (their benchmarks/results/), folders of records, or one record each. A time, ratio or rate that was
measured in rounds has changed if the intervals of its medians do not meet and the medians are more than 3 % apart; with
too few rounds for an interval, if no round of one is within the rounds of the other. Bytes are counted: more than 1 %
is a change. So is a relative error half as large again or two thirds, a gate that turned, an error that came or went.

Seconds compare the code only where machine and versions are the same, which is said first; ratios to what ran in turns
are made to travel.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks import record
from eaptk.errors import EaptkError

Records = dict[str, dict[str, Any]]
Kind = Literal["measured", "bytes", "error", "verdict"]
LEAST = {"measured": 0.03, "bytes": 0.01, "error": 0.5}
#: What is the better the larger it is: shares of the machine's best, and how much slower a peer is.
_MORE_IS_BETTER = ("share", "peer / eaptk", "peer / bare")
_BYTES = ("bytes", "bytes_above_bare")
_ERRORS = ("errors", "contraction_errors", "accuracy")


@dataclass(frozen=True)
class Value:
    """One figure of a record.

    Args:
        rounds: of what was measured in rounds.
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
    better: bool


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
    if isinstance(found, dict):
        if "median" in found and "each" in found and isinstance(found["each"], list):
            interval = tuple(found["interval"]) if found["interval"] else None
            yield name, Value("measured", found["median"], tuple(found["each"]), interval)
            return
        for key, value in found.items():
            if key not in ("environment", "settings", "profile"):
                yield from values(f"{name}: {key}", value)
    elif isinstance(found, list):
        for value in found:
            if isinstance(value, dict) and (called := _called(value)):
                yield from values(f"{name}: {called}", value)
        if found and all(isinstance(value, int) for value in found) and "bytes" in name:
            yield name, Value("bytes", found[-1])
    else:
        yield from _single(name, found)


def _single(name: str, found: Any) -> Iterator[tuple[str, Value]]:
    parts = name.split(": ")
    if isinstance(found, bool):
        if parts[-1] == "passed":
            yield name, Value("verdict", found)
    elif parts[-1] == "error" and (found is None or isinstance(found, str)):
        yield name, Value("verdict", found)
    elif isinstance(found, (int, float)):
        if parts[-1] in _BYTES:
            yield name, Value("bytes", found)
        elif any(part in _ERRORS for part in parts[:-1]):
            yield name, Value("error", found)


def _called(found: dict[str, Any]) -> str | None:
    if "name" in found:
        return str(found["name"])
    return f"{found['shape']}: {found['peer']}" if {"shape", "peer"} <= set(found) else None


def changes(before: Records, after: Records) -> tuple[list[Change], int, list[str]]:
    """What changed, how many figures did not, and figures that only one side has."""
    sides = [
        dict(pair for name, found in side.items() for pair in values(name, found)) for side in (before, after)
    ]
    shared = [name for name in sides[0] if name in sides[1]]
    found = [
        Change(name, old.value, new.value, _is_better(name, old, new))
        for name in shared
        for old, new in [(sides[0][name], sides[1][name])]
        if changed(old, new)
    ]
    alone = [name for name in (*sides[0], *sides[1]) if (name in sides[0]) != (name in sides[1])]
    return found, len(shared) - len(found), alone


def changed(old: Value, new: Value) -> bool:
    """Whether the two differ by more than noise."""
    if old.kind == "verdict" or new.kind == "verdict":
        return bool(old.value != new.value)
    if old.value == new.value:
        return False
    if old.value <= 0 or new.value <= 0:
        return True
    apart = abs(math.log(new.value / old.value)) > math.log1p(LEAST[old.kind])
    if old.kind != "measured":
        return apart
    (low, high), (other_low, other_high) = _range(old), _range(new)
    return apart and (high < other_low or other_high < low)


def _range(value: Value) -> tuple[float, float]:
    return value.interval or (min(value.rounds), max(value.rounds))


def _is_better(name: str, old: Value, new: Value) -> bool:
    if old.kind == "verdict":
        return new.value is True or new.value is None
    more = name.split(": ")[-1] in _MORE_IS_BETTER
    return bool((new.value > old.value) == more)


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=record.ROOT)
    return done.stdout if done.returncode == 0 else None


def _differences(before: Records, after: Records) -> list[str]:
    """In words, what machines and versions differ in."""
    lines = []
    for name in before:
        old, new = (side.get(name, {}).get("environment", {}) for side in (before, after))
        differ = [key for key in old if key != "date" and key in new and old[key] != new[key]]
        if differ:
            lines.append(f"{name}: " + ", ".join(f"{key} {old[key]} → {new[key]}" for key in differ))
    return lines


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
    console = Console()
    for line in _differences(before, after):
        console.print(line, highlight=False)
    found, same, alone = changes(before, after)
    table = Table(title=f"changed from {options.before} to {options.after}")
    for heading in ("figure", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading == "figure" else "right", overflow="fold")
    for change in found:
        colour = "green" if change.better else "red"
        table.add_row(
            change.name, _text(change.before), _text(change.after), f"[{colour}]{_change(change)}[/]"
        )
    if found:
        console.print(table)
    console.print(
        f"{len(found)} changed beyond noise, {same} did not, {len(alone)} are in one of the two alone"
    )


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _change(change: Change) -> str:
    word = "better" if change.better else "worse"
    numbers = [
        value for value in (change.before, change.after) if isinstance(value, (int, float)) and value > 0
    ]
    return f"{change.after / change.before - 1:+.1%}, {word}" if len(numbers) == 2 else word


if __name__ == "__main__":
    main()
