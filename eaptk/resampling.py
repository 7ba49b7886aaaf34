"""Paired differences of metrics: bootstrap intervals, permutation tests, effect sizes.

*Bootstrap* (Efron & Tibshirani 1993, §13.3 percentile interval): questions are drawn with replacement, both
runs with the same draw. If samples carry a group, whole groups are drawn: samples of one question are not
independent.

*Permutation*: under the null hypothesis the two labels of a pair, or of all pairs of a group, may be swapped;
p = (1 + #{|d*| ≥ |d|}) / (1 + permutations).

*Metrics that are no means.* Complexity is recomputed exactly from each draw's pooled histogram. Diversity is
1 − a U-statistic θ of pairs; it is linearised, θ* = θ + 2(mean*(h) − θ) with h_i the mean correlation of
sample i with the others (Hoeffding's projection), because a drawn sample is perfectly correlated with its own
copies. For the effect size both enter by their first-order contribution a sample, whose mean is the metric.

*Effect size*: Cohen's d_z, mean over pairs of the difference divided by its standard deviation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.metrics import METRICS, entropy
from eaptk.sweep import Doubles, Integers

#: Draws worked on at a time: 512 × groups doubles.
_CHUNK = 512


@dataclass(frozen=True)
class Difference:
    """One metric of one run against the baseline's.

    Args:
        metric: a name of `eaptk.metrics.METRICS`, or ``loss``.
        run, baseline: names of the runs.
        value_baseline, value: the metric of each.
        difference: value − value_baseline.
        low, high: paired bootstrap interval of the difference.
        p: two-sided paired permutation p-value.
        p_holm: `p` corrected over all metrics and runs of the comparison; None for the loss, which is no
            hypothesis.
        effect: Cohen's d_z; None if the difference is the same for all pairs.
        n_pairs: pairs that went into it (kurtosis and diversity need scores that vary).
        n_groups: independent units among them.
        direction: ``up`` or ``down`` if the interval excludes 0.
    """

    metric: str
    run: str
    baseline: str
    value_baseline: float
    value: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float | None
    effect: float | None
    n_pairs: int
    n_groups: int

    @property
    def direction(self) -> Literal["up", "down", "unresolved"]:
        return "up" if self.low > 0 else "down" if self.high < 0 else "unresolved"


@dataclass(frozen=True)
class Contributions:
    """What each of n samples of a run adds to its metrics.

    Args:
        metrics: name to [n]; the mean over samples is the metric, NaN where it is undefined.
        histogram: [n, bins], from whose sum complexity is recomputed.
    """

    metrics: dict[str, Doubles]
    histogram: Integers

    def keep(self, samples: npt.NDArray[np.bool_]) -> Contributions:
        """Those of some samples."""
        kept = {name: values[samples] for name, values in self.metrics.items()}
        return Contributions(kept, self.histogram[samples])


@dataclass(frozen=True)
class _Side:
    """One run's share of some pairs, added up over groups: every resample is then one matrix product."""

    contributions: Doubles  # [groups, metrics]
    histogram: Doubles  # [groups, bins]

    def values(self, weights: Doubles, sizes: Doubles, complexity: int | None, log_base: float) -> Doubles:
        """[draws, metrics], group g counted weights[draw, g] times; `complexity` is the column of that metric."""
        values: Doubles = weights @ self.contributions / (weights @ sizes)[:, None]
        if complexity is not None:
            values[:, complexity] = entropy(weights @ self.histogram, log_base)
        return values


@dataclass(frozen=True)
class Resampling:
    """How differences are judged.

    Args:
        confidence: of the intervals.
        n_resamples: bootstrap draws, and as many permutations.
        seed: of both; the same call gives the same numbers.

    Raises:
        EaptkError: a value that gives no interval.
    """

    confidence: float = 0.95
    n_resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise EaptkError(f"confidence is {self.confidence}; it must lie between 0 and 1")
        if self.n_resamples < 100:
            raise EaptkError(f"n_resamples is {self.n_resamples}; fewer than 100 give no interval")
        if self.seed < 0:
            raise EaptkError(f"seed is {self.seed}; it must not be negative")


