"""Pictures: what they show, and that they are made without a display and the same each time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from runs import make_run

from eaptk.comparison import compare
from eaptk.errors import EaptkError
from eaptk.figures import change_figure, comparison_figure, save_figure, strength_figure
from eaptk.graph import Graph
from eaptk.resampling import Resampling

GRAPHS = {
    "small": Graph(2, 4, 2),
    "deep": Graph(32, 4, 2, qkv="merged"),
    "head": Graph(4, 4, 2, granularity="head"),
    "layers": Graph(12, 8, 2).layers(),
}


def compared(graph, n_runs=2, **options):
    runs = [
        replace(make_run(10, seed, graph), path=Path(f"runs/r{seed}"), loss=np.arange(10.0) + seed)
        for seed in range(n_runs)
    ]
    return compare(runs, resampling=Resampling(n_resamples=100), **options)


def heatmaps(figure):
    return [axes.images[0] for axes in figure.axes if axes.images]


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_heatmap_holds_every_edge_and_nothing_else(graph):
    graph = GRAPHS[graph]
    strength = np.random.default_rng(0).lognormal(size=graph.n_edges)
    shown = heatmaps(strength_figure(graph, strength))[0].get_array()
    assert shown.shape == (graph.n_sources, graph.n_destinations)
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), graph.matrix(strength) == 0)
    ordinary = strength > np.percentile(strength, 2)
    np.testing.assert_array_equal(graph.pack(shown.filled())[ordinary], strength[ordinary])


def test_strengths_of_zero_stay_visible_as_edges():
    graph = GRAPHS["small"]
    strength = np.ones(graph.n_edges)
    strength[3] = 0
    shown = heatmaps(strength_figure(graph, strength))[0].get_array()
    assert np.ma.count(shown) == graph.n_edges


def test_change_is_symmetric_about_zero_and_says_where_it_is_clipped():
    graph = GRAPHS["small"]
    strength = np.linspace(1, 2, graph.n_edges)
    strength[0] = 1000
    figure = change_figure(graph, np.ones(graph.n_edges), strength)
    image = heatmaps(figure)[0]
    clip = np.percentile(strength - 1, 95)
    assert (image.norm.vmin, image.norm.vmax) == pytest.approx((-clip, clip))
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert any(f"clipped at ±{100 * clip:.3g}% (95th percentile)" in label for label in labels)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("n_runs", [2, 3])
def test_a_comparison_shows_each_run_each_change_and_each_metric(graph, n_runs):
    figure = comparison_figure(compared(GRAPHS[graph], n_runs))
    titles = [axes.get_title() for axes in figure.axes]
    for k in range(n_runs):
        assert f"mean |W|: r{k}" in titles
    for k in range(1, n_runs):
        assert f"relative change: r0 → r{k}" in titles
    for metric in ("intensity", "complexity", "kurtosis", "diversity", "loss"):
        assert metric in titles
    scales = {(image.norm.vmin, image.norm.vmax) for image in heatmaps(figure)[:n_runs]}
    assert len(scales) == 1


@pytest.mark.parametrize("graph", GRAPHS)
def test_labels_do_not_overlap(graph):
    figure = strength_figure(GRAPHS[graph], np.ones(GRAPHS[graph].n_edges))
    figure.canvas.draw()
    axes = figure.axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("n_runs", [2, 3])
def test_names_of_a_comparison_do_not_overlap(graph, n_runs):
    figure = comparison_figure(compared(GRAPHS[graph], n_runs))
    figure.canvas.draw()
    for axes in (image.axes for image in heatmaps(figure)):
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_nodes_are_named_where_their_names_fit():
    for name, fits in (("small", True), ("head", True), ("deep", False)):
        graph = GRAPHS[name]
        axes = heatmaps(comparison_figure(compared(graph)))[0].axes
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert (labels == [node.name for node in graph.destinations]) == fits
        assert axes.get_xlabel() == ("destination" if fits else "destination, by layer")


@pytest.mark.parametrize(("ablation", "said"), [("zero", True), ("patching", False)])
def test_a_heatmap_says_what_is_zero_by_identity(ablation, said):
    graph = GRAPHS["small"]
    (axes, _) = strength_figure(graph, np.ones(graph.n_edges), ablation=ablation).axes
    assert [text.get_text() for text in axes.texts] == (
        ["under zero ablation, input → a0: zero by identity"] if said else []
    )


def change_panel(figure):
    return next(axes for axes in figure.axes if axes.get_title().startswith("relative change"))


@pytest.mark.parametrize(("ablation", "n_undefined"), [("zero", 3), ("patching", 0)])
def test_changes_that_are_no_finding_are_grey_and_the_picture_says_so(ablation, n_undefined):
    graph = GRAPHS["small"]
    panel = change_panel(comparison_figure(replace(compared(graph), ablation=ablation)))
    assert np.ma.count(panel.images[0].get_array()) == graph.n_edges - n_undefined
    text = panel.texts[0].get_text()
    assert "grey: no edge, or below 0.01% of the largest strength" in text
    assert ("zero by identity" in text) == bool(n_undefined)


def difference_panel(figure, metric):
    return next(axes for axes in figure.axes if axes.get_title() == metric)


def test_an_interval_is_coloured_only_if_the_corrected_test_agrees():
    comparison = compared(GRAPHS["small"])
    colours = []
    for p_holm in (0.01, 0.2):
        differences = [replace(d, low=1.0, high=2.0, p_holm=p_holm) for d in comparison.differences]
        figure = comparison_figure(replace(comparison, differences=tuple(differences)))
        colours.append({line.get_color() for line in difference_panel(figure, "kurtosis").lines})
    assert colours == [{"#b2182b"}, {"#8a8a94"}]


def test_a_difference_without_an_interval_is_a_point():
    comparison = compared(GRAPHS["small"])
    differences = tuple(replace(d, low=None, high=None) for d in comparison.differences)
    panel = difference_panel(comparison_figure(replace(comparison, differences=differences)), "diversity")
    assert [len(line.get_xdata()) for line in panel.lines] == [1]


@pytest.mark.parametrize("n_runs", [2, 4])
def test_values_stand_beside_the_line_at_zero_with_as_many_digits_on_both_sides(n_runs):
    comparison = compared(GRAPHS["small"], n_runs)
    differences = tuple(replace(d, value_baseline=1.94, value=97.0) for d in comparison.differences)
    figure = comparison_figure(replace(comparison, differences=differences))
    figure.canvas.draw()
    panel = difference_panel(figure, "kurtosis")
    assert [text.get_text() for text in panel.texts] == ["1.94 → 97.0"] * (n_runs - 1)
    for collection in panel.collections:
        (zero,) = collection.get_segments()
        ends = panel.transData.transform(zero)[:, 1]
        for text in panel.texts:
            box = text.get_window_extent()
            assert max(ends) < box.y0 or min(ends) > box.y1


@pytest.mark.parametrize("dense", [False, True])
def test_the_dense_convention_is_named(dense):
    figure = comparison_figure(compared(GRAPHS["small"], dense=dense))
    (title,) = (sub.get_suptitle() for sub in figure.subfigs if sub.get_suptitle())
    assert ("dense convention, structural zeros counted" in title) == dense


def test_small_numbers_have_their_power_of_ten_in_the_label():
    comparison = compared(GRAPHS["small"], control_loss=False)
    panel = difference_panel(comparison_figure(comparison), "intensity")
    d = comparison.differences[0]
    assert panel.get_xlabel() == "in units of $10^{-6}$"
    assert panel.lines[-1].get_xdata()[0] == pytest.approx(1e6 * d.difference)
    panel.figure.canvas.draw()
    assert panel.xaxis.get_offset_text().get_text() == ""


@pytest.mark.parametrize("graph", ["deep", "head"])
def test_the_row_of_the_input_is_named(graph):
    figure = strength_figure(GRAPHS[graph], np.ones(GRAPHS[graph].n_edges))
    axes = figure.axes[0]
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    assert [place for place, label in ticks if label.get_text() == "input"] == [0]


def test_edges_that_were_not_measured_are_blank():
    graph = GRAPHS["small"]
    shown = heatmaps(comparison_figure(compared(graph, columns=[2, 7])))[0].get_array()
    assert np.ma.count(shown) == 2


def test_the_same_comparison_gives_the_same_bytes(tmp_path):
    first, again = (
        save_figure(comparison_figure(compared(GRAPHS["small"])), tmp_path / name / "comparison")
        for name in ("first", "again")
    )
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert [path.suffix for path in first] == [".png", ".svg"]
    assert matplotlib.image.imread(first[0]).std() > 0.1


def test_a_picture_that_cannot_be_written_ends_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    figure = strength_figure(GRAPHS["small"], np.ones(GRAPHS["small"].n_edges))
    with pytest.raises(EaptkError, match="cannot write the picture"):
        save_figure(figure, tmp_path / "file" / "picture")
