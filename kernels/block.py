"""Block contraction on the GPU: S[s, d] = Σ_t ⟨G_d[t], O'_s[t] − O_s[t]⟩, bound by memory bandwidth.

A program holds one tile of S, 128 destinations × 64 sources, over a piece of one sample's tokens: for the usual
model the whole of S is one or two tiles, so each source and each destination is read from memory once. Where S
has more tiles, those of one piece run side by side and share their rows through the L2. Operands are read where
they lie, through tables of addresses. Where a norm lies between gradient and stream, G is formed in registers
(`norm`). Partial tiles are at most 1/20 of the bytes read (`tiles.MIN_INNER`) and are summed in order (`reduction`).

Precision: float32 is contracted in float32. Bfloat16 and float16 products are exact in the tensor cores' float32
sums; what is computed in float32 first (G behind a norm, O' − O) is carried on as the sum of two bfloat16,
16 bits of mantissa, with three products in place of one: the kernel waits for memory, not for them.

Bytes (T tokens, D width, e bytes an element): T·D·e·(n_sources·(2 if patched) + n_destinations + the norms'
streams), and 8·128·64 a tile and piece. FLOPs: 2·T·D·128·64 a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm import norm_statistics
from .operands import Destination, Source
from .products import dot, narrow
from .reduction import reduce
from .reference import read_by
from .tables import COLUMNS, TRITON_DTYPES, destination_table, n_edges, operand_dtype, row_reach, source_table
from .target import current
from .tiles import Tile, pieces, tiles
from .tuning import BlockConfig, block_config

_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit(do_not_specialize=["n_tiles", "n_sources", "n_destinations", "n_tokens", "plane"])  # see products
def _block_kernel(
    sources,  # [n_sources, COLUMNS] int64
    destinations,  # [n_destinations, COLUMNS] int64
    tiles,  # [n_tiles, 2] int32: first destination row (may be negative), first source row
    pieces,  # [n_pieces, 3] int32: sample, first token, tokens
    statistics,  # [n_destinations, 3, B, T] float32, read behind a norm
    partials,  # [n_pieces, n_tiles, BLOCK_D, BLOCK_S] float32
    n_tiles,
    n_sources,
    n_destinations,
    width,
    n_tokens,  # T
    plane,  # B·T
    DTYPE: tl.constexpr,
    REPLACEMENT_DTYPE: tl.constexpr,
    PATCHED: tl.constexpr,
    NORMED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # All tiles of one piece are neighbours in the launch: what one has read the others find in the L2.
    # One axis, as only the first may be longer than 65535.
    tile = (tl.program_id(0) % n_tiles).to(tl.int64)
    piece = (tl.program_id(0) // n_tiles).to(tl.int64)
    d = tl.load(tiles + tile * 2) + tl.arange(0, BLOCK_D)
    s = tl.load(tiles + tile * 2 + 1) + tl.arange(0, BLOCK_S)
    sample = tl.load(pieces + piece * 3).to(tl.int64)
    start = tl.load(pieces + piece * 3 + 1).to(tl.int64)
    tokens = tl.load(pieces + piece * 3 + 2)
    d_mask = (d >= 0) & (d < n_destinations)
    s_mask = s < n_sources

    SPLIT: tl.constexpr = (tl.float32 != DTYPE) & (NORMED | PATCHED)
    SPLIT_SOURCES: tl.constexpr = SPLIT & (PATCHED | (tl.float16 == DTYPE))
    pointer = tl.pointer_type(DTYPE)
    d_entry = destinations + d.to(tl.int64) * _COLUMNS
    s_entry = sources + s.to(tl.int64) * _COLUMNS
    g_stride = tl.load(d_entry + 2, mask=d_mask, other=0)
    g_base = tl.load(d_entry, mask=d_mask, other=0).to(pointer)
    g_base += sample * tl.load(d_entry + 1, mask=d_mask, other=0) + start * g_stride
    o_stride = tl.load(s_entry + 2, mask=s_mask, other=0)
    o_base = tl.load(s_entry, mask=s_mask, other=0).to(pointer)
    o_base += sample * tl.load(s_entry + 1, mask=s_mask, other=0) + start * o_stride
    if PATCHED:
        r_stride = tl.load(s_entry + 5, mask=s_mask, other=0)
        r_base = tl.load(s_entry + 3, mask=s_mask, other=0).to(tl.pointer_type(REPLACEMENT_DTYPE))
        r_base += sample * tl.load(s_entry + 4, mask=s_mask, other=0) + start * r_stride
    if NORMED:
        x_address = tl.load(d_entry + 3, mask=d_mask, other=0)
        normed = x_address != 0
        x_stride = tl.load(d_entry + 5, mask=d_mask, other=0)
        x_base = x_address.to(pointer)
        x_base += sample * tl.load(d_entry + 4, mask=d_mask, other=0) + start * x_stride
        gain_base = tl.load(d_entry + 6, mask=d_mask, other=0).to(tl.pointer_type(tl.float32))
        rho_at = statistics + d.to(tl.int64) * 3 * plane + sample * n_tokens + start

    acc = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    steps = tl.cdiv(width, BLOCK_K)
    for i in tl.range(0, tokens * steps, num_stages=STAGES):
        t = (i // steps).to(tl.int64)
        k = (i % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        k_mask = (k < width)[None, :]
        o_at = (o_base + t * o_stride)[:, None] + k[None, :]
        g_at = (g_base + t * g_stride)[:, None] + k[None, :]
        if ALIGNED:
            o_at = tl.multiple_of(o_at, (16, 16))
        o = tl.load(o_at, mask=s_mask[:, None] & k_mask, other=0.0)
        if ALIGNED:
            g_at = tl.multiple_of(g_at, (16, 16))
        g = tl.load(g_at, mask=d_mask[:, None] & k_mask, other=0.0)
        if PATCHED:
            r_at = (r_base + t * r_stride)[:, None] + k[None, :]
            if ALIGNED:
                r_at = tl.multiple_of(r_at, (16, 16))
            r = tl.load(r_at, mask=s_mask[:, None] & k_mask, other=0.0)
            o = r.to(tl.float32) - o.to(tl.float32)
        if NORMED:
            x_at = (x_base + t * x_stride)[:, None] + k[None, :]
            gain_at = gain_base[:, None] + k[None, :]
            if ALIGNED:
                x_at = tl.multiple_of(x_at, (16, 16))
            x = tl.load(x_at, mask=normed[:, None] & k_mask, other=0.0).to(tl.float32)
            if ALIGNED:
                gain_at = tl.multiple_of(gain_at, (16, 16))
            gain = tl.load(gain_at, mask=normed[:, None] & k_mask, other=1.0)
            rho = tl.load(rho_at + t, mask=normed, other=1.0)
            c = tl.load(rho_at + t + plane, mask=normed, other=0.0)
            e = tl.load(rho_at + t + 2 * plane, mask=normed, other=0.0)
            g = rho[:, None] * gain * g.to(tl.float32) - c[:, None] * x + e[:, None]
        if SPLIT:
            g, o = g.to(tl.float32), o.to(tl.float32)
            g_high = narrow(g, tl.bfloat16)
            g_low = narrow(g - g_high.to(tl.float32), tl.bfloat16)
            o_high = narrow(o, tl.bfloat16)
            acc = dot(g_high, tl.trans(o_high), acc)
            acc = dot(g_low, tl.trans(o_high), acc)
            if SPLIT_SOURCES:
                o_low = narrow(o - o_high.to(tl.float32), tl.bfloat16)
                acc = dot(g_high, tl.trans(o_low), acc)
        else:
            acc = dot(g, tl.trans(o), acc)

    inside = tl.arange(0, BLOCK_D)[:, None] * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    tl.store(partials + (piece * n_tiles + tile) * (BLOCK_D * BLOCK_S) + inside, acc)


def contract_block(
    sources: Sequence[Source],
    destinations: Sequence[Destination],
    lengths: Sequence[int],
    config: BlockConfig | None = None,
) -> Tensor:
    """Scores [B, n_edges] float32 of operands without weights; arguments as `reference.contract` (checked there).

    Args:
        config: in place of the table's.
    """
    sources = read_by(sources, destinations)
    dtype = operand_dtype(sources, destinations)
    device = sources[0].value.device
    n_samples, n_tokens, width = sources[0].value.shape
    left, right = destination_table(destinations, dtype), source_table(sources, dtype)
    left_rows, right_rows = left.tensor(device), right.tensor(device)
    statistics = norm_statistics(destinations, left, left_rows, lengths)
    patched = sources[0].replacement is not None
    config = config or block_config(dtype, statistics is not None, patched, current())
    tile_list = tiles(row_reach(destinations), config.block_d, (config.block_s,))[config.block_s]
    piece_list = pieces(lengths, width)
    tile_rows, piece_rows, first_piece = int_tables(tile_list, piece_list, n_samples, device)
    partials = torch.empty(
        len(piece_list), len(tile_list), config.block_d, config.block_s, dtype=torch.float32, device=device
    )
    scores = torch.empty(n_samples, n_edges(destinations), dtype=torch.float32, device=device)
    _block_kernel[(len(tile_list) * len(piece_list),)](
        right_rows,
        left_rows,
        tile_rows,
        piece_rows,
        partials if statistics is None else statistics,
        partials,
        len(tile_list),
        len(right.rows),
        len(left.rows),
        width,
        n_tokens,
        n_samples * n_tokens,
        DTYPE=TRITON_DTYPES[dtype],
        REPLACEMENT_DTYPE=TRITON_DTYPES[right.other_dtype],
        PATCHED=patched,
        NORMED=statistics is not None,
        ALIGNED=left.aligned and right.aligned,
        BLOCK_D=config.block_d,
        BLOCK_S=config.block_s,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )
    reduce(partials, first_piece, tile_rows, left_rows, scores, negated=not patched)
    return scores


def int_tables(
    tile_list: Sequence[Tile],
    piece_list: Sequence[tuple[int, int, int]],
    n_samples: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles [n, 2], pieces [n, 3] and each sample's first piece [B + 1], int32."""
    counts = [0] * (n_samples + 1)
    for sample, _, _ in piece_list:
        counts[sample + 1] += 1
    first = torch.tensor(counts).cumsum(0)
    return tuple(  # type: ignore[return-value]
        torch.as_tensor(table, dtype=torch.int32).to(device, non_blocking=True)
        for table in (tile_list, piece_list, first)
    )
