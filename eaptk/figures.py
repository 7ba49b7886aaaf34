"""Pictures of a run's edges and of a comparison (matplotlib, no global state, no display needed).

Rows of a heatmap are sources in order of writing, columns destinations in order of reading. Pairs without an
edge are grey, as are edges that were not kept or measured, and changes of edges that hold nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullFormatter

from eaptk.comparison import NOISE, Comparison, relative_change
from eaptk.errors import EaptkError
from eaptk.graph import Graph, Node
from eaptk.metrics import Metrics
from eaptk.resampling import AT_EQUAL_LOSS
from eaptk.store import Run
from eaptk.sweep import Doubles, Integers, weighted_column_sums

_NO_EDGE = "#e9e9ec"
INK = "#333340"
#: Of a difference, by its direction.
COLOURS = {"up": "#b2182b", "down": "#2166ac", "unresolved": "#8a8a94"}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    # Ids in an SVG are random without a salt; the same comparison is to give the same bytes.
    "svg.hashsalt": "eaptk",
}

#: Strengths are heavy-tailed: the logarithmic scale spans at most this many decades below the largest.
_DECADES = 4
#: See `Comparison.relative_change`.
_BY_IDENTITY = "under zero ablation, input → a0: zero by identity"
#: Colours of a relative change end at this percentile of its size, so that a few tiny baselines do not rule.
_CLIP_PERCENTILE = 95
#: Nodes are named in letters of so many points, where that many times the size is between them: a line is higher
#: than its letters, and the layout leaves a panel less than it had.
_SMALLEST, _LARGEST, _LEADING = 5.0, 7.0, 1.3
_MOST_LABELS = 12
#: Labels of a small panel would run into each other if they were nearer than this share of half its axis.
_ACROSS, _DOWN = 0.4, 0.15


def strength_figure(
    graph: Graph,
    strength: npt.ArrayLike,
    columns: Integers | None = None,
    title: str = "",
    ablation: str | None = None,
) -> Figure:
    """Heatmap of mean |W|, logarithmic colours.

    Args:
        strength: [e] mean |W| of each of `columns`; None for all edges.
        ablation: says, where it is ``"zero"``, which edges are 0 by identity.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.4), layout="constrained")
        axes = figure.subplots()
        matrix = edge_matrix(graph, strength, columns)
        note = _strength_note(graph, columns, ablation)
        strength_panel(axes, graph, matrix, strength_scale([matrix]), title, note)
        strength_bar(figure, [axes])
        return figure


def run_figure(run: Run, metrics: Metrics) -> Figure:
    """Heatmap of a run's mean |W| over the samples that were measured.

    Of a run that kept each sample's strongest edges over all that are done, of each edge over those that kept it; of
    sums over pairs of layers |ΣW| and Σ|W|, side by side.
    """
    name, ablation = run.path.name, run.manifest["ablation"]
    if run.top_columns is not None:
        means = run.edge_means()
        title = f"mean |W| over the samples that kept the edge: {name}"
        return strength_figure(run.graph, means.absolute, means.columns, title, ablation)
    if not run.keep.layer_pairs:
        return strength_figure(run.graph, metrics.strength, metrics.columns, f"mean |W|: {name}", ablation)
    uniform = np.full((1, metrics.n_samples), 1 / metrics.n_samples)
    sums = weighted_column_sums(run.absolute().scores, uniform, metrics.rows, absolute=True)[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.4), layout="constrained")
        for axes, values, what in zip(
            figure.subplots(1, 2), (metrics.strength, sums), ("|ΣW|", "Σ|W|"), strict=True
        ):
            matrix = edge_matrix(run.graph, values, metrics.columns)
            note = _strength_note(run.graph, metrics.columns, ablation)
            strength_panel(
                axes, run.graph, matrix, strength_scale([matrix]), f"mean {what} between layers: {name}", note
            )
            strength_bar(figure, [axes], f"mean {what}")
        return figure


