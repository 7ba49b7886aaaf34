"""The sweep over score rows beside its numpy twin, and beside only reading the same bytes.

Prediction: a plain sum runs at the machine's memory bandwidth. The sweep takes some 55 vector operations, two a
cycle at best, and 16 counter updates for 32 elements: about 1.1 cycles an element, hence near 25 GB/s on two
cores of 3.6 GHz, two thirds of what their memory delivers. What comes out is 20 GB/s beside 28 to 42 of reading,
which depends on the machine's neighbours: 0.30 ns of arithmetic an element and thread, 0.04 of mapping pages, the
rest waiting for memory.

The file is read through a fresh memory map each time, from a warm page cache: a cold one measures the disk.
Rows have the width of a 7B model at head level. All contenders run alternately in one process; the fastest
repetition of each is reported, of the twin one run over an eighth of the rows, scaled up.

    python -m benchmarks.sweep [--gigabytes 2]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks import record
from eaptk import Graph, _native
from eaptk.sweep import _threads, sweep

TWIN_FACTOR, READ_SHARE = 4.0, 0.6
BINS = 100
#: The twin takes a minute for 2 GB: it reads every so-many-th row, and its time is scaled up.
TWIN_PART = 8

#: Qwen2.5-7B: 28 layers, 28 query and 4 key/value heads.
WIDTH = Graph(28, 28, 4, granularity="head").n_edges

Rows = npt.NDArray[np.float32]


def write_rows(path: Path, n_rows: int, kind: str) -> float:
    """Rows of one distribution, a few of them repeated; returns the largest size."""
    rng = np.random.default_rng(0)
    few = min(n_rows, 16)
    draw = rng.standard_normal if kind == "gaussian" else lambda shape: rng.standard_t(3, shape)
    rows = draw((few, WIDTH)).astype(np.float32)
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n_rows, WIDTH))
    for start in range(0, n_rows, few):
        mapped[start : start + few] = rows[: min(few, n_rows - start)]
    mapped.flush()
    return float(np.abs(rows).max())


def seconds(work: Callable[[Rows], Any], path: Path) -> float:
    """Wall time of one call, mapping the file included."""
    started = time.perf_counter()
    work(np.load(path, mmap_mode="r"))
    return time.perf_counter() - started


def measure(kind: str, gigabytes: float, repetitions: int) -> dict[str, Any]:
    """GB/s of every contender on rows of one distribution."""
    n_rows = max(1, round(gigabytes * 1e9 / (4 * WIDTH)))
    threads = _threads(None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.npy"
        upper = write_rows(path, n_rows, kind)
        contenders: dict[str, Callable[[Rows], Any]] = {
            "read and sum": lambda rows: _native.read_sum(rows, threads),
            "sweep": lambda rows: sweep(rows, bins=BINS, upper=upper),
            "sweep, moments only": lambda rows: sweep(rows),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for work in contenders.values():
            seconds(work, path)
        for _ in range(repetitions):
            for name, work in contenders.items():
                times[name].append(seconds(work, path))
        part = range(0, n_rows, TWIN_PART)
        twin = seconds(lambda rows: sweep(rows, part, bins=BINS, upper=upper, backend="numpy"), path)
    size = n_rows * WIDTH * 4 / 1e9
    twin *= n_rows / len(part)
    speeds = {name: size / min(each) for name, each in times.items()} | {"numpy twin": size / twin}
    return {
        "rows": kind,
        "shape": [n_rows, WIDTH],
        "gigabytes": size,
        "threads": threads,
        "seconds": times | {"numpy twin": [twin]},
        "gigabytes_per_second": speeds,
        "times_the_twin": speeds["sweep"] / speeds["numpy twin"],
        "share_of_reading": speeds["sweep"] / speeds["read and sum"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the file of rows")
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    results = [
        measure(kind, arguments.gigabytes, arguments.repetitions) for kind in ("gaussian", "heavy-tailed")
    ]

    table = Table(
        title=f"sweep over {arguments.gigabytes:g} GB of rows, {results[0]['threads']} threads, GB/s"
    )
    names = list(results[0]["gigabytes_per_second"])
    for heading in ("rows", *names, f"× twin (≥ {TWIN_FACTOR:g})", f"of reading (≥ {READ_SHARE:.0%})"):
        table.add_column(heading, justify="left" if heading == "rows" else "right")
    for result in results:
        table.add_row(
            result["rows"],
            *(f"{result['gigabytes_per_second'][name]:.2f}" for name in names),
            f"{result['times_the_twin']:.0f}",
            f"{result['share_of_reading']:.0%}",
        )
    Console().print(table)
    avx512 = _native.has_avx512()
    print("wrote", record.write("sweep", {"avx512": avx512, "bins": BINS, "results": results}))


if __name__ == "__main__":
    main()
