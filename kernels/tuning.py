"""Which tile sizes each kernel runs with: tables read from the top, where the first row that fits holds.

A row names an architecture (`architecture`), a number (``"float"``: float32; ``"half"``: bfloat16 and float16) and a
shape class; `ANY` fits all. The last row of a table is its one good default. Every row passes the static gates
(`benchmarks.static`): no spill, tensor cores at work, shared memory that fits. `autotune` looks further, among
`BLOCK_CANDIDATES` and their like, where a user asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from .target import Target

ANY = "any"
Config = TypeVar("Config")
#: Architecture, number, shape class, and what runs there.
Row = tuple[str, str, str, Config]


@dataclass(frozen=True)
class BlockConfig:
    """Of the block contraction: destinations × sources of a tile, elements of D a step, steps in flight, warps."""

    block_d: int
    block_s: int
    block_k: int
    stages: int
    warps: int


@dataclass(frozen=True)
class HeadConfig:
    """Of a chunk's contraction: as `BlockConfig`, with tile widths in sources, widest first."""

    block_d: int
    widths: tuple[int, ...]
    block_k: int
    stages: int
    warps: int


@dataclass(frozen=True)
class ExpandConfig:
    """Of the expansion: tokens × columns of D of a tile, elements of a head a step, warps."""

    block_t: int
    block_c: int
    block_h: int
    warps: int


@dataclass(frozen=True)
class ProjectionConfig:
    """Of the norm's statistics behind a projection: tokens × whole heads of a tile, elements of D a step, warps."""

    block_t: int
    block_h: int
    block_k: int
    warps: int


#: Shape class: what is formed in registers. As many bytes in flight as these and shared memory allow.
BLOCK: Sequence[Row[BlockConfig]] = (
    ("cdna", "float", ANY, BlockConfig(64, 64, 16, stages=2, warps=4)),
    (ANY, "float", ANY, BlockConfig(64, 64, 16, stages=2, warps=8)),
    ("cdna", "half", "plain", BlockConfig(128, 64, 64, stages=2, warps=8)),
    ("cdna", "half", ANY, BlockConfig(128, 64, 32, stages=2, warps=8)),
    ("ampere", "half", "norm+patch", BlockConfig(64, 32, 32, stages=3, warps=8)),
    (ANY, "half", "plain", BlockConfig(128, 64, 64, stages=3, warps=8)),
    (ANY, "half", ANY, BlockConfig(128, 64, 32, stages=3, warps=8)),
)

#: No shape classes: whatever the graph's size, its tiles are filled by the same few sizes.
HEAD: Sequence[Row[HeadConfig]] = (
    ("cdna", "float", ANY, HeadConfig(64, (64,), 16, stages=2, warps=4)),
    (ANY, "float", ANY, HeadConfig(64, (64,), 16, stages=2, warps=8)),
    ("cdna", "half", ANY, HeadConfig(128, (128, 64), 64, stages=2, warps=8)),
    (ANY, "half", ANY, HeadConfig(128, (128, 64), 64, stages=3, warps=8)),
)

#: Shape class: what is formed in registers.
EXPAND: Sequence[Row[ExpandConfig]] = (
    ("cdna", "float", ANY, ExpandConfig(64, 64, 16, warps=4)),
    ("cdna", "half", ANY, ExpandConfig(64, 128, 64, warps=4)),
    (ANY, "float", ANY, ExpandConfig(64, 64, 16, warps=8)),
    ("ampere", "half", "patch", ExpandConfig(64, 128, 32, warps=8)),
    (ANY, "half", ANY, ExpandConfig(64, 128, 64, warps=8)),
)

