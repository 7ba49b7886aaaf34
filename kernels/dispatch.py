"""Which implementation runs: Triton's kernels for operands on a GPU, compiled loops on a CPU, plain PyTorch elsewhere.

A kernel is first tried on the device at hand (`trial`). Where it fails, or errs, plain PyTorch takes its place and a
warning says so; who named the kernels gets an error instead. For float64 there is plain PyTorch alone, as there is
where a processor has no vectors, or operands no dtype, that the loops were compiled for.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import native, reference, trial
from .operands import Destination, Source
from .rows import RowStatistics, bin_edges
from .rows import row_statistics as reference_statistics

Backend = Literal["native", "reference", "triton"]
BACKENDS: tuple[Backend, ...] = ("native", "reference", "triton")
#: Names the backend for a whole process; an argument overrides it.
VARIABLE = "EAPTK_BACKEND"
#: Set to 1, tile sizes are timed (`autotune`).
AUTOTUNE = "EAPTK_AUTOTUNE"
#: Devices, as PyTorch names them, whose operands the kernels take unasked: CUDA's and ROCm's.
DEVICES = ("cuda",)


def contract(
    sources: Sequence[Source],
    destinations: Sequence[Destination],
    lengths: Sequence[int],
    *,
    backend: Backend | None = None,
    autotune: bool | None = None,
) -> Tensor:
    """Scores of every real edge of every sample; see `reference.contract` for arguments, result and errors.

    Args:
        backend: ``"native"``, ``"reference"`` or ``"triton"``; by default what the environment variable
            ``EAPTK_BACKEND`` says, else the kernels on a GPU if they pass their trial there, the compiled loops on a
            CPU if they take these operands, and the reference elsewhere.
        autotune: time the kernels' tile sizes on these operands, once a card, and keep the fastest (`autotune`); by
            default if the environment variable ``EAPTK_AUTOTUNE`` is 1.

    Raises:
        ValueError: the backend is unknown; or it is named, and not installed, cannot take these operands, or fails
            its trial.
    """
    named = _named(backend)
    held = [*(s.value for s in sources), *(d.gradient for d in destinations)]
    if named == "triton" and any(x.dtype == torch.float64 for x in held):
        raise ValueError("no Triton kernel for operands of float64; use backend='reference'")
    if named is None and not all(_on_gpu(x) for x in held):
        named = "native" if native.takes(sources, destinations) else "reference"
    elif named == "native" and not native.takes(sources, destinations):
        raise ValueError(
            "no compiled loop for these operands, or for this processor: they take float32 and bfloat16 on an "
            "x86 one with AVX2; use backend='reference'"
        )
    if named == "native":
        return native.contract(sources, destinations, lengths)
    if named == "reference":
        return reference.contract(sources, destinations, lengths)
    reference.check(sources, destinations, lengths)
    weights = [*(s.weight for s in sources), *(d.weight for d in destinations)]
    name = "block" if all(weight is None for weight in weights) else "head"
    kernel: trial.Contract = _block if name == "block" else _head
    # Triton launches on the current device, wherever its operands lie.
    with torch.cuda.device_of(held[0]):
        if not _trusted(trial.contraction(name, kernel, sources, destinations), named):
            return reference.contract(sources, destinations, lengths)
        if os.environ.get(AUTOTUNE) == "1" if autotune is None else autotune:
            from .autotune import tuned

            kernel = tuned(name, sources, destinations, lengths)
        return kernel(sources, destinations, lengths)


def row_statistics(
    rows: Tensor, bins: int | None = None, upper: float | None = None, *, backend: Backend | None = None
) -> RowStatistics:
    """Moments, extremes and histogram of score rows; see `rows.row_statistics` for arguments and errors.

    Args:
        backend: as of `contract`, but for ``"native"``, which is the reference.
    """
    named = _named(backend)
    if named in ("native", "reference") or (named is None and not _on_gpu(rows)):
        return reference_statistics(rows, bins, upper)
    bin_edges(rows, bins, upper)
    with torch.cuda.device_of(rows):
        chosen = _rows if _trusted(trial.of_rows(_rows, rows), named) else reference_statistics
        return chosen(rows, bins, upper)


def _named(backend: Backend | None) -> Backend | None:
    named = backend or os.environ.get(VARIABLE)
    if not named:
        return None
    if named not in BACKENDS:
        where = "backend" if backend else VARIABLE
        raise ValueError(f"{where} is {named!r}; it must be one of {', '.join(BACKENDS)}")
    return named


def _on_gpu(x: Tensor) -> bool:
    return x.device.type in DEVICES and x.dtype != torch.float64


def _trusted(fault: str | None, named: Backend | None) -> bool:
    """Whether the kernel passed its trial; if it was named and did not, that is an error."""
    if fault is None:
        return True
    if named == "triton":
        raise ValueError(f"{fault}; use backend='reference', or unset {VARIABLE}")
    # Given once a text by Python's default filter, and once a text is right: it names card, kernel and dtype.
    warnings.warn(f"{fault}; plain PyTorch takes its place, and more time", RuntimeWarning, stacklevel=3)
    return False


def _block(sources: Sequence[Source], destinations: Sequence[Destination], lengths: Sequence[int]) -> Tensor:
    from .block import contract_block

    return contract_block(sources, destinations, lengths)


def _head(sources: Sequence[Source], destinations: Sequence[Destination], lengths: Sequence[int]) -> Tensor:
    from .head import contract_head

    return contract_head(sources, destinations, lengths)


def _rows(rows: Tensor, bins: int | None, upper: float | None) -> RowStatistics:
    from .row_kernels import row_statistics

    return row_statistics(rows, bins, upper)