def change_figure(
    graph: Graph,
    baseline: npt.ArrayLike,
    strength: npt.ArrayLike,
    columns: Integers | None = None,
    title: str = "",
) -> Figure:
    """Heatmap of each edge's relative change, diverging colours about 0; both [e] mean |W|.

    Grey where `eaptk.comparison.relative_change` is undefined: edges weaker than 1e-4 of the largest strength
    in both.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.4), layout="constrained")
        axes = figure.subplots()
        matrix = edge_matrix(graph, relative_change(baseline, strength), columns)
        limit = change_limit([matrix])
        change_panel(axes, graph, matrix, limit, title, grey_means(None, _not_kept(graph, columns)))
        change_bar(figure, [axes], limit)
        return figure


def comparison_figure(comparison: Comparison) -> Figure:
    """Each run's heatmap on one scale, relative changes against the baseline, and every metric's interval.

    Changes are grey where `Comparison.relative_change` is undefined; a metric's interval is grey where its
    direction is unresolved, and missing where it has none.
    """
    graph, names, columns = comparison.graph, comparison.names, comparison.metrics[0].columns
    not_kept = _not_kept(graph, columns)
    strengths = [edge_matrix(graph, metrics.strength, columns) for metrics in comparison.metrics]
    changes = [edge_matrix(graph, comparison.relative_change(k), columns) for k in range(1, len(names))]
    scale, limit = strength_scale(strengths), change_limit(changes)
    # Two runs and their change fit side by side; more runs get a second row, each change below its run.
    rows, width = (1, 3) if len(names) == 2 else (2, len(names))
    low = 1.5 + 0.5 * len(changes)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * width, 4.7 * rows + low), layout="constrained")
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[4.7 * rows, low])[:, 0]
        panels = np.atleast_2d(above.subplots(rows, width))
        for axes, matrix, name in zip(panels[0], strengths, names, strict=False):
            strength_panel(axes, graph, matrix, scale, f"mean |W|: {name}", not_kept)
        strength_bar(above, list(panels[0][: len(names)]))
        change_panels = panels[0][2:] if rows == 1 else panels[1][1:]
        for axes, matrix, name in zip(change_panels, changes, names[1:], strict=True):
            change = f"relative change: {names[0]} → {name}"
            change_panel(axes, graph, matrix, limit, change, grey_means(comparison.ablation, not_kept))
        change_bar(above, list(change_panels), limit)
        if rows == 2:
            panels[1][0].set_axis_off()
        _difference_panels(below, comparison)
        return figure


def save_figure(figure: Figure, stem: str | Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg; returns their paths."""
    stem = Path(stem)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            figure.savefig(paths[0], dpi=160)
            # The second file has the layout of the first: finding one takes as long as drawing.
            layout = figure.get_layout_engine()
            figure.set_layout_engine("none")
            figure.savefig(paths[1], metadata={"Date": None})
            figure.set_layout_engine(layout)
    except OSError as error:
        raise EaptkError(f"cannot write the picture {stem}: {error.strerror}") from error
    return paths


def edge_matrix(graph: Graph, values: npt.ArrayLike, columns: Integers | None) -> Doubles:
    """[n_sources, n_destinations], NaN where there is nothing to show."""
    columns = np.arange(graph.n_edges) if columns is None else columns
    matrix = np.full((graph.n_sources, graph.n_destinations), np.nan)
    matrix[graph.edge_source[columns], graph.edge_destination[columns]] = values
    return matrix


def strength_scale(matrices: Sequence[Doubles]) -> LogNorm:
    """One logarithmic colour scale for all of them."""
    positive = np.concatenate([matrix[matrix > 0] for matrix in matrices])
    if not len(positive):
        return LogNorm(1e-3, 1)
    top = positive.max()
    bottom = max(np.percentile(positive, 1), top * 10.0**-_DECADES)
    return LogNorm(min(bottom, top / 10), top)


def change_limit(matrices: Sequence[Doubles]) -> float:
    """Where the colours of relative changes end, on either side of 0."""
    sizes = np.abs(np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices]))
    return float(np.percentile(sizes, _CLIP_PERCENTILE)) or 1.0 if len(sizes) else 1.0


def strength_panel(
    axes: Axes, graph: Graph, matrix: Doubles, scale: LogNorm, title: str, note: str | None = None
) -> None:
    """A heatmap of mean |W|; `note` says what is grey, where that is more than pairs without an edge."""
    # An edge of strength 0 is an edge: it takes the lowest colour, where a logarithm would blank it.
    _heatmap(axes, graph, np.maximum(matrix, scale.vmin or 0), "viridis", scale, title)
    _note(axes, note)


def change_panel(
    axes: Axes, graph: Graph, matrix: Doubles, limit: float, title: str, note: str | None = None
) -> None:
    """A heatmap of changes; `note` says what is grey, see `grey_means`."""
    _heatmap(axes, graph, matrix, "RdBu_r", Normalize(-limit, limit), title)
    _note(axes, note)


def _note(axes: Axes, note: str | None) -> None:
    if note is not None:
        # Destinations that read little come first and sources that are read little last: this corner is empty.
        axes.text(0.02, 0.02, note, transform=axes.transAxes, fontsize=7)


