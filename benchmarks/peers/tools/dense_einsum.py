"""benchmarks/dense.py: hooks on the Hugging Face model, and one einsum a destination and layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import eaptk
from benchmarks.dense import dense_scores


def load(folder: Path, dtype: torch.dtype, form: dict[str, Any]) -> tuple[Any, eaptk.Graph]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if model.config.model_type == "gpt2":
        raise NotImplementedError("it reads separate q, k and v projections, and GPT-2 has one for all three")
    return model, eaptk.Graph.from_model(model, granularity="head")


def score(loaded: tuple[Any, eaptk.Graph], ids: Tensor, other: Tensor) -> Tensor:
    model, graph = loaded
    return dense_scores(model, eaptk.Batch.from_mapping({"input_ids": ids}), graph)


def edges(loaded: tuple[Any, eaptk.Graph], scores: Tensor) -> tuple[np.ndarray, list[str], list[str]]:
    _, graph = loaded
    return (
        scores[0].float().numpy(),
        [node.name for node in graph.sources],
        [node.name for node in graph.destinations],
    )
