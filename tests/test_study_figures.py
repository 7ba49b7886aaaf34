"""A study's pictures: which there are, what they show, and that nothing that was not measured is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from studies import make_experiment, make_study

from eaptk.comparison import relative_change
from eaptk.experiment import Experiment
from eaptk.figures import COLOURS, INK
from eaptk.study_figures import StudyFigure, slug, study_figures

PAIR = make_experiment()
SERIES = make_experiment("along", "along", names=("0", "1", "2"), steps=(0, 10, 20), validated=False)


def drawn(*experiments: Experiment) -> dict[str, StudyFigure]:
    """The first picture of each part."""
    found: dict[str, StudyFigure] = {}
    for figure in study_figures(make_study(experiments)):
        found.setdefault(figure.section, figure)
    return found


def panel(figure: StudyFigure, title: str) -> Axes:
    return next(axes for axes in figure.figure.axes if title in axes.get_title())


def test_a_study_has_a_picture_of_everything_that_was_measured() -> None:
    parts = {"metrics", "diversity", "lengths", "sensitivity", "edges", "entropy"}
    assert set(drawn(PAIR)) == parts | {"validation"}
    assert set(drawn(SERIES)) == parts | {"training"}
    assert set(drawn(replace(PAIR, sensitivity=(), validation=(), lengths=((), ())))) == {
        "metrics",
        "diversity",
        "edges",
        "entropy",
    }


def test_pictures_have_files_of_their_own() -> None:
    results = make_study(
        [replace(PAIR, family=f"GRPO seed {k}", alpha=a) for k in range(2) for a in (0.1, 0.3)]
    )
    stems = [figure.stem for figure in study_figures(results)]
    assert len(set(stems)) == len(stems)
    assert {"metrics-arithmetic-alpha-0.1", "edges-grpo-seed-1-arithmetic"} <= set(stems)
    assert slug("a/../b \\ c") == "a-..-b-c"


@pytest.mark.parametrize("direction", ["up", "down", "unresolved"])
def test_a_difference_has_the_colour_of_its_direction(direction: str) -> None:
    sign = -1 if direction == "down" else 1
    fields = {"difference": sign * 1.0, "low": sign * 1 - 0.5, "high": sign * 1 + 0.5, "value_baseline": 2.0}
    q = 0.5 if direction == "unresolved" else 0.001
    differences = tuple(
        replace(d, **fields, p_holm=q, q=q) if d.metric == "complexity" else d for d in PAIR.real.differences
    )
    figure = drawn(replace(PAIR, real=replace(PAIR.real, differences=differences)))["metrics"]
    interval, point = panel(figure, "complexity").lines[1:]
    assert interval.get_color() == point.get_color() == COLOURS[direction]
    assert list(interval.get_xdata()) == [sign * 0.5 - 0.25, sign * 0.5 + 0.25]


def test_heatmaps_show_strengths_and_their_change_for_every_share() -> None:
    figure = drawn(replace(PAIR, alpha=0.1), PAIR)["edges"]
    graph, (before, after) = PAIR.real.graph, (metrics.strength for metrics in PAIR.real.metrics)
    titles = [axes.get_title() for axes in figure.figure.axes if axes.images]
    assert titles == [f"{what}, α = {a}" for what in ("SFT", "GRPO", "SFT → GRPO") for a in (0.1, 0.3)]
    shown = panel(figure, "SFT → GRPO, α = 0.3").images[0].get_array()
    change = relative_change(before, after)
    # Under zero ablation the input's edges into the first attention are 0 by identity.
    change[graph.reach[graph.edge_destination] == 1] = np.nan
    np.testing.assert_array_equal(graph.pack(shown.filled(np.nan)), change)


def test_entropies_are_drawn_before_and_after_and_as_a_difference() -> None:
    above, below = drawn(PAIR)["entropy"].figure.axes
    before, after = (metrics.source_entropy for metrics in PAIR.real.metrics)
    np.testing.assert_array_equal([line.get_ydata() for line in above.lines], [before, after])
    np.testing.assert_array_equal(below.lines[-1].get_ydata(), after - before)


def test_lengths_are_counted_and_the_cuts_marked() -> None:
    (axes,) = drawn(PAIR, replace(PAIR, alpha=0.5, cut=20))["lengths"].figure.axes
    for patch, lengths in zip(axes.patches, PAIR.lengths, strict=True):
        corners = patch.get_xy()
        assert corners[:, 1].max() == np.histogram(lengths, np.unique(corners[:, 0]))[0].max()
    assert [line.get_xdata()[0] for line in axes.lines] == [12, 20]
    # Both are seen where they are alike.
    assert [patch.get_fill() for patch in axes.patches] == [True, False]


def test_complexities_are_written_as_shares_of_the_baseline() -> None:
    axes = drawn(PAIR)["sensitivity"].figure.axes[0]
    first = PAIR.sensitivity[0]
    written = next(text for text in axes.texts if text.get_position() == (0, 0)).get_text()
    share = float(written.replace("−", "-"))
    assert share == pytest.approx(100 * (first.values[1] / first.values[0] - 1), abs=0.05)
    assert axes.get_xticklabels()[0].get_text() == "50\n0.1"


def luminance(colour: Sequence[float]) -> float:
    return float(np.power(colour, 2.2) @ (0.2126, 0.7152, 0.0722))


def test_what_is_written_on_a_colour_is_read_on_it() -> None:
    (axes,) = (axes for axes in drawn(PAIR)["sensitivity"].figure.axes if axes.images)
    image = axes.images[0]
    for text in axes.texts:
        x, y = text.get_position()
        below = luminance(image.to_rgba(image.get_array()[int(y), int(x)])[:3])
        low, high = sorted((below, luminance(to_rgb(text.get_color()))))
        assert (high + 0.05) / (low + 0.05) > 3.5
    assert {text.get_color() for text in axes.texts} == {"white", INK}


@pytest.mark.parametrize("scale", [1.0, 1.9e-7, 3.3e5])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_an_axis_of_scores_has_powers_of_ten_that_do_not_overlap(scale: float, spread: float) -> None:
    scores = scale * np.random.default_rng(0).lognormal(0, spread, 60)
    checked = replace(PAIR.validation[0], predicted=tuple(scores), exact=tuple(-scores))
    figure = drawn(replace(PAIR, validation=(checked,) * 4))["validation"].figure
    figure.canvas.draw()
    axes = figure.axes[0]
    assert "asinh" in axes.get_xlabel()
    assert "asinh" in axes.get_ylabel()
    for axis in (axes.xaxis, axes.yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        assert len(boxes) >= 3
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
        ticks = np.abs([*axis.get_majorticklocs(), *axis.get_minorticklocs()])
        powers = np.unique(np.log10(ticks[ticks > 0]).round(9))
        np.testing.assert_array_equal(np.diff(powers), 1)
        np.testing.assert_array_equal(powers, powers.round())
        assert axis.get_view_interval()[1] >= max(ticks.max(), scores.max())


def test_a_validation_says_of_what_it_is() -> None:
    checked = replace(PAIR.validation[0], spearman=-0.5, slope=-2.0)
    figure = drawn(replace(PAIR, family="rl", validation=(checked,)))["validation"]
    title = figure.figure.axes[0].get_title()
    assert title == "family rl, model SFT\nr = 0.980, Spearman −0.500\nslope −2.000"


def test_every_pair_of_a_validation_is_a_point() -> None:
    axes = panel(drawn(PAIR)["validation"], "r = 0.980")
    np.testing.assert_array_equal(axes.lines[-1].get_xdata(), PAIR.validation[0].predicted)
    np.testing.assert_array_equal(axes.lines[-1].get_ydata(), PAIR.validation[0].exact)


def test_a_series_is_drawn_along_its_steps() -> None:
    figure = drawn(SERIES)["training"]
    line = panel(figure, "intensity").lines[0]
    assert list(line.get_xdata()) == [0, 10, 20]
    assert list(line.get_ydata()) == pytest.approx([m.intensity for m in SERIES.real.metrics])
    assert list(panel(figure, "answered right").lines[0].get_ydata()) == list(SERIES.accuracy)


@pytest.mark.parametrize("name", ["$x_1$", r"$\frac{", "_hidden", "<b>"])
def test_any_name_can_be_drawn(name: str) -> None:
    experiment = make_experiment(name, names=("SFT", name), validated=True)
    for figure in study_figures(make_study([experiment])):
        figure.figure.canvas.draw()
