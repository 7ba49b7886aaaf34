"""Runs the pieces, records and prints them; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.timing import summary

MOST_KEPT = 99


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro", description="Single pieces, timed.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    environment = record.environment()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pieces.json"
        failed = pytest.main(
            [
                str(Path(__file__).parent / "test_pieces.py"),
                "--quiet",
                "--disable-warnings",
                "--override-ini=addopts=--import-mode=importlib",
                f"--basetemp={folder}/work",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",  # it turns the measuring off
                "--benchmark-quiet",
                "--benchmark-save-data",
                "--benchmark-disable-gc",
                "--benchmark-warmup=on",
                f"--benchmark-max-time={0.3 if options.quick else 2}",
                "--benchmark-min-rounds=7",
                f"--benchmark-json={path}",
            ]
        )
        if failed:
            print("a piece is wrong: nothing is recorded", file=sys.stderr)
            return int(failed)
        found = json.loads(path.read_text())["benchmarks"]
    pieces = {each["name"].removeprefix("test_"): _piece(each) for each in found}
    Console().print(_table(pieces))
    result = {
        "environment": environment,
        "quick": options.quick,
        "threads": options.threads,
        "pieces": pieces,
    }
    written = record.write("micro", result, options.quick)
    print(f"written to {written.relative_to(record.ROOT)}")
    return 0


def _piece(found: dict[str, Any]) -> dict[str, Any]:
    rounds = found["stats"]["data"]
    step = -(-len(rounds) // MOST_KEPT)
    return {"what": found["extra_info"]["what"], "seconds": summary(rounds[::step]), "rounds": len(rounds)}


def _table(pieces: dict[str, Any]) -> Table:
    table = Table(title="Single pieces")
    for heading in ("piece", "milliseconds", "interval"):
        table.add_column(heading, justify="left" if heading == "piece" else "right")
    for piece in pieces.values():
        low, high = piece["seconds"]["interval"] or [float("nan")] * 2
        table.add_row(
            piece["what"],
            f"{piece['seconds']['median'] * 1e3:.3f}",
            f"{low * 1e3:.3f}–{high * 1e3:.3f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