#: Shape class: the head's width, up to a power of two. Wide heads leave room for fewer tokens.
PROJECTION: Sequence[Row[ProjectionConfig]] = (
    ("cdna", "float", "64", ProjectionConfig(64, 64, 16, warps=4)),
    ("cdna", "float", "128", ProjectionConfig(32, 128, 16, warps=4)),
    ("cdna", "float", "256", ProjectionConfig(16, 256, 16, warps=4)),
    ("cdna", "float", "512", ProjectionConfig(16, 512, 16, warps=4)),
    ("cdna", "half", "64", ProjectionConfig(64, 64, 32, warps=4)),
    ("cdna", "half", "128", ProjectionConfig(64, 128, 32, warps=4)),
    ("cdna", "half", "256", ProjectionConfig(32, 256, 32, warps=4)),
    ("cdna", "half", "512", ProjectionConfig(16, 512, 32, warps=4)),
    (ANY, "float", "64", ProjectionConfig(64, 64, 16, warps=8)),
    (ANY, "float", "128", ProjectionConfig(32, 128, 16, warps=8)),
    (ANY, "float", "256", ProjectionConfig(16, 256, 16, warps=8)),
    (ANY, "float", "512", ProjectionConfig(16, 512, 16, warps=8)),
    (ANY, "half", "64", ProjectionConfig(64, 64, 32, warps=8)),
    (ANY, "half", "128", ProjectionConfig(64, 128, 32, warps=8)),
    (ANY, "half", "256", ProjectionConfig(32, 256, 32, warps=8)),
    (ANY, "half", "512", ProjectionConfig(16, 512, 32, warps=8)),
)
#: Of head widths, the shape classes of `PROJECTION`.
HEAD_WIDTHS = (64, 128, 256, 512)

#: What autotuning times beside the table's choice, by number. None is wrong anywhere; some are slow somewhere.
BLOCK_CANDIDATES = {
    "float": (BlockConfig(64, 64, 32, 2, 8), BlockConfig(64, 32, 32, 2, 4), BlockConfig(32, 32, 32, 3, 4)),
    "half": (
        BlockConfig(64, 64, 64, 3, 4),
        BlockConfig(64, 64, 128, 3, 8),
        BlockConfig(128, 64, 32, 4, 8),
        BlockConfig(128, 128, 32, 3, 8),
        BlockConfig(64, 32, 64, 4, 4),
    ),
}
HEAD_CANDIDATES = {
    "float": (HeadConfig(64, (64,), 32, 2, 8), HeadConfig(128, (64,), 16, 2, 8)),
    "half": (
        HeadConfig(128, (128, 64), 32, 4, 8),
        HeadConfig(128, (128, 64), 64, 3, 4),
        HeadConfig(128, (256, 64), 64, 3, 8),
        HeadConfig(64, (128, 64), 64, 3, 4),
    ),
}
EXPAND_CANDIDATES = {
    "float": (ExpandConfig(32, 128, 16, 8), ExpandConfig(64, 64, 32, 8)),
    "half": (ExpandConfig(128, 128, 64, 8), ExpandConfig(64, 128, 32, 4), ExpandConfig(64, 64, 64, 4)),
}


def architecture(target: Target) -> str:
    """Class of architectures, named after its first: how products reach the tensor cores is what tells them apart.

    ``"ampere"``: from registers (sm_80 to sm_89, sm_120 on); ``"hopper"``: from shared memory (sm_90 to sm_119);
    ``"cdna"``: AMD's.
    """
    if target.backend == "hip":
        return "cdna"
    return "hopper" if 90 <= target.capability < 120 else "ampere"


def number(dtype: torch.dtype) -> str:
    return "float" if dtype == torch.float32 else "half"


def shape_class(normed: bool, patched: bool) -> str:
    """Shape class: what is formed in registers."""
    return "+".join([*["norm"] * normed, *["patch"] * patched]) or "plain"


def block_config(dtype: torch.dtype, normed: bool, patched: bool, target: Target) -> BlockConfig:
    return _first(BLOCK, dtype, target, shape_class(normed, patched))


def head_config(dtype: torch.dtype, target: Target) -> HeadConfig:
    return _first(HEAD, dtype, target, ANY)


def expand_config(dtype: torch.dtype, patched: bool, target: Target) -> ExpandConfig:
    return _first(EXPAND, dtype, target, shape_class(False, patched))


def projection_config(dtype: torch.dtype, head_dim: int, target: Target) -> ProjectionConfig:
    """Raises: ValueError: no tile holds so wide a head."""
    width = next((w for w in HEAD_WIDTHS if w >= head_dim), None)
    if width is None:
        raise ValueError(
            f"no Triton kernel for heads of {head_dim}, {HEAD_WIDTHS[-1]} at most; use the reference"
        )
    return _first(PROJECTION, dtype, target, str(width))


def _first(rows: Sequence[Row[Config]], dtype: torch.dtype, target: Target, shape: str) -> Config:
    wanted = (architecture(target), number(dtype), shape)
    return next(row[3] for row in rows if all(r in (ANY, w) for r, w in zip(row[:3], wanted, strict=True)))
