"""One chunk (some tokens × some columns of D) of every row expanded: O_s = z_s·W_s and G_d, into scratch.

Sources: O = (z·W)⊙gain, or of O' − O. Destinations: u = g·W, and the norm's vector-Jacobian product in registers
(`norm`): G = ρ γ⊙u − c x + e. Rows without weight pass through. What the scratch holds beyond D is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import Destination, Source
from .products import dot, narrow, power
from .tables import COLUMNS, TRITON_DTYPES, Table
from .tuning import ExpandConfig

_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit(do_not_specialize=["sample", "start", "tokens", "n_tokens", "plane"])  # see products
def _expand_kernel(
    table,  # [n_rows, COLUMNS] int64
    indices,  # [n_group] int32, which rows to do
    statistics,  # [n_rows, 3, B, T] float32, read by destinations behind a norm
    exponents,  # [n_rows, B] int32, read where rows are scaled
    out,  # [n_rows, row_size]: of each row [tokens, columns] is written
    sample,
    start,  # first token
    tokens,
    first_column,
    columns,
    row_size,
    width,
    head_dim,
    weight_stride_h,
    weight_stride_d,
    n_tokens,  # T
    plane,  # B·T
    DTYPE: tl.constexpr,
    OTHER_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    PATCHED: tl.constexpr,
    NORMED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.load(indices + tl.program_id(2)).to(tl.int64)
    entry = table + row * _COLUMNS
    pointer = tl.pointer_type(DTYPE)
    place = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = (place < tokens)[:, None]
    at = (start + place).to(tl.int64)[:, None]
    lane = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = (first_column + lane)[None, :]
    c_mask = column < width
    mask = t_mask & c_mask
    value = tl.load(entry).to(pointer) + sample * tl.load(entry + 1) + at * tl.load(entry + 2)
    other = (
        tl.load(entry + 3).to(tl.pointer_type(OTHER_DTYPE))
        + sample * tl.load(entry + 4)
        + at * tl.load(entry + 5)
    )
    gain_address = tl.load(entry + 6)
    gain_width = tl.where(gain_address != 0, width, 0)
    gain = tl.load(gain_address.to(tl.pointer_type(tl.float32)) + column, mask=column < gain_width, other=1.0)
    weight_address = tl.load(entry + 7)
    if weight_address != 0:
        weight = weight_address.to(pointer)
        acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for h_start in range(0, head_dim, BLOCK_H):
            h = h_start + tl.arange(0, BLOCK_H)
            h_mask = h < head_dim
            z_at = value + h[None, :]
            w_at = weight + (
                h.to(tl.int64)[:, None] * weight_stride_h + column.to(tl.int64) * weight_stride_d
            )
            if ALIGNED:
                z_at = tl.multiple_of(z_at, (16, 16))
            z = tl.load(z_at, mask=t_mask & h_mask[None, :], other=0.0)
            if PATCHED:
                z_new_at = other + h[None, :]
                if ALIGNED:
                    z_new_at = tl.multiple_of(z_new_at, (16, 16))
                z_new = tl.load(z_new_at, mask=t_mask & h_mask[None, :], other=0.0)
                change = z_new.to(tl.float32) - z.to(tl.float32)
                z = narrow(change, DTYPE)
            if ALIGNED:
                w_at = tl.multiple_of(w_at, (16, 16))
            w = tl.load(w_at, mask=h_mask[:, None] & c_mask, other=0.0)
            acc = dot(z, w, acc)
            if PATCHED:
                # What rounding the change leaves over, so that small changes of large values stay exact.
                acc = dot(narrow(change - z.to(tl.float32), DTYPE), w, acc)
    else:
        acc = tl.load(value + column, mask=mask, other=0.0).to(tl.float32)
        if PATCHED:
            acc = tl.load(other + column, mask=mask, other=0.0).to(tl.float32) - acc
    acc = acc * gain
    if NORMED:
        normed_tokens = tl.where(tl.load(entry + 3) != 0, tokens, 0)
        n_mask = (place < normed_tokens)[:, None]
        x_at = other + column
        if ALIGNED:
            x_at = tl.multiple_of(x_at, (16, 16))
        x = tl.load(x_at, mask=n_mask & c_mask, other=0.0).to(tl.float32)
        rho_at = statistics + row * 3 * plane + sample * n_tokens + at
        rho = tl.load(rho_at, mask=n_mask, other=1.0)
        c = tl.load(rho_at + plane, mask=n_mask, other=0.0)
        e = tl.load(rho_at + 2 * plane, mask=n_mask, other=0.0)
        acc = rho * acc - c * x + e
    here = out + row * row_size + place.to(tl.int64)[:, None] * columns + lane[None, :]
    if SCALED:
        acc *= power(tl.load(exponents + row * (plane // n_tokens) + sample))
    kept = narrow(tl.where(c_mask, acc, 0.0), OUT_DTYPE)
    tl.store(here, kept, mask=t_mask & (lane < columns)[None, :])


@dataclass(frozen=True)
class Group:
    """Rows one launch expands: those whose weights have one layout."""

    indices: Tensor
    head_dim: int
    stride_h: int
    stride_d: int


def groups(operands: Sequence[Source] | Sequence[Destination], device: torch.device) -> list[Group]:
    """Rows by layout of their weights; those without weight go with the first."""
    members: dict[tuple[int, int, int], list[int]] = {}
    plain: list[int] = []
    row = 0
    for operand in operands:
        rows = range(row, row + operand.rows)
        row = rows.stop
        weight = operand.weight
        layout = None if weight is None else (weight.shape[1], weight.stride(1), weight.stride(2))
        (plain if layout is None else members.setdefault(layout, [])).extend(rows)
    if not members:
        members[1, 1, 1] = []
    next(iter(members.values())).extend(plain)
    return [
        Group(torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True), *layout)
        for layout, rows in members.items()
    ]


@dataclass(frozen=True)
class Side:
    """All rows of one side, ready to expand chunk by chunk.

    Args:
        rows: the table on the device.
        statistics: `norm.norm_statistics` of destinations, or None.
        exponents: [n_rows, B] int32, by what power of two each row is scaled (`scale`), or None.
    """

    table: Table
    rows: Tensor
    groups: list[Group]
    patched: bool
    statistics: Tensor | None
    exponents: Tensor | None = None

    @property
    def scratch(self) -> torch.dtype:
        """What expanded rows are narrowed to: float16 has more digits than bfloat16, but holds scaled numbers alone."""
        return self.table.dtype if self.exponents is None else torch.float16


@dataclass(frozen=True)
class Chunk:
    """Tokens start … start + tokens of a sample, columns first_column … first_column + columns of D."""

    sample: int
    start: int
    tokens: int
    first_column: int
    columns: int


def chunks(sample: int, length: int, tokens: int, width: int, columns: int) -> Iterator[Chunk]:
    """A sample's chunks of `tokens` × `columns`; the last tokens may be fewer, the last columns overhang D."""
    for start in range(0, length, tokens):
        for first_column in range(0, width, columns):
            yield Chunk(sample, start, min(tokens, length - start), first_column, columns)


