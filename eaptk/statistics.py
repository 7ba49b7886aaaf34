"""What the metrics need of a sample's row of scores, kept in the row's place.

A row of E scores becomes seven moments and a histogram. What metrics need beyond a sample's own row are sums over
samples, an entry an edge, and for whole runs they suffice: mean |W| of each edge, and, with z_i the centred row of
unit length, S = Σ z_i, from which the mean correlation of all pairs follows exactly (see `eaptk.metrics`).

What is lost: other bins or another range of the histogram (a count in bins of one kind says nothing certain of
bins of another, however fine), some of the edges or of the samples, and each single sample's correlation with the
others. That is refused or left out, never estimated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.sweep import Doubles, Integers, Scores, Sweep, bin_edges, sweep, weighted_column_sums

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_BINS = 100

#: Moments of a row, fields of `Sweep`, in the order they are stored.
MOMENTS = ("sum_abs", "sum", "m2", "m3", "m4", "min", "max")

#: Edges that are added up at a time where rows lie on a device.
_COLUMNS = 2**20

#: Sums over samples, [n_edges] each, in the order they are stored: Σ|w|, Σw, and Σ w/‖w − mean‖ over the samples
#: whose scores vary, the length being that of the real edges or of the matrix with its structural zeros.
SUMS = ("absolute", "signed", "unit", "unit_dense")


@dataclass(frozen=True)
class Histogram:
    """`bins` equal bins of |W| on [0, `upper`].

    Raises:
        EaptkError: `eaptk.sweep` cannot count in such bins.
    """

    bins: int
    upper: float

    def __post_init__(self) -> None:
        bin_edges(self.bins, self.upper)


@dataclass(frozen=True)
class Summary:
    """Statistics of a batch of B rows.

    Args:
        moments: [B, 7], see `MOMENTS`.
        counts: [B, bins] uint32; what is missing to E lies above the range.
        sums: [4, E], see `SUMS`.
    """

    moments: Doubles
    counts: npt.NDArray[np.uint32]
    sums: Doubles


def summarise(scores: Tensor, graph: Graph, histogram: Histogram, columns: Integers | None = None) -> Summary:
    """What is kept of finite float32 score rows [B, e], found on the GPU if they are on one.

    Args:
        columns: [e], the edges that `scores` are of; None for all.
    """
    if scores.device.type == "cuda":
        return summarise_in_torch(scores, graph, histogram, columns)
    # Not every other device has float64, and on the host the sweep is hundreds of times faster than PyTorch.
    rows: Scores = scores.cpu().numpy()
    swept = sweep(rows, bins=histogram.bins, upper=histogram.upper)
    return _summary(swept, n_structural_zeros(graph, columns), partial(weighted_column_sums, rows))


def summarise_in_torch(
    scores: Tensor, graph: Graph, histogram: Histogram, columns: Integers | None = None
) -> Summary:
    """The same by `eaptk.kernels`, for rows that should not leave their device.

    Raises:
        EaptkError: the kernel was named (``EAPTK_BACKEND``) and cannot run, or it broke the device.
    """
    import torch

    from eaptk.kernels import row_statistics

    try:
        found = row_statistics(scores, histogram.bins, histogram.upper)
    except ValueError as error:
        raise EaptkError(str(error)) from error
    by_name = {name: value.cpu().numpy() for name, value in vars(found).items()}

    def column_sums(weights: Doubles, absolute: bool = False) -> Doubles:
        on_device = torch.from_numpy(weights).to(scores.device)
        sums = np.empty((len(weights), scores.shape[1]))
        # A few columns at a time: sums of all edges in float64 may be larger than what memory is left.
        for first in range(0, scores.shape[1], _COLUMNS):
            part = scores[:, first : first + _COLUMNS].double()
            sums[:, first : first + _COLUMNS] = (on_device @ (part.abs() if absolute else part)).cpu().numpy()
        return sums

    return _summary(Sweep(**by_name), n_structural_zeros(graph, columns), column_sums)


def _summary(swept: Sweep, n_zeros: int, column_sums: Callable[..., Doubles]) -> Summary:
    assert swept.histogram is not None
    dense = swept.with_zeros(n_zeros)
    once = np.ones_like(swept.sum)
    signed = np.stack([once, unit_weights(swept), unit_weights(dense)])
    return Summary(
        moments=np.stack([getattr(swept, name) for name in MOMENTS], axis=1),
        counts=swept.histogram.astype(np.uint32),
        sums=np.concatenate([column_sums(once[None], absolute=True), column_sums(signed)]),
    )


@dataclass(frozen=True)
class Statistics:
    """All that a run without rows knows, as of one moment.

    Args:
        graph: of the rows that were measured.
        columns: [e], the edges that were kept; None for all.
        histogram: its bins.
        done: [n_samples], which samples the sums hold; nothing else is known of the others.
        moments: [n_samples, 7], see `MOMENTS`.
        counts: [n_samples, bins] uint32.
        sums: [4, e], see `SUMS`.
    """

    graph: Graph
    histogram: Histogram
    done: npt.NDArray[np.bool_]
    moments: Doubles
    counts: npt.NDArray[np.uint32]
    sums: Doubles
    columns: Integers | None = None

    @property
    def share_above(self) -> float:
        """Of all |W|, the share that the histogram ends before."""
        n = self._n_edges * int(self.done.sum())
        return 1 - int(self.counts[self.done].sum(dtype=np.int64)) / n if n else 0.0

    def sweep(self, rows: Integers) -> Sweep:
        """What `eaptk.sweep.sweep` found in these rows."""
        counts = self.counts[rows].astype(np.int64)
        above = self._n_edges - counts.sum(1)
        return replace(self._moments(rows), histogram=counts, above=above)

    def means(self) -> tuple[Doubles, Doubles]:
        """[e] each: mean |W| and mean W over the samples that are done."""
        absolute, signed = self.sums[:2] / self.done.sum()
        return absolute, signed

    def strength(self, rows: Integers) -> Doubles:
        """[e]: mean |W| over `rows`, different ones that are done; NaN unless they are all of those."""
        return self.means()[0] if len(rows) == self.done.sum() else np.full(self._n_edges, np.nan)

    def mean_correlation(self, rows: Integers, dense: bool) -> float | None:
        """Over all pairs of `rows` whose scores vary.

        None for fewer than two of those, and unless they are all that are done and vary.
        """
        finished = np.flatnonzero(self.done)
        n_zeros = n_structural_zeros(self.graph, self.columns) if dense else 0
        swept = self._moments(finished).with_zeros(n_zeros)
        varies = swept.min < swept.max
        n = int(varies.sum())
        if n < 2 or not np.isin(finished[varies], rows).all():
            return None
        centre = (swept.mean * unit_weights(swept)).sum()
        total = self.sums[SUMS.index("unit_dense" if dense else "unit")] - centre
        return float((total @ total + n_zeros * centre**2 - n) / (n * (n - 1)))

    @property
    def _n_edges(self) -> int:
        return self.sums.shape[1]

    def _moments(self, rows: Integers) -> Sweep:
        columns = np.ascontiguousarray(self.moments[rows].T)
        count = np.full(len(rows), self._n_edges)
        return Sweep(count=count, **dict(zip(MOMENTS, columns, strict=True)))


def unit_weights(swept: Sweep) -> Doubles:
    """[n]: 1 / ‖w − mean‖ of each row, 0 for rows that do not vary."""
    length = np.sqrt(swept.m2 * swept.count)
    return np.divide(1.0, length, out=np.zeros_like(length), where=swept.min < swept.max)


def n_structural_zeros(graph: Graph, columns: Integers | None = None) -> int:
    """Pairs of a source and a destination that are no edge, of those that `columns` touch (None: of all)."""
    if columns is None:
        return graph.n_sources * graph.n_destinations - graph.n_edges
    sources = np.unique(graph.edge_source[columns])
    reach = graph.reach[np.unique(graph.edge_destination[columns])]
    edges = (sources[:, None] < reach).sum()
    return int(len(sources) * len(reach) - edges)
