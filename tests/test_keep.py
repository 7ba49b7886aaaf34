"""What is kept of a row: some edges, each sample's strongest, sums over pairs of layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from keeping import GRAPH, GRAPHS, HISTOGRAM, SOME, make_rows

from eaptk import EaptkError, Graph
from eaptk.keep import Keep

NAMES = [f"q{i}" for i in range(8)]
KINDS: dict[str, dict[str, Any]] = {
    "rows": {},
    "some": {"columns": SOME},
    "top": {"top": 7},
    "top of some": {"columns": SOME, "top": 7},
    "pairs": {"layer_pairs": True},
    "pairs of some": {"columns": SOME, "layer_pairs": True},
}


def arrays(found: Any) -> dict[str, np.ndarray]:
    return found if isinstance(found, dict) else {"scores": found}


def pairs_by_name(graph: Graph, columns: np.ndarray, rows: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Sums in float64, by the layers of each edge's two ends."""
    found: dict[tuple[int, int], np.ndarray] = {}
    for column in columns:
        source = graph.sources[graph.edge_source[column]].layer
        destination = graph.destinations[graph.edge_destination[column]].layer
        value = rows[:, column].astype(np.float64)
        found[source, destination] = found.get((source, destination), 0) + value
    return found


@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=60, max_size=60), min_size=1, max_size=3),
    k=st.integers(1, 36),
    dtype=st.sampled_from(["float32", "float16"]),
)
@settings(max_examples=60, deadline=None)
def test_the_strongest_are_numpys_on_the_whole_row_and_of_equal_ones_the_first(
    rows: list[list[int]], k: int, dtype: str
) -> None:
    graph = GRAPHS["parallel"]
    scores = (np.array(rows, np.float32) / 7)[:, : graph.n_edges]
    found = Keep(graph, dtype, top=k).of(torch.from_numpy(scores), NAMES)
    whole = scores.astype(dtype)
    expected = np.argsort(-np.abs(whole), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found["columns"], expected)
    np.testing.assert_array_equal(found["scores"], np.take_along_axis(whole, expected, 1))


def test_the_strongest_of_some_edges_are_numbered_as_the_graph_numbers_them() -> None:
    rows = make_rows()
    found = Keep(GRAPH, columns=SOME, top=5).of(torch.from_numpy(rows), NAMES)
    expected = SOME[np.argsort(-np.abs(rows[:, SOME]), axis=1, kind="stable")[:, :5]]
    np.testing.assert_array_equal(found["columns"], expected)


@pytest.mark.parametrize("some", [False, True], ids=["all edges", "some edges"])
@pytest.mark.parametrize("name", GRAPHS)
def test_sums_over_pairs_of_layers_are_those_of_the_whole_row(name: str, some: bool) -> None:
    graph = GRAPHS[name]
    rows = make_rows(graph=graph)
    columns = np.arange(0, graph.n_edges, 4) if some else np.arange(graph.n_edges)
    keep = Keep(graph, columns=columns if some else None, layer_pairs=True)
    found = keep.of(torch.from_numpy(rows), NAMES)
    table = keep.table().to_pandas()
    signed = pairs_by_name(graph, columns, rows)
    absolute = pairs_by_name(graph, columns, np.abs(rows))
    pairs = list(zip(table["source_layer"], table["destination_layer"], strict=True))
    assert sorted(pairs) == sorted(signed)
    np.testing.assert_array_equal(found["scores"].T, np.float32([signed[pair] for pair in pairs]))
    np.testing.assert_array_equal(found["absolute"].T, np.float32([absolute[pair] for pair in pairs]))
    assert table["n_edges"].sum() == len(columns)


