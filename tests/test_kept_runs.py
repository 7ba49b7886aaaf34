"""Runs that kept some edges: read, measured, compared, drawn and written as what they are, or refused."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keeping import GRAPH, GRAPHS, HISTOGRAM, SOME, make_rows, make_run, write_run
from rich.console import Console
from runs import FakeRun
from summaries import manifest

from eaptk import EaptkError, Keep, Run, compare, measure, strongest
from eaptk.cli import main
from eaptk.comparison import Comparison
from eaptk.figures import comparison_figure, run_figure
from eaptk.metrics import Metrics
from eaptk.resampling import Resampling
from eaptk.sensitivity import complexity_sensitivity
from eaptk.store import RunWriter
from eaptk.tables import strongest_edges

ROWS = make_rows()
KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "some": {"columns": SOME},
    "top": {"top": 7},
    "top of some": {"columns": SOME, "top": 7},
    "pairs": {"layer_pairs": True},
    "pairs of some": {"columns": SOME, "layer_pairs": True},
    "statistics of some": {"columns": SOME, "histogram": HISTOGRAM},
}
FEW = Resampling(n_resamples=100)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name.replace(" ", "-"), ROWS, **how) for name, how in KINDS.items()}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same of other scores."""
    folder, rows = tmp_path_factory.mktemp("others"), 1.5 * make_rows(seed=1)
    return {name: make_run(folder / name.replace(" ", "-"), rows, **how) for name, how in KINDS.items()}


def assert_alike(found: Metrics, expected: Metrics) -> None:
    ours, theirs = vars(found), vars(expected)
    for name, value in theirs.items():
        if isinstance(value, (np.ndarray, float)):
            np.testing.assert_allclose(ours[name], value, rtol=1e-12, err_msg=name)
        else:
            assert ours[name] == value, name


@given(st.sampled_from(sorted(GRAPHS)), st.data())
@settings(max_examples=15, deadline=None)
def test_metrics_of_some_edges_are_those_of_a_run_that_kept_them_alone(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    graph = GRAPHS[name]
    rows = make_rows(graph=graph)
    columns = data.draw(st.sets(st.integers(0, graph.n_edges - 1), min_size=2).map(sorted))
    part = data.draw(st.sets(st.sampled_from(columns), min_size=2).map(sorted))
    dense = data.draw(st.booleans())
    run = make_run(tmp_path_factory.mktemp("run") / "some", rows, graph, columns=columns)
    whole = FakeRun(rows, graph=graph)
    assert_alike(measure(run, dense=dense), measure(whole, columns=columns, dense=dense))
    assert_alike(measure(run, columns=part, dense=dense), measure(whole, columns=part, dense=dense))


@pytest.mark.parametrize("dense", [False, True])
def test_statistics_of_some_edges_give_the_metrics_of_their_rows(runs: dict[str, Run], dense: bool) -> None:
    options: dict[str, Any] = {"bins": HISTOGRAM.bins, "upper": HISTOGRAM.upper, "dense": dense}
    found = measure(runs["statistics of some"], **options)
    expected = measure(runs["some"], **options)
    for name in (
        *("intensity", "complexity", "kurtosis", "diversity", "output_entropy", "n_entries", "n_above"),
        *("columns", "strength", "source_entropy", "sample_histogram"),
    ):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-10, err_msg=name)


def test_metrics_of_each_samples_strongest_are_those_of_its_kept_scores(runs: dict[str, Run]) -> None:
    run = runs["top"]
    found = measure(run)
    top = np.sort(np.abs(ROWS), axis=1)[:, -7:].astype(np.float64)
    assert found.n_entries == 7
    np.testing.assert_allclose(found.intensity, top.mean(), rtol=1e-12)
    np.testing.assert_array_equal(found.sample_histogram.sum(1), 7)
    assert found.kurtosis is not None
    assert found.diversity is None
    assert found.output_entropy is None
    assert np.isnan(found.sample_correlation).all()
    kept = (run.kept().to_scipy() != 0).toarray()
    by_all = kept.all(0)
    np.testing.assert_allclose(found.strength[by_all], np.abs(ROWS).mean(0)[by_all], rtol=1e-6)
    assert np.isnan(found.strength[~by_all]).all()


