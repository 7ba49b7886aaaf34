"""`exact_effects`: what a run without an edge loses, against an oracle that shares no code with it."""

from __future__ import annotations

from functools import partial
from typing import Any

import oracle
import pytest
import torch
from oracle import relative_error
from tiny import NAMES, tiny_batch, tiny_model
from torch import Tensor, nn

from eaptk import Batch, EaptkError, Graph, attribute, exact_effects, source_means

EXACT = 1e-10  # relative Frobenius in float64


def some_edges(graph: Graph, n: int = 8) -> list[int]:
    """Edges of all layers: every destination of the last layer is among them, and so is the first edge."""
    last = [int(graph.offset[d]) + int(graph.reach[d]) // 2 for d in range(graph.n_destinations)]
    return sorted({0, *last[-n:], *range(5, graph.n_edges, graph.n_edges // n)})


@torch.no_grad()
def oracle_effects(
    model: nn.Module,
    batch: Batch,
    graph: Graph,
    columns: list[int],
    loss: Any = None,
    ablation: str = "zero",
    means: dict[str, Tensor] | None = None,
) -> Tensor:
    """[B, e]: the loss with ε = 1 at one edge, less the loss with ε = 0; samples alone and unpadded."""
    rows = []
    for b, length in enumerate(batch.lengths.tolist()):
        ids, targets = batch.ids[b, :length], batch.targets[b, :length]
        sample_loss = oracle.nll(targets) if loss is None else loss(b)
        replacement = means
        if ablation == "patching":
            replacement = oracle.record(model, batch.corrupt_ids[b, :length], graph)
        change = oracle.changes(oracle.record(model, ids, graph), replacement)
        epsilon = torch.zeros(graph.n_sources, graph.n_destinations, dtype=model.dtype)
        lost = []
        for column in (None, *columns):
            epsilon.zero_()
            if column is not None:
                epsilon[graph.edge_source[column], graph.edge_destination[column]] = 1
            lost.append(oracle.perturbed_loss(model, ids, sample_loss, graph, change, epsilon))
        rows.append(torch.stack(lost[1:]) - lost[0])
    return torch.stack(rows)


@pytest.mark.parametrize("qkv", ["split", "merged"])
@pytest.mark.parametrize("granularity", ["block", "head"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_changes_as_when_the_edge_is_cut_by_hand(name: str, granularity: str, qkv: str) -> None:
    model, batch = tiny_model(name), tiny_batch()
    graph = Graph.from_model(model, granularity, qkv)
    columns = some_edges(graph)
    expected = oracle_effects(model, batch, graph, columns)
    assert relative_error(exact_effects(model, batch, graph, columns), expected) < EXACT


@pytest.mark.parametrize("granularity", ["block", "head"])
@pytest.mark.parametrize("ablation", ["patching", "mean"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gpt_neox", "gemma2"])
def test_what_replaces_a_source_is_what_the_destination_reads(
    name: str, ablation: str, granularity: str
) -> None:
    model, batch, others = tiny_model(name), tiny_batch(), tiny_batch(5, seed=1)
    graph = Graph.from_model(model, granularity)
    columns = some_edges(graph)
    means = source_means(model, [others], graph) if ablation == "mean" else None
    found = exact_effects(model, batch, graph, columns, ablation=ablation, means=means)
    by_hand = oracle.mean_written(model, others, graph) if ablation == "mean" else None
    expected = oracle_effects(model, batch, graph, columns, ablation=ablation, means=by_hand)
    assert relative_error(found, expected) < EXACT


def squared_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return logits[int((targets >= 0).nonzero().max())].square().mean()


def squared_logits_of_a_batch(logits: Tensor, batch: Batch) -> Tensor:
    return torch.stack([squared_logits(*pair) for pair in zip(logits, batch.targets, strict=True)])


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        ("logit_diff", lambda targets, foils: oracle.logit_difference(targets, foils)),
        (squared_logits_of_a_batch, lambda targets, foils: partial(squared_logits, targets=targets)),
    ],
    ids=["logit_diff", "callable"],
)
def test_any_loss_that_attribution_knows(loss: Any, by_hand: Any) -> None:
    model, batch = tiny_model("qwen2"), tiny_batch()
    graph = Graph.from_model(model)
    columns = some_edges(graph)
    lengths = batch.lengths.tolist()
    expected = oracle_effects(
        model,
        batch,
        graph,
        columns,
        loss=lambda b: by_hand(batch.targets[b, : lengths[b]], batch.foils[b, : lengths[b]]),
    )
    assert relative_error(exact_effects(model, batch, graph, columns, loss=loss), expected) < EXACT


def test_the_effect_on_the_kl_is_what_restoring_the_edge_takes_from_it() -> None:
    model, batch = tiny_model("qwen2"), tiny_batch()
    graph = Graph.from_model(model)
    columns = some_edges(graph)
    found = exact_effects(model, batch, graph, columns, ablation="patching", loss="kl")
    swapped = Batch(batch.corrupt_ids, batch.lengths, batch.targets, batch.names, corrupt_ids=batch.ids)

    def towards_clean(b: int) -> oracle.SampleLoss:
        length = int(batch.lengths[b])
        clean_logits = oracle.run(model, batch.ids[b, :length])
        return oracle.kl(batch.targets[b, :length], clean_logits)

    restored = oracle_effects(model, swapped, graph, columns, loss=towards_clean, ablation="patching")
    assert relative_error(found, -restored) < EXACT


@pytest.mark.parametrize("source", ["a0", "m1"])
def test_scores_predict_the_effect_of_a_source_the_better_the_less_it_writes(source: str) -> None:
    errors = []
    for scale in (1e-1, 1e-2, 1e-3):
        model, batch = tiny_model("qwen2"), tiny_batch()
        graph = Graph.from_model(model)
        layer = model.model.layers[int(source[1])]
        writer = layer.self_attn.o_proj if source[0] == "a" else layer.mlp.down_proj
        writer.weight.data *= scale
        s = [node.name for node in graph.sources].index(source)
        columns = [c for c in range(graph.n_edges) if graph.edge_source[c] == s]
        predicted = attribute(model, batch, graph).rows[:, columns]
        errors.append(relative_error(predicted, exact_effects(model, batch, graph, columns)))
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.5)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.2)


def test_the_input_of_the_first_block_is_what_first_order_cannot_see() -> None:
    """A norm ignores its input's scale: the slope is 0, but nothing at all is another thing to read."""
    model, batch = tiny_model("qwen2"), tiny_batch()
    graph = Graph.from_model(model)
    column = graph.column("input", "a0<v>")
    exact = exact_effects(model, batch, graph, [column])
    assert attribute(model, batch, graph).rows[:, column].abs().max() < 1e-3 * exact.abs().min()


def test_a_sample_is_the_same_alone_and_in_a_batch() -> None:
    model, batch = tiny_model("llama"), tiny_batch()
    graph = Graph.from_model(model)
    together = exact_effects(model, batch, graph, [3, 11])
    for b, length in enumerate(batch.lengths.tolist()):
        alone = Batch(
            batch.ids[[b], :length], batch.lengths[[b]], batch.targets[[b], :length], (batch.names[b],)
        )
        torch.testing.assert_close(exact_effects(model, alone, graph, [3, 11])[0], together[b])


def test_the_model_is_left_as_it_was() -> None:
    model, batch = tiny_model("gpt2").train(), tiny_batch()
    graph = Graph.from_model(model, "head")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact_effects(model, batch, graph, [7, graph.n_edges - 1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert hooks == []


def test_what_cannot_be_measured_is_refused() -> None:
    batch = tiny_batch()
    model = tiny_model("llama", torch.float32)
    graph = Graph.from_model(model)
    with pytest.raises(EaptkError, match=f"there is no edge {graph.n_edges}; they are numbered 0 to"):
        exact_effects(model, batch, graph, [0, graph.n_edges])
    with pytest.raises(EaptkError, match="ablation 'mean' needs means"):
        exact_effects(model, batch, graph, [0], ablation="mean")
    with pytest.raises(EaptkError, match=r"the model is in bfloat16, .* load it in float32"):
        exact_effects(tiny_model("llama", torch.bfloat16), batch, graph, [0])
    # In float32 this overflows only in the product with the unembedding.
    model.lm_head.weight.data *= 1e38
    with pytest.raises(EaptkError, match=r"sample 'sample-0': without edge .* the loss is not finite"):
        exact_effects(model, batch, graph, [0])
