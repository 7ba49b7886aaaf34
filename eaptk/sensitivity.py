"""How much of a difference in complexity is the choice of its histogram.

The entropy of a histogram depends on its bins and on where it ends; arXiv 2509.21044 states neither, and no choice
is right. So it is measured under several, on the samples and edges of a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

from eaptk.comparison import Comparison
from eaptk.errors import EaptkError
from eaptk.experiment import Sensitivity
from eaptk.metrics import Metrics, ScoredRun, entropy, stored_places
from eaptk.sweep import sweep

#: Ends of the histogram, as shares of where the comparison's own ends.
SHARES = (0.1, 0.3, 1.0)
BINS = (50, 100, 200, 400)


def complexity_sensitivity(
    runs: Sequence[ScoredRun],
    comparison: Comparison,
    *,
    bins: Sequence[int] = BINS,
    shares: Sequence[float] = SHARES,
) -> tuple[Sensitivity, ...]:
    """Complexity of each run of a comparison under each range and number of bins, a sweep of its rows each.

    Args:
        runs: [k], those that were compared, in the order of `comparison.names`.
        bins: of the histogram.
        shares: where it ends, as shares of where the comparison's own does. Entries above that are counted in
            no bin.

    Returns:
        A row each: all `bins` of the first range, then of the next.

    Raises:
        EaptkError: not the runs compared, a run that keeps no rows, or a histogram that nothing falls into.
    """
    if len(runs) != len(comparison.names):
        raise EaptkError(f"the comparison is of {len(comparison.names)} runs; got {len(runs)}")
    found = []
    for upper in (share * comparison.metrics[0].upper for share in shares):
        for n in bins:
            values = [_complexity(*pair, n, upper) for pair in zip(runs, comparison.metrics, strict=True)]
            found.append(Sensitivity(n, upper, tuple(values)))
    return tuple(found)


def _complexity(run: ScoredRun, measured: Metrics, bins: int, upper: float) -> float:
    if run.statistics is not None:
        raise EaptkError(f"run {run.path} keeps no rows, so it has no other histogram than its own")
    places = stored_places(run, measured.columns)
    swept = sweep(run.scores, measured.rows, places, bins=bins, upper=upper)
    histogram = swept.with_zeros(measured.n_entries - int(swept.count[0])).histogram
    assert histogram is not None
    if not histogram.any():
        raise EaptkError(
            f"no |W| of {run.path} is as small as {upper}, where the histogram ends; let it end later"
        )
    return float(entropy(histogram.sum(0), measured.log_base))