@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from(["split", "merged"]))
@settings(max_examples=20, deadline=None)
def test_pairs_of_layers_are_the_edges_of_a_graph_of_layers(
    n_layers: int, n_heads: int, parallel: bool, qkv: Any
) -> None:
    graph = Graph(n_layers, n_heads, n_heads, "head", qkv, parallel)
    layers = graph.layers()
    ends = zip(graph.edge_source, graph.edge_destination, strict=True)
    expected = {(graph.sources[s].layer, graph.destinations[d].layer) for s, d in ends}
    ends = zip(layers.edge_source, layers.edge_destination, strict=True)
    found = {(layers.sources[s].layer, layers.destinations[d].layer) for s, d in ends}
    assert found == expected
    assert len(found) == layers.n_edges


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_what_is_kept_of_a_sample_does_not_depend_on_its_batch(how: dict[str, Any]) -> None:
    keep, rows = Keep(GRAPH, **how), torch.from_numpy(make_rows())
    together = arrays(keep.of(rows, NAMES))
    for i in range(len(rows)):
        alone = arrays(keep.of(rows[[i]], NAMES[i : i + 1]))
        for name, array in together.items():
            np.testing.assert_array_equal(alone[name][0], array[i])


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_what_is_kept_is_as_wide_as_a_manifest_says(how: dict[str, Any]) -> None:
    keep = Keep(GRAPH, **how)
    found = arrays(keep.of(torch.from_numpy(make_rows()), NAMES))
    read = Keep.from_dict(keep.to_dict(), GRAPH)
    assert {name: (array.shape[1], array.dtype) for name, array in found.items()} == read.arrays
    assert read.to_dict() == keep.to_dict()
    assert read.kept_graph == keep.kept_graph


def test_a_manifest_of_before_there_was_a_choice_keeps_whole_rows() -> None:
    read = Keep.from_dict({"row_dtype": "float16", "metrics_only": None}, GRAPH)
    assert read.whole
    assert read.arrays == {"scores": (GRAPH.n_edges, np.dtype(np.float16))}


def test_naming_all_edges_is_naming_none() -> None:
    everything = Keep(GRAPH, columns=np.ones(GRAPH.n_edges, dtype=bool))
    assert everything.to_dict() == Keep(GRAPH).to_dict()


@pytest.mark.parametrize("columns", [SOME[::-1], np.repeat(SOME, 2)], ids=["backwards", "twice"])
def test_edges_are_a_set(columns: np.ndarray) -> None:
    assert Keep(GRAPH, columns=columns).to_dict() == Keep(GRAPH, columns=SOME).to_dict()


def test_other_edges_of_the_same_number_have_another_fingerprint() -> None:
    first, second = (Keep(GRAPH, columns=[column]).to_dict()["edges"] for column in (3, 4))
    assert first["count"] == second["count"] == 1
    assert first["fingerprint"] != second["fingerprint"]


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_a_score_beyond_float16_is_refused_with_its_sample_and_edge(how: dict[str, Any]) -> None:
    rows = make_rows()
    rows[2, SOME[5]] = 1e6
    keep = Keep(GRAPH, "float16", **how)
    edge = GRAPH.edge_name(SOME[5])
    if keep.layer_pairs:
        edge = "l[01]→l[01]|l[01]→logits|input→l[01]|input→logits"
    with pytest.raises(EaptkError, match=f"sample 'q2': the score of edge ({edge}) .*float16; use .*float32"):
        keep.of(torch.from_numpy(rows), NAMES)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"top": 0}, "top is 0; it must be at least 1"),
        ({"top": GRAPH.n_edges}, "to keep them all, leave it out"),
        ({"columns": SOME, "top": len(SOME)}, f"less than the {len(SOME)} edges"),
        ({"columns": []}, "no edge is selected"),
        ({"columns": [GRAPH.n_edges]}, f"there is no edge {GRAPH.n_edges}"),
        ({"columns": np.ones(3, dtype=bool)}, r"mask has shape \(3,\)"),
        ({"top": 3, "layer_pairs": True}, "strongest .* or sums over layer pairs, not both"),
        ({"top": 3, "histogram": HISTOGRAM}, "metrics only or the strongest"),
    ],
)
def test_what_cannot_be_kept_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(EaptkError, match=message) as error:
        Keep(GRAPH, **how)
    assert "\n" not in str(error.value)


def test_the_two_halves_are_the_whole() -> None:
    keep, rows = Keep(GRAPH, top=4), torch.from_numpy(make_rows())
    halves = keep.entries(keep.reduce(rows), NAMES)
    for name, array in keep.of(rows, NAMES).items():
        np.testing.assert_array_equal(halves[name], array)
