"""A loss of one's own, in a module that any process can import."""

from __future__ import annotations

import torch

from eaptk.batch import Batch


def of_a_set(logits: torch.Tensor, batch: Batch, scale: float = 0.5) -> torch.Tensor:
    return logits.square().mean((1, 2)) * (scale if "q0" in {"red", "green", "blue", "black"} else 1.0)