def test_sums_over_pairs_of_layers_are_measured_as_edges_between_layers(runs: dict[str, Run]) -> None:
    run = runs["pairs"]
    assert run.graph == GRAPH.layers()
    assert_alike(measure(run), measure(FakeRun(np.array(run.scores), graph=GRAPH.layers())))
    sums = run.absolute().scores.astype(np.float64)
    np.testing.assert_allclose(
        sums.sum(1) / GRAPH.n_edges, measure(runs["whole"]).sample_intensity, rtol=1e-6
    )
    assert measure(run.absolute()).intensity == pytest.approx(sums.mean(), rel=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_lists_exactly_the_edges_it_stores(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    table = pandas.read_parquet(run.path / "edges.parquet")
    np.testing.assert_array_equal(table["column"], run.columns)
    ends = [
        f"{source}→{destination}" for source, destination in zip(table.source, table.destination, strict=True)
    ]
    assert ends == [run.graph.edge_name(column) for column in run.columns]
    if run.keep.histogram is None and run.keep.top is None:
        assert run.scores.shape == (len(ROWS), len(table))


@pytest.mark.parametrize("name", ["whole", "some"])
def test_an_edge_is_found_by_name_wherever_its_column_is(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    for edge in SOME:
        ends = GRAPH.edge_name(edge).split("→")
        np.testing.assert_array_equal(run.scores[:, run.column(*ends)], ROWS[:, edge])


@pytest.mark.parametrize(("name", "edge"), [("some", "input→a0.h1<q>"), ("top", "input→a0.h0<q>")])
def test_an_edge_that_was_not_kept_has_no_column(runs: dict[str, Run], name: str, edge: str) -> None:
    with pytest.raises(EaptkError, match=f"did not keep {edge} of every sample"):
        runs[name].column(*edge.split("→"))


@pytest.mark.parametrize("name", ["whole", "some", "top", "top of some"])
def test_kept_scores_are_those_of_the_row_whatever_view_is_taken(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    kept = run.kept([1, 4])
    columns = np.broadcast_to(kept.columns, kept.values.shape)
    np.testing.assert_array_equal(kept.values, np.take_along_axis(ROWS[[1, 4]], columns, axis=1))

    matrix = kept.matrix()
    full = GRAPH.matrix(ROWS[[1, 4]])
    is_kept = ~np.isnan(matrix)
    np.testing.assert_array_equal(matrix[is_kept], full[is_kept])
    assert np.isnan(matrix).sum() == 2 * (GRAPH.n_edges - kept.values.shape[1])

    sparse = kept.to_scipy()
    assert sparse.has_canonical_format
    for row, sample in enumerate((1, 4)):
        stored = sparse[[row]].tocoo()
        np.testing.assert_array_equal(stored.data, ROWS[sample, stored.coords[1]])

    frame = kept.to_frame()
    assert list(frame["sample"].unique()) == [1, 4]
    np.testing.assert_array_equal(frame["score"], ROWS[frame["sample"], frame["column"]])


@pytest.mark.parametrize("name", ["whole", "some", "top", "pairs"])
def test_kept_edges_become_a_graph_with_mean_scores(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    drawn = run.kept().to_networkx()
    means = run.edge_means()
    assert isinstance(drawn, networkx.DiGraph)
    assert drawn.number_of_edges() == len(means.columns)
    for *_, edge in drawn.edges(data=True):
        place = np.searchsorted(means.columns, edge["column"])
        assert edge["score"] == pytest.approx(means.signed[place], rel=1e-6)


def test_means_of_each_samples_strongest_are_over_the_samples_that_kept_the_edge(
    runs: dict[str, Run],
) -> None:
    means = runs["top"].edge_means()
    chosen = np.argsort(-np.abs(ROWS), axis=1, kind="stable")[:, :7]
    kept = np.zeros(ROWS.shape, dtype=bool)
    np.put_along_axis(kept, chosen, True, axis=1)
    np.testing.assert_array_equal(means.columns, np.flatnonzero(kept.any(0)))
    for column, n, signed in zip(means.columns, means.n_samples, means.signed, strict=True):
        values = ROWS[kept[:, column], column]
        assert n == len(values)
        assert signed == pytest.approx(values.mean(), rel=1e-6)


def compared(*given: Run, **options: Any) -> Comparison:
    return compare(given, names=[f"run {i}" for i in range(len(given))], resampling=FEW, **options)


@pytest.mark.parametrize("dense", [False, True])
def test_runs_of_the_same_edges_compare_as_these_edges_of_whole_runs(
    runs: dict[str, Run], others: dict[str, Run], dense: bool
) -> None:
    found = compared(runs["some"], others["some"], dense=dense)
    expected = compared(runs["whole"], others["whole"], columns=SOME, dense=dense)
    assert [vars(d) for d in found.differences] == [vars(d) for d in expected.differences]
    pandas.testing.assert_frame_equal(found.edges_frame(), expected.edges_frame())


def test_a_whole_run_compares_with_one_of_some_edges_on_these(
    runs: dict[str, Run], others: dict[str, Run]
) -> None:
    found = compared(runs["whole"], others["some"])
    assert list(found.metrics[0].columns) == list(SOME)
    assert f"compared on the {len(SOME)} edges that all runs kept" in " ".join(found.notes)
    assert [vars(d) for d in found.differences] == [
        vars(d) for d in compared(runs["some"], others["some"]).differences
    ]


def test_runs_of_strongest_edges_compare_without_what_is_unknown(
    runs: dict[str, Run], others: dict[str, Run]
) -> None:
    found = compared(runs["top"], others["top"])
    assert [d.metric for d in found.differences] == ["intensity", "complexity", "kurtosis", "loss"]
    assert "7 strongest edges: metrics are of these alone, there is no diversity" in " ".join(found.notes)


def test_signed_and_absolute_sums_do_not_compare(runs: dict[str, Run], others: dict[str, Run]) -> None:
    assert compared(runs["pairs"].absolute(), others["pairs"].absolute()).differences[0].metric == "intensity"
    with pytest.raises(EaptkError, match="runs differ in sums"):
        compared(runs["pairs"], others["pairs"].absolute())


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ("whole", "top", "runs differ in strongest edges kept of a sample: .* has None, .* has 7"),
        ("top", "top of some", "were chosen from .* and from others in .*; score both alike"),
        ("whole", "pairs", "runs differ in graph: .*granularity='head'.*granularity='layer'"),
    ],
)
def test_runs_that_kept_unlike_things_do_not_compare(
    runs: dict[str, Run], others: dict[str, Run], ours: str, theirs: str, message: str
) -> None:
    with pytest.raises(EaptkError, match=message):
        compared(runs[ours], others[theirs])


def test_runs_without_a_common_edge_do_not_compare(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / str(c[0]), ROWS, columns=c) for c in ([0, 1], [2, 3]))
    with pytest.raises(EaptkError, match="kept no edge in common"):
        compared(first, second)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "some",
            {"columns": [1]},
            f"kept {len(SOME)} of .* edges, input→a0.h1<q> not among them; measure edges",
        ),
        ("top", {"dense": True}, "strongest edges: zeros of the dense convention say nothing"),
        (
            "top",
            {"columns": [1, 2]},
            "strongest edges, which differ, so no part of its edges can be measured",
        ),
        ("statistics of some", {"columns": SOME[:3]}, "keeps no rows, so no part of its edges"),
        ("pairs", {"columns": [GRAPH.n_edges - 1]}, "there is no edge"),
    ],
)
def test_what_a_run_does_not_know_is_not_measured(
    runs: dict[str, Run], name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EaptkError, match=message) as error:
        measure(runs[name], **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["whole", "top", "some"])
