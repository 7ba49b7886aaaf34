"""Pictures of a study (matplotlib): small multiples of what `eaptk.figures` draws of one comparison, and more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eaptk.experiment import Experiment, StudyResults
from eaptk.figures import (
    COLOURS,
    INK,
    STYLE,
    asinh_axes,
    change_bar,
    change_limit,
    change_panel,
    edge_matrix,
    grey_means,
    ink_on,
    minus,
    node_ticks,
    strength_bar,
    strength_panel,
    strength_scale,
)
from eaptk.metrics import METRICS
from eaptk.resampling import AT_EQUAL_LOSS, Difference
from eaptk.study_tables import Line, grouped, lines, percent, relative
from eaptk.sweep import Doubles

Section = Literal[
    "metrics", "edges", "diversity", "entropy", "lengths", "sensitivity", "validation", "training"
]

#: Models in order, the baseline first; a series takes its colours from a scale instead.
_MODELS = ("#5b6770", "#d1662b", "#3a7d44", "#7b4fa3", "#b8860b")
#: Panels side by side that still read well on a page.
_ACROSS = 4


@dataclass(frozen=True)
class StudyFigure:
    """One picture, the part of the report it belongs to, a stem for its files and what it shows, in words."""

    section: Section
    stem: str
    caption: str
    figure: Figure


def study_figures(results: StudyResults) -> Iterator[StudyFigure]:
    """Every picture of a study, one at a time; a part for which nothing was measured has none."""
    for dataset, found in grouped(lines(results.experiments), lambda line: line.experiment.dataset).items():
        for section, caption, draw in (
            ("diversity", _DIVERSITY_CAPTION, _diversity_figure),
            ("lengths", _LENGTHS_CAPTION, _lengths_figure),
            ("sensitivity", _SENSITIVITY_CAPTION, _sensitivity_figure),
        ):
            yield from _figure(section, dataset, caption, draw, found)  # type: ignore[arg-type]
        ends = {metric: _ends(found, metric) for metric in METRICS}
        for alpha, members in grouped(found, lambda line: line.experiment.alpha).items():
            name = f"{dataset}, α = {alpha:g}"
            forest = partial(_metrics_figure, ends)
            yield from _figure("metrics", name, _METRICS_CAPTION, forest, members)
            yield from _figure("validation", name, _VALIDATION_CAPTION, _validation_figure, members)
        for family, members in grouped(found, lambda line: line.experiment.family).items():
            name = f"{family}, {dataset}"
            yield from _figure("edges", name, _EDGES_CAPTION, _edges_figure, members)
            yield from _figure("entropy", name, _ENTROPY_CAPTION, _entropy_figure, members)
            if members[0].experiment.steps is not None:
                yield from _figure("training", name, _TRAINING_CAPTION, _training_figure, members)


def _figure(
    section: Section, name: str, caption: str, draw: Callable[[list[Line]], Figure | None], found: list[Line]
) -> Iterator[StudyFigure]:
    with matplotlib.rc_context(STYLE):
        figure = draw(found)
    if figure is not None:
        yield StudyFigure(section, slug(f"{section} {name}"), f"{name}: {caption}", figure)


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^0-9a-z.]+", "-", name.lower().replace("α = ", "alpha ")).strip("-.")


_METRICS_CAPTION = (
    "difference of each metric to the baseline, as a share of the baseline's value, with paired bootstrap "
    "intervals; open circles: the same at equal loss; grey: not resolved after correction"
)


def _metrics_figure(ends: dict[str, tuple[float, float]], members: list[Line]) -> Figure | None:
    """A forest: a panel for each metric, families down, on axes that all α share."""
    figure = Figure(figsize=(11, 0.7 + 0.22 * len(members)), layout="constrained")
    panels = figure.subplots(1, len(METRICS))
    for axes, metric in zip(panels, METRICS, strict=True):
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        for y, line in enumerate(members):
            _whisker(axes, line.real.get(metric), y, filled=True)
            _whisker(axes, line.real.get(metric + AT_EQUAL_LOSS), y + 0.32, filled=False)
        _families(axes, members, axes is panels[0])
        axes.set_xlim(ends[metric])
        axes.xaxis.set_major_formatter(lambda value, _: minus(percent(value)) if value else "0")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(metric)
    return figure


def _ends(found: Sequence[Line], metric: str) -> tuple[float, float]:
    """Where an axis begins and ends that holds every interval of a metric, and 0."""
    names = (metric, metric + AT_EQUAL_LOSS)
    shares = [relative(line.real[name]) for line in found for name in names if name in line.real]
    reached = [0.0, *(end for share in shares if share is not None for end in share if end is not None)]
    low, high = min(reached), max(reached)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _whisker(axes: Axes, d: Difference | None, y: float, filled: bool) -> None:
    share = None if d is None else relative(d)
    if d is None or share is None:
        return
    value, low, high = share
    colour = COLOURS[d.direction]
    if low is not None and high is not None:
        width = 2 if filled else 1
        axes.plot([low, high], [y, y], color=colour, linewidth=width, solid_capstyle="butt", zorder=2)
    face = colour if filled else "white"
    axes.plot(value, y, "o", color=colour, markerfacecolor=face, markersize=4.5 if filled else 3.5, zorder=3)


def _families(axes: Axes, members: Sequence[Line], named: bool) -> None:
    """Families down the y axis, a rule between methods."""
    axes.set_ylim(len(members) - 0.3, -0.7)
    axes.set_yticks(
        range(len(members)),
        [line.label for line in members] if named else [""] * len(members),
        parse_math=False,
        fontsize=8,
    )
    for y in range(1, len(members)):
        if members[y].group != members[y - 1].group:
            axes.axhline(y - 0.42, color="#d8d8de", linewidth=0.8, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", length=2, labelsize=8)
    _bare(axes)


_DIVERSITY_CAPTION = (
    "cross-sample diversity of each experiment, from the baseline (open) to the model (filled); "
    "grey: not resolved after correction"
)


def _diversity_figure(found: list[Line]) -> Figure | None:
    found = [line for line in found if "diversity" in line.real]
    if not found:
        return None
    alphas = grouped(found, lambda line: line.experiment.alpha)
    tallest = max(map(len, alphas.values()))
    figure = Figure(figsize=(1.6 + 2.4 * len(alphas), 1.1 + 0.22 * tallest), layout="constrained")
    panels = figure.subplots(1, len(alphas), squeeze=False, sharex=True)[0]
    for axes, (alpha, members) in zip(panels, alphas.items(), strict=True):
        for y, line in enumerate(members):
            d = line.real["diversity"]
            colour = COLOURS[d.direction]
            axes.plot([d.value_baseline, d.value], [y, y], color=colour, linewidth=1.6, zorder=2)
            axes.plot(d.value_baseline, y, "o", color=colour, markerfacecolor="white", markersize=5, zorder=3)
            axes.plot(d.value, y, "o", color=colour, markersize=5, zorder=3)
        same = [m.label for m in members] == [m.label for m in next(iter(alphas.values()))]
        _families(axes, members, axes is panels[0] or not same)
        axes.set_title(f"α = {alpha:g}")
        axes.set_xlabel("diversity", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure


_LENGTHS_CAPTION = (
    "tokens of the answers to questions that every model answered right, before the filters on length; "
    "filled: the baseline; "
    "dashed: where answers are cut, for each α"
)


def _lengths_figure(found: list[Line]) -> Figure | None:
    families = grouped(found, lambda line: line.experiment.family)
    families = {f: members for f, members in families.items() if any(members[0].experiment.lengths)}
    if not families:
        return None
    figure, panels = _grid(len(families), (2.75, 2.0))
    for axes, (family, members) in zip(panels, families.items(), strict=True):
        experiment = members[0].experiment
        longest = max(max(lengths, default=1) for lengths in experiment.lengths)
        bins = np.arange(0, longest + 2, max(1, -(-longest // 30))) - 0.5
        for name, lengths, colour in zip(
            experiment.names, experiment.lengths, _model_colours(experiment), strict=True
        ):
            # The baseline is an area, the others lines: where they are alike both are seen.
            style: dict[str, Any] = {"histtype": "step", "linewidth": 1.4}
            if name == experiment.names[0]:
                style = {"histtype": "stepfilled", "alpha": 0.45}
            axes.hist(lengths, bins=list(bins), color=colour, label=_text(name), **style)
        for member in members:
            axes.axvline(
                member.experiment.cut, color="#a0a0a8", linewidth=0.7, linestyle=(0, (4, 3)), zorder=0
            )
        axes.set_title(family, fontsize=9, parse_math=False)
        axes.set_xlim(0, 1.03 * bins[-1])
        # Room for the names above the bars.
        axes.set_ylim(0, axes.get_ylim()[1] * (1.2 + 0.12 * min(len(experiment.names), 3)))
        axes.set_xlabel("tokens of an answer", fontsize=8)
        axes.set_ylabel("answers", fontsize=8)
        axes.tick_params(length=2, labelsize=8)
        _legend(axes, experiment)
        _bare(axes, left=True)
    return figure


_SENSITIVITY_CAPTION = (
    "difference of the complexity to the baseline, as a share of the baseline's, under other histograms: "
    "bins, and range as a share of the widest"
)


def _sensitivity_figure(found: list[Line]) -> Figure | None:
    found = [line for line in found if line.experiment.sensitivity]
    if not found:
        return None
    alphas = grouped(found, lambda line: line.experiment.alpha)
    settings = max(len(line.experiment.sensitivity) for line in found)
    tallest = max(map(len, alphas.values()))
    across = max(1, min(len(alphas), 2 if settings <= 12 else 1))
    figure, panels = _grid(len(alphas), (1.9 + 0.37 * settings, 1.0 + 0.24 * tallest), across)
    tables = [np.stack([_complexity_changes(m, settings) for m in members]) for members in alphas.values()]
    limit = change_limit(tables)
    for axes, (alpha, members), table in zip(panels, alphas.items(), tables, strict=True):
        image = axes.imshow(
            np.ma.masked_invalid(table), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto"
        )
        for (y, x), value in np.ndenumerate(table):
            if np.isfinite(value):
                ink = ink_on(image.to_rgba(value))
                axes.text(x, y, _in_percent(value), ha="center", va="center", fontsize=7, color=ink)
        rows = max((m.experiment.sensitivity for m in members), key=len)
        widest = max(row.upper for row in rows)
        names = [f"{row.bins}\n{row.upper / widest:.2g}" for row in rows]
        axes.set_xticks(range(len(names)), names, fontsize=7)
        axes.set_yticks(range(len(members)), [m.label for m in members], parse_math=False, fontsize=8)
        axes.set_title(f"α = {alpha:g}, differences in %")
        axes.set_xlabel("bins, range", fontsize=8)
        axes.tick_params(length=0)
        _bare(axes)
    return figure


def _in_percent(share: float) -> str:
    """A signed share in per cent that fits into a small cell."""
    return minus(f"{100 * share:+,.0f}" if abs(share) >= 0.9995 else f"{100 * share:+.1f}")


def _complexity_changes(line: Line, n: int) -> Doubles:
    """[n]: relative change of the complexity under each choice of histogram, NaN where the baseline's is 0."""
    changes = np.full(n, np.nan)
    k = line.experiment.names.index(next(iter(line.real.values())).run)
    for i, row in enumerate(line.experiment.sensitivity):
        if row.values[0] > 0:
            changes[i] = row.values[k] / row.values[0] - 1
    return changes


