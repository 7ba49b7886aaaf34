"""Statistics of score rows on the GPU: one read of every score, in float64, the same bits each time.

A program takes a block of one row: sums, extremes and central moments about the block's own mean, so that nothing
cancels. The blocks of a row are merged in order by one program (Pébay 2008, about the mean of all). Counts are
integers, so the order in which atomics add them changes nothing. How a row is cut depends on its width alone.

Bytes: 4 a score, and 56 a block of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import MOMENTS, RowStatistics, bin_edges, packed

#: Scores of a block, and blocks that are merged side by side.
BLOCK = 2048
LANES = 256
WARPS = 8


@triton.jit
def _row_kernel(
    rows,  # [n_rows, width], rows `stride` apart
    edges,  # [bins + 1] float64
    partials,  # [7, n_rows, n_blocks] float64: `MOMENTS`, the central ones as sums
    slots,  # [n_rows, bins + 1] int64, zero
    width,
    stride,
    n_blocks,
    bins,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One axis, as only the first may be longer than 65535.
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    place = block * BLOCK + tl.arange(0, BLOCK)
    mask = place < width
    w = tl.load(rows + row * stride + place, mask=mask, other=0.0).to(tl.float64)
    size = tl.abs(w)
    total = tl.sum(w)
    d = tl.where(mask, w - total / tl.minimum(width - block * BLOCK, BLOCK), 0.0)
    square = d * d
    plane = tl.num_programs(0).to(tl.int64)
    here = partials + row * n_blocks + block
    tl.store(here, tl.sum(size))
    tl.store(here + plane, total)
    tl.store(here + 2 * plane, tl.sum(square))
    tl.store(here + 3 * plane, tl.sum(square * d))
    tl.store(here + 4 * plane, tl.sum(square * square))
    tl.store(here + 5 * plane, tl.min(tl.where(mask, w, float("inf"))))
    tl.store(here + 6 * plane, tl.max(tl.where(mask, w, float("-inf"))))
    if COUNTED:
        upper = tl.load(edges + bins)
        inside = size <= upper
        near = tl.minimum((tl.where(inside, size, 0.0) / upper * bins).to(tl.int32), bins - 1)
        below = size < tl.load(edges + near)
        beyond = (size >= tl.load(edges + near + 1)) & (near + 1 < bins)
        slot = tl.where(inside, near - below.to(tl.int32) + beyond.to(tl.int32), bins)
        counts = slots + row * (bins + 1)
        # Tails are heavy and nearly all is in the first bin: a sum there, so that no counter is fought for.
        tl.atomic_add(counts, tl.sum((mask & (slot == 0)).to(tl.int64)))
        tl.atomic_add(counts + slot, tl.full((BLOCK,), 1, tl.int64), mask=mask & (slot != 0))


@triton.jit
def _merge_kernel(
    partials,  # [7, n_rows, n_blocks] float64
    out,  # [7, n_rows] float64
    width,
    n_blocks,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    # An argument would not do: where it is 1, Triton makes a Python integer of it, which has no `to`.
    n_rows = tl.num_programs(0).to(tl.int64)
    plane = n_rows * n_blocks
    blocks = partials + row * n_blocks
    size = tl.zeros((LANES,), tl.float64)
    total = tl.zeros((LANES,), tl.float64)
    low = tl.full((LANES,), float("inf"), tl.float64)
    high = tl.full((LANES,), float("-inf"), tl.float64)
    for start in range(0, n_blocks, LANES):
        mask = start + lane < n_blocks
        here = blocks + start + lane
        size += tl.load(here, mask=mask, other=0.0)
        total += tl.load(here + plane, mask=mask, other=0.0)
        low = tl.minimum(low, tl.load(here + 5 * plane, mask=mask, other=float("inf")))
        high = tl.maximum(high, tl.load(here + 6 * plane, mask=mask, other=float("-inf")))
    sum_all = tl.sum(total)
    mean = sum_all / width
    m2 = tl.zeros((LANES,), tl.float64)
    m3 = tl.zeros((LANES,), tl.float64)
    m4 = tl.zeros((LANES,), tl.float64)
    for start in range(0, n_blocks, LANES):
        mask = start + lane < n_blocks
        here = blocks + start + lane
        n = tl.where(mask, tl.minimum(width - (start + lane) * BLOCK, BLOCK), 1).to(tl.float64)
        d = tl.where(mask, tl.load(here + plane, mask=mask, other=0.0) / n - mean, 0.0)
        b2 = tl.load(here + 2 * plane, mask=mask, other=0.0)
        b3 = tl.load(here + 3 * plane, mask=mask, other=0.0)
        b4 = tl.load(here + 4 * plane, mask=mask, other=0.0)
        m2 += b2 + n * d * d
        m3 += b3 + 3 * d * b2 + n * d * d * d
        m4 += b4 + 4 * d * b3 + 6 * d * d * b2 + n * d * d * d * d
    here = out + row
    tl.store(here, tl.sum(size))
    tl.store(here + n_rows, sum_all)
    tl.store(here + 2 * n_rows, tl.sum(m2) / width)
    tl.store(here + 3 * n_rows, tl.sum(m3) / width)
    tl.store(here + 4 * n_rows, tl.sum(m4) / width)
    tl.store(here + 5 * n_rows, tl.min(low))
    tl.store(here + 6 * n_rows, tl.max(high))


def row_statistics(rows: Tensor, bins: int | None = None, upper: float | None = None) -> RowStatistics:
    """As `rows.row_statistics`."""
    edges = bin_edges(rows, bins, upper)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    n_rows, width = rows.shape
    n_blocks = triton.cdiv(width, BLOCK)
    partials = torch.empty(len(MOMENTS), n_rows, n_blocks, dtype=torch.float64, device=rows.device)
    moments = torch.empty(len(MOMENTS), n_rows, dtype=torch.float64, device=rows.device)
    slots = None
    if edges is not None:
        slots = torch.zeros(n_rows, len(edges), dtype=torch.int64, device=rows.device)
    _row_kernel[(n_rows * n_blocks,)](
        rows,
        partials if edges is None else edges,
        partials,
        partials if slots is None else slots,
        width,
        rows.stride(0),
        n_blocks,
        0 if edges is None else len(edges) - 1,
        COUNTED=edges is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    _merge_kernel[(n_rows,)](partials, moments, width, n_blocks, BLOCK, LANES, num_warps=4)
    return packed(moments, width, slots)