def grey_means(ablation: str | None, not_kept: str | None = None) -> str:
    """Why a change has no colour, a reason a line."""
    noise = f"below {NOISE:.2%} of the largest strength in both"
    zero = f"\nor, {_BY_IDENTITY}" if ablation == "zero" else ""
    return ("grey: no edge, " if not_kept is None else f"{not_kept}\n") + f"or {noise}{zero}"


def _strength_note(graph: Graph, columns: Integers | None, ablation: str | None) -> str | None:
    """What a reader of strengths must know: what is grey, and where there is nothing but rounding."""
    zero = _BY_IDENTITY if ablation == "zero" else None
    return "\n".join(filter(None, (_not_kept(graph, columns), zero))) or None


def _not_kept(graph: Graph, columns: Integers | None) -> str | None:
    """What is grey where some edges alone are drawn."""
    if columns is None or len(columns) == graph.n_edges:
        return None
    return f"grey: no edge, or not kept: {len(columns):,} of {graph.n_edges:,} edges are"


def strength_bar(figure: Figure | SubFigure, axes: list[Axes], label: str = "mean |W|") -> None:
    """The colours of `strength_panel`, beside the panels that share them."""
    bar = figure.colorbar(axes[0].images[0], ax=axes, extend="min", pad=0.02, fraction=0.05, aspect=30)
    bar.set_label(label)
    bar.outline.set_visible(False)


def change_bar(figure: Figure | SubFigure, axes: list[Axes], limit: float) -> None:
    """The colours of `change_panel`, beside the panels that share them."""
    bar = figure.colorbar(axes[0].images[0], ax=axes, extend="both", pad=0.02, fraction=0.05, aspect=30)
    bar.set_label(f"relative change\nclipped at ±{100 * limit:.3g}% ({_CLIP_PERCENTILE}th percentile)")
    bar.ax.yaxis.set_major_formatter(lambda value, _: minus(f"{100 * value:+.3g}%") if value else "0")
    bar.outline.set_visible(False)


def _heatmap(axes: Axes, graph: Graph, matrix: Doubles, colours: str, scale: Normalize, title: str) -> None:
    palette = matplotlib.colormaps[colours].with_extremes(bad=_NO_EDGE)
    axes.imshow(np.ma.masked_invalid(matrix), cmap=palette, norm=scale, aspect="auto")
    axes.set_title(title, parse_math=False)
    node_ticks(axes.xaxis, graph, graph.destinations, "destination")
    node_ticks(axes.yaxis, graph, graph.sources, "source")
    for side in axes.spines.values():
        side.set_visible(False)


