"""Which implementation of the contraction runs: Triton's kernels on CUDA and ROCm, plain PyTorch elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from . import reference
from .operands import Destination, Source

Backend = Literal["reference", "triton"]
BACKENDS: tuple[Backend, ...] = ("reference", "triton")
#: Names the backend for a whole process; an argument overrides it.
VARIABLE = "EAPTK_BACKEND"


def contract(
    sources: Sequence[Source],
    destinations: Sequence[Destination],
    lengths: Sequence[int],
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Scores of every real edge of every sample; see `reference.contract` for arguments, result and errors.

    Args:
        backend: ``"reference"`` or ``"triton"``; by default what the environment variable ``EAPTK_BACKEND`` says,
            else Triton for CUDA and ROCm tensors of at most 32 bits, and the reference for all others.

    Raises:
        ValueError: the backend is unknown, not installed, or cannot take these operands.
    """
    if _chosen(backend, sources, destinations) == "reference":
        return reference.contract(sources, destinations, lengths)
    if find_spec("triton") is None:
        raise ValueError(
            "the Triton kernels need the package triton: pip install 'eaptk[gpu]', "
            f"or set {VARIABLE}=reference for the slow path"
        )
    reference.check(sources, destinations, lengths)
    weights = [*(s.weight for s in sources), *(d.weight for d in destinations)]
    if any(weight is not None for weight in weights):
        from .head import contract_head

        return contract_head(sources, destinations, lengths)
    from .block import contract_block

    return contract_block(sources, destinations, lengths)


def _chosen(
    backend: Backend | None, sources: Sequence[Source], destinations: Sequence[Destination]
) -> Backend:
    named = backend or os.environ.get(VARIABLE)
    if named:
        if named not in BACKENDS:
            where = "backend" if backend else VARIABLE
            raise ValueError(f"{where} is {named!r}; it must be one of {', '.join(BACKENDS)}")
        return "triton" if named == "triton" else "reference"
    # torch calls ROCm's devices "cuda" as well.
    values = [*(s.value for s in sources), *(d.gradient for d in destinations)]
    on_gpu = all(value.device.type == "cuda" and value.dtype != torch.float64 for value in values)
    return "triton" if values and on_gpu else "reference"
