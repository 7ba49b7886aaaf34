"""Why the oracle may be believed: its parts agree with plainer computations of the same things."""

from __future__ import annotations

import oracle
import pytest
import torch
from tiny import NAMES, tiny_batch, tiny_model

from eaptk import Graph
from eaptk.graph import Node

GRANULARITIES = ["block", "head"]


def longest_sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, corrupt ids and targets of the longest sample of a batch."""
    batch = tiny_batch()
    b = int(batch.lengths.argmax())
    return batch.ids[b], batch.corrupt_ids[b], batch.targets[b]


@pytest.mark.parametrize("name", NAMES)
def test_models_compute_in_true_float64(name: str) -> None:
    ids, _, _ = longest_sample()
    usual, exact = tiny_model(name), tiny_model(name, attention="exact")
    single = tiny_model(name, torch.float32)
    logits = oracle.run(usual, ids)
    torch.testing.assert_close(logits, oracle.run(exact, ids), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.float(), oracle.run(single, ids), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits, oracle.run(single, ids).double())


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_far_from_linear(name: str) -> None:
    """Activations of order one: the stream and the logits neither vanish nor explode."""
    ids, _, _ = longest_sample()
    model = tiny_model(name)
    written = oracle.record(model, ids, Graph.from_model(model))
    assert all(0.2 < float(value.std()) < 10 for value in written.values())
    assert 0.5 < float(oracle.run(model, ids).detach().std()) < 10


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_sources_rebuild_what_each_norm_reads(name: str, granularity: str) -> None:
    ids, _, _ = longest_sample()
    model = tiny_model(name)
    graph = Graph.from_model(model, granularity)
    layers, final_norm = oracle.decoder_layers(model)
    norms = []
    for i, layer in enumerate(layers):
        norms += [(layer.attention_norm, Node("attention", i)), (layer.mlp_norm, Node("mlp", i))]
    norms.append((final_norm, Node("logits", graph.n_layers)))
    streams: list[torch.Tensor] = []
    handles = [
        norm.register_forward_pre_hook(lambda m, args: streams.append(args[0][0].detach()))
        for norm, _ in norms
    ]
    with oracle.hooked(*handles), torch.no_grad():
        oracle.run(model, ids)
    written = oracle.record(model, ids, graph)

    for (_, destination), stream in zip(norms, streams, strict=True):
        before = [source for source in graph.sources if oracle.is_edge(graph, source, destination)]
        rebuilt = sum(written[source.name] for source in before)
        if granularity == "head":
            blocks = {source.layer for source in before if source.kind == "attention"}
            biases = [getattr(layers[block].output_projection, "bias", None) for block in sorted(blocks)]
            rebuilt = rebuilt + sum(bias for bias in biases if bias is not None)
        torch.testing.assert_close(rebuilt, stream, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ablation", ["zero", "patching"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_finite_differences(name: str, granularity: str, ablation: str) -> None:
    ids, corrupt, targets = longest_sample()
    model = tiny_model(name)
    graph = Graph.from_model(model, granularity)
    replacement = oracle.record(model, corrupt, graph) if ablation == "patching" else None
    loss = oracle.nll(targets)
    exact = oracle.scores(model, ids, loss, graph, replacement)
    last = graph.n_layers - 1
    head = ".h1" if granularity == "head" else ""
    edges = [
        (f"a0{head}", f"a{last}{head}<q>"),
        ("m0", f"a{last}{head}<k>"),
        ("input", f"a{last}{head}<v>"),
        ("input", f"m{last}"),
        (f"a{last}{head}", "logits"),
    ]
    matrix = {
        (s.name, d.name): float(exact[i, j])
        for i, s in enumerate(graph.sources)
        for j, d in enumerate(graph.destinations)
    }
    found = [oracle.finite_difference(model, ids, loss, graph, *edge, replacement) for edge in edges]
    assert found == pytest.approx([matrix[edge] for edge in edges], rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_perturbation_the_loss_is_the_models_own(name: str) -> None:
    ids, _, targets = longest_sample()
    model = tiny_model(name)
    graph = Graph.from_model(model, "head")
    change = oracle.changes(oracle.record(model, ids, graph), None)
    epsilon = torch.zeros(graph.n_sources, graph.n_destinations, dtype=torch.float64)
    own = torch.nn.functional.cross_entropy(oracle.run(model, ids), targets)
    perturbed = oracle.perturbed_loss(model, ids, oracle.nll(targets), graph, change, epsilon)
    torch.testing.assert_close(perturbed, own, rtol=1e-12, atol=1e-12)


def test_ablating_all_of_the_stream_at_the_logits_leaves_the_head_of_zero() -> None:
    """ε = 1 on every edge into the logits, finitely: what is left to read is nothing at all."""
    ids, _, targets = longest_sample()
    model = tiny_model("llama")
    graph = Graph.from_model(model)
    change = oracle.changes(oracle.record(model, ids, graph), None)
    epsilon = torch.zeros(graph.n_sources, graph.n_destinations, dtype=torch.float64)
    epsilon[:, -1] = 1.0
    loss = oracle.perturbed_loss(model, ids, oracle.nll(targets), graph, change, epsilon)
    uniform = torch.log(torch.tensor(float(model.config.vocab_size), dtype=torch.float64))
    torch.testing.assert_close(loss, uniform, rtol=1e-6, atol=1e-6)