def expand(
    side: Side, chunk: Chunk, out: Tensor, lead: tuple[int, int], width: int, config: ExpandConfig
) -> None:
    """Write [tokens, columns] of every row to out [n_rows, row_size] of dtype `side.scratch`; `lead` is (B, T)."""
    for group in side.groups:
        grid = (
            triton.cdiv(chunk.columns, config.block_c),
            triton.cdiv(chunk.tokens, config.block_t),
            len(group.indices),
        )
        _expand_kernel[grid](
            side.rows,
            group.indices,
            out if side.statistics is None else side.statistics,
            out if side.exponents is None else side.exponents,
            out,
            chunk.sample,
            chunk.start,
            chunk.tokens,
            chunk.first_column,
            chunk.columns,
            out.shape[1],
            width,
            group.head_dim,
            group.stride_h,
            group.stride_d,
            lead[1],
            lead[0] * lead[1],
            DTYPE=TRITON_DTYPES[side.table.dtype],
            OTHER_DTYPE=TRITON_DTYPES[side.table.other_dtype],
            OUT_DTYPE=TRITON_DTYPES[out.dtype],
            SCALED=side.exponents is not None,
            PATCHED=side.patched,
            NORMED=side.statistics is not None,
            ALIGNED=side.table.aligned,
            BLOCK_T=config.block_t,
            BLOCK_C=config.block_c,
            BLOCK_H=config.block_h,
            num_warps=config.warps,
            enable_fp_fusion=True,
        )
