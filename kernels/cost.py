"""FLOPs and bytes of a contraction, counted over the very tiles, pieces and chunks that its launcher walks.

Every count includes padding: what a tile multiplies or loads beyond the last row counts, as it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .block import block_config
from .expand import chunks, expand_config
from .head import head_config, head_plan
from .norm import projection_config
from .target import Target
from .tiles import cdiv, pieces, tiles


@dataclass(frozen=True)
class BlockCost:
    """Of the contraction kernel and its reduction.

    Args:
        memory: bytes from and to device memory, where tiles of one piece find each other's rows in the L2.
        loaded: bytes that processors ask the L2 for.
        minimum: each source and destination read once.
    """

    flops: int
    memory: int
    loaded: int
    minimum: int


def block_cost(
    reach: Sequence[int],
    n_sources: int,
    lengths: Sequence[int],
    width: int,
    dtype: torch.dtype,
    target: Target,
) -> BlockCost:
    """Of a zero ablation without norms; `reach` as in `tiles.tiles`."""
    config = block_config(dtype, False, False, target)
    members = tiles(reach, config.block_d, (config.block_s,))[config.block_s]
    partial = 4 * config.block_d * config.block_s
    rows = n_sources + len(reach)
    in_tiles = sum(
        min(config.block_d, len(reach) - t.destination, config.block_d + t.destination)
        + min(config.block_s, n_sources - t.source)
        for t in members
    )
    flops = memory = loaded = 0
    for piece in pieces(lengths, width):
        row = piece.tokens * width * dtype.itemsize
        steps = piece.tokens * cdiv(width, config.block_k)
        flops += 2 * len(members) * config.block_d * config.block_s * steps * config.block_k
        sums = 2 * len(members) * partial
        memory += rows * row + sums
        loaded += in_tiles * row + sums
    return BlockCost(flops, memory, loaded, rows * sum(lengths) * width * dtype.itemsize)


@dataclass(frozen=True)
class HeadCost:
    """FLOPs of each part: expansions of both sides, the norms' statistics, and the contraction."""

    expansion: int
    statistics: int
    contraction: int


def head_cost(
    reach: Sequence[int],
    n_sources: int,
    source_heads: int,
    destination_heads: int,
    head_dim: int,
    lengths: Sequence[int],
    width: int,
    dtype: torch.dtype,
    target: Target,
) -> HeadCost:
    """Of rows of which so many come as heads; `reach` as in `tiles.tiles`."""
    config, expansion = head_config(dtype, target), expand_config(dtype, target)
    projection = projection_config(dtype, head_dim, target)
    lists = tiles(reach, config.block_d, config.widths)
    area = sum(config.block_d * block_s * len(members) for block_s, members in lists.items())
    n_tiles = sum(map(len, lists.values()))
    expanded = statistics = contracted = 0
    for sample, length in enumerate(lengths):
        n_rows = n_sources + len(reach)
        plan = head_plan(n_rows, n_tiles, length, width, dtype.itemsize, config.block_k)
        for chunk in chunks(sample, length, plan.tokens, width, plan.columns):
            tile_tokens = cdiv(chunk.tokens, expansion.block_t) * expansion.block_t
            tile_columns = cdiv(chunk.columns, expansion.block_c) * expansion.block_c
            inner = cdiv(head_dim, expansion.block_h) * expansion.block_h
            expanded += 2 * (source_heads + destination_heads) * tile_tokens * tile_columns * inner
            contracted += 2 * area * cdiv(chunk.tokens * chunk.columns, config.block_k) * config.block_k
        tokens = cdiv(length, projection.block_t) * projection.block_t
        columns = cdiv(width, projection.block_k) * projection.block_k
        statistics += 2 * destination_heads * tokens * columns * projection.block_h
    return HeadCost(expanded, statistics, contracted)
