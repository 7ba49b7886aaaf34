"""Tables of a study: what its report says in numbers, once, for HTML and Markdown alike.

A difference is shown relative to the baseline's value, (value − baseline) / baseline, and its interval on the
same scale; where the baseline is not positive (excess kurtosis may be negative) it is shown as it is. An arrow
stands only where a difference is resolved: one family's after correction over the whole study (see
`eaptk.resampling`), the mean of several by its interval for new seeds (see `eaptk.replicates`).
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from eaptk.experiment import Experiment, StudyResults
from eaptk.replicates import Convention, Replicated, across
from eaptk.resampling import Difference

if TYPE_CHECKING:
    import pandas

Direction = Literal["", "up", "down", "unresolved"]
#: A heading, and the metric and the convention below it.
_Column = tuple[str, str, Convention]
_CONVENTIONS: tuple[Convention, ...] = ("real", "dense")

ARROWS: dict[Direction, str] = {"": "", "up": "↑", "down": "↓", "unresolved": "?"}


@dataclass(frozen=True)
class Cell:
    """What stands in a table: a text, small print a line each, and the direction it is coloured by."""

    text: str = ""
    small: tuple[str, ...] = ()
    direction: Direction = ""


@dataclass(frozen=True)
class StudyTable:
    """A table. The first cell of a row is its heading.

    Args:
        title: above it.
        head: a heading a column.
        rows: cells, as many as `head`.
        kinds: of each row: ``summary`` of the ``member`` rows below it, or ``""``.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    kinds: tuple[Literal["", "summary", "member"], ...] = ()

    def to_html(self) -> str:
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.head)
        body = []
        for row, kind in zip(self.rows, self.kinds or ("",) * len(self.rows), strict=True):
            cells = [f'<th scope="row">{_html_cell(row[0])}</th>']
            cells += [f'<td class="{_html_class(cell)}">{_html_cell(cell)}</td>' for cell in row[1:]]
            body.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return (
            f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n'
            + "\n".join(body)
            + "\n</tbody></table></div>"
        )

    def to_markdown(self) -> str:
        kinds = self.kinds or ("",) * len(self.rows)
        rows = [
            [("&emsp;" if kind == "member" else "") + _markdown_cell(row[0]), *map(_markdown_cell, row[1:])]
            for row, kind in zip(self.rows, kinds, strict=True)
        ]
        lines = [[markdown(name) for name in self.head], ["---"] * len(self.head), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{markdown(self.title)}**\n\n{table}" if self.title else table


@dataclass(frozen=True)
class Line:
    """One run of one experiment against its baseline: of a series only the last, else each.

    Args:
        label: the family, and the run where the experiment has several.
        run: its name.
        group: what lines are grouped by: the method, and likewise the run's place.
        real, dense: its differences by metric, in either convention.
    """

    label: str
    run: str
    group: tuple[str, tuple[str, float] | None]
    experiment: Experiment
    real: dict[str, Difference]
    dense: dict[str, Difference]


def lines(experiments: Iterable[Experiment]) -> list[Line]:
    """Every line of the headline, in the order of the experiments."""
    found = []
    for experiment in experiments:
        runs = experiment.names[1:] if experiment.steps is None else experiment.names[-1:]
        for run in runs:
            several = len(runs) > 1
            found.append(
                Line(
                    f"{experiment.family}: {run}" if several else experiment.family,
                    run,
                    (experiment.method, experiment.place(run) if several else None),
                    experiment,
                    {d.metric: d for d in experiment.real.differences if d.run == run},
                    {d.metric: d for d in experiment.dense.differences if d.run == run},
                )
            )
    return found


def grouped(found: Iterable[Line], key: Callable[[Line], Any]) -> dict[Any, list[Line]]:
    """Lines by a key, in the order in which keys first appear."""
    groups: dict[Any, list[Line]] = {}
    for line in found:
        groups.setdefault(key(line), []).append(line)
    return groups


def relative(d: Difference) -> tuple[float, float | None, float | None] | None:
    """Difference and interval over the baseline's value; None where that is not positive."""
    if d.value_baseline <= 0:
        return None
    low, high = (None if end is None else end / d.value_baseline for end in (d.low, d.high))
    return d.difference / d.value_baseline, low, high


def glance(results: StudyResults) -> list[StudyTable]:
    """A table a dataset: metrics and α down, methods across; the mean over a method's families."""
    tables = []
    replicates = _replicates(results)
    for dataset, found in grouped(lines(results.experiments), lambda line: line.experiment.dataset).items():
        groups = grouped(found, lambda line: line.group)
        alphas = grouped(found, lambda line: line.experiment.alpha)
        rows = []
        for metric in _metrics(found):
            for alpha, members in alphas.items():
                cells = [
                    _summary([m for m in members if m.group == group], metric, "real", replicates)
                    for group in groups
                ]
                short = (replace(cell, small=(" ".join(cell.small),)) for cell in cells)
                rows.append((Cell(metric), Cell(f"{alpha:g}"), *short))
        tables.append(StudyTable(dataset, ("metric", "α", *map(_group_label, groups.values())), tuple(rows)))
    return tables


def headline(results: StudyResults) -> list[StudyTable]:
    """A table a dataset and α: families by method down, metrics across, over real edges."""
    return _by_family(results, lambda found: [(name, name, "real") for name in _metrics(found)])


def conventions(results: StudyResults) -> list[StudyTable]:
    """The same with both conventions side by side; the loss knows none."""

    def columns(found: Sequence[Line]) -> list[_Column]:
        metrics = [name for name in _metrics(found) if any(name in line.dense for line in found)]
        return [
            (f"{name}, {side}", name, side) for name in metrics if name != "loss" for side in _CONVENTIONS
        ]

    return _by_family(results, columns)


def funnels(results: StudyResults) -> list[StudyTable]:
    """How questions were selected: a row for each funnel that differs within its family and dataset."""
    tables: dict[tuple[str, tuple[str, ...]], dict[tuple[Cell, ...], list[Experiment]]] = {}
    for experiment in results.experiments:
        names = tuple(stage.name for stage in experiment.funnel)
        right = " · ".join(
            f"{name} {share:.1%}" for name, share in zip(experiment.names, experiment.accuracy, strict=True)
        )
        start = experiment.funnel[0].n_in if experiment.funnel else 0
        stages = [
            Cell(f"{stage.n_out:,}", (f"−{stage.n_in - stage.n_out:,}",) if stage.n_out < stage.n_in else ())
            for stage in experiment.funnel
        ]
        row = (Cell(experiment.family), Cell(right), Cell(f"{start:,}"), *stages)
        tables.setdefault((experiment.dataset, names), {}).setdefault(row, []).append(experiment)
    found = []
    for (dataset, names), rows in tables.items():
        families = [row[0].text for row in rows]
        labelled = tuple(
            (_with_alphas(row[0], members) if families.count(row[0].text) > 1 else row[0], *row[1:])
            for row, members in rows.items()
        )
        found.append(StudyTable(dataset, ("family", "answered right", "asked", *names), labelled))
    return found


def reasons(results: StudyResults) -> dict[str, list[str]]:
    """Why questions left, each reason once, by the stage at which any did."""
    found: dict[str, list[str]] = {}
    for stage in (stage for experiment in results.experiments for stage in experiment.funnel):
        if stage.n_out < stage.n_in and stage.why not in found.setdefault(stage.name, []):
            found[stage.name].append(stage.why)
    return found


def notes(results: StudyResults) -> list[tuple[str, list[str]]]:
    """What a reader must know to trust the numbers, and the experiments each note is about."""
    found: dict[str, list[str]] = {}
    for experiment in results.experiments:
        for note in dict.fromkeys((*experiment.real.notes, *experiment.dense.notes)):
            found.setdefault(note, []).append(label(experiment))
    return list(found.items())


def validations(results: StudyResults) -> StudyTable | None:
    """First-order scores against exact ablation; None where no experiment has any."""
    head = ("experiment", "model", "edges × samples", "Pearson", "Spearman", "slope", "same sign")
    rows = tuple(
        (
            Cell(label(experiment)),
            Cell(v.model),
            Cell(f"{v.n_edges:,} × {v.n_samples:,}"),
            Cell(f"{v.pearson:.3f}"),
            Cell(f"{v.spearman:.3f}"),
            Cell(f"{v.slope:.3f}"),
            Cell(f"{v.sign_agreement:.1%}"),
        )
        for experiment in results.experiments
        for v in experiment.validation
    )
    return StudyTable("", head, rows) if rows else None


def facts_table(facts: dict[str, Any]) -> StudyTable:
    """Provenance, a fact a row."""
    rows = tuple((Cell(str(name)), Cell(_plain(value))) for name, value in facts.items())
    return StudyTable("", ("fact", "value"), rows)


def all_differences(results: StudyResults) -> pandas.DataFrame:
    """Every difference of every experiment in both conventions, a row each."""
    import pandas

    frames = []
    for experiment in results.experiments:
        for convention in _CONVENTIONS:
            frame = getattr(experiment, convention).to_frame()
            for name in ("family", "method", "dataset", "alpha"):
                frame[name] = getattr(experiment, name)
            frame["convention"] = convention
            # Where it was measured comes first.
            frames.append(frame[[*frame.columns[-5:], *frame.columns[:-5]]])
    return pandas.concat(frames, ignore_index=True)


def label(experiment: Experiment) -> str:
    """An experiment in words."""
    return f"{experiment.family}, {experiment.dataset}, α = {experiment.alpha:g}"


def markdown(text: str) -> str:
    """Text that Markdown shows to the letter."""
    return re.sub(r"([\\`*_{}\[\]<>|~#$&])", r"\\\1", " ".join(text.split()))


def percent(share: float) -> str:
    """A signed share in per cent, three digits of it."""
    return f"{100 * share:+,.0f}%" if abs(share) >= 9.995 else f"{100 * share:+.3g}%"


def _by_family(results: StudyResults, columns: Callable[[Sequence[Line]], list[_Column]]) -> list[StudyTable]:
    tables = []
    replicates = _replicates(results)
    places = grouped(
        lines(results.experiments), lambda line: (line.experiment.dataset, line.experiment.alpha)
    )
    for (dataset, alpha), found in places.items():
        shown = columns(found)
        rows: list[tuple[Cell, ...]] = []
        kinds: list[Literal["", "summary", "member"]] = []
        for members in grouped(found, lambda line: line.group).values():
            if len(members) > 1:
                cells = [_summary(members, metric, side, replicates) for _, metric, side in shown]
                rows.append((Cell(_group_label(members), (f"mean of {len(members)}",)), *cells))
                kinds.append("summary")
            for member in members:
                comparison = member.experiment.real
                small = (comparison.sample_size(), f"cut {member.experiment.cut}")
                cells = [_difference(getattr(member, side).get(metric)) for _, metric, side in shown]
                rows.append((Cell(member.label, small), *cells))
                kinds.append("member" if len(members) > 1 else "")
        head = ("family", *(heading for heading, _, _ in shown))
        tables.append(StudyTable(f"{dataset}, α = {alpha:g}", head, tuple(rows), tuple(kinds)))
    return tables


def _group_label(members: Sequence[Line]) -> str:
    """The method, and the run where there are several; replicates may each have named it."""
    method, place = members[0].group
    return method if place is None else f"{method}: {', '.join(dict.fromkeys(m.run for m in members))}"


def _metrics(found: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(metric for line in found for metric in line.real))


def _replicates(results: StudyResults) -> dict[tuple[Any, ...], Replicated]:
    """Every mean over families, by where it was measured and of which families."""
    return {
        (r.families, r.dataset, r.alpha, r.place, r.convention, r.metric): r
        for r in across(results.experiments)
    }


def _summary(
    members: Sequence[Line], metric: str, side: Convention, replicates: dict[tuple[Any, ...], Replicated]
) -> Cell:
    """The mean over several families, its interval for new seeds, and how many are resolved which way."""
    differences = [d for m in members if (d := getattr(m, side).get(metric)) is not None]
    if len(differences) < 2:
        return _difference(differences[0] if differences else None, brief=True)
    families = tuple(m.experiment.family for m in members if metric in getattr(m, side))
    first, places = members[0].experiment, {m.experiment.place(m.run) for m in members}
    mean = None
    if len(places) == 1:
        mean = replicates.get((families, first.dataset, first.alpha, *places, side, metric))
    directions = [d.direction for d in differences]
    counts = " ".join(
        f"{directions.count(which)}{ARROWS[which]}"
        for which in ("up", "down", "unresolved")
        if which in directions
    )
    if mean is None:  # of series that do not end at the same step
        return Cell("–", (counts,))
    baselines = [d.value_baseline for d in mean.differences]
    scale = sum(baselines) / len(baselines) if min(baselines) > 0 else None
    interval = _interval(mean.low, mean.high, scale)
    return Cell(f"{ARROWS[mean.direction]} {_size(mean.mean, scale)}", (interval, counts), mean.direction)


def _difference(d: Difference | None, brief: bool = False) -> Cell:
    if d is None:
        return Cell("–")
    scale = d.value_baseline if d.value_baseline > 0 else None
    small = [_interval(d.low, d.high, scale)]
    if not brief:
        effect = "" if d.effect is None else f"d {d.effect:+.2f}, "
        p = f"p {d.p:.2g}" if d.p_holm is None else f"Holm {d.p_holm:.2g}"
        small += [f"{d.value_baseline:.3g} → {d.value:.3g}", effect + p]
    return Cell(f"{ARROWS[d.direction]} {_size(d.difference, scale)}", tuple(small), d.direction)


def _size(difference: float, scale: float | None) -> str:
    return f"{difference:+.3g}" if scale is None else percent(difference / scale)


def _interval(low: float | None, high: float | None, scale: float | None) -> str:
    if low is None or high is None:
        return "no interval"
    return f"[{_size(low, scale)}, {_size(high, scale)}]"


def _with_alphas(cell: Cell, members: Sequence[Experiment]) -> Cell:
    return Cell(cell.text, (f"α = {', '.join(f'{m.alpha:g}' for m in members)}",))


def _plain(value: Any) -> str:
    """A JSON value in words."""
    if isinstance(value, dict):
        return "; ".join(
            f"{name} ({_plain(each)})" if isinstance(each, dict) else f"{name}: {_plain(each)}"
            for name, each in value.items()
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return "none" if value is None else str(value)


def _html_class(cell: Cell) -> str:
    """What is longer than a line of a column of numbers may break."""
    return cell.direction or ("long" if max(map(len, (cell.text, *cell.small))) > 40 else "")


def _html_cell(cell: Cell) -> str:
    return html.escape(cell.text) + "".join(f"<small>{html.escape(line)}</small>" for line in cell.small)


def _markdown_cell(cell: Cell) -> str:
    return "<br>".join(map(markdown, (cell.text, *cell.small)))