def paired_differences(
    metrics: Sequence[str],
    runs: tuple[str, str],
    a: Contributions,
    b: Contributions,
    groups: Integers,
    log_base: float,
    resampling: Resampling,
) -> list[Difference]:
    """The difference of each metric, all from the same draws; `p_holm` is left None.

    Args:
        metrics: names, each defined for all n samples of `a` and `b`.
        runs: names of the baseline (`a`) and of the run (`b`).
        groups: [n], samples with the same integer belong together.
        log_base: of the complexity.
    """
    groups = np.unique(groups, return_inverse=True)[1]
    n_groups = int(groups.max()) + 1
    sizes = np.bincount(groups).astype(np.float64)
    complexity = metrics.index("complexity") if "complexity" in metrics else None
    each_a, each_b = (np.stack([side.metrics[name] for name in metrics], axis=1) for side in (a, b))
    side_a = _Side(_by_group(each_a, groups), _by_group(a.histogram, groups))
    side_b = _Side(_by_group(each_b, groups), _by_group(b.histogram, groups))
    swap = _Side(side_b.contributions - side_a.contributions, side_b.histogram - side_a.histogram)

    once = np.ones((1, n_groups))
    value_a = side_a.values(once, sizes, complexity, log_base)[0]
    value_b = side_b.values(once, sizes, complexity, log_base)[0]
    observed = value_b - value_a

    rng = np.random.default_rng(resampling.seed)
    n_resamples = resampling.n_resamples
    drawn = np.empty((n_resamples, len(metrics)))
    exceeding = np.zeros(len(metrics))
    for start in range(0, n_resamples, _CHUNK):
        n = min(_CHUNK, n_resamples - start)
        picks = rng.integers(n_groups, size=(n, n_groups)) + n_groups * np.arange(n)[:, None]
        weights = np.bincount(picks.ravel(), minlength=n * n_groups).reshape(n, n_groups).astype(np.float64)
        drawn[start : start + n] = side_b.values(weights, sizes, complexity, log_base)
        drawn[start : start + n] -= side_a.values(weights, sizes, complexity, log_base)

        swapped = rng.integers(2, size=(n, n_groups)).astype(np.float64)
        permuted = observed - 2 * (swapped @ swap.contributions) / sizes.sum()
        if complexity is not None:
            moved = swapped @ swap.histogram
            permuted[:, complexity] = entropy(side_b.histogram.sum(0) - moved, log_base)
            permuted[:, complexity] -= entropy(side_a.histogram.sum(0) + moved, log_base)
        # Swapping all or none gives the observed difference again, up to rounding: it counts as reaching it.
        exceeding += (np.abs(permuted) >= np.abs(observed) * (1 - 1e-9)).sum(0)

    tail = (1 - resampling.confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    paired = each_b - each_a
    spread = paired.std(axis=0, ddof=1)
    return [
        Difference(
            metric=metric,
            run=runs[1],
            baseline=runs[0],
            value_baseline=float(value_a[k]),
            value=float(value_b[k]),
            difference=float(observed[k]),
            low=float(low[k]),
            high=float(high[k]),
            p=float((1 + exceeding[k]) / (1 + n_resamples)),
            p_holm=None,
            effect=float(paired[:, k].mean() / spread[k]) if spread[k] > 0 else None,
            n_pairs=len(groups),
            n_groups=n_groups,
        )
        for k, metric in enumerate(metrics)
    ]


def _by_group(values: npt.NDArray[Any], groups: Integers) -> Doubles:
    sums = np.zeros((int(groups.max()) + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums


def holm(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    """With Holm's (1979) step-down correction over all hypotheses as `p_holm`; the loss is none."""
    differences = list(differences)
    tested = sorted((d for d in differences if d.metric in METRICS), key=lambda d: d.p)
    corrected: dict[int, float] = {}
    running = 0.0
    for rank, difference in enumerate(tested):
        running = max(running, min(1.0, (len(tested) - rank) * difference.p))
        corrected[id(difference)] = running
    return tuple(replace(d, p_holm=corrected.get(id(d))) for d in differences)
