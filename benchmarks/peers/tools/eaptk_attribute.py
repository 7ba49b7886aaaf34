"""eaptk itself, in the form the peer has; in float64 the truth that all are held against."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import eaptk


def load(folder: Path, dtype: torch.dtype, form: dict[str, Any]) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if dtype == torch.float64:
        exact(model)
    graph = eaptk.Graph.from_model(model, granularity=form["granularity"], qkv=form["qkv"])
    dials = {"flush_layers": 1, "checkpoint": True} if form.get("least_memory") else {}
    return {"model": model, "graph": graph, "ablation": form["ablation"], "dials": dials}


def score(loaded: dict[str, Any], ids: Tensor, other: Tensor) -> eaptk.EdgeScores:
    batch = {"input_ids": ids, "corrupt_ids": other}
    return eaptk.attribute(
        loaded["model"], batch, loaded["graph"], ablation=loaded["ablation"], **loaded["dials"]
    )


def edges(loaded: dict[str, Any], scores: eaptk.EdgeScores) -> tuple[np.ndarray, list[str], list[str]]:
    graph = loaded["graph"]
    return (
        scores.matrix()[0],
        [node.name for node in graph.sources],
        [node.name for node in graph.destinations],
    )


def exact(model: nn.Module) -> None:
    """Give a float64 model float64 norms and rotations: Hugging Face computes these in float32 whatever the dtype."""

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))

    def rotation(module: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        width = 2 * len(module.inv_freq)
        base = model.config.rope_parameters["rope_theta"]
        frequency = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = position_ids[..., None].double() * frequency
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
        elif name.endswith("RotaryEmbedding"):
            module.forward = MethodType(rotation, module)
