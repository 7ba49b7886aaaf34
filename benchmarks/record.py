"""One JSON file a benchmark, with all that is needed to compare it years later."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: Records of quick runs, which say whether all works and not how fast it is: none is committed.
QUICK = ROOT / "build" / "bench"


def environment() -> dict[str, Any]:
    """Machine, versions and commit, of now: to be asked for when measuring begins."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "eaptk")},
    }


def write(name: str, result: dict[str, Any], quick: bool = False) -> Path:
    """Write benchmarks/results/{name}.json, or build/bench/{name}.json of a quick run.

    Args:
        result: with `environment` of when measuring began; that of now is added where it has none.
    """
    path = (QUICK if quick else RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **result}, indent=2) + "\n")
    return path


def _commit() -> str:
    """What is checked out, and whether the code is another: records and pages made of them are not code."""

    def git(*arguments: str) -> str:
        command = [
            "git",
            *arguments,
            "--",
            ".",
            *(f":!{path}" for path in ("benchmarks/results", "docs", "README.md")),
        ]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("log", "-1", "--format=%h") + ("-dirty" if changed else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
