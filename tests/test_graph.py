"""The computation graph: which edges there are, what they are called, and where a row keeps them."""

from __future__ import annotations

import json

import networkx
import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from eaptk import EaptkError, Graph, Node

graphs = st.builds(
    lambda n_layers, n_kv_heads, group, granularity, qkv, parallel: Graph(
        n_layers, n_kv_heads * group, n_kv_heads, granularity, qkv, parallel
    ),
    n_layers=st.integers(1, 4),
    n_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    granularity=st.sampled_from(["block", "head"]),
    qkv=st.sampled_from(["split", "merged"]),
    parallel=st.booleans(),
)


def names(nodes: tuple[Node, ...]) -> list[str]:
    return [node.name for node in nodes]


def test_sources_are_in_order_of_writing() -> None:
    assert names(Graph(2, 4, 2).sources) == ["input", "a0", "m0", "a1", "m1"]
    assert names(Graph(2, 2, 1, "head").sources) == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]


def test_destinations_are_in_order_of_reading() -> None:
    assert names(Graph(1, 4, 2).destinations) == ["a0<q>", "a0<k>", "a0<v>", "m0", "logits"]
    assert names(Graph(2, 4, 2, qkv="merged").destinations) == ["a0", "m0", "a1", "m1", "logits"]


def test_keys_and_values_have_one_destination_a_key_value_head() -> None:
    assert names(Graph(1, 4, 2, "head").destinations) == [
        *("a0.h0<q>", "a0.h1<q>", "a0.h2<q>", "a0.h3<q>"),
        *("a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>"),
        *("m0", "logits"),
    ]


def test_merged_destinations_are_whole_attentions_at_head_granularity_too() -> None:
    assert names(Graph(1, 4, 2, "head", "merged").destinations) == ["a0", "m0", "logits"]


@pytest.mark.parametrize("n_layers", [1, 2, 7, 28])
def test_a_serial_decoder_has_4ll_plus_3l_plus_1_block_edges(n_layers: int) -> None:
    assert Graph(n_layers, 28, 4).n_edges == 4 * n_layers**2 + 3 * n_layers + 1


def test_sizes_of_a_7b_model_at_head_granularity() -> None:
    graph = Graph(28, 28, 4, "head")
    assert (graph.n_sources, graph.n_destinations) == (1 + 28 * 29, 28 * (28 + 4 + 4 + 1) + 1)


@given(graphs)
def test_an_edge_exists_iff_its_source_is_written_before_its_destination_reads(graph: Graph) -> None:
    for source in graph.sources:
        for destination in graph.destinations:
            same_layer = graph.parallel is False and source.kind == "attention" and destination.kind == "mlp"
            earlier = source.layer < destination.layer or (source.layer == destination.layer and same_layer)
            if earlier:
                column = graph.column(source.name, destination.name)
                assert graph.edge_name(column) == f"{source.name}→{destination.name}"
            else:
                with pytest.raises(EaptkError, match=f"no edge {source.name}→"):
                    graph.column(source.name, destination.name)


def test_a_parallel_mlp_does_not_read_its_own_layers_attention() -> None:
    assert Graph(1, 2, 2).column("a0", "m0") == 4
    with pytest.raises(EaptkError, match="a0 is written after m0 reads"):
        Graph(1, 2, 2, parallel=True).column("a0", "m0")


@given(graphs)
def test_columns_number_the_edges_without_gaps(graph: Graph) -> None:
    ends = zip(graph.edge_source, graph.edge_destination, strict=True)
    numbered = [graph.column(graph.sources[s].name, graph.destinations[d].name) for s, d in ends]
    assert numbered == list(range(graph.n_edges))


@given(graphs)
def test_each_destinations_edges_are_one_slice_of_the_row_over_the_first_sources(graph: Graph) -> None:
    assert graph.offset[0] == 0
    assert graph.offset[-1] == graph.n_edges
    for d, start in enumerate(graph.offset[:-1]):
        own = slice(start, graph.offset[d + 1])
        assert (graph.edge_destination[own] == d).all()
        assert graph.edge_source[own].tolist() == list(range(graph.reach[d]))


@given(graphs, st.integers(0, 2**32 - 1))
def test_matrix_and_pack_are_inverse(graph: Graph, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(2, 3, graph.n_edges)).astype(np.float32)
    matrix = graph.matrix(rows)
    assert matrix.shape == (2, 3, graph.n_sources, graph.n_destinations)
    assert matrix.dtype == rows.dtype
    np.testing.assert_array_equal(graph.pack(matrix), rows)
    assert np.count_nonzero(matrix) == np.count_nonzero(rows)


