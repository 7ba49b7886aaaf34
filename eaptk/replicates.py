"""What the experiments of a study say together: one correction for all, and one contrast over several seeds.

*Correction* (`correct`): every metric of every experiment is a hypothesis, and a reader sees all of their arrows
at once. See `eaptk.resampling.benjamini_hochberg` for why its false discovery rate is what is bounded. Each
convention is corrected by itself: counting zeros as well describes the same scores a second time.

*Replicates* (`across`): experiments of one method, data set and α differ in the seed of training alone. Each has
its own interval, which redraws questions and knows nothing of seeds: that training again may give another
difference is seen only between replicates. For the mean difference of S of them

    seeds       mean ± t(S − 1) · sd / √S, Student's interval of the S differences
    questions   the mean square of the margins of the S bootstrap intervals. The replicates answer the same
                questions, so their errors may go the same way, and averaging removes none of them.

are combined by adding the squares of their margins on either side (Zou & Donner 2008, MOVER). The interval is for
new seeds and new questions at once, and cautious: what is particular to a seed *and* a question counts in both.
Simulated with S = 3, at 95 % it covers 95–99 % whichever of the two varies more. Student's interval of the seeds
alone covers 18 % where questions do; a bootstrap that redraws seeds as well as questions covers 76 % where seeds
do, as it knows three values and draws one of them three times in one of nine draws. So three seeds give a wide
interval (t = 4.3), and nothing honest is narrower. Nor can three signs reject anything (2/2³ = 0.25). The
differences of replicates are taken to be normal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from eaptk.experiment import Experiment, StudyResults
from eaptk.resampling import Difference, benjamini_hochberg, student_quantile

Convention = Literal["real", "dense"]


@dataclass(frozen=True)
class Replicated:
    """One metric of one run against the baseline, in S ≥ 2 replicates.

    Args:
        method, dataset, alpha: what the replicates share.
        convention: ``"real"`` or ``"dense"``.
        metric: as of `Difference`.
        place: of the run in each experiment (`Experiment.place`).
        families: [S] of the replicates.
        differences: [S] of each, with its own interval.
        mean: of the S differences.
        low, high: interval of `mean` for new seeds and new questions (see the module); None where a replicate
            has no interval.
        confidence: of the interval.
        n_same_sign: how many of the S differences have the sign of `mean`.
        ratio: exp(mean over replicates of log(value / baseline)); None where a value is not positive.
        direction: ``up`` or ``down`` if the interval excludes 0; else ``unresolved``. Corrected for nothing.
    """

    method: str
    dataset: str
    alpha: float
    convention: Convention
    metric: str
    place: tuple[str, float]
    families: tuple[str, ...]
    differences: tuple[Difference, ...]
    mean: float
    low: float | None
    high: float | None
    confidence: float
    n_same_sign: int
    ratio: float | None

    @property
    def direction(self) -> Literal["up", "down", "unresolved"]:
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "unresolved"
        return "up" if self.low > 0 else "down"


def across(experiments: Iterable[Experiment]) -> list[Replicated]:
    """Every difference that at least two experiments of one method, data set and α have, both conventions.

    In the order of the experiments, their runs and metrics, real edges before dense. Runs of a series are held
    together where they stand at the same step, others where they have the same place in their family, as they are
    usually named after their seed.
    """
    found: dict[tuple[str, str, float, Convention, str, tuple[str, float]], dict[str, Difference]] = {}
    for e in experiments:
        conventions: tuple[tuple[Convention, Sequence[Difference]], ...] = (
            ("real", e.real.differences),
            ("dense", e.dense.differences),
        )
        for convention, differences in conventions:
            for d in differences:
                key = (e.method, e.dataset, e.alpha, convention, d.metric, e.place(d.run))
                found.setdefault(key, {})[e.family] = d
    return [
        _replicated(*key, families=tuple(members), differences=tuple(members.values()))
        for key, members in found.items()
        if len(members) > 1
    ]


def _replicated(
    method: str,
    dataset: str,
    alpha: float,
    convention: Convention,
    metric: str,
    place: tuple[str, float],
    families: tuple[str, ...],
    differences: tuple[Difference, ...],
) -> Replicated:
    values = [d.difference for d in differences]
    mean = math.fsum(values) / len(values)
    confidence = min(d.confidence for d in differences)
    ratios = [d.value / d.value_baseline if d.value_baseline > 0 else 0.0 for d in differences]
    ratio = None
    if min(ratios) > 0:
        ratio = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    low, high = _interval(differences, mean, confidence)
    return Replicated(
        method=method,
        dataset=dataset,
        alpha=alpha,
        convention=convention,
        metric=metric,
        place=place,
        families=families,
        differences=differences,
        mean=mean,
        low=low,
        high=high,
        confidence=confidence,
        n_same_sign=sum(value * mean > 0 for value in values),
        ratio=ratio,
    )


def _interval(
    differences: Sequence[Difference], mean: float, confidence: float
) -> tuple[float | None, float | None]:
    n = len(differences)
    below, above = [], []
    for d in differences:
        if d.low is None or d.high is None:
            return None, None
        below.append((d.difference - d.low) ** 2)
        above.append((d.high - d.difference) ** 2)
    seeds = student_quantile((1 + confidence) / 2, n - 1) ** 2 * math.fsum(
        (d.difference - mean) ** 2 for d in differences
    )
    seeds /= n * (n - 1)
    return mean - math.sqrt(seeds + math.fsum(below) / n), mean + math.sqrt(seeds + math.fsum(above) / n)


def correct(results: StudyResults) -> StudyResults:
    """The study with `q` of every difference corrected over all experiments; each convention by itself."""
    experiments = list(results.experiments)
    for convention in ("real", "dense"):
        comparisons = [getattr(e, convention) for e in experiments]
        corrected = iter(benjamini_hochberg(d for c in comparisons for d in c.differences))
        for k, c in enumerate(comparisons):
            kept = tuple(next(corrected) for _ in c.differences)
            experiments[k] = replace(experiments[k], **{convention: replace(c, differences=kept)})
    return replace(results, experiments=tuple(experiments))
