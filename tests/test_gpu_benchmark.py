"""`python -m benchmarks.gpu`: the script that takes the figures on a card runs where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import relative_error
from rich.console import Console
from tiny import tiny_batch, tiny_model

from benchmarks.dense import dense_scores
from benchmarks.gpu import Gates
from eaptk import Graph, attribute

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a card it takes minutes and is run by hand")
def test_it_runs_end_to_end_at_toy_size() -> None:
    record = ROOT / "benchmarks" / "results" / "gpu.json"
    before = record.stat().st_mtime_ns if record.exists() else None
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = [line for line in run.stdout.splitlines() if line.startswith("PASS")]
    for gate in ("block, float32", "block, bfloat16", "head, float16", "statistics of rows", "usual scripts"):
        assert any(gate in line for line in passed), gate
    assert "FAIL" not in run.stdout
    assert (record.stat().st_mtime_ns if record.exists() else None) == before, "toy sizes are no record"


@pytest.mark.parametrize(
    ("value", "of", "passes"),
    [
        (1.0, "at most", True),
        (1.1, "at most", False),
        (1.0, "at least", True),
        (0.9, "at least", False),
        (float("inf"), "at least", True),
        (float("nan"), "at most", False),
        (float("nan"), "at least", False),
    ],
)
def test_a_gate_that_fails_fails_all(value: float, of: str, passes: bool) -> None:
    gates = Gates(Console(quiet=True))
    gates.check("one that holds", 0.0, 1.0)
    gates.check("the other", value, 1.0, of)  # type: ignore[arg-type]
    assert gates.passed == passes


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_the_usual_scripts_way_gives_the_same_scores(name: str) -> None:
    model, batch = tiny_model(name, torch.float32), tiny_batch()
    graph = Graph.from_model(model, "head")
    scores = attribute(model, batch, graph).matrix()
    assert relative_error(dense_scores(model, batch, graph).numpy(), scores) < 1e-5
