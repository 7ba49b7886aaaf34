"""`attribute`: its rows are what direct perturbation says they are, for every model, method and loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import relative_error
from tiny import NAMES, VOCABULARY, tiny_batch, tiny_model
from torch import Tensor, nn

from eaptk import (
    Batch,
    Graph,
    Sample,
    attribute,
    collate,
    source_means,
)

GRANULARITIES = ["block", "head"]
EXACT = 1e-12  # relative Frobenius in float64
SDPA_NAMES = [name for name in NAMES if name != "gemma2"]  # sdpa cannot cap attention scores


@pytest.mark.parametrize("qkv", ["split", "merged"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_edge_agrees_with_direct_perturbation(name: str, granularity: str, qkv: str) -> None:
    model, batch = tiny_model(name), tiny_batch()
    graph = Graph.from_model(model, granularity, qkv)
    scores = attribute(model, batch, graph)
    assert scores.rows.dtype == torch.float64
    assert relative_error(scores.matrix(), oracle.batch_scores(model, batch, graph)) < EXACT


@pytest.mark.parametrize("qkv", ["split", "merged"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_patching_agrees_with_direct_perturbation(name: str, granularity: str, qkv: str) -> None:
    model, batch = tiny_model(name), tiny_batch()
    graph = Graph.from_model(model, granularity, qkv)
    scores = attribute(model, batch, graph, ablation="patching")
    assert relative_error(scores.matrix(), oracle.batch_scores(model, batch, graph, "patching")) < EXACT


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_mean_ablation_agrees_with_direct_perturbation(name: str, granularity: str) -> None:
    model, batch, others = tiny_model(name), tiny_batch(), tiny_batch(5, seed=1)
    graph = Graph.from_model(model, granularity)
    scores = attribute(model, batch, graph, ablation="mean", means=source_means(model, [others], graph))
    means = oracle.mean_written(model, others, graph)
    assert (
        relative_error(scores.matrix(), oracle.batch_scores(model, batch, graph, "mean", means=means)) < EXACT
    )


def squared_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """A loss of no particular meaning at the last position that carries loss, for one sample."""
    last = int((targets >= 0).nonzero().max())
    return logits[last].square().mean()


def squared_logits_of_a_batch(logits: Tensor, batch: Batch) -> Tensor:
    return torch.stack([squared_logits(*pair) for pair in zip(logits, batch.targets, strict=True)])


@pytest.mark.parametrize("ablation", ["zero", "patching"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("loss", ["logit_diff", "callable"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2"])
def test_other_losses_agree_with_direct_perturbation(
    name: str, loss: str, granularity: str, ablation: str
) -> None:
    model, batch = tiny_model(name), tiny_batch()
    graph = Graph.from_model(model, granularity)
    ours, theirs = (squared_logits_of_a_batch, squared_logits) if loss == "callable" else (loss, loss)
    scores = attribute(model, batch, graph, ablation=ablation, loss=ours)
    assert relative_error(scores.matrix(), oracle.batch_scores(model, batch, graph, ablation, theirs)) < EXACT


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gpt_neox", "gemma2"])
def test_kl_is_how_far_each_edge_of_the_corrupted_run_moves_it_from_the_clean_one(
    name: str, granularity: str
) -> None:
    model, batch = tiny_model(name), tiny_batch()
    graph = Graph.from_model(model, granularity)
    scores = attribute(model, batch, graph, ablation="patching", loss="kl")
    assert relative_error(scores.matrix(), oracle.batch_scores(model, batch, graph, "patching", "kl")) < EXACT


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(name: str, granularity: str) -> None:
    single, double, batch = tiny_model(name, torch.float32), tiny_model(name), tiny_batch()
    graph = Graph.from_model(single, granularity)
    rows = attribute(single, batch, graph).rows
    assert rows.dtype == torch.float32
    assert relative_error(rows, attribute(double, batch, graph).rows) < 1e-5


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "gemma2"])
def test_half_precision_models_give_close_float32_rows(
    name: str, dtype: torch.dtype, granularity: str
) -> None:
    half, single, batch = tiny_model(name, dtype), tiny_model(name, torch.float32), tiny_batch()
    graph = Graph.from_model(half, granularity)
    rows = attribute(half, batch, graph).rows
    assert rows.dtype == torch.float32
    # The model's own rounding, not the contraction's, is what is bounded here.
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    assert relative_error(rows, attribute(single, batch, graph).rows) < tolerance


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", SDPA_NAMES)
def test_sdpa_and_eager_attention_give_the_same_scores(name: str, granularity: str) -> None:
    sdpa, eager = (tiny_model(name, torch.float32, attention) for attention in ("sdpa", "eager"))
    graph, batch = Graph.from_model(sdpa, granularity), tiny_batch()
    assert relative_error(attribute(sdpa, batch, graph).rows, attribute(eager, batch, graph).rows) < 1e-5


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("layers", "width", "heads", "kv_heads"), [(1, 36, 6, 3), (4, 20, 2, 1), (2, 132, 33, 33)]
)
def test_awkward_shapes_agree_with_direct_perturbation(
    layers: int, width: int, heads: int, kv_heads: int, granularity: str
) -> None:
    model = tiny_model(
        "llama",
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    graph, batch = Graph.from_model(model, granularity), tiny_batch()
    scores = attribute(model, batch, graph)
    assert relative_error(scores.matrix(), oracle.batch_scores(model, batch, graph)) < EXACT


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_long_sequence_beside_a_short_one_agrees_with_direct_perturbation(granularity: str) -> None:
    """Long and wide enough to be contracted in several pieces, the last of them shorter."""
    model = tiny_model("gpt_neox", hidden_size=256, max_position_embeddings=2048)
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCABULARY, (count,), generator=generator).tolist())

    batch = collate([Sample("long", tokens(1301), tokens(3)), Sample("short", tokens(17), tokens(3))])
    graph = Graph.from_model(model, granularity)
    scores = attribute(model, batch, graph)
    assert relative_error(scores.matrix(), oracle.batch_scores(model, batch, graph)) < EXACT


# Identities


@pytest.mark.parametrize("name", NAMES)
def test_zero_ablation_of_all_a_destination_reads_changes_nothing_as_norms_ignore_scale(name: str) -> None:
    model, batch = tiny_model(name), tiny_batch()
    matrix = attribute(model, batch, Graph.from_model(model)).matrix()
    sums = np.abs(matrix.sum(axis=1))
    assert sums.max() < 1e-4 * np.abs(matrix).sum(axis=1).max()


@pytest.mark.parametrize("ablation", ["zero", "patching"])
@pytest.mark.parametrize("name", NAMES)
def test_heads_add_up_to_their_block(name: str, ablation: str) -> None:
    model, batch = tiny_model(name), tiny_batch()
    # The output projection's bias belongs to the block but to no head.
    for layer in oracle.decoder_layers(model)[0]:
        if getattr(layer.output_projection, "bias", None) is not None:
            nn.init.zeros_(layer.output_projection.bias)
    block, head = (Graph.from_model(model, granularity) for granularity in GRANULARITIES)
    fine = attribute(model, batch, head, ablation=ablation).matrix()
    summed = np.zeros((len(batch), block.n_sources, block.n_destinations))

    def owner(nodes: tuple[Any, ...], node: Any) -> int:
        parts = (node.kind, node.layer, node.branch)
        return [(n.kind, n.layer, n.branch) for n in nodes].index(parts)

    for s, source in enumerate(head.sources):
        for d, destination in enumerate(head.destinations):
            summed[:, owner(block.sources, source), owner(block.destinations, destination)] += fine[:, s, d]
    assert relative_error(attribute(model, batch, block, ablation=ablation).matrix(), summed) < EXACT


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_queries_keys_and_values_add_up_to_the_merged_destination(name: str, granularity: str) -> None:
    model, batch = tiny_model(name), tiny_batch()
    split, merged = (Graph.from_model(model, granularity, qkv) for qkv in ("split", "merged"))
    fine = attribute(model, batch, split).matrix()
    summed = [
        fine[..., [(n.kind, n.layer) == (node.kind, node.layer) for n in split.destinations]].sum(-1)
        for node in merged.destinations
    ]
    assert relative_error(attribute(model, batch, merged).matrix(), np.stack(summed, -1)) < EXACT


def test_scores_are_linear_in_the_loss() -> None:
    model, batch = tiny_model("qwen2"), tiny_batch()
    graph = Graph.from_model(model, "head")

    def first(logits: Tensor, batch: Batch) -> Tensor:
        return logits[:, 0].logsumexp(-1)

    def mixture(logits: Tensor, batch: Batch) -> Tensor:
        return 2.0 * first(logits, batch) - 0.5 * squared_logits_of_a_batch(logits, batch)

    rows = {loss: attribute(model, batch, graph, loss=loss).rows for loss in (first, mixture)}
    squared = attribute(model, batch, graph, loss=squared_logits_of_a_batch).rows
    assert relative_error(rows[mixture], 2.0 * rows[first] - 0.5 * squared) < EXACT


def test_patching_with_the_same_prompt_scores_nothing() -> None:
    model, batch = tiny_model("llama"), tiny_batch()
    same = Batch(batch.ids, batch.lengths, batch.targets, batch.names, corrupt_ids=batch.ids)
    graph = Graph.from_model(model, "head")
    assert attribute(model, same, graph, ablation="patching").rows.abs().max() < 1e-12


@pytest.mark.parametrize("loss", ["nll", "logit_diff", "kl"])
def test_the_loss_reported_is_each_samples_own(loss: str) -> None:
    model, batch = tiny_model("llama"), tiny_batch()
    expected = []
    for b, length in enumerate(batch.lengths.tolist()):
        ids, corrupt = batch.ids[b, :length], batch.corrupt_ids[b, :length]
        targets, foils = batch.targets[b, :length], batch.foils[b, :length]
        if loss == "kl":
            expected.append(oracle.kl(targets, oracle.run(model, ids))(oracle.run(model, corrupt)))
        else:
            own = oracle.nll(targets) if loss == "nll" else oracle.logit_difference(targets, foils)
            expected.append(own(oracle.run(model, ids)))
    found = attribute(model, batch, Graph.from_model(model), ablation="patching", loss=loss).loss
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=EXACT, atol=EXACT)


# What comes back


def test_a_tokenizers_mapping_does_as_a_batch() -> None:
    model, batch = tiny_model("llama"), tiny_batch()
    graph = Graph.from_model(model)
    mask = (torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]).long()
    labels = torch.full_like(batch.ids, -100)
    labels[:, 1:] = batch.targets[:, :-1]
    # The last target of each sample lies beyond what is fed, so it has no place among the labels.
    ends = torch.arange(len(batch)), batch.lengths - 1
    targets = batch.targets.clone()
    targets[ends] = -100
    kept = [b for b in range(len(batch)) if (targets[b] >= 0).any()]
    mapping = {"input_ids": batch.ids[kept], "attention_mask": mask[kept], "labels": labels[kept]}
    names = tuple(map(str, range(len(kept))))
    same = Batch(batch.ids[kept], batch.lengths[kept], targets[kept], names)
    assert len(kept) > 1
    assert torch.equal(attribute(model, mapping, graph).rows, attribute(model, same, graph).rows)


def test_scores_are_read_as_matrix_frame_graph_and_largest_edges() -> None:
    model, batch = tiny_model("llama"), tiny_batch()
    graph = Graph.from_model(model, "head")
    scores = attribute(model, batch, graph)
    rows = scores.rows.numpy()
    np.testing.assert_array_equal(scores.matrix(), graph.matrix(rows))

    frame = scores.to_frame()
    assert frame["source"].tolist() == graph.to_frame()["source"].tolist()
    np.testing.assert_array_equal(frame[[0, 1, 2]].to_numpy().T, rows)

    mean = rows.mean(0)
    digraph = scores.to_networkx()
    assert digraph.edges["input", "m0"]["score"] == pytest.approx(mean[graph.column("input", "m0")])

    best = scores.top(5)
    magnitude = np.abs(rows).mean(0)
    order = np.argsort(-magnitude)[:5]
    assert [name for name, _ in best] == [graph.edge_name(column) for column in order]
    assert [score for _, score in best] == pytest.approx(mean[order].tolist())