def test_only_a_run_of_sums_has_absolute_ones(runs: dict[str, Run], name: str) -> None:
    with pytest.raises(EaptkError, match="kept no sums over layer pairs"):
        runs[name].absolute()


@pytest.mark.parametrize("name", ["some", "top of some"])
def test_complexity_under_other_histograms_is_that_of_the_kept_edges(
    runs: dict[str, Run], others: dict[str, Run], name: str
) -> None:
    pair = (runs[name], others[name])
    found = complexity_sensitivity(pair, compared(*pair), bins=[30], shares=[0.5])
    upper = compared(*pair).metrics[0].upper / 2
    expected = [measure(run, bins=30, upper=upper).complexity for run in pair]
    np.testing.assert_allclose(found[0].values, expected, rtol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_a_heatmap_shows_kept_edges_alone_and_says_so(
    runs: dict[str, Run], name: str, tmp_path: Path
) -> None:
    run = runs[name]
    figure = run_figure(run, measure(run))
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 1 + run.keep.layer_pairs
    shown = np.ma.count(panels[0].images[0].get_array())
    notes = " ".join(text.get_text() for axes in panels for text in axes.texts)
    if run.keep.top is not None:
        assert shown == len(run.edge_means().columns)
    else:
        assert shown == len(run.columns)
    assert ("not kept" in notes) == (shown < run.graph.n_edges)


def test_a_comparison_is_drawn_with_unknown_edges_blank(
    runs: dict[str, Run], others: dict[str, Run], tmp_path: Path
) -> None:
    found = compared(runs["some"], others["some"])
    assert found.write(tmp_path)
    figure = comparison_figure(found)
    assert f"not kept: {len(SOME)} of {GRAPH.n_edges} edges are" in " ".join(
        text.get_text() for axes in figure.axes for text in axes.texts
    )


def test_a_directory_stands_for_its_run(runs: dict[str, Run], others: dict[str, Run]) -> None:
    a, b = runs["whole"], others["whole"]
    assert measure(str(a.path)).to_dict() == measure(a).to_dict()
    np.testing.assert_array_equal(strongest(a.path, 3), strongest(a, 3))
    given = {"resampling": Resampling(n_resamples=100), "names": ["a", "b"]}
    assert compare([str(a.path), b.path], **given).to_dict() == compare([a, b], **given).to_dict()


@pytest.mark.parametrize("name", ["whole", "some", "top", "statistics of some"])
def test_a_run_and_its_scores_are_shown_in_a_line(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert repr(run).startswith(f"Run('{run.path}': {run.n_samples} samples × {GRAPH.n_edges:,} edges, ")
    if run.statistics is None:
        assert repr(run.kept([0])).startswith("KeptScores(1 samples × ")


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("some", f"float32 of {len(SOME)} chosen edges"),
        ("top", "the 7 strongest of each, float32"),
        ("pairs", "over 8 pairs of layers, float32"),
        ("statistics of some", f"metrics only of {len(SOME)} chosen edges: 40 bins on [0, 6]"),
    ],
)
def test_inspect_says_what_was_kept(runs: dict[str, Run], name: str, facts: str) -> None:
    console = Console(width=120, file=StringIO())
    console.print(strongest_edges(runs[name], 3))
    assert facts in runs[name].keep.description
    means = runs[name].edge_means()
    assert runs[name].graph.edge_name(means.columns[np.argmax(means.total)]) in console.file.getvalue()


