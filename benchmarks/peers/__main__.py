"""Command line of the benchmark against peers; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import record
from benchmarks.console import wide_console
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.client import HERE, ROOT, environment, packages
from benchmarks.peers.comparison import HALVES, Bench, Settings, compare, largest
from benchmarks.peers.tables import accuracies, costs
from benchmarks.peers.workload import MOST_TOKENS, SHAPES, save
from eaptk.errors import EaptkError

FOLDER = ROOT / "build" / "peers"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    console = Console(stderr=True)
    settings = Settings(
        tokens=options.tokens,
        seconds=3 if options.quick else 30,
        limit=300 if options.quick else 1800,
        threads=options.threads,
        folder=FOLDER / "run",
        halves=HALVES[:1] if options.quick else HALVES,
    )
    settings.folder.mkdir(parents=True, exist_ok=True)
    environments: dict[str, Any] = {}
    pythons: dict[str | None, Path] = {None: Path(sys.executable)}
    for name in dict.fromkeys(PEERS[peer].environment for peer in options.peers):
        if name is None:
            continue
        console.print(f"environment of {name}: made once, in minutes")
        try:
            pythons[name], seconds = environment(HERE / f"{name}.txt", FOLDER)
            environments[name] = {"packages": packages(pythons[name]), "install_seconds": seconds}
        except EaptkError as error:
            environments[name] = {"error": str(error)}

    result: dict[str, Any] = {
        "environment": record.environment(),
        "complete": False,
        "settings": {
            "quick": options.quick,
            "peers": options.peers,
            "tokens": options.tokens,
            "threads": options.threads,
            "seconds": settings.seconds,
            "gigabytes": options.gigabytes,
        },
        "environments": environments,
        "shapes": {},
        "comparisons": [],
    }
    comparisons = result["comparisons"]
    with ExitStack() as tools:
        bench = Bench(settings, tools)
        for shape in options.shapes:
            n_layers = SHAPES[shape].quick_layers if options.quick else SHAPES[shape].n_layers
            folder = FOLDER / "models" / f"{shape}-{n_layers}"
            save(SHAPES[shape], n_layers, folder)
            result["shapes"][shape] = json.loads((folder / "config.json").read_text())
            for name in options.peers:
                peer = PEERS[name]
                console.print(f"{shape}, {n_layers} layers: {name}")
                found: dict[str, Any] = {
                    "peer": name,
                    "what": peer.what,
                    "shape": shape,
                    "layers": n_layers,
                    "form": peer.form,
                    "error": environments.get(peer.environment, {}).get("error"),
                }
                if not found["error"]:
                    start = time.perf_counter()
                    found |= _compared(bench, peer, pythons[peer.environment], folder, options.gigabytes)
                    found["took"] = time.perf_counter() - start
                comparisons.append(found)
                # After each: a run of an hour that is cut off has what it found.
                record.write("peers", result, options.quick)
    result["complete"] = True
    path = record.write("peers", result, options.quick)
    out = wide_console()
    for shape in options.shapes:
        of_shape = [found for found in comparisons if found["shape"] == shape]
        out.print(costs(of_shape, options.tokens, options.gigabytes))
        out.print(accuracies(of_shape))
    print(f"written to {path.relative_to(record.ROOT)}")


def _compared(bench: Bench, peer: Peer, python: Path, folder: Path, gigabytes: float) -> dict[str, Any]:
    """All parts of one comparison that there are, the error that ended it among them."""
    found: dict[str, Any] = {"error": None}
    try:
        for part, value in compare(bench, peer, python, folder):
            found[part] = value
    except EaptkError as error:
        found["error"] = str(error)
    if memory := found.get("memory"):
        found["largest"] = {
            who: largest(memory["tokens"], peaks, gigabytes * 1e9) for who, peaks in memory["bytes"].items()
        }
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="eaptk beside its peers: scores checked, then seconds, memory and accuracy.",
    )
    parser.add_argument("--quick", action="store_true", help="one shallower model, fewer repetitions")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help="all; the first if quick"
    )
    parser.add_argument(
        "--tokens", type=int, help=f"of the sample (256; 128 if quick; at most {MOST_TOKENS // 2})"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="memory that lengths are to fit in")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or list(SHAPES)[: 1 if options.quick else None]
    options.tokens = options.tokens or (128 if options.quick else 256)
    if not 16 <= options.tokens <= MOST_TOKENS // 2:
        parser.error(
            f"--tokens must be from 16 to {MOST_TOKENS // 2}: memory is measured at twice as many too"
        )
    return options


if __name__ == "__main__":
    main()
