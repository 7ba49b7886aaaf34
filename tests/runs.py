"""Runs made by hand: only what is read of a run when it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from eaptk.graph import Graph

BLOCK = Graph(n_layers=3, n_heads=4, n_kv_heads=2)

MANIFEST = {
    "ablation": "zero",
    "loss": "nll",
    "cut": None,
    "max_new_tokens": None,
    "tokenizer": "sha256:0",
    "model": {"dtype": "float32"},
}


@dataclass
class FakeRun:
    scores: np.ndarray
    path: Path = Path("runs/made-up")
    graph: Graph = BLOCK
    done: np.ndarray = field(default=None)  # type: ignore[assignment]
    loss: np.ndarray = field(default=None)  # type: ignore[assignment]
    ids: list[str] = field(default=None)  # type: ignore[assignment]
    groups: list[str | None] = field(default=None)  # type: ignore[assignment]
    manifest: dict[str, Any] = field(default_factory=lambda: dict(MANIFEST))
    prompts: list[list[int]] = field(default=None)  # type: ignore[assignment]
    answers: list[list[int]] = field(default=None)  # type: ignore[assignment]
    columns: np.ndarray = field(default=None)  # type: ignore[assignment]
    top_columns: np.ndarray | None = None
    histogram: None = None
    statistics: None = None

    def __post_init__(self) -> None:
        n = len(self.scores)
        self.columns = np.arange(self.graph.n_edges) if self.columns is None else self.columns
        self.done = np.ones(n, np.uint8) if self.done is None else self.done
        self.loss = np.zeros(n) if self.loss is None else self.loss
        self.ids = [f"q{i}" for i in range(n)] if self.ids is None else self.ids
        self.groups = [None] * n if self.groups is None else self.groups
        # A question is its id: the same one has the same tokens in every run.
        tokens = [list(map(ord, name)) for name in self.ids]
        self.prompts = tokens if self.prompts is None else self.prompts
        self.answers = tokens if self.answers is None else self.answers

    @property
    def samples(self) -> pa.Table:
        return pa.table(
            {
                "id": self.ids,
                "group": pa.array(self.groups, pa.string()),
                "prompt_ids": pa.array(self.prompts, pa.list_(pa.int32())),
                "answer_ids": pa.array(self.answers, pa.list_(pa.int32())),
            }
        )


def make_run(n: int = 12, seed: int = 0, graph: Graph = BLOCK, **fields: Any) -> FakeRun:
    """Heavy-tailed scores that share a pattern over edges."""
    rng = np.random.default_rng(seed)
    pattern = np.random.default_rng(99).standard_t(4, size=graph.n_edges)
    scores = 1e-3 * (pattern + rng.standard_t(4, size=(n, graph.n_edges)))
    return FakeRun(scores.astype(np.float32), graph=graph, **fields)
