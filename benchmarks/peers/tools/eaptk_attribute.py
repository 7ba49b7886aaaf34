"""eaptk itself, in the form the peer has; in float64 the truth that all are held against."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import eaptk
from benchmarks.exact import float64_throughout


def load(folder: Path, dtype: torch.dtype, form: dict[str, Any]) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    graph = eaptk.Graph.from_model(model, granularity=form["granularity"], qkv=form["qkv"])
    dials = {"flush_layers": 1, "checkpoint": True} if form.get("least_memory") else {}
    return {"model": model, "graph": graph, "ablation": form["ablation"], "dials": dials}


def score(loaded: dict[str, Any], ids: Tensor, other: Tensor) -> eaptk.EdgeScores:
    batch, model = {"input_ids": ids, "corrupt_ids": other}, loaded["model"]
    with float64_throughout(model) if model.dtype == torch.float64 else nullcontext():
        return eaptk.attribute(model, batch, loaded["graph"], ablation=loaded["ablation"], **loaded["dials"])


def edges(loaded: dict[str, Any], scores: eaptk.EdgeScores) -> tuple[np.ndarray, list[str], list[str]]:
    graph = loaded["graph"]
    return (
        scores.matrix()[0],
        [node.name for node in graph.sources],
        [node.name for node in graph.destinations],
    )
