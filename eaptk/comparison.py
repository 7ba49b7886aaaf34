"""Compare runs sample by sample: never a bare difference.

Samples are paired by id. For each metric of `eaptk.metrics` (and for the loss, which is shown beside because
confidence alone moves gradients) there are both values, the difference, a paired bootstrap interval, a paired
permutation p-value, Holm's correction over all metrics and runs, and an effect size.

How intervals, p-values and effect sizes are made is said in `eaptk.resampling`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.metrics import DEFAULT_BINS, METRICS, Metrics, ScoredRun, measure
from eaptk.resampling import Contributions, Difference, Resampling, holm, paired_differences
from eaptk.sweep import Doubles, Integers, sweep

if TYPE_CHECKING:
    import pandas
    import pyarrow
    from rich.table import Table

#: What two runs must share to be comparable, as keys of the manifest.
_MUST_AGREE = ("ablation", "loss", "cut")

#: Metrics defined for any sample, and those only for samples whose scores are not all equal.
_EVERYWHERE = ("intensity", "complexity", "loss")
_WHERE_VARYING = ("kurtosis", "diversity")

_DEFAULT_RESAMPLING = Resampling()


class PairedRun(ScoredRun, Protocol):
    """What is compared of a run; `eaptk.Run` is one."""

    @property
    def manifest(self) -> dict[str, Any]: ...
    @property
    def samples(self) -> pyarrow.Table: ...
    @property
    def loss(self) -> Doubles: ...


@dataclass(frozen=True)
class Comparison:
    """Two or more runs on the samples they share; the first is the baseline.

    Args:
        names: [k] of the runs.
        graph: theirs.
        metrics: [k], each run's on the shared samples, all with one histogram range.
        differences: for each run but the first, each metric and then the loss; a metric that is undefined
            for want of two samples whose scores vary is left out.
        sample_ids: [n] of the shared samples.
        n_dropped: [k], finished samples of each run that others lack.
        n_unfinished: [k], samples of each run that are not done.
        resampling: how intervals and p-values were made.
    """

    names: tuple[str, ...]
    graph: Graph = field(repr=False)
    metrics: tuple[Metrics, ...] = field(repr=False)
    differences: tuple[Difference, ...]
    sample_ids: tuple[str, ...] = field(repr=False)
    n_dropped: tuple[int, ...]
    n_unfinished: tuple[int, ...]
    resampling: Resampling

    def relative_change(self, run: int = 1) -> Doubles:
        """[e]: (mean|W_run| − mean|W_baseline|) / mean|W_baseline| of each edge; NaN where the baseline is 0."""
        return relative_change(self.metrics[0].strength, self.metrics[run].strength)

    def to_frame(self) -> pandas.DataFrame:
        """One row a difference: the fields of `Difference` and its direction."""
        import pandas

        rows = [_plain(difference) for difference in self.differences]
        return pandas.DataFrame(rows)

    def edges_frame(self) -> pandas.DataFrame:
        """One row an edge: the graph's columns, mean |W| of each run, relative change of each but the first."""
        frame = self.graph.to_frame().iloc[self.metrics[0].columns].reset_index(drop=True)
        for name, metrics in zip(self.names, self.metrics, strict=True):
            frame[f"strength {name}"] = metrics.strength
        for k, name in enumerate(self.names[1:], start=1):
            frame[f"relative change {name}"] = self.relative_change(k)
        return frame

    def to_dict(self) -> dict[str, Any]:
        """Everything but the edges, JSON-ready."""
        return {
            "runs": list(self.names),
            "n_pairs": len(self.sample_ids),
            "n_dropped": list(self.n_dropped),
            "n_unfinished": list(self.n_unfinished),
            "resampling": asdict(self.resampling),
            "differences": [_plain(difference) for difference in self.differences],
            "metrics": {n: m.to_dict() for n, m in zip(self.names, self.metrics, strict=True)},
            "sample_ids": list(self.sample_ids),
        }

    def write(self, folder: str | Path) -> list[Path]:
        """Write comparison.csv, comparison.json and edges.parquet into `folder`; returns their paths."""
        folder = Path(folder)
        paths = [folder / name for name in ("comparison.csv", "comparison.json", "edges.parquet")]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.to_frame().to_csv(paths[0], index=False)
            paths[1].write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
            self.edges_frame().to_parquet(paths[2], index=False)
        except OSError as error:
            raise EaptkError(f"cannot write the comparison to {folder}: {error.strerror}") from error
        return paths

    def to_table(self) -> Table:
        """For the terminal (rich)."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        baseline = self.names[0]
        dropped = sum(self.n_dropped) + sum(self.n_unfinished)
        several = len(self.names) > 2
        table = Table(
            title=f"{' and '.join(self.names[1:])} against {baseline}: {len(self.sample_ids):,} pairs"
            + (f" ({dropped:,} samples without a finished partner left out)" if dropped else ""),
            title_justify="left",
            caption=f"intervals: paired bootstrap, {self.resampling.confidence:.0%}; p: paired permutation, "
            f"Holm-corrected over metrics (not for the loss, which is shown beside); d_z: paired effect size; "
            f"?: the interval holds 0",
            caption_justify="left",
            # Narrow enough that no number is cut short on a terminal of 80 columns.
            box=SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        for heading in ("metric", *(["run"] if several else [])):
            table.add_column(heading)
        value = "value" if several else self.names[1]
        pairs = [
            f"{d.n_pairs:,}" + (f" in {d.n_groups:,}" if d.n_groups < d.n_pairs else "")
            for d in self.differences
        ]
        # The title has their number already, unless some metric or some groups make it another.
        uneven = set(pairs) != {f"{len(self.sample_ids):,}"}
        headings = (baseline, value, "difference", "interval", "p", "d_z", *(["pairs"] if uneven else []))
        for heading in headings:
            table.add_column(heading, justify="right", overflow="fold")
        arrow = {"up": "↑", "down": "↓", "unresolved": "?"}
        for d, counted in zip(self.differences, pairs, strict=True):
            p = d.p if d.p_holm is None else d.p_holm
            table.add_row(
                d.metric,
                *([d.run] if several else []),
                f"{d.value_baseline:.3g}",
                f"{d.value:.3g}",
                f"{arrow[d.direction]} {d.difference:+.3g}",
                f"[{d.low:+.3g}, {d.high:+.3g}]".replace("[", r"\["),
                f"{p:.2g}",
                "–" if d.effect is None else f"{d.effect:+.2f}",
                *([counted] if uneven else []),
                end_section=d.metric == "loss",
            )
        return table


def relative_change(baseline: npt.ArrayLike, strength: npt.ArrayLike) -> Doubles:
    """(strength − baseline) / baseline, NaN where the baseline is 0."""
    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(strength, dtype=np.float64)
    return np.divide(b - a, a, out=np.full(a.shape, np.nan), where=a > 0)


def compare(
    runs: Sequence[PairedRun],
    *,
    names: Sequence[str] | None = None,
    columns: npt.ArrayLike | None = None,
    dense: bool = False,
    bins: int = DEFAULT_BINS,
    upper: float | None = None,
    log_base: float = math.e,
    resampling: Resampling = _DEFAULT_RESAMPLING,
) -> Comparison:
    """Compare runs on the samples that are done in all of them.

    Args:
        runs: two or more; the first is the baseline.
        names: of the runs; default: their folders'.
        columns, dense, bins, upper, log_base: as for `eaptk.metrics.measure`; `upper` None for the largest
            |W| in any of the runs.
        resampling: see there.

    Raises:
        EaptkError: runs differ in graph, ablation or loss; fewer than two shared samples or groups; a run
            gives one sample another group than the baseline does; or `measure` cannot measure one.
    """
    if len(runs) < 2:
        raise EaptkError(f"a comparison needs at least two runs; got {len(runs)}")
    _check_comparable(runs)
    names = tuple(names) if names is not None else _names(runs)
    ids, rows, groups = _pair(runs)
    if upper is None:
        tops = [
            sweep(run.scores, index, columns).max_abs.max() for run, index in zip(runs, rows, strict=True)
        ]
        upper = float(max(tops)) or None
    options: dict[str, Any] = {
        "columns": columns,
        "dense": dense,
        "bins": bins,
        "upper": upper,
        "log_base": log_base,
    }
    metrics = tuple(measure(run, rows=index, **options) for run, index in zip(runs, rows, strict=True))

    # Kurtosis and correlations exist only where scores vary, and compare only over the same samples.
    varies = ~np.isnan(sum(m.sample_kurtosis for m in metrics))
    varying: Sequence[Metrics | None] = metrics
    if not varies.all():
        varying = [
            measure(run, rows=index[varies], **options) if varies.sum() >= 2 else None
            for run, index in zip(runs, rows, strict=True)
        ]
    sides = [
        _contributions(m, v, varies, np.asarray(run.loss)[index])
        for m, v, run, index in zip(metrics, varying, runs, rows, strict=True)
    ]
    differences: list[Difference] = []
    for name, side in zip(names[1:], sides[1:], strict=True):
        pair = (names[0], name)
        everywhere = _EVERYWHERE if not varies.all() else (*_EVERYWHERE, *_WHERE_VARYING)
        found = paired_differences(everywhere, pair, sides[0], side, groups, log_base, resampling)
        if not varies.all() and len(np.unique(groups[varies])) >= 2:
            kept = (sides[0].keep(varies), side.keep(varies), groups[varies])
            found += paired_differences(_WHERE_VARYING, pair, *kept, log_base, resampling)
        differences += sorted(found, key=lambda d: (*METRICS, "loss").index(d.metric))
    finished = [int((np.asarray(run.done) == 1).sum()) for run in runs]
    return Comparison(
        names=names,
        graph=runs[0].graph,
        metrics=metrics,
        differences=holm(differences),
        sample_ids=ids,
        n_dropped=tuple(n - len(ids) for n in finished),
        n_unfinished=tuple(len(run.done) - n for run, n in zip(runs, finished, strict=True)),
        resampling=resampling,
    )


def _contributions(
    metrics: Metrics, varying: Metrics | None, varies: npt.NDArray[np.bool_], loss: Doubles
) -> Contributions:
    """First-order contributions: of the entropy at the pooled histogram, of the U-statistic its projection.

    Args:
        metrics: of all n pairs.
        varying: of those whose scores vary in every run, None for fewer than two.
        varies: [n], which those are.
        loss: [n].
    """
    total = metrics.sample_histogram.sum(1)
    pooled = metrics.sample_histogram.sum(0) / total.sum()
    surprise = -np.log(pooled, out=np.zeros_like(pooled), where=pooled > 0) / math.log(metrics.log_base)
    kurtosis, diversity = np.full((2, len(varies)), np.nan)
    if varying is not None and varying.diversity is not None:
        kurtosis[varies] = varying.sample_kurtosis
        diversity[varies] = 2 - varying.diversity - 2 * varying.sample_correlation
    by_metric = {
        "intensity": metrics.sample_intensity,
        "complexity": metrics.sample_histogram @ surprise / total.mean(),
        "kurtosis": kurtosis,
        "diversity": diversity,
        "loss": loss,
    }
    return Contributions(by_metric, metrics.sample_histogram)


def _check_comparable(runs: Sequence[PairedRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for name, ours, theirs in [
            *((key, first.manifest.get(key), run.manifest.get(key)) for key in _MUST_AGREE),
            ("graph", first.graph.to_dict(), run.graph.to_dict()),
        ]:
            if ours != theirs:
                raise EaptkError(
                    f"runs differ in {name}: {first.path} has {_changed(ours, theirs)}, "
                    f"{run.path} has {_changed(theirs, ours)}; score both alike to compare them"
                )


def _changed(value: Any, other: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    return ", ".join(f"{key}={item!r}" for key, item in value.items() if other.get(key) != item)


def _names(runs: Sequence[PairedRun]) -> tuple[str, ...]:
    short = tuple(Path(run.path).resolve().name for run in runs)
    names = short if len(set(short)) == len(short) else tuple(str(run.path) for run in runs)
    if len(set(names)) < len(names):
        raise EaptkError(
            f"run {max(names, key=names.count)} is given twice; a run does not differ from itself"
        )
    return names


def _pair(runs: Sequence[PairedRun]) -> tuple[tuple[str, ...], list[Integers], Integers]:
    """Shared ids in the baseline's order, their rows in each run, and the group of each as an integer."""
    tables = [run.samples.select(["id", "group"]).to_pydict() for run in runs]
    where = [
        {name: row for row, (name, done) in enumerate(zip(table["id"], run.done, strict=True)) if done}
        for run, table in zip(runs, tables, strict=True)
    ]
    shared = [name for name in where[0] if all(name in rows for rows in where[1:])]
    if len(shared) < 2:
        raise EaptkError(
            f"runs {' and '.join(str(run.path) for run in runs)} share {len(shared)} finished samples; "
            f"a comparison needs two (samples are paired by id)"
        )
    rows = [np.array([rows[name] for name in shared]) for rows in where]
    labels = [[table["group"][row] for row in index] for table, index in zip(tables, rows, strict=True)]
    for run, other in zip(runs[1:], labels[1:], strict=True):
        for name, ours, theirs in zip(shared, labels[0], other, strict=True):
            if ours != theirs:
                raise EaptkError(
                    f"sample {name!r} belongs to group {ours!r} in {runs[0].path} and {theirs!r} in {run.path}"
                )
    # A sample without a group is one of its own.
    keys = [
        ("id", name) if label is None else ("group", label)
        for name, label in zip(shared, labels[0], strict=True)
    ]
    number: dict[tuple[str, str], int] = {}
    groups = np.array([number.setdefault(key, len(number)) for key in keys])
    if len(number) < 2:
        raise EaptkError(
            f"all {len(shared)} shared samples belong to one group; an interval needs at least two"
        )
    return tuple(shared), rows, groups


def _plain(difference: Difference) -> dict[str, Any]:
    return asdict(difference) | {"direction": difference.direction}
