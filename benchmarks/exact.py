"""Models in float64 throughout: Hugging Face computes RMS norms and rotations in float32 whatever the dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

import torch
from torch import Tensor, nn


@contextmanager
def float64_throughout(model: nn.Module) -> Iterator[None]:
    """Norms and rotations of a model of float64 weights compute in float64 meanwhile."""
    with ExitStack() as undone:
        for module in model.modules():
            name = type(module).__name__
            if name.endswith("RMSNorm"):
                module.forward = MethodType(_norm, module)
            elif name.endswith("RotaryEmbedding"):
                module.forward = MethodType(_rotation, module)
            else:
                continue
            undone.callback(delattr, module, "forward")
        yield


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))


def _rotation(module: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    width = 2 * len(module.inv_freq)
    base = module.config.rope_parameters["rope_theta"]
    frequency = base ** -(torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    angles = position_ids[..., None].double() * frequency
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()
