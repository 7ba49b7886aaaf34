"""Agreement with matrices another tool computed, where a folder of them lies beside the checkout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import transformers
from tiny import float64_norms

from eaptk import Graph, attribute
from eaptk.batch import NO_TARGET, Batch


def theirs(folder: Path, ablation: str, graph: Graph) -> np.ndarray:
    """[sample, source, destination] in our numbering; their k and v columns are one a query head."""
    meta = json.loads((folder / "meta.json").read_text())
    scores = np.load(folder / "scores.npz")[ablation].astype(np.float64)
    column = {name: i for i, name in enumerate(meta["destinations"])}
    assert meta["sources"] == [node.name for node in graph.sources]
    group = graph.n_heads // graph.n_kv_heads
    columns = []
    for node in graph.destinations:
        names = [node.name]
        if node.branch in ("k", "v"):
            heads = range(node.head * group, (node.head + 1) * group)
            names = [f"a{node.layer}.h{head}<{node.branch}>" for head in heads]
        columns.append(sum(scores[..., column[name]] for name in names))
    return np.stack(columns, axis=-1)


def load(folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, Graph, Batch, slice]:
    """The model, its graph, all samples as one batch, and the rows whose meaning both tools share."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).eval()
    if dtype == torch.float64:
        float64_norms(model)
    arrays = np.load(folder / "scores.npz")
    ids, corrupt = torch.from_numpy(arrays["ids"]).long(), torch.from_numpy(arrays["corrupt_ids"]).long()
    targets = torch.full_like(ids, NO_TARGET)
    half = ids.shape[1] // 2
    targets[:, half - 1 : -1] = ids[:, half:]
    batch = Batch(
        ids=ids,
        lengths=torch.full((len(ids),), ids.shape[1]),
        targets=targets,
        names=tuple(map(str, range(len(ids)))),
        corrupt_ids=corrupt,
    )
    # Their `input` leaves out learned position embeddings.
    rows = slice(1, None) if model.config.model_type == "gpt2" else slice(None)
    return model, Graph.from_model(model, granularity="head"), batch, rows


def relative(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("ablation", ["zero", "patching"])
def test_the_oracle_reproduces_them(golden: Path, ablation: str) -> None:
    model, graph, batch, rows = load(golden, torch.float64)
    ours = []
    for ids, corrupt, targets in zip(batch.ids, batch.corrupt_ids, batch.targets, strict=True):
        replacement = oracle.record(model, corrupt, graph) if ablation == "patching" else None
        ours.append(oracle.scores(model, ids, oracle.nll(targets), graph, replacement).numpy())
    assert relative(np.stack(ours)[:, rows], theirs(golden, ablation, graph)[:, rows]) < 1e-5


@pytest.mark.parametrize("ablation", ["zero", "patching"])
def test_attribute_reproduces_them_in_float32(golden: Path, ablation: str) -> None:
    model, graph, batch, rows = load(golden, torch.float32)
    ours = attribute(model, batch, graph, ablation=ablation).matrix()
    assert relative(np.asarray(ours)[:, rows], theirs(golden, ablation, graph)[:, rows]) < 1e-4
