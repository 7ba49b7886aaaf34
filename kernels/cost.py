"""FLOPs and bytes of a contraction, counted over the very tiles, pieces and chunks that its launcher walks.

Every count includes padding: what a tile multiplies or loads beyond the last row counts, as it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .expand import chunks
from .target import Target
from .tiles import cdiv, head_plan, pieces, tiles
from .tuning import block_config, expand_config, head_config, projection_config


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
    """FLOPs of each part: expansions of both sides, the norms' statistics, and the contraction.

    Args:
        memory: bytes from and to device memory: operands once for the rows' scales and again for each chunk, scratch
            written once and read once (tiles of one split share their rows through the L2), partial sums read and
            written for each chunk.
        launches: of kernels, the norms' statistics and the rows' scales apart.
    """

    expansion: int
    statistics: int
    contraction: int
    memory: int
    launches: int


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
    config, expansion = head_config(dtype, target), expand_config(dtype, False, target)
    projection = projection_config(dtype, head_dim, target)
    lists = tiles(reach, config.block_d, config.widths)
    area = sum(config.block_d * block_s * len(members) for block_s, members in lists.items())
    heads, rows = source_heads + destination_heads, n_sources + len(reach)
    expanded = statistics = contracted = memory = launches = 0
    for sample, length in enumerate(lengths):
        plan = head_plan(n_sources, length, width, dtype.itemsize)
        for chunk in chunks(sample, length, plan.tokens, width, plan.columns):
            tile_tokens = cdiv(chunk.tokens, expansion.block_t) * expansion.block_t
            tile_columns = cdiv(chunk.columns, expansion.block_c) * expansion.block_c
            inner = cdiv(head_dim, expansion.block_h) * expansion.block_h
            expanded += 2 * heads * tile_tokens * tile_columns * inner
            elements = chunk.tokens * chunk.columns
            contracted += 2 * area * cdiv(elements, config.block_k) * config.block_k
            operands = heads * head_dim * (chunk.tokens + chunk.columns) + (rows - heads) * elements
            memory += (operands + 2 * rows * elements) * dtype.itemsize + 2 * 4 * area * plan.splits
            launches += 2 + len(lists)
        tokens = cdiv(length, projection.block_t) * projection.block_t
        columns = cdiv(width, projection.block_k) * projection.block_k
        statistics += 2 * destination_heads * tokens * columns * projection.block_h
        if dtype != torch.float32:
            scaled = heads * head_dim * (length + width) + (rows - heads) * length * width
            memory += scaled * dtype.itemsize
        launches += len(lists)
    return HeadCost(expanded, statistics, contracted, memory, launches)
