"""Runs made by hand: only what is read of a run when it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from eaptk.graph import Graph

BLOCK = Graph(n_layers=3, n_heads=4, n_kv_heads=2)


@dataclass
class FakeRun:
    scores: np.ndarray
    path: Path = Path("runs/made-up")
    graph: Graph = BLOCK
    done: np.ndarray = field(default=None)  # type: ignore[assignment]
    loss: np.ndarray = field(default=None)  # type: ignore[assignment]
    ids: list[str] = field(default=None)  # type: ignore[assignment]
    groups: list[str | None] = field(default=None)  # type: ignore[assignment]
    manifest: dict[str, Any] = field(default_factory=lambda: {"ablation": "zero", "loss": "nll", "cut": None})

    def __post_init__(self) -> None:
        n = len(self.scores)
        self.done = np.ones(n, np.uint8) if self.done is None else self.done
        self.loss = np.zeros(n) if self.loss is None else self.loss
        self.ids = [f"q{i}" for i in range(n)] if self.ids is None else self.ids
        self.groups = [None] * n if self.groups is None else self.groups

    @property
    def samples(self) -> pa.Table:
        return pa.table({"id": self.ids, "group": pa.array(self.groups, pa.string())})


def make_run(n: int = 12, seed: int = 0, graph: Graph = BLOCK, **fields: Any) -> FakeRun:
    """Heavy-tailed scores that share a pattern over edges."""
    rng = np.random.default_rng(seed)
    pattern = np.random.default_rng(99).standard_t(4, size=graph.n_edges)
    scores = 1e-3 * (pattern + rng.standard_t(4, size=(n, graph.n_edges)))
    return FakeRun(scores.astype(np.float32), graph=graph, **fields)
