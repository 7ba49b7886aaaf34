"""Partial tiles of S summed in order, in float64, and written as packed rows: no atomics, the same bits each time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tables import COLUMNS

_COLUMNS = tl.constexpr(COLUMNS)
#: Destination rows of a tile that one program sums.
ROWS = 8


@triton.jit(do_not_specialize=["n_tiles", "n_edges"])  # see products
def _reduce_kernel(
    partials,  # [n_pieces, n_tiles, BLOCK_D, BLOCK_S] float32
    first_piece,  # [B + 1] int32: sample b's pieces are first_piece[b] … first_piece[b + 1] − 1
    tiles,  # [n_tiles, 2] int32: first destination row, first source row
    table,  # [n_destinations, COLUMNS] int64
    scores,  # [B, n_edges] float32
    n_tiles,
    n_edges,
    NEGATED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_S)
    inside = row[:, None] * BLOCK_S + lane[None, :]
    first = tl.load(first_piece + sample).to(tl.int64)
    last = tl.load(first_piece + sample + 1).to(tl.int64)
    size: tl.constexpr = BLOCK_D * BLOCK_S

    d = tl.load(tiles + tile * 2) + row
    s = tl.load(tiles + tile * 2 + 1) + lane
    entry = table + d.to(tl.int64) * _COLUMNS
    reach = tl.load(entry + 8, mask=d >= 0, other=0)
    column = tl.load(entry + 9, mask=d >= 0, other=0)
    edge = s[None, :] < reach[:, None]
    total = tl.zeros((ROWS, BLOCK_S), tl.float64)
    for piece in range(first, last):
        partial = tl.load(partials + (piece * n_tiles + tile) * size + inside, mask=edge, other=0.0)
        total += partial.to(tl.float64)
    if NEGATED:
        total = -total
    here = scores + sample * n_edges + column[:, None] + s[None, :]
    tl.store(here, total.to(tl.float32), mask=edge)


def reduce(
    partials: Tensor, first_piece: Tensor, tiles: Tensor, table: Tensor, scores: Tensor, negated: bool
) -> None:
    """Write the real edges of `tiles` into `scores` [B, n_edges]; shapes as at the kernel."""
    _, n_tiles, block_d, block_s = partials.shape
    n_samples, n_edges = scores.shape
    grid = (n_tiles, block_d // ROWS, n_samples)
    _reduce_kernel[grid](
        partials,
        first_piece,
        tiles,
        table,
        scores,
        n_tiles,
        n_edges,
        negated,
        block_d,
        block_s,
        ROWS,
        enable_fp_fusion=True,
    )