_VALIDATION_CAPTION = (
    "first-order scores of a random subset of edges against the change of the loss when each is ablated for "
    "real; both axes are linear about 0 and logarithmic beyond (asinh); dashed: equality"
)


def _validation_figure(found: list[Line]) -> Figure | None:
    experiments = _experiments(found)
    shown = [(experiment, v) for experiment in experiments for v in experiment.validation]
    if not shown:
        return None
    across = _ACROSS if len(shown) <= 2 * _ACROSS else 6
    figure, panels = _grid(len(shown), (2.4, 2.85), across)
    for k, (axes, (experiment, v)) in enumerate(zip(panels, shown, strict=True)):
        predicted, exact = np.asarray(v.predicted), np.asarray(v.exact)
        ends = asinh_axes(axes, np.concatenate([predicted, exact]))
        axes.plot(ends, ends, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.plot(predicted, exact, ".", color=_MODELS[1], markersize=4, alpha=0.6, markeredgewidth=0)
        axes.set_xlabel("first order (asinh scale)", fontsize=8)
        if k % across == 0:
            axes.set_ylabel("exact (asinh scale)", fontsize=8)
        who = [f"family {_short(experiment.family)}", f"model {_short(v.model)}"]
        title = [", ".join(who)] if sum(map(len, who)) <= 30 else who
        title.append(minus(f"r = {v.pearson:.3f}, Spearman {v.spearman:.3f}"))
        title.append(minus(f"slope {v.slope:.3f}"))
        axes.set_title("\n".join(title), fontsize=8, parse_math=False)
        axes.tick_params(length=3)
        _bare(axes, left=True)
    return figure


_EDGES_CAPTION = (
    "mean |W| of every edge, and its relative change against the baseline; sources down in order of writing, "
    "destinations across in order of reading, one colour scale for all α"
)


def _edges_figure(found: list[Line]) -> Figure | None:
    """A column for each α; rows: the baseline's strengths, then each run's and their change."""
    experiments = _experiments(found)
    first = experiments[0]
    runs = range(1, len(first.names)) if first.steps is None else [len(first.names) - 1]
    graph = first.real.graph
    figure = Figure(
        figsize=(0.9 + 3.1 * len(experiments), 0.4 + 2.75 * (1 + 2 * len(runs))), layout="constrained"
    )
    panels = figure.subplots(1 + 2 * len(runs), len(experiments), squeeze=False)
    strengths, changes = [], []
    for experiment in experiments:
        comparison = experiment.real
        columns = comparison.metrics[0].columns
        strengths.append([edge_matrix(graph, comparison.metrics[k].strength, columns) for k in (0, *runs)])
        changes.append([edge_matrix(graph, comparison.relative_change(k), columns) for k in runs])
    scale = strength_scale([matrix for each in strengths for matrix in each])
    limit = change_limit([matrix for each in changes for matrix in each])
    for x, experiment in enumerate(experiments):
        for i, k in enumerate((0, *runs)):
            title = f"{experiment.names[k]}, α = {experiment.alpha:g}"
            strength_panel(panels[i, x], graph, strengths[x][i], scale, title)
        for i, k in enumerate(runs):
            title = f"{experiment.names[0]} → {experiment.names[k]}, α = {experiment.alpha:g}"
            change_panel(panels[1 + len(runs) + i, x], graph, changes[x][i], limit, title)
    _outer_labels(panels)
    strength_bar(figure, list(panels[: 1 + len(runs)].ravel()))
    change_bar(figure, list(panels[1 + len(runs) :].ravel()), limit)
    note = grey_means(first.real.ablation)
    figure.supxlabel(note.replace("\n", " ") if len(experiments) > 1 else note, fontsize=8)
    return figure


_ENTROPY_CAPTION = (
    "output entropy of every source, how evenly its strength spreads over its outgoing edges, and below it the "
    "difference to the baseline"
)


def _entropy_figure(found: list[Line]) -> Figure | None:
    experiments = _experiments(found)
    figure = Figure(figsize=(0.7 + 3.1 * len(experiments), 4.2), layout="constrained")
    panels = figure.subplots(2, len(experiments), squeeze=False, sharey="row")
    for (above, below), experiment in zip(panels.T, experiments, strict=True):
        graph, metrics = experiment.real.graph, experiment.real.metrics
        below.axhline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        for name, each, colour in zip(experiment.names, metrics, _model_colours(experiment), strict=True):
            style = {"color": colour, "linewidth": 1.1, "markersize": 4}
            above.plot(each.source_entropy, ".-", label=_text(name), **style)
            if each is not metrics[0]:
                below.plot(each.source_entropy - metrics[0].source_entropy, ".-", **style)
        above.set_title(f"α = {experiment.alpha:g}")
        for axes in (above, below):
            node_ticks(axes.xaxis, graph, graph.sources, "source")
            axes.tick_params(axis="y", length=2, labelsize=8)
            axes.grid(axis="y", color="#e4e4e8", linewidth=0.6)
            _bare(axes, left=True)
    _outer_labels(panels)
    base = experiments[0].real.metrics[0].log_base
    unit = {np.e: "nats", 2.0: "bits"}.get(base, f"base {base:g}")
    panels[0, 0].set_ylabel(f"output entropy ({unit})", fontsize=8)
    panels[1, 0].set_ylabel("difference", fontsize=8)
    _legend(panels[0, 0], experiments[0])
    return figure


_TRAINING_CAPTION = (
    "every checkpoint of a training run, with the interval of its difference to the first; filled points are "
    "resolved after correction"
)


def _training_figure(found: list[Line]) -> Figure | None:
    experiments = [line.experiment for line in found]
    metrics = list(dict.fromkeys(d.metric for e in experiments for d in e.real.differences))
    metrics = [metric for metric in metrics if not metric.endswith(AT_EQUAL_LOSS)]
    figure, panels = _grid(len(metrics) + 2, (2.9, 2.2))
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(experiments)))
    for experiment, colour in zip(experiments, shades, strict=True):
        for axes, metric in zip(panels, metrics, strict=False):
            _track(axes, experiment, metric, colour)
        entropies = [
            np.nan if m.output_entropy is None else m.output_entropy for m in experiment.real.metrics
        ]
        panels[-2].plot(_steps(experiment), entropies, ".-", color=colour, linewidth=1.3)
    panels[-1].plot(_steps(experiments[0]), experiments[0].accuracy, ".-", color=INK, linewidth=1.3)
    titles = [*metrics, "output entropy, mean of sources", "questions answered right"]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("position along training", fontsize=8)
        axes.tick_params(length=2, labelsize=8)
        axes.ticklabel_format(axis="y", scilimits=(-2, 4), useOffset=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", color="#e4e4e8", linewidth=0.6)
        _bare(axes, left=True)
    panels[-1].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    if len(experiments) > 1:
        shown = panels[0].get_legend_handles_labels()
        figure.legend(*shown, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _track(axes: Axes, experiment: Experiment, metric: str, colour: Any) -> None:
    """One metric over the checkpoints at which it is defined."""
    later = [d for d in experiment.real.differences if d.metric == metric]
    if not later:
        return
    start = later[0].value_baseline
    steps = _steps(experiment)[[0, *(experiment.names.index(d.run) for d in later)]]
    axes.plot(
        steps,
        [start, *(d.value for d in later)],
        color=colour,
        linewidth=1.3,
        label=f"α = {experiment.alpha:g}",
    )
    low, high = (
        [start, *(d.value if (end := getattr(d, name)) is None else start + end for d in later)]
        for name in ("low", "high")
    )
    axes.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
    for d, step in zip(later, steps[1:], strict=True):
        face = "white" if d.direction == "unresolved" else colour
        axes.plot(step, d.value, "o", color=colour, markerfacecolor=face, markersize=4)


def _experiments(found: Sequence[Line]) -> list[Experiment]:
    """Those the lines belong to, once each: a series has a line for every checkpoint."""
    return list({id(line.experiment): line.experiment for line in found}.values())


def _steps(experiment: Experiment) -> Doubles:
    """[k]: where along training each model stands."""
    return np.asarray(experiment.steps, dtype=np.float64)


def _grid(n: int, size: tuple[float, float], across: int = _ACROSS) -> tuple[Figure, list[Axes]]:
    """`n` panels of `size` inches, a few across; those that would be left over are taken away."""
    across = min(across, n)
    down = -(-n // across)
    figure = Figure(figsize=(across * size[0], down * size[1]), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).ravel())
    for axes in panels[n:]:
        axes.remove()
    return figure, panels[:n]


def _outer_labels(panels: np.ndarray[tuple[int, int], np.dtype[np.object_]]) -> None:
    """Panels of one figure share their nodes: name them at the left and at the bottom alone."""
    for axes in panels[:, 1:].ravel():
        axes.set_ylabel("")
        axes.tick_params(axis="y", labelleft=False)
    for axes in panels[:-1].ravel():
        axes.set_xlabel("")
        axes.tick_params(axis="x", labelbottom=False)


def _model_colours(experiment: Experiment) -> Sequence[object]:
    n = len(experiment.names)
    if experiment.steps is None and n <= len(_MODELS):
        return _MODELS[:n]
    return list(matplotlib.colormaps["plasma"](np.linspace(0, 0.85, n)))


def _legend(axes: Axes, experiment: Experiment) -> None:
    n = len(experiment.names)
    axes.legend(fontsize=7, framealpha=0.9, edgecolor="none", handlelength=1.2, ncols=1 if n <= 3 else 2)


def _text(name: str) -> str:
    """A name to the letter: no formulas, and no leading underscore, which hides a label."""
    return ("​" if name.startswith("_") else "") + name.replace("$", r"\$")


def _short(name: str, width: int = 25) -> str:
    """A name that fits above a small panel."""
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _bare(axes: Axes, left: bool = False) -> None:
    for side in ("top", "right") if left else ("top", "right", "left"):
        axes.spines[side].set_visible(False)