def node_ticks(axis: Axis, graph: Graph, nodes: Sequence[Node], role: str) -> None:
    """Name every node where the names fit; else number the layers, with a minor tick at each boundary."""
    axis.set_tick_params(length=0)
    across = axis is axis.axes.xaxis
    # Before the layout: near what it will be.
    box = axis.axes.bbox
    points = 72 * (box.width if across else box.height) / axis.axes.figure.dpi
    size = min(points / len(nodes) / _LEADING, _LARGEST)
    if size >= _SMALLEST:
        axis.set_label_text(role)
        axis.set_ticks(range(len(nodes)), [node.name for node in nodes], rotation=90 if across else 0)
        axis.set_tick_params(labelsize=size)
        return
    axis.set_label_text(f"{role}, by layer")
    layer = np.array([node.layer for node in nodes])
    step = -(-graph.n_layers // _MOST_LABELS)
    ticks = [(np.flatnonzero(layer == k).mean(), str(k)) for k in range(0, graph.n_layers, step)]
    if nodes[0].kind == "input":
        ticks = [(0, "input")] + [tick for tick in ticks if tick[0] > 0.05 * len(nodes)]
    if nodes[-1].kind == "logits":
        # A number close to the end would run into the word.
        most = min(0.9 * len(nodes), len(nodes) - 2)
        ticks = [tick for tick in ticks if tick[0] < most] + [(len(nodes) - 1, "logits")]
    axis.set_ticks([place for place, _ in ticks], [label for _, label in ticks])
    axis.set_ticks(np.flatnonzero(np.diff(layer)) + 0.5, minor=True)
    axis.set_tick_params(which="minor", length=2.5, color=INK, width=0.5)


def _difference_panels(figure: SubFigure, comparison: Comparison) -> None:
    """One small panel a metric, in its own units: differences and intervals, 0 dashed."""
    metrics = list(dict.fromkeys(d.metric for d in comparison.differences))
    confidence = f"{comparison.resampling.confidence:.0%}"
    dense = "dense convention, structural zeros counted: " if comparison.metrics[0].dense else ""
    figure.suptitle(
        f"{dense}difference to {comparison.names[0]} with {confidence} paired bootstrap interval, "
        f"{comparison.sample_size()} (grey: not resolved after correction)",
        fontsize=10,
        parse_math=False,
    )
    if comparison.notes:
        figure.supxlabel("\n".join(comparison.notes), fontsize=8, parse_math=False)
    for axes, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
        shown = [d for d in comparison.differences if d.metric == metric]
        # A metric and the same at equal loss share their units.
        alike = [d for d in comparison.differences if d.metric.split()[0] == metric.split()[0]]
        exponent = _exponent([value for d in alike for value in (d.low, d.high, d.difference)])
        unit = 10.0**exponent
        for row in range(len(shown)):
            # Not through what is written above the next row.
            end = row + (0.53 if row < len(shown) - 1 else 0.6)
            axes.vlines(0, row - 0.13, end, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        for row, d in enumerate(shown):
            colour = COLOURS[d.direction]
            if d.low is not None and d.high is not None:
                ends = [d.low / unit, d.high / unit]
                axes.plot(ends, [row, row], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(d.difference / unit, row, "o", color=colour, markersize=6)
            values = f"{_digits(d.value_baseline)} → {_digits(d.value)}"
            axes.text(d.difference / unit, row - 0.3, values, ha="center", va="center", fontsize=8)
        axes.set_title(metric.replace(AT_EQUAL_LOSS, f"\n{AT_EQUAL_LOSS.strip()}"))
        if exponent:
            axes.set_xlabel(rf"in units of $10^{{{exponent}}}$", fontsize=8)
        axes.set_ylim(len(shown) - 0.4, -0.75)
        axes.set_yticks(
            range(len(shown)),
            [d.run for d in shown] if metric == metrics[0] else [""] * len(shown),
            parse_math=False,
        )
        # More panels are narrower, and what is written above the outermost points must fit.
        axes.margins(x=0.08 * len(metrics))
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(axis="x", length=2, labelsize=8)
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)


def _exponent(values: Sequence[float | None]) -> int:
    """The power of ten to take out of an axis: a multiple of 3, and 0 for sizes that read well as they are."""
    largest = max(abs(value) for value in values if value is not None)
    return 0 if largest == 0 or 1e-2 <= largest < 1e4 else 3 * math.floor(math.log10(largest) / 3)


def _digits(value: float) -> str:
    """Three significant digits, zeros at the end among them, so that both sides of an arrow are as exact."""
    return minus(f"{value:#.3g}".removesuffix("."))


def minus(number: str) -> str:
    """A number with the sign that matplotlib writes beside it, in place of a hyphen."""
    return number.replace("-", "−")


def ink_on(colour: npt.ArrayLike) -> str:
    """What is read best on a colour, red, green and blue in [0, 1]: ink or white, by contrast (WCAG 2)."""
    below, ink = (_luminance(each) + 0.05 for each in (colour, to_rgb(INK)))
    return "white" if 1.05 / below > below / ink else INK


def _luminance(colour: npt.ArrayLike) -> float:
    rgb = np.asarray(colour, dtype=np.float64)[:3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def asinh_axes(axes: Axes, values: npt.ArrayLike) -> tuple[float, float]:
    """Both axes linear about 0 up to the median size, logarithmic beyond, ticks at powers of ten; where they end."""
    sizes = np.abs(np.asarray(values, dtype=np.float64))
    width = float(np.median(sizes[sizes > 0])) if (sizes > 0).any() else 1.0
    end = 2 * max(float(sizes.max(initial=0)), width)
    highest = math.floor(math.log10(end))
    if math.asinh(10.0**highest / width) < _ACROSS * math.asinh(end / width):
        # So near 0 that it has no room for its label.
        highest += 1
        end = 1.2 * 10.0**highest
    powers = [10.0**k for k in range(highest, math.ceil(math.log10(width / 2)) - 1, -1)]
    for axis, scale, share in ((axes.xaxis, axes.set_xscale, _ACROSS), (axes.yaxis, axes.set_yscale, _DOWN)):
        scale("asinh", linear_width=width)
        last, room = math.inf, share * math.asinh(end / width)
        named, others = {0.0: "0"}, []
        for power in powers:
            place = math.asinh(power / width)
            if min(place, last - place) < room:
                others += [-power, power]
                continue
            last = place
            name = f"10^{{{math.log10(power):.0f}}}"
            named |= {-power: f"$-{name}$", power: f"${name}$"}
        axis.set_ticks(list(named), list(named.values()), fontsize=7)
        axis.set_ticks(others, minor=True)
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlim=(-end, end), ylim=(-end, end), aspect="equal")
    return -end, end
