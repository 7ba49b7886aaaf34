"""Statistics of score rows in plain PyTorch: the CPU path, and the specification of the kernel.

What `eaptk.sweep` finds in stored rows, found where the rows are computed, so that they need not be stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Elements of a row that are summed on their own before the sums are: the same bits for any number of threads.
ROW_BLOCK = 4096
#: Names of what is found of each row, apart from counts, in the order kernels write it.
MOMENTS = ("sum_abs", "sum", "m2", "m3", "m4", "min", "max")


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of each row w, [n_rows] float64 unless said otherwise; `eaptk.sweep.Sweep` on the device.

    A row that is not finite throughout has a `sum_abs` that is not.

    Args:
        count: number of entries, int64.
        sum_abs, sum: Σ|w| and Σw.
        m2, m3, m4: central moments Σ(w − mean)^p / count about the row's own mean (biased).
        min, max: extremes of w.
        histogram: [n_rows, bins] int64 counts of |w| in equal bins of [0, upper], the last one closed; or None.
        above: how many |w| exceed `upper` or are NaN, int64; or None.
    """

    count: Tensor
    sum_abs: Tensor
    sum: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor
    min: Tensor
    max: Tensor
    histogram: Tensor | None = None
    above: Tensor | None = None


def row_statistics(rows: Tensor, bins: int | None = None, upper: float | None = None) -> RowStatistics:
    """Moments, extremes and histogram of score rows [n_rows, n_edges], in float64.

    Args:
        bins, upper: of the histogram; both or neither.

    Raises:
        ValueError: `rows` is no matrix of floats with at least one column, or the histogram is half given or empty.
    """
    edges = bin_edges(rows, bins, upper)
    n_rows, width = rows.shape
    statistics = torch.empty(len(MOMENTS), n_rows, dtype=torch.float64, device=rows.device)
    slots = None
    if edges is not None:
        slots = torch.empty(n_rows, len(edges), dtype=torch.int64, device=rows.device)
    for i, row in enumerate(rows.unbind()):
        w = row.double()
        size = w.abs()
        total = _sum(w)
        d = w - total / width
        square = d.square()
        statistics[:, i] = torch.stack(
            [
                _sum(size),
                total,
                *(_sum(p) / width for p in (square, square * d, square.square())),
                *w.aminmax(),
            ]
        )
        if edges is not None and slots is not None:
            # A bin holds its lower edge; what lies on the range's end falls into the last bin all the same.
            slot = torch.bucketize(size, edges, right=True) - 1
            slot[size == edges[-1]] -= 1
            slots[i] = torch.bincount(slot, minlength=len(edges))
    return packed(statistics, width, slots)


def bin_edges(rows: Tensor, bins: int | None, upper: float | None) -> Tensor | None:
    """[bins + 1] float64 edges of the histogram, those of numpy to the bit; raises as `row_statistics`."""
    if rows.dim() != 2 or not rows.shape[1] or not rows.is_floating_point():
        raise ValueError(f"rows must be floats [n_rows, n_edges]; got {tuple(rows.shape)} {rows.dtype}")
    if bins is None and upper is None:
        return None
    if bins is None or upper is None or bins < 1 or not 0 < upper < float("inf"):
        raise ValueError(
            f"a histogram needs at least one bin and a finite range; got bins={bins}, upper={upper}"
        )
    return torch.from_numpy(np.linspace(0.0, upper, bins + 1)).to(rows.device)


def packed(moments: Tensor, width: int, slots: Tensor | None) -> RowStatistics:
    """Of `MOMENTS` [7, n_rows], and counts [n_rows, bins + 1], overflow last, or None."""
    histogram, above = (None, None) if slots is None else (slots[:, :-1], slots[:, -1])
    count = torch.full((moments.shape[1],), width, device=moments.device)
    return RowStatistics(count, **dict(zip(MOMENTS, moments, strict=True)), histogram=histogram, above=above)


def _sum(x: Tensor) -> Tensor:
    whole = len(x) - len(x) % ROW_BLOCK
    return x[:whole].view(-1, ROW_BLOCK).sum(1).sum() + x[whole:].sum()
