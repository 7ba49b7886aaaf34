"""Command line of the report; see the package."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console

from benchmarks import record
from benchmarks.peers.comparison import ACCURACY_TOKENS
from benchmarks.report import figures, floor, peers, readme
from benchmarks.report.markdown import table
from eaptk.errors import EaptkError
from eaptk.figures import STYLE

DOCS = record.ROOT / "docs"
README = record.ROOT / "README.md"
COMMANDS = {
    "floor": floor.COMMAND,
    "peers": peers.COMMAND,
    "micro": "python -m benchmarks.micro",
    "cost_model": "python -m benchmarks.cost_model",
}
#: In which predictions are to stay.
TOLERANCE = 0.25


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Records as a page with figures."
    )
    parser.add_argument("--quick", action="store_true", help="of quick runs, into build/bench/")
    options = parser.parse_args(arguments)
    source, target = (record.QUICK, record.QUICK) if options.quick else (record.RESULTS, DOCS)
    records = read(source)
    if not records:
        raise EaptkError(f"{source} has no record; run {COMMANDS['floor']}{' --quick' * options.quick} first")
    drawn = draw(records, target / "benchmarks")
    path = target / "benchmarks.md"
    path.write_text(page(records, drawn))
    written = [path]
    if not options.quick and {"floor", "peers"} & records.keys():
        shape = next(iter(records["peers"]["shapes"]), "") if "peers" in records else ""
        figure = drawn.get(f"peers-{shape}", drawn.get("floor"))
        readme.update(README, readme.region(records, figure and f"docs/{figure}"))
        written.append(README)
    Console().print("written:", ", ".join(str(each.relative_to(record.ROOT)) for each in written))


def read(folder: Path) -> dict[str, Any]:
    """Records by name, of those that there are."""
    found = {name: folder / f"{name}.json" for name in COMMANDS}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def draw(records: dict[str, Any], folder: Path) -> dict[str, str]:
    """Figures of what was right, by name; their paths as the page beside the folder has them."""
    drawn: dict[str, str] = {}

    def save(name: str, figure: Any) -> None:
        figures.save(figure, folder / f"{name}.svg")
        drawn[name] = f"{folder.name}/{name}.svg"

    with matplotlib.rc_context(STYLE):
        if "floor" in records and floor.right(records["floor"]["cases"]):
            save("floor", figures.floor_figure(records["floor"]["cases"]))
        for shape in records.get("peers", {}).get("shapes", ()):
            found = [each for each in records["peers"]["comparisons"] if each["shape"] == shape]
            if peers.timed(found):
                save(f"peers-{shape}", figures.peers_figure(found, records["peers"]["settings"]["tokens"]))
    return drawn


def page(records: dict[str, Any], drawn: dict[str, str]) -> str:
    """The whole page."""
    parts = [
        "# Benchmarks",
        "Made by `python -m benchmarks.report` from records that the commands named here wrote; nothing is to be "
        "changed by hand. `make bench-quick` runs all of it in small, `make bench` as it stands here. "
        "`python -m benchmarks.compare A B` says what changed between two commits, folders or records beyond noise.",
        _machines(records),
        "## Against the floor",
        floor.section(records["floor"], drawn.get("floor")) if "floor" in records else _absent("floor"),
        "## Against peers",
    ]
    exact = [
        "## How exact",
        "Relative distance (Frobenius) of scores to those in float64. In half precision nearly all of it is the "
        "model's own rounding.",
    ]
    if "peers" in records:
        by_shape = {
            name.removeprefix("peers-"): path for name, path in drawn.items() if name.startswith("peers-")
        }
        parts.append(peers.section(records["peers"], by_shape))
        tokens = records["peers"]["settings"]["tokens"]
        exact += [
            f"Of one sample, in float32 of {tokens} tokens and in half precision of {ACCURACY_TOKENS}, beside each "
            "peer eaptk asked for the same:"
        ]
        exact += [peers.accuracy(records["peers"])]
    else:
        parts.append(_absent("peers"))
    if "floor" in records:
        exact += [
            "Of eaptk, 24 tokens of every case above; and of its contraction alone, of the whole batch, to that of the "
            "same operands in float64:",
            floor.exactness(records["floor"]),
        ]
    parts += [
        *(exact if len(exact) > 2 else ()),
        "## Single pieces",
        _pieces(records["micro"]) if "micro" in records else _absent("micro"),
        "## Predicted and measured",
        _predicted(records["cost_model"]) if "cost_model" in records else _absent("cost_model"),
    ]
    return "\n\n".join(parts) + "\n"


def _absent(name: str) -> str:
    return f"No record: `{COMMANDS[name]}` makes one."


def _machines(records: dict[str, Any]) -> str:
    rows = []
    for name, each in records.items():
        of = each["environment"]
        versions = f"torch {of['torch']}, transformers {of['transformers']}, Python {of['python']}"
        machine = f"{of['processor']}, {of['cores']} cores"
        rows.append([f"{name}.json", of["date"][:10], of["commit"], machine, versions])
    return table(["record", "date", "commit", "machine", "versions"], rows)


def _pieces(found: dict[str, Any]) -> str:
    rows = []
    for piece in found["pieces"].values():
        low, high = piece["seconds"]["interval"] or (None, None)
        interval = "–" if low is None else f"{low * 1e3:.3g}–{high * 1e3:.3g}"
        rows.append([piece["what"], f"{piece['seconds']['median'] * 1e3:.3g}", interval])
    return f"`{COMMANDS['micro']}`\n\n" + table(["piece", "ms", "interval"], rows)


def _predicted(found: dict[str, Any]) -> str:
    measured = found["measured"]
    held = [case for case in measured["cases"] if not case["fitted"]]
    fitted = len(measured["cases"]) - len(held)
    worst = max(held, key=lambda case: abs(case["error"]))
    return (
        f"`{COMMANDS['cost_model']}`. Two constants of one core, {measured['rate'] / 1e9:.0f} GFLOP/s and "
        f"{measured['bandwidth'] / 1e9:.1f} GB/s, fitted to {fitted} measurements, foretell {len(held)} others to "
        f"{abs(worst['error']):.0%} at worst ({TOLERANCE:.0%} wanted; the worst: {worst['model']}, width "
        f"{worst['width']}, {worst['layers']} layers, {worst['level']} level). More in [scale.md](scale.md)."
    )


if __name__ == "__main__":
    main()
