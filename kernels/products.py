"""Products and conversions every kernel uses: operands as they are, float32 sums, no tf32, round to nearest even.

Numbers that differ from batch to batch, and on which no vector's alignment rests, are in every kernel's
`do_not_specialize`: Triton would compile it anew for 1, for multiples of 16 and for the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a·b; a and b of one dtype."""
    # Triton's interpreter would multiply bfloat16's bit patterns; in float32 the products are the same, exact.
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def power(exponent):
    """2^exponent in float32, exact for −126 … 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 to DTYPE."""
    # The interpreter truncates to bfloat16 where a device rounds.
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)
