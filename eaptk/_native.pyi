"""Compiled from csrc/. Arguments must be validated first; use `eaptk.sweep` and `eaptk.kernels`."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_Scores = npt.NDArray[np.float32] | npt.NDArray[np.float16]
_Indices = npt.NDArray[np.int64]
_Doubles = npt.NDArray[np.float64]

def sweep(
    scores: _Scores,
    rows: _Indices,
    columns: _Indices | None,
    edges: _Doubles | None,
    threads: int,
    portable: bool,
) -> tuple[_Doubles, _Indices, _Indices]:
    """Moments [n_rows, 7] (sum_abs, sum, m2, m3, m4, min, max), counts [n_rows, n_bins], above [n_rows]."""

def weighted_column_sums(
    scores: _Scores, rows: _Indices, columns: _Indices | None, weights: _Doubles, absolute: bool, threads: int
) -> _Doubles:
    """[n_weights, n_columns] from weights [n_weights, n_rows]."""

def row_dots(
    scores: _Scores, rows: _Indices, columns: _Indices | None, vector: _Doubles, threads: int
) -> _Doubles:
    """[n_rows]: each row's product with vector [n_columns]."""

def read_sum(data: npt.NDArray[np.float32], threads: int) -> float:
    """The sum of all elements, at memory bandwidth: the yardstick of benchmarks/sweep.py."""

def has_avx512() -> bool:
    """Whether this processor runs the AVX-512 kernel."""

#: Tokens that are added up together in float32.
TOKENS: int

class Operand:
    """[samples, tokens, rows, columns] at an address (0: none), with strides in elements; see csrc/contraction.hpp."""

    def __init__(self, data: int, bfloat16: bool, sample: int, token: int, row: int) -> None: ...

class Weight:
    """[rows, head_dim, width] of float32 at an address (0: none), with strides in elements."""

    def __init__(self, data: int, head_dim: int, row: int, dimension: int, column: int) -> None: ...

class Source:
    def __init__(self, value: Operand, replacement: Operand, weight: Weight, rows: int) -> None: ...

class Gradient:
    def __init__(self, value: Operand, weight: Weight, rows: int, reach: int) -> None: ...

class Reader:
    """Destinations behind one norm; mean, rho [samples, n_tokens] and gain [padded(width)] are addresses of float32."""

    def __init__(
        self,
        gradients: Sequence[Gradient],
        stream: Operand,
        mean: int,
        rho: int,
        n_tokens: int,
        gain: int,
    ) -> None: ...

def contract(
    sources: Sequence[Source],
    groups: Sequence[Sequence[Reader]],
    first: int,
    lengths: Sequence[int],
    width: int,
    written: int,
    gradients: int,
    normed: int,
    runs: int,
    threads: int,
    lanes: int,
    out: int,
) -> None:
    """Add scores of samples from `first` on to float64 sums at the address `out`, scratch at those before it.

    Args:
        written, gradients, normed: room for runs · pitch(width) floats of every source, of the rows of any group, and
            of the readers of any.
    """

def padded(width: int) -> int:
    """Floats of a row that a token takes."""

def pitch(width: int) -> int:
    """Floats of scratch that a row takes in a run of `TOKENS` tokens."""

def lanes() -> list[int]:
    """Floats in a vector, of those that this processor has and `contract` was compiled for, the most first."""
