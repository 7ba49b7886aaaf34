"""Stored scores and the edges they belong to, whichever of them a run kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.sweep import Doubles, Integers

if TYPE_CHECKING:
    import networkx
    import pandas
    import scipy.sparse


class EdgeMeans(NamedTuple):
    """Means over samples, [m] each, of the m edges that any of them kept.

    Of sums over pairs of layers W is the signed sum.

    Args:
        absolute, signed: mean |W| and mean W over the samples that kept the edge.
        columns: which edges, ascending.
        n_samples: how many samples kept each; all of them, but where each kept its strongest.
    """

    absolute: Doubles
    signed: Doubles
    columns: Integers
    n_samples: Integers

    @property
    def total(self) -> Doubles:
        """Σ|W| over the samples that kept the edge."""
        total: Doubles = self.absolute * self.n_samples
        return total


@dataclass(frozen=True, repr=False)
class KeptScores:
    """Scores of n samples, as a run stored them.

    Args:
        values: [n, m]; of a run that kept each sample's strongest edges the strongest first; of sums over pairs of
            layers ΣW.
        columns: which edges of `graph`: [m] for all samples, or [n, m] where each has its own.
        graph: what the columns number: the graph that was scored, or its `Graph.layers`.
        samples: [n], which samples of the run.
        absolute: [n, m], Σ|W| of sums over pairs of layers; else None.
    """

    values: npt.NDArray[Any]
    columns: npt.NDArray[Any]
    graph: Graph
    samples: Integers
    absolute: npt.NDArray[Any] | None = None

    def __repr__(self) -> str:
        n_samples, n_scores = self.values.shape
        return f"KeptScores({n_samples:,} samples × {n_scores:,} scores, {self.graph})"

    def __len__(self) -> int:
        return len(self.values)

    def matrix(self) -> npt.NDArray[Any]:
        """[n, n_sources, n_destinations]: 0 where there is no edge, NaN where one was not kept."""
        rows = np.full((len(self), self.graph.n_edges), np.nan, dtype=self.values.dtype)
        np.put_along_axis(rows, self._columns, self.values, axis=1)
        return self.graph.matrix(rows)

    def to_scipy(self) -> scipy.sparse.csr_array:
        """[n, n_edges]: what was kept is stored, zeros among it too; what is not stored is unknown, not 0.

        Raises:
            EaptkError: SciPy is not installed.
        """
        try:
            import scipy.sparse
        except ImportError as error:
            raise EaptkError("a sparse array needs SciPy: pip install scipy") from error

        n, m = self.values.shape
        order = np.argsort(self._columns, axis=1, kind="stable")
        values = np.take_along_axis(self.values, order, axis=1).astype(np.float32, copy=False)
        columns = np.take_along_axis(self._columns, order, axis=1)
        starts = np.arange(n + 1) * m
        return scipy.sparse.csr_array(
            (values.ravel(), columns.ravel(), starts), shape=(n, self.graph.n_edges)
        )

    def means(self) -> EdgeMeans:
        """Of the edges that any of the samples kept; there must be a sample."""
        if self.columns.ndim == 1:
            values = self.values.astype(np.float64)
            n_samples = np.full(values.shape[1], len(self))
            return EdgeMeans(np.abs(values).mean(0), values.mean(0), self.columns, n_samples)
        columns, place = np.unique(self.columns, return_inverse=True)
        place = place.ravel()
        n_samples = np.bincount(place)
        values = self.values.astype(np.float64).ravel()
        absolute, signed = (np.bincount(place, w) / n_samples for w in (np.abs(values), values))
        return EdgeMeans(absolute, signed, columns.astype(np.int64), n_samples)

    def top(self, k: int = 20) -> list[tuple[str, float]]:
        """The `k` edges of largest Σ|W| over the samples, as (``source→destination``, mean W where kept)."""
        means = self.means()
        order = np.argsort(-means.total, kind="stable")[:k]
        return [
            (self.graph.edge_name(int(means.columns[place])), float(means.signed[place])) for place in order
        ]

    def to_frame(self) -> pandas.DataFrame:
        """One row a sample and edge: sample, column, source, destination, their layers, score.

        With ``absolute`` beside it for sums over pairs of layers.
        """
        frame = self.graph.to_frame(self._columns.ravel())
        frame.insert(0, "sample", np.repeat(self.samples, self.values.shape[1]))
        frame["score"] = self.values.ravel()
        if self.absolute is not None:
            frame["absolute"] = self.absolute.ravel()
        return frame

    def to_networkx(self) -> networkx.DiGraph:
        """The edges that were kept, each with its mean score over the samples that kept it as ``score``."""
        means = self.means()
        return self.graph.to_networkx(means.signed, means.columns)

    @property
    def _columns(self) -> npt.NDArray[Any]:
        return np.broadcast_to(self.columns, self.values.shape)
