"""The floor: forward pass, loss and gradient to the first layer's input, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import eaptk
from benchmarks.cost import bare_pass
from eaptk.sites import Sites


def load(folder: Path, dtype: torch.dtype, form: dict[str, Any]) -> tuple[Any, Sites]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, Sites(model, eaptk.Graph.from_model(model))


def score(loaded: tuple[Any, Sites], ids: Tensor, other: Tensor) -> None:
    model, sites = loaded
    bare_pass(model, sites, eaptk.Batch.from_mapping({"input_ids": ids}))
