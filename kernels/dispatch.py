"""Which implementation of the contraction runs: plain PyTorch, or Triton's kernels where they are asked for.

The kernels agree with the reference in Triton's interpreter and compile cleanly for four targets, but no figure of
theirs has been taken on a card yet (`benchmarks.gpu` takes them). Until one has, nobody gets them unasked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from torch import Tensor

from . import reference
from .operands import Destination, Source
from .rows import RowStatistics
from .rows import row_statistics as reference_statistics

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
            else the reference.

    Raises:
        ValueError: the backend is unknown, not installed, or cannot take these operands.
    """
    if _chosen(backend) == "reference":
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


def row_statistics(
    rows: Tensor, bins: int | None = None, upper: float | None = None, *, backend: Backend | None = None
) -> RowStatistics:
    """Moments, extremes and histogram of score rows; see `rows.row_statistics` for arguments and errors."""
    _chosen(backend)
    return reference_statistics(rows, bins, upper)


def _chosen(backend: Backend | None) -> Backend:
    named = backend or os.environ.get(VARIABLE) or "reference"
    if named not in BACKENDS:
        where = "backend" if backend else VARIABLE
        raise ValueError(f"{where} is {named!r}; it must be one of {', '.join(BACKENDS)}")
    return "triton" if named == "triton" else "reference"
