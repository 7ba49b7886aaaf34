"""Compare runs sample by sample: never a bare difference.

For each metric of `eaptk.metrics` (and for the loss, which is shown beside because confidence alone moves
gradients) there are both values, the difference, a paired bootstrap interval, a paired permutation p-value,
Holm's correction over all metrics and runs, and an effect size.

Which samples make a pair is said in `eaptk.pairing`; how intervals, p-values and effect sizes are made, and
what "at equal loss" means, in `eaptk.resampling`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.metrics import METRICS, Metrics, agreed_histogram, measure, stored_places
from eaptk.pairing import PairedRun, pair, run_names, shared_columns
from eaptk.resampling import (
    AT_EQUAL_LOSS,
    Contributions,
    Difference,
    Resampling,
    differences_at_equal_loss,
    holm,
    paired_differences,
)
from eaptk.store import opened
from eaptk.sweep import Doubles, sweep

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

#: Metrics defined for any sample, and those only for samples whose scores are not all equal.
_EVERYWHERE = ("intensity", "complexity", "loss")
_WHERE_VARYING = ("kurtosis", "diversity")

#: Edges weaker than this share of the strongest are rounding; how they change is no finding.
NOISE = 1e-4

#: With fewer independent groups a note says how little they can show.
_FEW_GROUPS = 10

_DEFAULT_RESAMPLING = Resampling()


@dataclass(frozen=True)
class Comparison:
    """Two or more runs on the samples they share; the first is the baseline.

    Args:
        names: [k] of the runs.
        graph: theirs.
        metrics: [k], each run's on the shared samples, all with one histogram range.
        ablation: theirs.
        differences: for each run but the first, each metric, after it the same metric at equal loss if that
            was asked for, and the loss. A metric that is undefined for want of two samples whose scores
            vary is left out, and so is diversity where a run keeps no rows, or each sample's strongest edges alone:
            without each sample's correlation there is neither interval nor test.
        sample_ids: [n] of the shared samples.
        n_dropped: [k], finished samples of each run that others lack.
        n_unfinished: [k], samples of each run that are not done.
        resampling: how intervals and p-values were made.
        notes: what a reader must know to trust the numbers, a sentence each.
    """

    names: tuple[str, ...]
    graph: Graph = field(repr=False)
    ablation: str
    metrics: tuple[Metrics, ...] = field(repr=False)
    differences: tuple[Difference, ...]
    sample_ids: tuple[str, ...] = field(repr=False)
    n_dropped: tuple[int, ...]
    n_unfinished: tuple[int, ...]
    resampling: Resampling
    notes: tuple[str, ...]

    def relative_change(self, run: int = 1) -> Doubles:
        """[e]: `relative_change` of each edge of a run against the baseline.

        NaN as well for edges that are 0 by identity and hold nothing but rounding and the norm's ε: a
        destination that reads the input alone (a0) reads it through a norm that ignores its scale, so scaling
        the input away (zero ablation) changes nothing there to first order.
        """
        change = relative_change(self.metrics[0].strength, self.metrics[run].strength)
        if self.ablation == "zero":
            destinations = self.graph.edge_destination[self.metrics[0].columns]
            change[self.graph.reach[destinations] == 1] = np.nan
        return change

    def sample_size(self) -> str:
        """In words: how many pairs, and of how many groups if those are fewer."""
        n, n_groups = len(self.sample_ids), self.differences[0].n_groups
        return f"{n:,} pairs" + (f" in {n_groups:,} groups" if n_groups < n else "")

    def to_frame(self) -> pandas.DataFrame:
        """One row a difference: the fields of `Difference` and its direction."""
        import pandas

        rows = [_plain(difference) for difference in self.differences]
        return pandas.DataFrame(rows)

    def edges_frame(self) -> pandas.DataFrame:
        """One row an edge: the graph's columns, mean |W| of each run, relative change of each but the first."""
        frame = self.graph.to_frame(self.metrics[0].columns)
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
            "ablation": self.ablation,
            "resampling": asdict(self.resampling),
            "notes": list(self.notes),
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
            paths[1].write_text(
                json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            self.edges_frame().to_parquet(paths[2], index=False)
        except OSError as error:
            raise EaptkError(f"cannot write the comparison to {folder}: {error.strerror}") from error
        return paths

    def to_table(self) -> Table:
        """For the terminal (rich)."""
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        names = [escape(name) for name in self.names]
        dropped = sum(self.n_dropped) + sum(self.n_unfinished)
        several = len(names) > 2
        controlled = any(d.metric.endswith(AT_EQUAL_LOSS) for d in self.differences)
        pairs = [
            f"{d.n_pairs:,}" + (f" in {d.n_groups:,}" if d.n_groups < d.n_pairs else "")
            for d in self.differences
        ]
        # One number for all rows stands in the title; a column for it would not fit 80 characters.
        uneven = len(set(pairs)) > 1
        first = self.metrics[0]
        caption = (
            f"complexity: {first.bins:,} bins up to {first.upper:.3g}; "
            f"intervals: paired bootstrap, {self.resampling.confidence:.0%}; p: paired permutation, "
            f"Holm-corrected over metrics (not for the loss, which is shown beside); d_z: paired effect size; "
            f"?: not resolved after correction"
            + ("; eq. loss: the metric above at equal loss" if controlled else "")
        )
        table = Table(
            title=f"{' and '.join(names[1:])} against {names[0]}: {self.sample_size()}"
            + (", zeros counted" if first.dense else "")
            + (f" ({dropped:,} samples without a finished partner left out)" if dropped else ""),
            title_justify="left",
            caption="\n".join([caption, *(escape(f"note: {note}") for note in self.notes)]),
            caption_justify="left",
            # Narrow enough that no number is cut short on a terminal of 80 columns.
            box=SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        table.add_column("metric", overflow="ellipsis", no_wrap=True)
        value = "value" if several else names[1]
        headings = (names[0], value, "difference", "interval", "p", "d_z", *(["pairs"] if uneven else []))
        for heading in headings:
            table.add_column(heading, justify="right", overflow="fold")
        arrow = {"up": "↑", "down": "↓", "unresolved": "?"}
        for i, (d, n_pairs) in enumerate(zip(self.differences, pairs, strict=True)):
            if several and (i == 0 or self.differences[i - 1].run != d.run):
                table.add_row(escape(d.run), style="bold")
            table.add_row(
                "↳ eq. loss" if d.metric.endswith(AT_EQUAL_LOSS) else d.metric,
                f"{d.value_baseline:.3g}",
                f"{d.value:.3g}",
                f"{arrow[d.direction]} {d.difference:+.3g}",
                "–" if d.low is None or d.high is None else escape(f"[{d.low:+.3g}, {d.high:+.3g}]"),
                f"{d.p if d.p_holm is None else d.p_holm:.2g}",
                "–" if d.effect is None else f"{d.effect:+.2f}",
                *([n_pairs] if uneven else []),
                end_section=d.metric == "loss",
            )
        return table


def relative_change(baseline: npt.ArrayLike, strength: npt.ArrayLike) -> Doubles:
    """(strength − baseline) / baseline of each edge; both [e] mean |W|.

    NaN where either is, where the baseline is 0, and where both are below `NOISE` (1e-4) times the largest strength
    in either: there a change is one of rounding.
    """
    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(strength, dtype=np.float64)
    stronger = np.maximum(a, b)
    counts = (a > 0) & (stronger >= NOISE * np.fmax.reduce(stronger, initial=0))
    return np.divide(b - a, a, out=np.full(a.shape, np.nan), where=counts)


def compare(
    runs: Sequence[PairedRun | str | os.PathLike[str]],
    *,
    names: Sequence[str] | None = None,
    ids: Collection[str] | None = None,
    columns: npt.ArrayLike | None = None,
    dense: bool = False,
    bins: int | None = None,
    upper: float | None = None,
    log_base: float = math.e,
    resampling: Resampling = _DEFAULT_RESAMPLING,
    control_loss: bool = False,
) -> Comparison:
    """Compare runs on the samples that are done in all of them.

    Args:
        runs: two or more, or their directories; the first is the baseline.
        names: of the runs; default: their folders'.
        ids: compare only these samples; None for all.
        columns: as for `eaptk.metrics.measure`; None for all edges that every run kept.
        dense, bins, upper, log_base: as for `eaptk.metrics.measure`; `upper` None for the largest
            |W| in any of the runs, or for the range that a run without rows was scored with.
        resampling: see there.
        control_loss: also report intensity and kurtosis at equal loss (see `eaptk.resampling`), corrected
            together with the others.

    Raises:
        EaptkError: runs or their samples do not compare (see `eaptk.pairing.pair`), `names` do not fit them,
            `measure` cannot measure one, or the loss differs alike in all pairs and is to be controlled for.
    """
    if len(runs) < 2:
        raise EaptkError(f"a comparison needs at least two runs; got {len(runs)}")
    paired: list[PairedRun] = [opened(run) for run in runs]
    names = run_names(paired, names)
    pairing = pair(paired, names, ids)
    rows, groups = pairing.rows, pairing.groups
    columns, kept_note = shared_columns(paired, columns)
    bins, upper = agreed_histogram(paired, bins, upper)
    if upper is None:
        tops = [
            sweep(run.scores, index, stored_places(run, columns)).max_abs.max()
            for run, index in zip(paired, rows, strict=True)
        ]
        upper = float(max(tops)) or None
    options: dict[str, Any] = {
        "columns": columns,
        "dense": dense,
        "bins": bins,
        "upper": upper,
        "log_base": log_base,
    }
    metrics = tuple(measure(run, rows=index, **options) for run, index in zip(paired, rows, strict=True))

    # Kurtosis and correlations exist only where scores vary, and compare only over the same samples.
    varies = ~np.isnan(sum(m.sample_kurtosis for m in metrics))
    varying: Sequence[Metrics | None] = metrics
    if not varies.all():
        varying = [
            measure(run, rows=index[varies], **options) if varies.sum() >= 2 else None
            for run, index in zip(paired, rows, strict=True)
        ]
    sides = [
        _contributions(m, v, varies, np.asarray(run.loss)[index])
        for m, v, run, index in zip(metrics, varying, paired, rows, strict=True)
    ]
    differences: list[Difference] = []
    for name, side in zip(names[1:], sides[1:], strict=True):
        pair_names = (names[0], name)
        where_varying = [m for m in _WHERE_VARYING if m in sides[0].metrics and m in side.metrics]
        everywhere = _EVERYWHERE if not varies.all() else (*_EVERYWHERE, *where_varying)
        found = paired_differences(everywhere, pair_names, sides[0], side, groups, log_base, resampling)
        kept = (sides[0].keep(varies), side.keep(varies), groups[varies])
        enough = len(np.unique(groups[varies])) >= 2
        if not varies.all() and enough:
            found += paired_differences(where_varying, pair_names, *kept, log_base, resampling)
        if control_loss:
            found.append(
                differences_at_equal_loss("intensity", pair_names, sides[0], side, groups, resampling)
            )
            if enough:
                found.append(differences_at_equal_loss("kurtosis", pair_names, *kept, resampling))
        differences += sorted(
            found, key=lambda d: (*METRICS, "loss").index(d.metric.removesuffix(AT_EQUAL_LOSS))
        )
    finished = [int((np.asarray(run.done) == 1).sum()) for run in paired]
    return Comparison(
        names=names,
        graph=paired[0].graph,
        ablation=paired[0].manifest["ablation"],
        metrics=metrics,
        differences=holm(differences),
        sample_ids=pairing.ids,
        n_dropped=pairing.n_dropped,
        n_unfinished=tuple(len(run.done) - count for run, count in zip(paired, finished, strict=True)),
        resampling=resampling,
        notes=(
            *pairing.notes,
            *kept_note,
            *_notes(pairing.n_groups, names, sides if control_loss else []),
            *_notes_without_rows(paired, names, metrics, varying),
            *_notes_on_range(names, metrics),
        ),
    )


def _notes(n_groups: int, names: Sequence[str], controlled: Sequence[Contributions]) -> list[str]:
    notes = []
    if n_groups < _FEW_GROUPS:
        notes.append(
            f"only {n_groups} independent groups: intervals are rough, and no p can be below "
            f"{2 / 2**n_groups:.2g} before correction"
        )
    for name, side in zip(names[1:], controlled[1:], strict=False):
        change = side.metrics["loss"] - controlled[0].metrics["loss"]
        if change.min() > 0 or change.max() < 0:
            notes.append(
                f"every loss of {name} is {'above' if change.min() > 0 else 'below'} that of {names[0]}: "
                f"values at equal loss are extrapolated"
            )
    return notes


def _notes_without_rows(
    runs: Sequence[PairedRun],
    names: Sequence[str],
    metrics: Sequence[Metrics],
    varying: Sequence[Metrics | None],
) -> list[str]:
    if runs[0].top_columns is not None:
        return [
            f"each sample kept its {runs[0].top_columns.shape[1]:,} strongest edges: metrics are of these alone, there "
            f"is no diversity, and mean |W| is known of edges that every sample kept"
        ]
    without = [name for run, name in zip(runs, names, strict=True) if run.histogram is not None]
    if not without:
        return []
    values = ", ".join(
        f"{name} {'unknown' if m is None or m.diversity is None else format(m.diversity, '.4g')}"
        for name, m in zip(names, varying, strict=True)
    )
    notes = [
        f"{', '.join(without)} kept no rows: diversity has neither interval nor test there; values: {values}"
    ]
    partial = [name for name, m in zip(names, metrics, strict=True) if np.isnan(m.strength).any()]
    if partial:
        notes.append(
            f"{', '.join(partial)} kept no rows and has finished samples that are not shared: mean |W| of edges "
            f"over the shared ones is unknown"
        )
    return notes


def _notes_on_range(names: Sequence[str], metrics: Sequence[Metrics]) -> list[str]:
    return [
        f"complexity leaves out the {m.n_above:,} scores of {name} whose |W| is above the range's end, {m.upper:.3g}"
        for name, m in zip(names, metrics, strict=True)
        if m.n_above
    ]


def _contributions(
    metrics: Metrics, varying: Metrics | None, varies: npt.NDArray[np.bool_], loss: Doubles
) -> Contributions:
    """First-order contributions: of the entropy at the pooled histogram, of the U-statistic its projection.

    Diversity is left out where a run without rows gives none of the latter.

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
    if varying is not None:
        kurtosis[varies] = varying.sample_kurtosis
    if varying is not None and varying.diversity is not None:
        diversity[varies] = 2 - varying.diversity - 2 * varying.sample_correlation
    by_metric = {
        "intensity": metrics.sample_intensity,
        "complexity": metrics.sample_histogram @ surprise / total.mean(),
        "kurtosis": kurtosis,
        "diversity": diversity,
        "loss": loss,
    }
    if varying is not None and np.isnan(varying.sample_correlation).all():
        del by_metric["diversity"]
    return Contributions(by_metric, metrics.sample_histogram)


def _plain(difference: Difference) -> dict[str, Any]:
    return asdict(difference) | {"direction": difference.direction}
