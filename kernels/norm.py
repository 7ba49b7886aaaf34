"""What the norm's vector-Jacobian product needs of each token: three numbers, so G is formed where it is used.

With v = ρ γ⊙u, u the gradient at the norm's output, and x the stream it read,

    G = ρ γ⊙u − c x + e        c = ρ³ A/D,  e = c μ − ρ M/D,  A = ⟨γ⊙u, x − μ⟩,  M = Σ γ⊙u

and μ = M = e = 0 for RMSNorm. G itself is never written: at block level that would read u and x, write G and
read it again; this reads u and x once more (both streams of a layer's q, k and v lie in the L2) and writes 12
bytes a token. Traffic for L layers with split q, k, v, in units of T·D elements: 4 L here (u of q, k and v, and
x), beside the 7 L of the contraction; writing G out costs 7 L, beside 6 L.

Where the destination comes as heads, u = g·W is not at hand, but A = g·(W(γ⊙(x−μ))) needs no more of it than
what the projection itself made of the stream: 2·D·head_dim FLOPs a row and token.

That is a fifth of the contraction's FLOPs at the 7B shape, about 3 % of the model's own passes. Two ways around it
cost more than they save. A = g·(p − β's share − bias), p the projection's own output, would have p kept of every
layer, and in bfloat16 leaves few digits of it where a bias is as large as Qwen2's keys'. Or A as a by-product of the
expansion, c⟨x, O⟩ subtracted afterwards: ⟨x_l, O_s⟩ of every layer, source and token reads the sources' scratch
again and adds up 93 KB a token, 4.5 GB for 512 tokens, longer than the product takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import Destination
from .products import dot, narrow
from .tables import COLUMNS, TRITON_DTYPES, Table
from .target import current
from .tuning import projection_config

_COLUMNS = tl.constexpr(COLUMNS)
#: Numbers a row and token: ρ, c, e.
STATISTICS = 3
ROW_BLOCK = 2048


@triton.jit(do_not_specialize=["n_normed", "plane", "n_tokens"])  # see products
def _norm_kernel(
    table,  # [n_rows, COLUMNS] int64
    indices,  # [n_normed] int32, which rows to do
    lengths,  # [B] int32
    out,  # [n_rows, 3, B, T] float32
    n_normed,
    plane,  # B·T
    n_tokens,
    width,
    eps,  # [n_rows] float32
    DTYPE: tl.constexpr,
    CENTRED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The rows of one norm are neighbours in the launch: its stream comes from the L2 after the first.
    # One axis, as only the first may be longer than 65535.
    row = tl.load(indices + tl.program_id(0) % n_normed).to(tl.int64)
    position = (tl.program_id(0) // n_normed).to(tl.int64)
    token = position % n_tokens
    sample = position // n_tokens
    if token >= tl.load(lengths + sample):
        return
    entry = table + row * _COLUMNS
    pointer = tl.pointer_type(DTYPE)
    gradient = tl.load(entry).to(pointer) + sample * tl.load(entry + 1) + token * tl.load(entry + 2)
    stream = tl.load(entry + 3).to(pointer) + sample * tl.load(entry + 4) + token * tl.load(entry + 5)
    gain = tl.load(entry + 6).to(tl.pointer_type(tl.float32))
    lane = tl.arange(0, BLOCK)[None, :]

    mean = 0.0
    if CENTRED:
        total = tl.zeros((1, BLOCK), tl.float32)
        for start in range(0, width, BLOCK):
            k = start + lane
            x_at = stream + k
            if ALIGNED:
                x_at = tl.multiple_of(x_at, (16, 16))
            total += tl.load(x_at, mask=k < width, other=0.0).to(tl.float32)
        mean = tl.sum(total) / width
    squares = tl.zeros((1, BLOCK), tl.float32)
    along = tl.zeros((1, BLOCK), tl.float32)
    summed = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        k = start + lane
        mask = k < width
        x_at = stream + k
        if ALIGNED:
            x_at = tl.multiple_of(x_at, (16, 16))
        x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - mean, 0.0)
        u_at = gradient + k
        if ALIGNED:
            u_at = tl.multiple_of(u_at, (16, 16))
        u = tl.load(u_at, mask=mask, other=0.0).to(tl.float32)
        u *= tl.load(gain + k, mask=mask, other=0.0)
        squares += x * x
        along += u * x
        summed += u
    rho = 1.0 / tl.sqrt_rn(tl.sum(squares) / width + tl.load(eps + row))
    c = rho * rho * rho * tl.sum(along) / width
    e = c * mean
    if CENTRED:
        e -= rho * tl.sum(summed) / width
    here = out + row * 3 * plane + position
    tl.store(here, rho)
    tl.store(here + plane, c)
    tl.store(here + 2 * plane, e)


@triton.jit(do_not_specialize=["n_tokens"])  # see products
def _head_norm_kernel(
    table,  # [n_rows, COLUMNS] int64
    indices,  # [n_normed] int32, which rows to do
    lengths,  # [B] int32
    out,  # [n_rows, 3, B, T] float32
    n_tokens,
    width,
    head_dim,
    weight_stride_h,
    weight_stride_d,
    eps,  # [n_rows] float32
    DTYPE: tl.constexpr,
    CENTRED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,  # all of head_dim
    BLOCK_K: tl.constexpr,
):
    row = tl.load(indices + tl.program_id(0)).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = token < tl.load(lengths + sample)
    entry = table + row * _COLUMNS
    pointer = tl.pointer_type(DTYPE)
    at = token.to(tl.int64)[:, None]
    gradient = tl.load(entry).to(pointer) + sample * tl.load(entry + 1) + at * tl.load(entry + 2)
    stream = tl.load(entry + 3).to(pointer) + sample * tl.load(entry + 4) + at * tl.load(entry + 5)
    gain = tl.load(entry + 6).to(tl.pointer_type(tl.float32))
    weight = tl.load(entry + 7).to(pointer)
    lane = tl.arange(0, BLOCK_K)
    h = tl.arange(0, BLOCK_H)

    mean = tl.zeros((BLOCK_T,), tl.float32)
    if CENTRED:
        for start in range(0, width, BLOCK_K):
            k = start + lane
            x_at = stream + k[None, :]
            if ALIGNED:
                x_at = tl.multiple_of(x_at, (16, 16))
            x = tl.load(x_at, mask=real[:, None] & (k < width)[None, :], other=0.0)
            mean += tl.sum(x.to(tl.float32), 1)
        mean = mean / width
    squares = tl.zeros((BLOCK_T,), tl.float32)
    weight_sum = tl.zeros((BLOCK_H,), tl.float32)
    projected = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + lane
        mask = real[:, None] & (k < width)[None, :]
        x_at = stream + k[None, :]
        if ALIGNED:
            x_at = tl.multiple_of(x_at, (16, 16))
        x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - mean[:, None], 0.0)
        squares += tl.sum(x * x, 1)
        gamma = tl.load(gain + k, mask=k < width, other=0.0)
        w_at = weight + (
            h.to(tl.int64)[None, :] * weight_stride_h + k.to(tl.int64)[:, None] * weight_stride_d
        )
        w_mask = (h < head_dim)[None, :] & (k < width)[:, None]
        if ALIGNED:
            w_at = tl.multiple_of(w_at, (16, 16))
        w = tl.load(w_at, mask=w_mask, other=0.0)
        projected = dot(narrow(x * gamma[None, :], DTYPE), w, projected)
        if CENTRED:
            weight_sum += tl.sum(w.to(tl.float32) * gamma[:, None], 0)
    g = tl.load(gradient + h[None, :], mask=real[:, None] & (h < head_dim)[None, :], other=0.0)
    g = g.to(tl.float32)
    rho = 1.0 / tl.sqrt_rn(squares / width + tl.load(eps + row))
    c = rho * rho * rho * tl.sum(projected * g, 1) / width
    e = c * mean
    if CENTRED:
        e -= rho * tl.sum(g * weight_sum[None, :], 1) / width
    size = tl.num_programs(2).to(tl.int64) * n_tokens
    here = out + row * 3 * size + sample * n_tokens + token
    tl.store(here, rho, mask=real)
    tl.store(here + size, c, mask=real)
    tl.store(here + 2 * size, e, mask=real)


def norm_statistics(
    destinations: Sequence[Destination], table: Table, rows: Tensor, lengths: Sequence[int]
) -> Tensor | None:
    """[n_rows, 3, B, T] float32: ρ, c and e of every real token of every row behind a norm; None if there is none.

    Rows without a norm, and padding, are left unwritten.

    Args:
        table: of `destinations`, and `rows` the same on the device.
    """
    groups: dict[tuple[bool, tuple[int, int, int] | None], list[int]] = {}
    eps: list[float] = []
    for destination in destinations:
        norm, weight = destination.norm, destination.weight
        if norm is not None:
            layout = None if weight is None else (weight.shape[1], weight.stride(1), weight.stride(2))
            members = groups.setdefault((norm.centred, layout), [])
            members += range(len(eps), len(eps) + destination.rows)
        eps += [0.0 if norm is None else norm.eps] * destination.rows
    if not groups:
        return None
    device = rows.device
    n_samples, n_tokens = destinations[0].gradient.shape[:2]
    width = next(d.norm.stream.shape[-1] for d in destinations if d.norm is not None)
    out = torch.empty(len(eps), STATISTICS, n_samples, n_tokens, dtype=torch.float32, device=device)
    length_row = torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True)
    eps_row = torch.tensor(eps, dtype=torch.float32).to(device, non_blocking=True)
    dtype = TRITON_DTYPES[table.dtype]
    for (centred, layout), members in groups.items():
        indices = torch.tensor(members, dtype=torch.int32).to(device, non_blocking=True)
        if layout is None:
            _norm_kernel[(len(members) * n_samples * n_tokens,)](
                rows,
                indices,
                length_row,
                out,
                len(members),
                n_samples * n_tokens,
                n_tokens,
                width,
                eps_row,
                dtype,
                centred,
                table.aligned,
                ROW_BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
            continue
        head_dim, stride_h, stride_d = layout
        config = projection_config(table.dtype, head_dim, current())
        _head_norm_kernel[len(members), triton.cdiv(max(lengths), config.block_t), n_samples](
            rows,
            indices,
            length_row,
            out,
            n_tokens,
            width,
            head_dim,
            stride_h,
            stride_d,
            eps_row,
            dtype,
            centred,
            table.aligned,
            config.block_t,
            config.block_h,
            config.block_k,
            num_warps=config.warps,
            enable_fp_fusion=True,
        )
    return out