@pytest.mark.parametrize("name", KINDS)
def test_the_commands_read_runs_of_any_kind(
    runs: dict[str, Run],
    others: dict[str, Run],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(runs[name].path)
    for command in (
        ["metrics", path, "--json", str(tmp_path / "metrics.json")],
        ["compare", path, str(others[name].path), "--resamples", "100"],
    ):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 0
    found = json.loads((tmp_path / "metrics.json").read_text())["real"]
    assert found["intensity"] == measure(runs[name]).intensity
    assert ("7 strongest" in capsys.readouterr().out) == name.startswith("top")


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (
            {"columns": SOME},
            {"columns": SOME[1:]},
            "edges.fingerprint is 'sha256:.*' there, 'sha256:.*' here",
        ),
        ({"columns": SOME}, {}, f"edges.count is {len(SOME)} there, None here"),
        ({"top": 3}, {"top": 4}, "top is 3 there, 4 here"),
        ({"layer_pairs": True}, {}, "layer_pairs is 8 there, None here"),
    ],
)
def test_a_resume_that_would_keep_something_else_is_refused(
    tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], message: str
) -> None:
    run = make_run(tmp_path / "run", ROWS, **ours)
    with (
        pytest.raises(EaptkError, match=message),
        RunWriter(run.path, manifest(GRAPH, len(ROWS), None), keep=Keep(GRAPH, **theirs)),
    ):
        pass


def test_a_run_whose_list_of_edges_is_anothers_is_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ROWS, columns=SOME)
    GRAPH.to_frame(SOME).iloc[::-1].to_parquet(run.path / "edges.parquet")
    with pytest.raises(EaptkError, match=r"edges\.parquet lists other edges than the manifest says"):
        Run.open(run.path)


def test_a_manifest_alone_does_not_say_which_edges_to_keep() -> None:
    read = Keep.from_dict(Keep(GRAPH, columns=SOME).to_dict(), GRAPH)
    with pytest.raises(ValueError, match="does not hold the columns"):
        read.table()


def test_a_run_is_the_same_whatever_batches_it_is_written_in(tmp_path: Path) -> None:
    keep = Keep(GRAPH, top=5)
    run = write_run(tmp_path / "run", ROWS, keep)
    np.testing.assert_array_equal(run.top_columns, np.argsort(-np.abs(ROWS), axis=1, kind="stable")[:, :5])
