"""How far each expanded row may be shifted up so that it fits float16, as a power of two: found before it is formed.

Rows of bfloat16 operands are expanded in float32 and have to be narrowed for the tensor cores. Bfloat16 would leave
8 bits of each number, and scores off by 2e-3 of their norm; float16 leaves 11, at the same speed, but spans only
2^±15, and gradients are smaller than that. So each row of a sample is multiplied by 2^e, exactly undone in the sums:

    |O| ≤ max|z| √head_dim ‖W‖_F max|gain|        |G| ≤ max(ρ|g|) √head_dim ‖W‖_F max|γ|

as the norm's vector-Jacobian product is a projection times ρ γ. The bound brings no number above 2^14. It is too
wide by some 2^10 for a usual head, which of the 2^28 between that and the smallest normal number takes a third.

Read: values and gradients once, and each weight once; 2.1 GB for 512 tokens at the 7B shape of Qwen2.5, beside some
20 GB of expansion and contraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from .expand import Side
from .tables import COLUMNS, TRITON_DTYPES

_COLUMNS = tl.constexpr(COLUMNS)
#: Scaled rows stay below 2 to this.
_TOP = tl.constexpr(14)
#: No row is shifted further: two such shifts undone one after the other are no underflow.
_MOST = tl.constexpr(60)
BLOCK_T, BLOCK_K = 16, 256


@triton.jit(do_not_specialize=["n_tokens", "plane"])  # see products
def _scale_kernel(
    table,  # [n_rows, COLUMNS] int64
    indices,  # [n_group] int32, which rows to do
    statistics,  # [n_rows, 3, B, T] float32, read by destinations behind a norm
    lengths,  # [B] int32
    exponents,  # [n_rows, B] int32
    width,
    head_dim,
    weight_stride_h,
    weight_stride_d,
    n_tokens,  # T
    plane,  # B·T
    DTYPE: tl.constexpr,
    OTHER_DTYPE: tl.constexpr,
    PATCHED: tl.constexpr,
    NORMED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Samples side by side: the second finds a row's weights in the L2.
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(indices + tl.program_id(1)).to(tl.int64)
    length = tl.load(lengths + sample)
    entry = table + row * _COLUMNS
    pointer = tl.pointer_type(DTYPE)
    value = tl.load(entry).to(pointer) + sample * tl.load(entry + 1)
    value_stride = tl.load(entry + 2)
    other_address = tl.load(entry + 3)
    other = other_address.to(tl.pointer_type(OTHER_DTYPE)) + sample * tl.load(entry + 4)
    other_stride = tl.load(entry + 5)
    gain_address = tl.load(entry + 6)
    weight_address = tl.load(entry + 7)
    lane = tl.arange(0, BLOCK_K)
    inner = tl.where(weight_address != 0, head_dim, width)

    normed = tl.where(other_address != 0, length, 0)
    largest = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, length, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        real = token < length
        at = token.to(tl.int64)[:, None]
        here = tl.zeros((BLOCK_T,), tl.float32)
        for first in range(0, inner, BLOCK_K):
            k = first + lane[None, :]
            mask = real[:, None] & (k < inner)
            v_at = value + at * value_stride + k
            if ALIGNED:
                v_at = tl.multiple_of(v_at, (16, 16))
            v = tl.abs(tl.load(v_at, mask=mask, other=0.0).to(tl.float32))
            if PATCHED:
                o_at = other + at * other_stride + k
                if ALIGNED:
                    o_at = tl.multiple_of(o_at, (16, 16))
                v += tl.abs(tl.load(o_at, mask=mask, other=0.0).to(tl.float32))
            here = tl.maximum(here, tl.max(v, 1))
        if NORMED:
            rho_at = statistics + row * 3 * plane + sample * n_tokens + token
            here *= tl.load(rho_at, mask=token < normed, other=1.0)
        largest = tl.maximum(largest, here)
    bound = tl.max(largest)

    if weight_address != 0:
        weight = weight_address.to(pointer)
        squares = tl.zeros((BLOCK_T,), tl.float32)
        for h_start in range(0, head_dim, BLOCK_T):
            h = h_start + tl.arange(0, BLOCK_T)
            for first in range(0, width, BLOCK_K):
                k = first + lane
                w_at = weight + (
                    h.to(tl.int64)[:, None] * weight_stride_h + k.to(tl.int64)[None, :] * weight_stride_d
                )
                if ALIGNED:
                    w_at = tl.multiple_of(w_at, (16, 16))
                w = tl.load(w_at, mask=(h < head_dim)[:, None] & (k < width)[None, :], other=0.0)
                squares += tl.sum(w.to(tl.float32) * w.to(tl.float32), 1)
        bound *= tl.sqrt(tl.sum(squares) * head_dim)
    elif NORMED:
        bound *= tl.sqrt(tl.where(normed > 0, tl.full((), 1.0, tl.float32) * width, 1.0))
    if gain_address != 0:
        gain = gain_address.to(tl.pointer_type(tl.float32))
        most = tl.zeros((BLOCK_K,), tl.float32)
        for first in range(0, width, BLOCK_K):
            k = first + lane
            most = tl.maximum(most, tl.abs(tl.load(gain + k, mask=k < width, other=0.0)))
        bound *= tl.max(most)
    # The bound lies below 2^(its exponent + 1).
    shift = _TOP - 1 - ((bound.to(tl.int32, bitcast=True) >> 23) - 127)
    tl.store(exponents + row * tl.num_programs(0) + sample, tl.minimum(tl.maximum(shift, -_MOST), _MOST))


def scaled(side: Side, lengths: Sequence[int], n_tokens: int, width: int) -> Side:
    """The side with the exponent of every row and sample; `n_tokens` is T."""
    device = side.rows.device
    exponents = torch.empty(len(side.table.rows), len(lengths), dtype=torch.int32, device=device)
    length_row = torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True)
    for group in side.groups:
        _scale_kernel[len(lengths), len(group.indices)](
            side.rows,
            group.indices,
            exponents if side.statistics is None else side.statistics,
            length_row,
            exponents,
            width,
            group.head_dim,
            group.stride_h,
            group.stride_d,
            n_tokens,
            len(lengths) * n_tokens,
            DTYPE=TRITON_DTYPES[side.table.dtype],
            OTHER_DTYPE=TRITON_DTYPES[side.table.other_dtype],
            PATCHED=side.patched,
            NORMED=side.statistics is not None,
            ALIGNED=side.table.aligned,
            BLOCK_T=BLOCK_T,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return replace(side, exponents=exponents)
