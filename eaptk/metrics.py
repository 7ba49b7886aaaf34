"""Activation-intensity, information-complexity, kurtosis, diversity and output-entropy of a run's edges.

With W_i the scores of sample i over the measured edges, n samples and natural logarithms unless told
otherwise:

    intensity       mean over samples and edges of |W|
    complexity      −Σ_b p_b log p_b, p the histogram of |W| pooled over samples and edges
    kurtosis        mean over samples of m4/m2² − 3, biased moments about the sample's own mean
    diversity       1 − mean over pairs i ≠ j of the correlation of W_i and W_j
    output entropy  −Σ_d p_d log p_d, p the mean |W| of one source's outgoing edges, normalised; and its
                    mean over sources

Definitions of arXiv 2509.21044. Its own numbers count the structural zeros of the [sources, destinations]
matrix as well (``dense=True`` here): they are merged into the moments and bin 0, no matrix is ever formed.

The diversity needs no Gram matrix: with z_i the centred row of unit length and S = Σ_i z_i, the mean
correlation is (|S|² − n) / (n(n − 1)). So a run that keeps statistics in place of its rows has the same metrics;
what it lacks is said at `Metrics`.

Of a run that kept some edges, these alone are measured, as they would be in a run with all. Where each sample kept its
k strongest, intensity, complexity and kurtosis are those of its k scores; samples then hold different edges, of which
the others are unknown and not 0, so there is no correlation of samples, and no mean |W| of most edges. Sums over pairs
of layers are measured as scores of one edge between two layers, which by linearity they are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.statistics import DEFAULT_BINS, Histogram, Statistics, n_structural_zeros
from eaptk.store import opened
from eaptk.sweep import (
    Backend,
    Doubles,
    Integers,
    Scores,
    Sweep,
    indices,
    row_dots,
    sweep,
    weighted_column_sums,
)

#: Headline metrics, in the order they are reported.
METRICS = ("intensity", "complexity", "kurtosis", "diversity")


class ScoredRun(Protocol):
    """What is measured of a run; `eaptk.Run` is one."""

    @property
    def path(self) -> Path: ...
    @property
    def graph(self) -> Graph: ...
    @property
    def scores(self) -> npt.NDArray[Any]: ...
    @property
    def done(self) -> npt.NDArray[np.uint8]: ...
    @property
    def histogram(self) -> Histogram | None: ...
    @property
    def statistics(self) -> Statistics | None: ...
    @property
    def columns(self) -> Integers: ...
    @property
    def top_columns(self) -> npt.NDArray[Any] | None: ...


@dataclass(frozen=True)
class Metrics:
    """The metrics of a run, or of some of its samples and edges; see the module for definitions.

    A run without rows has no `sample_correlation`, and of a part of its finished samples no `diversity`,
    `strength`, `source_entropy` and `output_entropy`: these are None or NaN there. A run of each sample's strongest
    edges has none of the five, but the `strength` of edges that every measured sample kept.

    Args:
        dense: whether structural zeros are counted.
        n_samples: samples measured.
        n_unfinished: samples asked for but left out because their rows are not done.
        n_constant: samples whose scores are all equal; kurtosis and correlation are undefined for them,
            so `kurtosis` and `diversity` are means over the others.
        n_entries: numbers counted a sample: edges and, if `dense`, zeros.
        bins, upper, log_base: of the histogram, `bins` equal ones on [0, upper], and of all entropies.
        n_above: entries beyond `upper`, which the histogram does not hold.
        intensity, complexity: see the module.
        kurtosis: None if every sample is constant.
        diversity: None with fewer than two samples that are not constant.
        output_entropy: mean of `source_entropy`; None if no source has outgoing strength.
        rows: [n] indices of the measured samples in the run.
        columns: [e] indices of the measured edges, or of those that each sample's strongest were chosen from.
        sample_intensity: [n].
        sample_kurtosis: [n], NaN for constant samples.
        sample_correlation: [n], mean correlation with the other samples, NaN for constant samples.
        sample_histogram: [n, bins] int64.
        strength: [e], mean |W| of each edge.
        source_entropy: [n_sources], NaN for a source without outgoing strength among the measured edges.
    """

    dense: bool
    n_samples: int
    n_unfinished: int
    n_constant: int
    n_entries: int
    bins: int
    upper: float
    log_base: float
    n_above: int
    intensity: float
    complexity: float
    kurtosis: float | None
    diversity: float | None
    output_entropy: float | None
    rows: Integers = field(repr=False)
    columns: Integers = field(repr=False)
    sample_intensity: Doubles = field(repr=False)
    sample_kurtosis: Doubles = field(repr=False)
    sample_correlation: Doubles = field(repr=False)
    sample_histogram: Integers = field(repr=False)
    strength: Doubles = field(repr=False)
    source_entropy: Doubles = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, parameters and `source_entropy`, JSON-ready (NaN becomes None); arrays a sample stay out."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        entropy = [None if math.isnan(value) else value for value in self.source_entropy.tolist()]
        return plain | {"source_entropy": entropy}


def measure(
    run: ScoredRun | str | os.PathLike[str],
    *,
    rows: npt.ArrayLike | None = None,
    columns: npt.ArrayLike | None = None,
    dense: bool = False,
    bins: int | None = None,
    upper: float | None = None,
    log_base: float = math.e,
    backend: Backend = "native",
) -> Metrics:
    """Measure a run. Rows that are not done are left out and counted in `n_unfinished`.

    Args:
        run: a run, or its directory.
        rows: indices or a boolean mask of samples; None for all.
        columns: indices or a boolean mask of edges of the graph, which the run kept; None for all it kept.
        dense: count structural zeros too: all pairs of a source and a destination that are no edge, among
            the sources and the destinations that the measured edges touch.
        bins, upper: the histogram's; None for 100 and the largest |W| measured, or for those that a run
            without rows was scored with. Entropies of two measurements compare only if both are the same.
        log_base: of the entropies.
        backend: see `eaptk.sweep`.

    Raises:
        EaptkError: nothing to measure, a score is NaN or infinite, all scores are 0 and `upper` is None; a run is
            asked for edges it did not keep; a run without rows for some of its edges, or for another histogram than
            its own; or one of each sample's strongest edges for some edges or for structural zeros.
    """
    if not (log_base > 0 and log_base != 1 and math.isfinite(log_base)):
        raise EaptkError(f"log_base is {log_base}; it must be positive and not 1")
    run = opened(run)
    kept = run.statistics
    row_index, n_unfinished = _finished(run.path, run.done if kept is None else kept.done, rows)
    column_index = run.columns
    if columns is not None:
        column_index = np.unique(indices(columns, run.graph.n_edges, "edge"))
    places = stored_places(run, column_index)
    bins, upper = agreed_histogram([run], bins, upper)
    source: _Rows | _Strongest | _Summaries
    if kept is None and run.top_columns is None:
        source = _Rows(run.scores, row_index, places, backend)
    elif places is not None:
        raise EaptkError(f"run {run.path} keeps no rows, so no part of its edges can be measured")
    elif kept is not None:
        source = _Summaries(kept, row_index, dense)
    elif dense:
        raise EaptkError(
            f"run {run.path} kept each sample's strongest edges: zeros of the dense convention say nothing beside "
            f"edges that are unknown; measure real edges, or score again with the same edges for all samples"
        )
    else:
        source = _Strongest(run, row_index, column_index, backend)
    if upper is None:
        upper = float(source.sweep().max_abs.max())
        if upper == 0:
            raise EaptkError(
                f"every score of {run.path} that was selected is 0; give the histogram an upper end"
            )
    n_zeros = n_structural_zeros(run.graph, column_index) if dense else 0
    swept = source.sweep(bins, upper).with_zeros(n_zeros)
    assert swept.histogram is not None
    assert swept.above is not None
    if not swept.histogram.any():
        raise EaptkError(
            f"no |W| is as small as {upper}, where the histogram ends; give it a larger upper end"
        )

    n = len(row_index)
    varies = swept.min < swept.max
    kurtosis = np.full(n, np.nan)
    kurtosis[varies] = swept.m4[varies] / swept.m2[varies] ** 2 - 3
    correlation, mean_correlation = source.correlations(swept, varies)
    strength = source.strength()
    source_entropy = _source_entropies(run.graph, column_index, strength, log_base)
    has_strength = ~np.isnan(source_entropy)
    sample_intensity = swept.sum_abs / swept.count
    return Metrics(
        dense=dense,
        n_samples=n,
        n_unfinished=n_unfinished,
        n_constant=int(n - varies.sum()),
        n_entries=int(swept.count[0]),
        bins=bins,
        upper=upper,
        log_base=log_base,
        n_above=int(swept.above.sum()),
        intensity=float(sample_intensity.mean()),
        complexity=float(entropy(swept.histogram.sum(0), log_base)),
        kurtosis=float(kurtosis[varies].mean()) if varies.any() else None,
        diversity=None if mean_correlation is None else 1 - mean_correlation,
        output_entropy=float(source_entropy[has_strength].mean()) if has_strength.any() else None,
        rows=row_index,
        columns=column_index,
        sample_intensity=sample_intensity,
        sample_kurtosis=kurtosis,
        sample_correlation=correlation,
        sample_histogram=swept.histogram,
        strength=strength,
        source_entropy=source_entropy,
    )


def entropy(weights: npt.ArrayLike, log_base: float = math.e) -> Doubles:
    """−Σ p log p over the last axis, p = weights / Σ weights, 0 log 0 = 0; NaN where all weights are 0."""
    weights = np.asarray(weights, dtype=np.float64)
    total = weights.sum(-1, keepdims=True)
    p = np.divide(weights, total, out=np.full_like(weights, np.nan), where=total > 0)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    # −(1·log 1) is −0.0 and would be printed so; adding 0 drops the sign.
    result: Doubles = -(p * logs).sum(-1) / math.log(log_base) + 0.0
    return result


def stored_places(run: ScoredRun, columns: Integers) -> Integers | None:
    """Where a run's rows hold edges of its graph, ascending and unique; None if these are all it holds, in order.

    Raises:
        EaptkError: it did not keep one of them.
    """
    stored = run.columns
    if len(columns) == len(stored) and np.array_equal(columns, stored):
        return None
    if run.top_columns is not None:
        raise EaptkError(
            f"run {run.path} kept each sample's strongest edges, which differ, so no part of its edges can be "
            f"measured; score it again with the edges to measure"
        )
    places = np.minimum(np.searchsorted(stored, columns), len(stored) - 1)
    missing = columns[stored[places] != columns]
    if len(missing):
        raise EaptkError(
            f"run {run.path} kept {len(stored):,} of {run.graph.n_edges:,} edges, {run.graph.edge_name(missing[0])} "
            f"not among them; measure edges that it kept, or score it again with more"
        )
    return places


def agreed_histogram(
    runs: Sequence[ScoredRun], bins: int | None, upper: float | None
) -> tuple[int, float | None]:
    """`bins` and `upper` for all of `runs`: as given, else as runs without rows were scored with, else 100 and None.

    Raises:
        EaptkError: a run without rows was scored with others.
    """
    for run in runs:
        if (kept := run.histogram) is None:
            continue
        if bins not in (None, kept.bins) or upper not in (None, kept.upper):
            asked = f"{kept.bins if bins is None else bins} on [0, {kept.upper if upper is None else upper}]"
            raise EaptkError(
                f"run {run.path} keeps no rows, only counts in {kept.bins} bins on [0, {kept.upper}], which "
                f"cannot become {asked}; score it again with those"
            )
        bins, upper = kept.bins, kept.upper
    return DEFAULT_BINS if bins is None else bins, upper


@dataclass(frozen=True)
class _Rows:
    """Some rows and columns (None for all) of a run's scores, and what is measured of them."""

    scores: Scores
    rows: Integers
    columns: Integers | None
    backend: Backend

    def sweep(self, bins: int | None = None, upper: float | None = None) -> Sweep:
        return sweep(self.scores, self.rows, self.columns, bins=bins, upper=upper, backend=self.backend)

    def strength(self) -> Doubles:
        """[e]: mean |W| of each edge."""
        uniform = np.full((1, len(self.rows)), 1 / len(self.rows))
        return self._column_sums(self.rows, uniform, absolute=True)

    def correlations(self, swept: Sweep, varies: npt.NDArray[np.bool_]) -> tuple[Doubles, float | None]:
        """[n]: each sample's mean correlation with the others that vary, NaN for constant ones and a lone one.

        And their mean.
        """
        result = np.full(len(self.rows), np.nan)
        n = int(varies.sum())
        if n < 2:
            return result, None
        rows = self.rows[varies]
        length = np.sqrt(swept.m2 * swept.count)[varies]
        centre = (swept.mean[varies] / length).sum()
        total = self._column_sums(rows, 1 / length[None]) - centre
        # All entries of S, those of structural zeros included, sum to 0: W_i need not be centred for z_i·S, and
        # its zeros contribute nothing.
        dots = row_dots(self.scores, total, rows, self.columns, backend=self.backend)
        result[varies] = (dots / length - 1) / (n - 1)
        return result, float(result[varies].mean())

    def _column_sums(self, rows: Integers, weights: Doubles, absolute: bool = False) -> Doubles:
        return weighted_column_sums(
            self.scores, weights, rows, self.columns, absolute=absolute, backend=self.backend
        )[0]


