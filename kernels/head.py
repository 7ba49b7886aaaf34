"""Head-level contraction on the GPU: expand a chunk of every row into bounded scratch, contract it, go on.

A chunk is some tokens × some columns of D (`tiles.head_plan`). Per chunk, every source and destination row is
expanded once on tensor cores (`expand`; half precision is scaled to fit float16, see `scale`), then each tile of S
that holds an edge adds its product over the chunk to its own float32 partial sums: K = tokens·columns of the chunk,
in splits of about 4096. At the end partials are summed in order (`reduction`). One stream and no atomics: the same
bits each time. Chunks, splits and scales depend on the sample itself and the number of sources alone, so a row
depends neither on the batch nor on how destinations are split among calls.

FLOPs a token (n_s, n_d rows, H rows that come as heads, E edges):
    expansion 2·D·head_dim·H, statistics 2·D·head_dim·(destination H), contraction 2·D·(area of the tiles ≥ E).
Bytes: z, g and streams are read D/columns times, weights T/tokens times; scratch is written once, and read by the
tiles of a split side by side; partial sums are read and written once a chunk. The scratch lies in device memory: a
chunk that an L2 of 50 MB held whole would be 64 × 96 at the 7B shape of Qwen2.5 in bfloat16, and read weights and
heads more often than that saves: 22 GB for 512 tokens, against 6.3 GB and 14 GB of scratch in chunks of 256 × 256, and
2 GB for the scales. `cost.head_cost` counts all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .expand import Chunk, Side, chunks, expand, groups
from .norm import norm_statistics
from .operands import Destination, Source
from .products import dot, power
from .reduction import reduce
from .reference import read_by
from .scale import scaled
from .tables import destination_table, n_edges, operand_dtype, row_reach, source_table
from .target import current
from .tiles import HeadPlan, head_plan, tiles
from .tuning import ExpandConfig, HeadConfig, expand_config, head_config


@triton.jit(do_not_specialize=["n_destinations", "n_sources", "sample", "n_samples"])  # see products
def _head_kernel(
    gradients,  # [n_destinations, row_size]
    written,  # [n_sources, row_size]
    gradient_exponents,  # [n_destinations, B] int32, read where rows are scaled
    written_exponents,  # [n_sources, B] int32
    tiles,  # [n_tiles, 2] int32: first destination row (may be negative), first source row
    partials,  # [n_splits, n_tiles, BLOCK_D, BLOCK_S] float32
    n_destinations,
    n_sources,
    row_size,
    inner,  # leading elements of a row that count
    part,  # of them, how many one split sums
    sample,
    n_samples,  # B
    SCALED: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    d = tl.load(tiles + tile * 2) + tl.arange(0, BLOCK_D)
    s = tl.load(tiles + tile * 2 + 1) + tl.arange(0, BLOCK_S)
    d_mask = ((d >= 0) & (d < n_destinations))[:, None]
    s_mask = (s < n_sources)[:, None]
    g_base = gradients + d.to(tl.int64)[:, None] * row_size
    o_base = written + s.to(tl.int64)[:, None] * row_size
    start = split * part
    acc = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    for first in tl.range(start, tl.minimum(start + part, inner), BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        g = tl.load(g_base + k, mask=d_mask & (k < inner), other=0.0)
        o = tl.load(o_base + k, mask=s_mask & (k < inner), other=0.0)
        acc = dot(g, tl.trans(o), acc)
    if SCALED:
        down_d = tl.load(gradient_exponents + d[:, None] * n_samples + sample, mask=d_mask, other=0)
        down_s = tl.load(written_exponents + s[:, None] * n_samples + sample, mask=s_mask, other=0)
        acc = acc * power(-down_d) * tl.trans(power(-down_s))
    inside = tl.arange(0, BLOCK_D)[:, None] * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    here = partials + (split.to(tl.int64) * tl.num_programs(0) + tile) * (BLOCK_D * BLOCK_S) + inside
    if not FIRST:
        acc += tl.load(here)
    tl.store(here, acc)


def contract_head(
    sources: Sequence[Source],
    destinations: Sequence[Destination],
    lengths: Sequence[int],
    config: HeadConfig | None = None,
    expansion: ExpandConfig | None = None,
) -> Tensor:
    """Scores [B, n_edges] float32 of operands with and without weights; arguments as `reference.contract`.

    Args:
        config, expansion: in place of the tables'.
    """
    n_all = sum(source.rows for source in sources)
    sources = read_by(sources, destinations)
    dtype = operand_dtype(sources, destinations)
    config = config or head_config(dtype, current())
    device = sources[0].value.device
    lead = (sources[0].value.shape[0], sources[0].value.shape[1])
    width = (sources[0].value if sources[0].weight is None else sources[0].weight).shape[-1]
    left, right = destination_table(destinations, dtype), source_table(sources, dtype)
    left_rows = left.tensor(device)
    statistics = norm_statistics(destinations, left, left_rows, lengths)
    patched = sources[0].replacement is not None
    expansion = expansion or expand_config(dtype, patched, current())
    gradient_side = Side(left, left_rows, groups(destinations, device), False, statistics)
    source_side = Side(right, right.tensor(device), groups(sources, device), patched, None)
    if dtype != torch.float32:
        gradient_side = scaled(gradient_side, lengths, lead[1], width)
        source_side = scaled(source_side, lengths, lead[1], width)
    tile_lists = tiles(row_reach(destinations), config.block_d, config.widths)
    exponents = gradient_side.exponents, source_side.exponents
    scores = torch.empty(lead[0], n_edges(destinations), dtype=torch.float32, device=device)
    for sample, length in enumerate(lengths):
        plan = head_plan(n_all, length, width, dtype.itemsize)
        row_size = plan.tokens * plan.columns
        gradients = torch.empty(len(left.rows), row_size, dtype=gradient_side.scratch, device=device)
        written = torch.empty(len(right.rows), row_size, dtype=source_side.scratch, device=device)
        sums = {
            block_s: _Sums.of(members, plan.splits, config.block_d, block_s, device)
            for block_s, members in tile_lists.items()
        }
        for chunk in chunks(sample, length, plan.tokens, width, plan.columns):
            expand(source_side, chunk, written, lead, width, expansion)
            expand(gradient_side, chunk, gradients, lead, width, expansion)
            for each in sums.values():
                _contract_chunk(gradients, written, exponents, each, chunk, lead[0], plan, config)
        for each in sums.values():
            row = scores[sample : sample + 1]
            reduce(each.partials, each.first_piece, each.tiles, left_rows, row, negated=not patched)
    return scores


@dataclass(frozen=True)
class _Sums:
    """Tiles of one width and their partial sums [n_splits, n_tiles, block_d, block_s]."""

    tiles: Tensor
    first_piece: Tensor
    partials: Tensor

    @staticmethod
    def of(
        members: Sequence[tuple[int, int]], splits: int, block_d: int, block_s: int, device: torch.device
    ) -> _Sums:
        tile_rows = torch.tensor(members, dtype=torch.int32).to(device, non_blocking=True)
        first_piece = torch.tensor([0, splits], dtype=torch.int32).to(device, non_blocking=True)
        partials = torch.empty(splits, len(members), block_d, block_s, dtype=torch.float32, device=device)
        return _Sums(tile_rows, first_piece, partials)


def _contract_chunk(
    gradients: Tensor,
    written: Tensor,
    exponents: tuple[Tensor | None, Tensor | None],
    sums: _Sums,
    chunk: Chunk,
    n_samples: int,
    plan: HeadPlan,
    config: HeadConfig,
) -> None:
    splits, n_tiles, block_d, block_s = sums.partials.shape
    _head_kernel[n_tiles, splits](
        gradients,
        written,
        *(sums.tiles if each is None else each for each in exponents),
        sums.tiles,
        sums.partials,
        len(gradients),
        len(written),
        gradients.shape[1],
        chunk.tokens * chunk.columns,
        plan.part,
        chunk.sample,
        n_samples,
        SCALED=exponents[0] is not None,
        FIRST=chunk.start == 0 and chunk.first_column == 0,
        BLOCK_D=block_d,
        BLOCK_S=block_s,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )
