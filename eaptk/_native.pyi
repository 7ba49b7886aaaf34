"""Compiled from csrc/. Arguments must be validated first; use `eaptk.sweep`."""

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
