"""Whether a kernel can be trusted on the device at hand: before its first use there it is tried against the reference.

No card has run every kernel in every dtype, driver and version of Triton, and a wrong score looks like a right one.
So each is first run on a few random tokens of operands laid out like the ones it will get (`contraction`), or on
random rows (`rows`), and what it finds is compared with plain PyTorch. That takes a moment once in a process, beside
compiling what is compiled in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from . import reference, rows
from .operands import Destination, Source

#: Largest error ‖found − reference‖ / ‖reference‖: of float32 operands, of narrower ones, of those that are expanded,
#: of rows.
FLOAT32, HALF, EXPANDED, MOMENTS = 1e-5, 1e-4, 1e-3, 1e-9
#: Of the operands tried, at most, or little more: enough for several tiles of S, and little memory.
TOKENS, ROWS, WIDTH = 5, 160, 512
#: What each trial of this process found: None, or the fault.
VERDICTS: dict[Hashable, str | None] = {}

Contract = Callable[[Sequence[Source], Sequence[Destination], Sequence[int]], Tensor]
Operand = TypeVar("Operand", Source, Destination)


def contraction(
    name: str, kernel: Contract, sources: Sequence[Source], destinations: Sequence[Destination]
) -> str | None:
    """What is wrong with `kernel` for such operands on their device; None if nothing is."""
    device = sources[0].value.device
    tensors = [t for s in sources for t in (s.value, s.weight) if t is not None]
    tensors += [t for d in destinations for t in (d.gradient, d.weight) if t is not None]
    dtype = max({t.dtype for t in tensors}, key=lambda found: torch.finfo(found).eps)
    expanded = any(s.weight is not None for s in sources) or any(d.weight is not None for d in destinations)
    allowed = FLOAT32 if dtype == torch.float32 else EXPANDED if expanded else HALF
    kinds = [frozenset(map(_kind, sources)), frozenset(map(_kind, destinations))]

    def error() -> float:
        generator = torch.Generator(device).manual_seed(0)
        few = [_random_source(s, generator) for s in _representatives(sources)]
        reach = sum(s.rows for s in few)
        readers = [_random_destination(d, reach, generator) for d in _representatives(destinations)]
        lengths = [few[0].value.shape[1]]
        # In float64, which no setting of the user's makes coarser.
        wide = [replace(s, value=s.value.double()) for s in few]
        expected = reference.contract(wide, readers, lengths)
        return ((kernel(few, readers, lengths) - expected).norm() / expected.norm()).item()

    return _verdict((name, device, *kinds), f"{name!r} for {_named(dtype)}", device, allowed, error)


def of_rows(kernel: Callable[[Tensor, int, float], rows.RowStatistics], scores: Tensor) -> str | None:
    """What is wrong with `kernel` for such rows on their device; None if nothing is."""

    def error() -> float:
        generator = torch.Generator(scores.device).manual_seed(0)
        few = torch.empty(2, 5000, dtype=scores.dtype, device=scores.device).normal_(generator=generator) ** 3
        found, expected = kernel(few, 100, 5.0), rows.row_statistics(few, 100, 5.0)
        if not all(
            torch.equal(getattr(found, name), getattr(expected, name)) for name in ("histogram", "above")
        ):
            return float("inf")
        pairs = [(getattr(found, name), getattr(expected, name)) for name in rows.MOMENTS]
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs)

    name = f"'rows' for {_named(scores.dtype)}"
    return _verdict((name, scores.device), name, scores.device, MOMENTS, error)


def _verdict(
    key: Hashable, name: str, device: torch.device, allowed: float, error: Callable[[], float]
) -> str | None:
    if key not in VERDICTS:
        fault = None
        if find_spec("triton") is None:
            fault = "the package triton is not installed (pip install 'eaptk[gpu]')"
        else:
            try:
                found = error()
                if not found <= allowed:
                    fault = f"it is off by {found:.1e}, where {allowed:.1e} is allowed"
            except torch.OutOfMemoryError:
                raise
            # What a kernel broke is lost to the whole process: the reference would fail there as well.
            except torch.AcceleratorError as failure:
                raise ValueError(
                    f"the Triton kernel {name} left {device} unusable: {_first_line(failure)}; "
                    f"start again with EAPTK_BACKEND=reference"
                ) from failure
            # Compilers and drivers fail in ways of their own; whatever it is, the reference does without them.
            except Exception as failure:
                fault = f"it failed with {type(failure).__name__}: {_first_line(failure)}"
        VERDICTS[key] = fault and f"the Triton kernel {name} cannot be trusted on {card(device)}: {fault}"
    return VERDICTS[key]


def card(device: torch.device) -> str:
    """Name of the device, as its driver gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _first_line(failure: Exception) -> str:
    return str(failure).strip().partition("\n")[0]


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(operand: Source | Destination) -> Hashable:
    """What decides which code is compiled for an operand."""
    weight = operand.weight
    layout = None if weight is None else (weight.dtype, weight.shape[1], weight.stride(1) == 1)
    if isinstance(operand, Source):
        other = operand.replacement
        return operand.value.dtype, layout, operand.gain is not None, None if other is None else other.dtype
    norm = operand.norm
    return operand.gradient.dtype, layout, norm and (norm.centred, norm.stream.dtype)


def _representatives(operands: Sequence[Operand]) -> list[Operand]:
    """The first of each kind, and the first that have `ROWS` rows."""
    found, kinds, n_rows = [], set(), 0
    for operand in operands:
        if n_rows < ROWS or _kind(operand) not in kinds:
            found.append(operand)
            kinds.add(_kind(operand))
            n_rows += operand.rows
    return found


def _random_source(source: Source, generator: torch.Generator) -> Source:
    value, other = source.value, source.replacement
    if other is not None:
        other = _random(_of_node(other.expand_as(value), source.weight), generator)
    return replace(
        source,
        value=_random(_of_node(value, source.weight), generator),
        weight=None if source.weight is None else _narrow(source.weight),
        gain=None if source.gain is None else _narrow(source.gain),
        replacement=other,
    )


def _random_destination(destination: Destination, reach: int, generator: torch.Generator) -> Destination:
    norm, weight = destination.norm, destination.weight
    if norm is not None:
        norm = replace(norm, stream=_random(_narrow(norm.stream), generator), gain=_narrow(norm.gain))
    return replace(
        destination,
        gradient=_random(_of_node(destination.gradient, weight), generator),
        reach=min(destination.reach, reach),
        weight=None if weight is None else _narrow(weight),
        norm=norm,
    )


def _of_node(value: Tensor, weight: Tensor | None) -> Tensor:
    """Of [B, T, D] the first columns; heads, which a weight expands, are whole."""
    return _narrow(value) if weight is None else value


def _narrow(x: Tensor) -> Tensor:
    """The first columns of [..., D], congruent to D modulo 16: for others Triton compiles other code."""
    width = x.shape[-1]
    return x if width <= WIDTH else x[..., : WIDTH - -width % 16]


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(like[:1, :TOKENS]).normal_(generator=generator)