@dataclass(frozen=True)
class _Strongest:
    """Some rows of a run that kept each sample's strongest edges, of those that it chose from."""

    run: ScoredRun
    rows: Integers
    columns: Integers
    backend: Backend

    def sweep(self, bins: int | None = None, upper: float | None = None) -> Sweep:
        return sweep(self.run.scores, self.rows, bins=bins, upper=upper, backend=self.backend)

    def strength(self) -> Doubles:
        """[e]: mean |W| of edges that every sample kept, NaN for others."""
        assert self.run.top_columns is not None
        places = np.searchsorted(self.columns, self.run.top_columns[self.rows].ravel())
        n_samples = np.bincount(places, minlength=len(self.columns))
        sizes = np.abs(self.run.scores[self.rows].astype(np.float64)).ravel()
        total = np.bincount(places, sizes, minlength=len(self.columns))
        return np.where(n_samples == len(self.rows), total / len(self.rows), np.nan)

    def correlations(self, swept: Sweep, varies: npt.NDArray[np.bool_]) -> tuple[Doubles, None]:
        return np.full(len(self.rows), np.nan), None


@dataclass(frozen=True)
class _Summaries:
    """Some samples of a run without rows, and the same as of rows, as far as sums over samples give it."""

    kept: Statistics
    rows: Integers
    dense: bool

    def sweep(self, bins: int | None = None, upper: float | None = None) -> Sweep:
        return self.kept.sweep(self.rows)

    def strength(self) -> Doubles:
        return self.kept.strength(self.rows)

    def correlations(self, swept: Sweep, varies: npt.NDArray[np.bool_]) -> tuple[Doubles, float | None]:
        return np.full(len(self.rows), np.nan), self.kept.mean_correlation(self.rows, self.dense)


def _source_entropies(graph: Graph, columns: Integers, strength: Doubles, log_base: float) -> Doubles:
    matrix = np.zeros((graph.n_sources, graph.n_destinations))
    matrix[graph.edge_source[columns], graph.edge_destination[columns]] = strength
    return entropy(matrix, log_base)


def _finished(path: Path, done: npt.NDArray[Any], rows: npt.ArrayLike | None) -> tuple[Integers, int]:
    """The rows to measure, and how many of those asked for are not done."""
    done = np.asarray(done) == 1
    wanted = np.arange(len(done)) if rows is None else indices(rows, len(done), "sample")
    if not len(wanted):
        raise EaptkError("no sample is selected; there is nothing to measure")
    if len(np.unique(wanted)) < len(wanted):
        raise EaptkError("a sample is selected twice; its correlation with itself would count as similarity")
    finished = wanted[done[wanted]]
    if not len(finished):
        raise EaptkError(f"no row of {path} that was selected is done; score it first")
    return finished, len(wanted) - len(finished)
