"""The benchmark of throughput: what it compares is the same work."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import Qwen2ForCausalLM

from benchmarks.throughput import (
    TARGETS,
    bare_pass,
    lengths,
    make_samples,
    plan_facts,
    shares,
    without_padding,
)
from eaptk import Graph, attribute
from eaptk.dataset import plan_batches


def test_the_lengths_are_the_same_each_time_and_as_many_as_asked_for() -> None:
    assert lengths(2000) == lengths(2000)
    prompts, answers = lengths(2000)
    assert len(prompts) == len(answers) == 2000
    assert min(prompts + answers) >= 1
    assert sum(prompts) + sum(answers) - 2000 == 234_669


def test_packed_batches_hold_the_tokens_of_the_plan_without_padding() -> None:
    samples = make_samples(200, VOCABULARY)
    for rows in plan_batches([sample.n_tokens for sample in samples], 2048):
        own = [samples[row] for row in rows]
        batch = without_padding(own, VOCABULARY)
        assert len(batch) == len(own)
        assert set(batch.lengths.tolist()) == {batch.ids.shape[1]}
        assert abs(batch.ids.numel() - sum(sample.n_tokens for sample in own)) <= len(own) / 2


def new_model() -> Qwen2ForCausalLM:
    model: Qwen2ForCausalLM = tiny_model("qwen2", max_position_embeddings=2048)
    return model


def test_both_loops_run_in_turns_and_are_timed() -> None:
    seconds = shares(2, 1, new_model)
    assert seconds.keys() == {"bare", *TARGETS}
    assert all((each > 0).all() for each in seconds.values())


def test_the_bare_pass_takes_the_gradient_that_attribution_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ_t ⟨gradient, embedding⟩ is minus the sum of what all edges of the input say."""
    model, (sample,) = tiny_model("qwen2", max_position_embeddings=2048), make_samples(2, VOCABULARY)[:1]
    batch = without_padding([sample], VOCABULARY)
    graph = Graph.from_model(model)
    scores = attribute(model, batch, graph)
    found: list[torch.Tensor] = []
    monkeypatch.setattr(
        torch.autograd,
        "grad",
        lambda loss, root, grad=torch.autograd.grad: found.append(grad(loss, root)[0] * root),
    )
    bare_pass(model, batch)
    from_input = [i for i in range(graph.n_edges) if graph.edge_name(i).startswith("input→")]
    assert scores.rows[0, from_input].sum() == pytest.approx(-found[0].sum().item(), rel=1e-6)


def test_a_plan_is_described_as_it_is() -> None:
    facts = plan_facts(2000, 2048)
    assert facts["padding"] <= 0.05
    assert facts["batches"] >= facts["fewest_batches"]
    assert facts["fill"] <= 1
