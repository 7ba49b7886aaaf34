"""Operands as the kernels read them: one table row a node, holding addresses and strides, nothing copied.

Strides are in elements, addresses in bytes. A null address stands for an absent stream, gain or replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton.language as tl
from torch import Tensor

from .operands import Destination, Source

#: Columns of a row: value (address, sample stride, token stride), other (the same; a source's replacement or a
#: destination's stream), gain (address), weight (address), reach, first column of the packed row.
COLUMNS = 10
ALIGNMENT = 16
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass
class Table:
    """Rows of one side.

    Args:
        dtype: of values and weights, and `other_dtype` of replacements or streams.
        keep: what the addresses point to.
        aligned: all of it allows 128-bit loads.
    """

    dtype: torch.dtype
    other_dtype: torch.dtype
    rows: list[list[int]] = field(default_factory=list)
    keep: list[Tensor] = field(default_factory=list)
    aligned: bool = True

    def value(self, tensor: Tensor) -> list[int]:
        """Address and strides of [B, T, D] with D contiguous (copied only if it is not, or of another dtype)."""
        return self._lead(tensor.to(self.dtype))

    def other(self, tensor: Tensor | None) -> list[int]:
        """The same of a replacement or stream."""
        return [0, 0, 0] if tensor is None else self._lead(tensor.to(self.other_dtype))

    def _lead(self, tensor: Tensor) -> list[int]:
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        self._note(tensor)
        return [tensor.data_ptr(), tensor.stride(0), tensor.stride(1)]

    def gain(self, gain: Tensor | None) -> int:
        """Address of [D] in float32."""
        if gain is None:
            return 0
        gain = gain.float().contiguous()
        self._note(gain)
        return gain.data_ptr()

    def weight(self, weight: Tensor) -> int:
        """Address of one head's [head_dim, D], whose strides go with the launch."""
        if weight.dtype != self.dtype:
            raise ValueError(f"a weight of {weight.dtype} among operands of {self.dtype}")
        self._note(weight)
        return weight.data_ptr()

    def tensor(self, device: torch.device) -> Tensor:
        """[rows, COLUMNS] int64 on `device`."""
        return torch.tensor(self.rows, dtype=torch.int64).to(device, non_blocking=True)

    def _note(self, tensor: Tensor) -> None:
        self.keep.append(tensor)
        # The last dimension counts too: where rows end off a boundary, so does the mask of the last vector.
        offsets = [n * tensor.element_size() for n in (*tensor.stride()[:-1], tensor.shape[-1])]
        self.aligned &= all(n % ALIGNMENT == 0 for n in (tensor.data_ptr(), *offsets))


def operand_dtype(sources: Sequence[Source], destinations: Sequence[Destination]) -> torch.dtype:
    """The weights' dtype; without weights, the narrowest that holds every value, gradient and stream.

    Raises:
        ValueError: there is no kernel for it.
    """
    weights = [s.weight for s in sources if s.weight is not None]
    weights += [d.weight for d in destinations if d.weight is not None]
    held = [*(s.value for s in sources), *(d.gradient for d in destinations)]
    held += [d.norm.stream for d in destinations if d.norm is not None]
    if any(x.dtype == torch.float64 for x in held):
        dtype = torch.float64
    elif weights:
        dtype = weights[0].dtype
    else:
        dtype = held[0].dtype
        for tensor in held:
            dtype = torch.promote_types(dtype, tensor.dtype)
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"no Triton kernel for operands of {dtype}; use backend='reference'")
    return dtype


def source_table(sources: Sequence[Source], dtype: torch.dtype) -> Table:
    """A row a source without weight, or a head."""
    # Means come in float32 beside narrower values.
    found = {s.replacement.dtype for s in sources if s.replacement is not None}
    table = Table(dtype, found.pop() if len(found) == 1 and found <= TRITON_DTYPES.keys() else torch.float32)
    for source in sources:
        replacement = None if source.replacement is None else source.replacement.expand_as(source.value)
        if source.weight is None:
            table.rows.append([*table.value(source.value), *table.other(replacement), 0, 0, 0, 0])
            continue
        gain, value = table.gain(source.gain), source.value.to(dtype)
        for h in range(source.rows):
            other = table.other(None if replacement is None else replacement[..., h, :])
            table.rows.append(
                [*table.value(value[..., h, :]), *other, gain, table.weight(source.weight[h]), 0, 0]
            )
    return table


def destination_table(destinations: Sequence[Destination], dtype: torch.dtype) -> Table:
    """A row a destination without weight, or a head, with its reach and where its edges begin."""
    table = Table(dtype, dtype)
    column = 0
    for destination in destinations:
        norm = destination.norm
        stream = table.other(None if norm is None else norm.stream)
        gain = table.gain(None if norm is None else norm.gain)
        gradient = destination.gradient.to(dtype)
        for h in range(destination.rows):
            weight = 0 if destination.weight is None else table.weight(destination.weight[h])
            row = gradient if weight == 0 else gradient[..., h, :]
            table.rows.append([*table.value(row), *stream, gain, weight, destination.reach, column])
            column += destination.reach
    return table


def row_reach(destinations: Sequence[Destination]) -> list[int]:
    """[n rows], the reach of every destination row."""
    return [d.reach for d in destinations for _ in range(d.rows)]


def n_edges(destinations: Sequence[Destination]) -> int:
    return sum(d.rows * d.reach for d in destinations)
