"""Paired differences of metrics: bootstrap intervals, permutation tests, effect sizes.

*Bootstrap* (Efron & Tibshirani 1993): questions are drawn with replacement, both runs with the same draw. If
samples carry a group, whole groups are drawn: samples of one question are not independent. Intervals are expanded
percentile intervals (Hesterberg 2015, The American Statistician 69): a draw of n groups varies by
√((n − 1)/n) too little and its quantiles are those of a normal, not of Student's distribution, so the tails are
taken where they make the interval of a mean as long as Student's: at Φ(−√(n/(n − 1)) · t(n − 1)). Measured on means of
n = 10 … 100 differences, at 95 %: normal or heavy-tailed on both sides (t with 3 degrees of freedom, differences
of log-normals) they cover 92–95 %, plain percentiles 89–95 %, BCa 90–95 %, the studentised bootstrap 89–96 % at up
to 1.3 times the length; skewed ones (log-normal) 84 % at n = 10, 89 % at 40 and 92 % at 100, plain percentiles
78, 88 and 91 %.

*Permutation*: under the null hypothesis the two labels of a pair, or of all pairs of a group, may be swapped;
p = (1 + #{|d*| ≥ |d|}) / (1 + permutations).

*Metrics that are no means.* Complexity is recomputed exactly from each draw's pooled histogram. Diversity is
1 − a U-statistic θ of pairs; it is linearised, θ* = θ + 2(mean*(h) − θ) with h_i the mean correlation of
sample i with the others (Hoeffding's projection), because a drawn sample is perfectly correlated with its own
copies. For the effect size both enter by their first-order contribution a sample, whose mean is the metric.

*Effect size*: Cohen's d_z, mean over pairs of the difference divided by its standard deviation.

*Resolved* is what passes twice: the interval excludes 0, and so does the corrected test at the interval's own
level. The interval knows nothing of the other hypotheses and is a little short for few groups; the test of few
groups can reject nothing (n groups have 2^n labellings: p ≥ 2/2^n).

*At equal loss* (`differences_at_equal_loss`): the intercept a of the least-squares line d_i = a + b·l_i over
pairs, with d_i the difference of a metric and l_i that of the loss: what is expected to differ between two
answers of equal loss. Intervals redraw groups as above; for the test the residuals of the line through 0 (no
difference at equal loss) change sign by groups (Freedman & Lane 1983); the effect size is a over the standard
deviation of the residuals. Limits: it is a straight line, and it adjusts for the mean loss of an answer alone:
where that is a noisy measure of what moves loss and scores alike, the line is too flat and part of it stays in a.
Where no pair has a loss difference near 0, a is an extrapolation, and the interval does not know that the line
may bend on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.metrics import entropy
from eaptk.sweep import Doubles, Integers

#: Ends the name of a metric that is adjusted for the loss.
AT_EQUAL_LOSS = " at equal loss"

#: Weights of the draws worked on at a time ([draws, groups] doubles); a handful of such arrays live at once.
_CHUNK_BYTES = 2**24

#: Values closer than this, relative to the largest of them, differ by rounding alone.
_ROUNDING = 1e-9

#: Fewer independent groups give no interval of what is no mean: a draw of one or two of them means nothing.
_FEWEST_GROUPS = 4


@dataclass(frozen=True)
class Difference:
    """One metric of one run against the baseline's.

    Args:
        metric: a name of `eaptk.metrics.METRICS`, one of those followed by ``at equal loss``, or ``loss``.
        run, baseline: names of the runs.
        value_baseline, value: the metric of each.
        difference: value − value_baseline.
        low, high: paired bootstrap interval of the difference; None where fewer than 4 groups give none
            (diversity, and metrics at equal loss).
        p: two-sided paired permutation p-value.
        p_holm: `p` corrected over all metrics and runs of the comparison; None for the loss, which is no
            hypothesis.
        effect: Cohen's d_z; None if the difference is the same for all pairs, up to rounding.
        n_pairs: pairs that went into it (kurtosis and diversity need scores that vary).
        n_groups: independent units among them.
        confidence: of the interval.
        q: `p` corrected over a whole study (`benjamini_hochberg`) in place of `p_holm`; None outside one.
        direction: ``up`` or ``down`` if the interval excludes 0 and the corrected p (`q` in a study, else
            `p_holm`; for the loss `p`) is at most 1 − `confidence`; else ``unresolved``.
    """

    metric: str
    run: str
    baseline: str
    value_baseline: float
    value: float
    difference: float
    low: float | None
    high: float | None
    p: float
    p_holm: float | None
    effect: float | None
    n_pairs: int
    n_groups: int
    confidence: float
    q: float | None = None

    @property
    def direction(self) -> Literal["up", "down", "unresolved"]:
        p = next(p for p in (self.q, self.p_holm, self.p) if p is not None)
        if self.low is None or self.high is None or p > 1 - self.confidence or self.low <= 0 <= self.high:
            return "unresolved"
        return "up" if self.low > 0 else "down"


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

    n_resamples = resampling.n_resamples
    drawn = np.empty((n_resamples, len(metrics)))
    exceeding = np.zeros(len(metrics))
    for part, weights, swapped in _draws(n_groups, resampling):
        drawn[part] = side_b.values(weights, sizes, complexity, log_base)
        drawn[part] -= side_a.values(weights, sizes, complexity, log_base)

        permuted = observed - 2 * (swapped @ swap.contributions) / sizes.sum()
        if complexity is not None:
            moved = swapped @ swap.histogram
            permuted[:, complexity] = entropy(side_b.histogram.sum(0) - moved, log_base)
            permuted[:, complexity] -= entropy(side_a.histogram.sum(0) + moved, log_base)
        exceeding += _reaching(permuted, observed)

    intervals = _intervals(drawn, resampling.confidence, n_groups, 1)
    paired = each_b - each_a
    spread = paired.std(axis=0, ddof=1)
    spread[spread <= _ROUNDING * np.maximum(np.abs(each_a), np.abs(each_b)).max(0)] = 0
    found = []
    for k, metric in enumerate(metrics):
        has_interval = metric != "diversity" or n_groups >= _FEWEST_GROUPS
        found.append(
            Difference(
                metric=metric,
                run=runs[1],
                baseline=runs[0],
                value_baseline=float(value_a[k]),
                value=float(value_b[k]),
                difference=float(observed[k]),
                low=float(intervals[0, k]) if has_interval else None,
                high=float(intervals[1, k]) if has_interval else None,
                p=float((1 + exceeding[k]) / (1 + n_resamples)),
                p_holm=None,
                effect=float(paired[:, k].mean() / spread[k]) if spread[k] > 0 else None,
                n_pairs=len(groups),
                n_groups=n_groups,
                confidence=resampling.confidence,
            )
        )
    return found


def differences_at_equal_loss(
    metric: str,
    runs: tuple[str, str],
    a: Contributions,
    b: Contributions,
    groups: Integers,
    resampling: Resampling,
) -> Difference:
    """The difference of a metric that is a mean over samples, at equal loss; `value` is baseline + difference.

    Args:
        as for `paired_differences`; `a` and `b` hold the loss as well.

    Raises:
        EaptkError: the loss differs alike in all pairs, so there is no line to draw.
    """
    groups = np.unique(groups, return_inverse=True)[1]
    n, n_groups = len(groups), int(groups.max()) + 1
    d = b.metrics[metric] - a.metrics[metric]
    loss = b.metrics["loss"] - a.metrics["loss"]
    centred = loss - loss.mean()
    largest = max(np.abs(side.metrics["loss"]).max() for side in (a, b))
    if centred.std() <= _ROUNDING * largest:
        raise EaptkError(
            f"the loss of {runs[1]} differs from that of {runs[0]} by the same amount in all {n} pairs, "
            f"so nothing can be adjusted for it; compare without control for the loss"
        )
    # The intercept is linear in d: a = Σ_i weight_i d_i, and 0 for any line through 0.
    weight = 1 / n - loss.mean() * centred / (centred @ centred)
    observed = np.array([weight @ d])
    residual = d - d.mean() - centred * (centred @ d) / (centred @ centred)
    spread = float(np.sqrt(residual @ residual / (n - 2))) if n > 2 else 0.0
    through_zero = _by_group((weight * (d - loss * (loss @ d) / (loss @ loss)))[:, None], groups)
    # Residuals of a fitted line are too small by this much on average.
    through_zero *= math.sqrt(n_groups / max(n_groups - 1, 1))
    sums = _by_group(np.stack([np.ones(n), centred, centred**2, d, centred * d], axis=1), groups)

    drawn = np.empty((resampling.n_resamples, 1))
    exceeding = np.zeros(1)
    for part, weights, swapped in _draws(n_groups, resampling):
        count, x, xx, y, xy = (weights @ sums).T
        scatter = count * xx - x**2
        # A draw of pairs that share one loss difference has no line; it is left out of the quantiles.
        has_line = scatter > _ROUNDING * count**2 * centred.var()
        slope = np.divide(count * xy - x * y, scatter, out=np.full(len(x), np.nan), where=has_line)
        drawn[part, 0] = (y - slope * x) / count - slope * loss.mean()
        exceeding += _reaching((1 - 2 * swapped) @ through_zero, observed)

    low, high = _intervals(drawn, resampling.confidence, n_groups, 2)[:, 0]
    baseline = float(a.metrics[metric].mean())
    return Difference(
        metric=metric + AT_EQUAL_LOSS,
        run=runs[1],
        baseline=runs[0],
        value_baseline=baseline,
        value=baseline + float(observed[0]),
        difference=float(observed[0]),
        low=float(low) if n_groups >= _FEWEST_GROUPS else None,
        high=float(high) if n_groups >= _FEWEST_GROUPS else None,
        p=float((1 + exceeding[0]) / (1 + resampling.n_resamples)),
        p_holm=None,
        effect=float(observed[0]) / spread if spread > _ROUNDING * np.abs(d).max() else None,
        n_pairs=n,
        n_groups=n_groups,
        confidence=resampling.confidence,
    )


def _draws(n_groups: int, resampling: Resampling) -> Iterator[tuple[slice, Doubles, Doubles]]:
    """Some draws at a time: which, how often each group is drawn, and which groups swap labels (0 or 1)."""
    # A stream for each, so that the numbers do not depend on how many draws fit into memory.
    streams = np.random.SeedSequence(resampling.seed).spawn(2)
    bootstrap, permutation = (np.random.default_rng(stream) for stream in streams)
    chunk = max(1, _CHUNK_BYTES // (8 * n_groups))
    for start in range(0, resampling.n_resamples, chunk):
        n = min(chunk, resampling.n_resamples - start)
        picks = bootstrap.integers(n_groups, size=(n, n_groups)) + n_groups * np.arange(n)[:, None]
        weights = np.bincount(picks.ravel(), minlength=n * n_groups).reshape(n, n_groups)
        swapped = permutation.integers(2, size=(n, n_groups))
        yield slice(start, start + n), weights.astype(np.float64), swapped.astype(np.float64)


def _reaching(permuted: Doubles, observed: Doubles) -> Integers:
    """[metrics]: how many permutations are as large as what was observed."""
    # Swapping all or none gives the observed difference again, up to rounding: it counts as reaching it.
    reaching: Integers = (np.abs(permuted) >= np.abs(observed) * (1 - _ROUNDING)).sum(0)
    return reaching


def _intervals(drawn: Doubles, confidence: float, n_groups: int, n_parameters: int) -> Doubles:
    """[2, metrics]: expanded percentile intervals, of the draws that are defined.

    Args:
        n_parameters: what the draws estimate from `n_groups`: 1 for a mean, 2 for a line.
    """
    degrees = max(n_groups - n_parameters, 1)
    margin = math.sqrt(n_groups / degrees) * student_quantile((1 + confidence) / 2, degrees)
    tail = math.erfc(margin / math.sqrt(2)) / 2
    return np.nanquantile(drawn, [tail, 1 - tail], axis=0)


def student_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's distribution, to 1e-9; ½ < p < 1."""
    z = NormalDist().inv_cdf(p)
    if degrees > 1000:
        # Abramowitz & Stegun 26.7.5: what is left out is of the order of degrees⁻⁴.
        series = (
            z,
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        )
        return sum(term / degrees**k for k, term in enumerate(series))
    # 26.7.3 and 26.7.4: with t = √degrees · tan θ the share within ±t is a finite sum of powers of cos θ.
    odd = degrees % 2
    steps = np.arange(1, degrees // 2)
    factors = np.concatenate([[1.0], np.cumprod((2 * steps - 1 + odd) / (2 * steps + odd))])

    def within(theta: float) -> float:
        if degrees == 1:
            return 2 / math.pi * theta
        total = math.sin(theta) * float(factors @ math.cos(theta) ** (odd + 2 * np.arange(len(factors))))
        return 2 / math.pi * (theta + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 2 * p - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _by_group(values: npt.NDArray[Any], groups: Integers) -> Doubles:
    sums = np.zeros((int(groups.max()) + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums


def holm(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    """With Holm's (1979) step-down correction over all hypotheses as `p_holm`; the loss is none."""
    differences = list(differences)
    tested = sorted((d for d in differences if d.metric != "loss"), key=lambda d: d.p)
    corrected: dict[int, float] = {}
    running = 0.0
    for rank, difference in enumerate(tested):
        running = max(running, min(1.0, (len(tested) - rank) * difference.p))
        corrected[id(difference)] = running
    return tuple(replace(d, p_holm=corrected.get(id(d))) for d in differences)


def benjamini_hochberg(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    """With Benjamini & Hochberg's (1995) step-up correction over all hypotheses as `q`; the loss is none.

    Of all differences with q ≤ 0.05 at most 5 % are expected to be none. Holm's correction instead bounds the
    chance of a single one; over the hundreds of hypotheses of a study it asks for a p that 10,000 permutations
    cannot show (p ≥ 1/10,001), and the more so the more data sets a study adds. The bound holds for independent
    and for positively dependent hypotheses (Benjamini & Yekutieli 2001), as one answer cut at several lengths is.
    """
    differences = list(differences)
    tested = sorted((d for d in differences if d.metric != "loss"), key=lambda d: -d.p)
    corrected: dict[int, float] = {}
    running = 1.0
    for rank, difference in enumerate(tested):
        running = min(running, len(tested) / (len(tested) - rank) * difference.p)
        corrected[id(difference)] = running
    return tuple(replace(d, q=corrected.get(id(d))) for d in differences)
