"""transformer-lens 4: its own `attribution_patch` at edge granularity, on a `TransformerBridge`.

It scores an edge a position, in a dictionary; summed over positions here, after the clock has stopped. The gradient
is taken on the prompt it calls corrupt, towards the one it calls clean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from names import head_nodes
from tools.loss import scalar
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import (
    AttributionResult,
    EdgeAttributionConfig,
    Node,
    attribution_patch,
)

BRANCH = {"q_input": "q", "k_input": "k", "v_input": "v"}


def load(folder: Path, dtype: torch.dtype, form: dict[str, Any]) -> TransformerBridge:
    model = TransformerBridge.boot_transformers(str(folder), dtype=dtype, device="cpu")
    model.eval()
    return model


def score(model: TransformerBridge, ids: Tensor, other: Tensor) -> AttributionResult:
    return attribution_patch(
        model,
        clean=other,
        corrupt=ids,
        metric_fn=lambda logits: scalar(logits, ids),
        config=EdgeAttributionConfig(granularity="edge"),
    )


def edges(model: TransformerBridge, result: AttributionResult) -> tuple[np.ndarray, list[str], list[str]]:
    sources, destinations = head_nodes(model.cfg.n_layers, model.cfg.n_heads, model.cfg.n_heads)
    row = {name: i for i, name in enumerate(sources)}
    column = {name: i for i, name in enumerate(destinations)}
    scores = np.zeros((len(sources), len(destinations)))
    for (writer, reader), value in result.edge_scores.items():
        scores[row[_name(writer)], column[_name(reader)]] += value
    return scores, sources, destinations


def _name(node: Node) -> str:
    if node.kind in ("embed", "logits"):
        return "input" if node.kind == "embed" else "logits"
    if node.kind == "attn_head_out":
        return f"a{node.layer}.h{node.head}"
    if node.kind in BRANCH:
        return f"a{node.layer}.h{node.head}<{BRANCH[node.kind]}>"
    return f"m{node.layer}"