def test_matrix_puts_a_score_at_its_source_and_destination() -> None:
    graph = Graph(2, 4, 2, "head")
    row = np.zeros(graph.n_edges)
    row[graph.column("a0.h3", "a1.h1<v>")] = 5.0
    matrix = graph.matrix(row)
    assert matrix[names(graph.sources).index("a0.h3"), names(graph.destinations).index("a1.h1<v>")] == 5.0
    assert matrix.sum() == 5.0


@given(graphs)
def test_json_restores_the_graph(graph: Graph) -> None:
    assert Graph.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph


@given(graphs)
def test_to_frame_has_one_row_an_edge(graph: Graph) -> None:
    frame = graph.to_frame()
    assert list(frame.columns) == ["column", "source", "destination", "source_layer", "destination_layer"]
    assert frame["column"].tolist() == list(range(graph.n_edges))
    found = [graph.column(s, d) for s, d in zip(frame["source"], frame["destination"], strict=True)]
    assert found == frame["column"].tolist()
    layers = {node.name: node.layer for node in (*graph.sources, *graph.destinations)}
    assert frame["source_layer"].tolist() == [layers[name] for name in frame["source"]]
    assert frame["destination_layer"].tolist() == [layers[name] for name in frame["destination"]]


@given(graphs)
def test_to_networkx_keeps_every_edge_and_its_score(graph: Graph) -> None:
    row = np.arange(graph.n_edges) + 0.5
    digraph = graph.to_networkx(row)
    assert isinstance(digraph, networkx.DiGraph)
    assert digraph.number_of_edges() == graph.n_edges
    for source, destination, attributes in digraph.edges(data=True):
        assert attributes["score"] == graph.column(source, destination) + 0.5
        assert attributes["column"] == graph.column(source, destination)


def test_to_networkx_without_scores_has_none() -> None:
    digraph = Graph(1, 2, 1).to_networkx()
    assert all("score" not in attributes for _, _, attributes in digraph.edges(data=True))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            transformers.Qwen2Config(num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2),
            Graph(3, 6, 2, "head"),
        ),
        (transformers.GPT2Config(n_layer=2, n_head=4), Graph(2, 4, 4, "head")),
        (
            transformers.GPTNeoXConfig(
                num_hidden_layers=2, num_attention_heads=8, hidden_size=64, use_parallel_residual=True
            ),
            Graph(2, 8, 8, "head", parallel=True),
        ),
        (
            transformers.GPTNeoXConfig(
                num_hidden_layers=2, num_attention_heads=8, hidden_size=64, use_parallel_residual=False
            ),
            Graph(2, 8, 8, "head", parallel=False),
        ),
    ],
    ids=["qwen2", "gpt2", "gpt_neox-parallel", "gpt_neox-serial"],
)
def test_a_config_tells_the_graph(config: transformers.PreTrainedConfig, expected: Graph) -> None:
    assert Graph.from_config(config, granularity="head") == expected


@pytest.mark.parametrize(
    ("source", "destination", "message"),
    [
        ("a9", "logits", "no source named 'a9'"),
        ("a1", "a1<x>", "no destination named 'a1<x>' in this graph; did you mean 'a1<"),
        ("inptu", "logits", "did you mean 'input'"),
        ("logits", "logits", "no source named 'logits'"),
        ("m1", "a1<q>", "m1 is written after a1<q> reads"),
    ],
)
def test_a_wrong_name_is_answered_with_what_is_wrong(source: str, destination: str, message: str) -> None:
    with pytest.raises(EaptkError, match=message):
        Graph(2, 4, 2).column(source, destination)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "neuron"}, "granularity is 'neuron'; it must be one of block, head"),
        ({"qkv": "fused"}, "qkv is 'fused'; it must be one of split, merged"),
        ({"n_layers": 0}, "at least one layer"),
        ({"n_heads": 4, "n_kv_heads": 3}, "heads=4, key/value heads=3"),
    ],
)
def test_an_impossible_graph_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(EaptkError, match=message):
        Graph(**{"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, **fields})


def test_arrays_of_another_graph_are_refused() -> None:
    graph = Graph(2, 4, 2)
    with pytest.raises(EaptkError, match=r"\(3, 22\).*23 edges"):
        graph.matrix(np.zeros((3, 22)))
    with pytest.raises(EaptkError, match=r"\(5, 8\).*\(5, 9\)"):
        graph.pack(np.zeros((5, 8)))
