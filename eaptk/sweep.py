"""One pass over score rows: per-row moments and histograms, weighted column sums, products with a vector.

Every function runs in C++ (`eaptk._native`, all processors, the GIL released) or, on request, in a few
lines of numpy that say what the C++ computes and are its oracle. Scores are a C-contiguous
[n_samples, n_edges] array of float32 or float16, usually a memory map; each element is read once and all
arithmetic is in float64. No result depends on the number of threads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from eaptk import _native
from eaptk.errors import EaptkError

#: ``"native"`` takes the fastest kernel of this processor, ``"portable"`` the C++ one without AVX-512.
Backend = Literal["native", "portable", "numpy"]

Scores = npt.NDArray[np.float32] | npt.NDArray[np.float16]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

#: What the float32 arithmetic of the histogram can hold.
MAX_BINS = 2**16
_SMALLEST_UPPER, _LARGEST_UPPER = 1e-30, 1e30


@dataclass(frozen=True)
class Sweep:
    """Statistics of each selected row w over the selected columns; [n] each unless said otherwise.

    Args:
        count: number of entries.
        sum_abs, sum: Σ|w| and Σw.
        m2, m3, m4: central moments Σ(w − mean)^p / count about the row's own mean (biased).
        min, max: extremes of w.
        histogram: [n, bins] int64 counts of |w|, in the bins of ``np.histogram(|w|, bins, range=(0, upper))``;
            None if no histogram was asked for.
        above: how many |w| exceed `upper`; None without a histogram.
    """

    count: Integers
    sum_abs: Doubles
    sum: Doubles
    m2: Doubles
    m3: Doubles
    m4: Doubles
    min: Doubles
    max: Doubles
    histogram: Integers | None = None
    above: Integers | None = None

    @property
    def mean(self) -> Doubles:
        return self.sum / self.count

    @property
    def max_abs(self) -> Doubles:
        return np.maximum(-self.min, self.max)

    def with_zeros(self, n_zeros: int) -> Sweep:
        """The statistics of the same rows with `n_zeros` zeros appended to each.

        Exact moments are merged (Pébay 2008, eq. 2.1, with a second set of zero spread); zeros fall into bin 0.
        """
        if n_zeros == 0:
            return self
        n = self.count.astype(np.float64)
        total = n + n_zeros
        p, q = n / total, n_zeros / total
        # The zeros' mean minus the rows' mean.
        d = -self.mean
        histogram = self.histogram
        if histogram is not None:
            histogram = histogram.copy()
            histogram[:, 0] += n_zeros
        return replace(
            self,
            count=self.count + n_zeros,
            m2=p * self.m2 + p * q * d**2,
            m3=p * self.m3 + p * q * (p - q) * d**3 - 3 * p * q * d * self.m2,
            m4=p * self.m4
            + p * q * (p * p - p * q + q * q) * d**4
            + 6 * p * q * q * d**2 * self.m2
            - 4 * p * q * d * self.m3,
            min=np.minimum(self.min, 0.0),
            max=np.maximum(self.max, 0.0),
            histogram=histogram,
        )


def sweep(
    scores: Scores,
    rows: npt.ArrayLike | None = None,
    columns: npt.ArrayLike | None = None,
    *,
    bins: int | None = None,
    upper: float | None = None,
    threads: int | None = None,
    backend: Backend = "native",
) -> Sweep:
    """Statistics of score rows in one pass over memory.

    Args:
        scores: [n_samples, n_edges] float32 or float16, C-contiguous.
        rows: indices or a boolean mask of samples; None for all.
        columns: indices or a boolean mask of edges; None for all.
        bins, upper: number of equal bins of |w| on [0, upper], the last one closed; None for no histogram.
        threads: None for as many as processors.
        backend: see `Backend`.

    Raises:
        EaptkError: an argument does not fit, or a selected score is NaN or infinite (it is named).
    """
    scores, row_index, column_index = _select(scores, rows, columns)
    edges = bin_edges(bins, upper)
    if backend == "numpy":
        result = _sweep_numpy(scores, row_index, column_index, edges)
    else:
        moments, counts, above = _native.sweep(
            scores, row_index, column_index, edges, _threads(threads), backend == "portable"
        )
        sum_abs, total, m2, m3, m4, low, high = np.ascontiguousarray(moments.T)
        n = scores.shape[1] if column_index is None else len(column_index)
        result = Sweep(
            count=np.full(len(row_index), n),
            sum_abs=sum_abs,
            sum=total,
            m2=m2 / n,
            m3=m3 / n,
            m4=m4 / n,
            min=low,
            max=high,
            histogram=None if edges is None else counts,
            above=None if edges is None else above,
        )
    bad = np.flatnonzero(~np.isfinite(result.sum_abs))
    if len(bad):
        row = int(row_index[bad[0]])
        selected = np.arange(scores.shape[1]) if column_index is None else column_index
        column = int(selected[np.argmax(~np.isfinite(scores[row, selected]))])
        raise EaptkError(
            f"the score of sample {row}, edge column {column} is {scores[row, column]}; "
            f"leave that sample out or score it again"
        )
    return result


def weighted_column_sums(
    scores: Scores,
    weights: npt.ArrayLike,
    rows: npt.ArrayLike | None = None,
    columns: npt.ArrayLike | None = None,
    *,
    absolute: bool = False,
    threads: int | None = None,
    backend: Backend = "native",
) -> Doubles:
    """[k, n_columns]: Σ_i weights[k, i]·w[i, e], or of |w| if `absolute`; weights [k, n_rows].

    Raises:
        EaptkError: an argument does not fit.
    """
    scores, row_index, column_index = _select(scores, rows, columns)
    weights = np.ascontiguousarray(weights, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[1] != len(row_index):
        raise EaptkError(
            f"weights have shape {weights.shape}; expected [k, {len(row_index)}], one for each row"
        )
    if backend == "numpy":
        out = np.zeros((len(weights), scores.shape[1] if column_index is None else len(column_index)))
        for i, row in enumerate(row_index):
            w = _row(scores, row, column_index)
            out += weights[:, i, None] * (np.abs(w) if absolute else w)
        return out
    return _native.weighted_column_sums(scores, row_index, column_index, weights, absolute, _threads(threads))


def row_dots(
    scores: Scores,
    vector: npt.ArrayLike,
    rows: npt.ArrayLike | None = None,
    columns: npt.ArrayLike | None = None,
    *,
    threads: int | None = None,
    backend: Backend = "native",
) -> Doubles:
    """[n_rows]: Σ_e w[i, e]·vector[e]; vector [n_columns].

    Raises:
        EaptkError: an argument does not fit.
    """
    scores, row_index, column_index = _select(scores, rows, columns)
    vector = np.ascontiguousarray(vector, dtype=np.float64)
    width = scores.shape[1] if column_index is None else len(column_index)
    if vector.shape != (width,):
        raise EaptkError(
            f"the vector has shape {vector.shape}; expected [{width}], one entry for each column"
        )
    if backend == "numpy":
        return np.array([_row(scores, row, column_index) @ vector for row in row_index])
    return _native.row_dots(scores, row_index, column_index, vector, _threads(threads))


def _sweep_numpy(scores: Scores, rows: Integers, columns: Integers | None, edges: Doubles | None) -> Sweep:
    statistics, histograms = [], []
    with np.errstate(invalid="ignore"):
        for row in rows:
            w = _row(scores, row, columns)
            d = w - w.mean()
            moments = [np.mean(d**p) for p in (2, 3, 4)]
            statistics.append([np.abs(w).sum(), w.sum(), *moments, w.min(), w.max()])
            if edges is not None:
                histograms.append(
                    np.histogram(np.abs(w[np.isfinite(w)]), len(edges) - 1, (0.0, edges[-1]))[0]
                )
    sum_abs, total, m2, m3, m4, low, high = np.array(statistics).T
    n = scores.shape[1] if columns is None else len(columns)
    histogram = None if edges is None else np.array(histograms, dtype=np.int64)
    return Sweep(
        count=np.full(len(rows), n),
        sum_abs=sum_abs,
        sum=total,
        m2=m2,
        m3=m3,
        m4=m4,
        min=low,
        max=high,
        histogram=histogram,
        above=None if histogram is None else n - histogram.sum(1),
    )


def _row(scores: Scores, row: np.int64, columns: Integers | None) -> Doubles:
    w = scores[row] if columns is None else scores[row][columns]
    return w.astype(np.float64)


def _select(
    scores: Scores, rows: npt.ArrayLike | None, columns: npt.ArrayLike | None
) -> tuple[Scores, Integers, Integers | None]:
    if scores.ndim != 2 or scores.dtype not in (np.float32, np.float16) or not scores.dtype.isnative:
        raise EaptkError(
            f"scores must be [samples, edges] float32 or float16; got {scores.shape} {scores.dtype}"
        )
    if not scores.flags.c_contiguous:
        raise EaptkError("scores must be C-contiguous; select samples with `rows` and edges with `columns`")
    row_index = np.arange(len(scores)) if rows is None else indices(rows, len(scores), "sample")
    column_index = None if columns is None else indices(columns, scores.shape[1], "edge")
    if not len(row_index):
        raise EaptkError("no sample is selected; there is nothing to measure")
    if not (scores.shape[1] if column_index is None else len(column_index)):
        raise EaptkError("no edge is selected; there is nothing to measure")
    return scores, row_index, column_index


def indices(selection: npt.ArrayLike, length: int, what: str) -> Integers:
    """A selection among `length` samples or edges (`what`) as indices; a boolean mask becomes some.

    Raises:
        EaptkError: a mask of another length, an index that is no integer or out of range, or no list.
    """
    array = np.asarray(selection)
    if array.dtype == bool:
        if array.shape != (length,):
            raise EaptkError(f"the {what} mask has shape {array.shape}; expected ({length},)")
        return np.flatnonzero(array)
    if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        raise EaptkError(
            f"{what} indices must be a list of integers; got {array.dtype} of shape {array.shape}"
        )
    array = np.ascontiguousarray(array, dtype=np.int64)
    outside = array[(array < 0) | (array >= length)]
    if len(outside):
        raise EaptkError(f"there is no {what} {outside[0]}; they are numbered 0 to {length - 1}")
    return array


def bin_edges(bins: int | None, upper: float | None) -> Doubles | None:
    """[bins + 1] edges of equal bins on [0, upper]; None for no histogram.

    Raises:
        EaptkError: one is given without the other, or they are out of bounds.
    """
    if (bins is None) != (upper is None):
        raise EaptkError("a histogram needs both bins and upper")
    if bins is None or upper is None:
        return None
    if not 1 <= bins <= MAX_BINS:
        raise EaptkError(f"bins is {bins}; it must lie between 1 and {MAX_BINS}")
    if not _SMALLEST_UPPER <= upper <= _LARGEST_UPPER:
        raise EaptkError(
            f"the histogram's range ends at {upper}; it must end in [{_SMALLEST_UPPER}, {_LARGEST_UPPER}]"
        )
    return np.linspace(0.0, upper, bins + 1)


def _threads(threads: int | None) -> int:
    if threads is None:
        # Not os.cpu_count(): a container or taskset may grant fewer.
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < 1:
        raise EaptkError(f"threads is {threads}; it must be at least 1")
    return threads
