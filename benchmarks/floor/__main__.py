"""Command line of the benchmark against the floor; see the package."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import record
from benchmarks.console import wide_console
from benchmarks.floor import host
from benchmarks.floor.passes import LEAST_TOKENS, LEVELS, measure, yardstick
from benchmarks.floor.shapes import DEVICE, Case, cases
from benchmarks.floor.tables import PARTS, host_table, passes_table
from eaptk.errors import EaptkError

#: Of the minutes, what goes to rounds of cases; checks, warming up and memory take most of what is left.
SHARE_OF_CASES = 0.5


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    console, started = Console(stderr=True), time.perf_counter()
    seconds = 60 * options.minutes
    settings = {
        "quick": options.quick,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "threads": options.threads,
        "minutes": options.minutes,
        "only": options.only,
        "parts": options.parts,
    }
    result: dict[str, Any] = {
        "environment": record.environment(),
        "complete": False,
        "settings": settings,
        "cases": [],
    }
    chosen = [case for case in cases(options.quick) if all(word in case.name for word in options.only)]
    left = seconds * SHARE_OF_CASES
    for number, case in enumerate(chosen if "passes" in options.parts else []):
        console.print(case.name, highlight=False)
        found = _measured(case, max(5.0, left / (len(chosen) - number)))
        result["cases"].append(found)
        left -= sum(sum(found[who]["seconds"]["each"]) for who in ("bare", *LEVELS) if who in found)
        record.write("floor", result, options.quick)  # a run that is cut off has what it found
        gc.collect()
    if "yardstick" in options.parts:
        console.print("the bare pass beside one written by hand")
        usual = (
            c
            for c in cases(options.quick)
            if c.n_samples * c.n_tokens >= LEAST_TOKENS and c.dtype == "float32"
        )
        result["yardstick"] = yardstick(next(usual), 10 if options.quick else 40)
    if "storing" in options.parts:
        console.print("the store beside plain writes")
        result["storing"] = host.storing(50 if options.quick else 500, 5 if options.quick else 30)
    if "sweeping" in options.parts:
        console.print("the sweep over rows beside reading them")
        result["sweeping"] = host.sweeping(0.2 if options.quick else 1.0, 7)
    if "starting" in options.parts:
        console.print("starting up")
        result["starting"] = host.starting(10 if options.quick else 20)
    result["complete"] = True
    path = record.write("floor", result, options.quick)
    out = wide_console()
    for table in (passes_table(result), host_table(result)):
        if table.row_count:
            out.print(table)
    minutes = (time.perf_counter() - started) / 60
    print(f"{minutes:.1f} minutes; written to {Path(path).relative_to(record.ROOT)}")


def _measured(case: Case, seconds: float) -> dict[str, Any]:
    try:
        return measure(case, seconds)
    except (
        RuntimeError,
        MemoryError,
        EaptkError,
    ) as error:  # of too little memory PyTorch's are RuntimeErrors
        lines = str(error).splitlines() or [""]
        return {"name": case.name, "error": f"{type(error).__name__}: {lines[0]}"}
    finally:
        case.free()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.floor",
        description="Attribution beside the bare passes, kernels beside the machine's best, and the disk.",
    )
    parser.add_argument("--quick", action="store_true", help="shallower models, fewer repetitions")
    parser.add_argument("--minutes", type=float, help="that it may take, about (18; 2 if quick)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="cases whose name has all of these words"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or (2 if options.quick else 18)
    return options


if __name__ == "__main__":
    main()
