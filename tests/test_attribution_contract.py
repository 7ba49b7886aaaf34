"""`attribute` leaves the model as it found it, and refuses what it cannot score right."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_batch, tiny_model
from torch import Tensor, nn

from eaptk import (
    Batch,
    EaptkError,
    Graph,
    Sample,
    attribute,
    collate,
    source_means,
)

GRANULARITIES = ["block", "head"]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that scoring it could disturb."""
    hooks = [name for name in vars(model) if name.endswith(("_hooks", "_pre_hooks"))]
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "weights": [p.detach().numpy().copy() for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "config": model.config.to_dict(),
        "grad_mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert all(map(np.array_equal, before.pop("weights"), after.pop("weights")))
    assert before == after


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "gemma2"])
def unusual_model(request: pytest.FixtureRequest) -> nn.Module:
    """A model half in training mode, half frozen, with a hook of the user's own."""
    model = tiny_model(request.param, torch.float32)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    model.register_forward_hook(lambda module, args, out: None)
    return model


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_model_is_left_exactly_as_found(unusual_model: nn.Module, granularity: str, mode: Any) -> None:
    graph, batch = Graph.from_model(unusual_model, granularity), tiny_batch()
    expected = attribute(unusual_model, batch, graph, ablation="patching").rows
    with mode():
        before = state(unusual_model)
        scores = attribute(unusual_model, batch, graph, ablation="patching")
        assert_same(before, state(unusual_model))
    assert torch.equal(scores.rows, expected)
    assert not scores.rows.requires_grad


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_model_is_left_exactly_as_found_after_an_exception(
    unusual_model: nn.Module, granularity: str
) -> None:
    def broken(logits: Tensor, batch: Batch) -> Tensor:
        raise ZeroDivisionError("the user's own mistake")

    before = state(unusual_model)
    with pytest.raises(ZeroDivisionError, match="the user's own mistake"):
        attribute(unusual_model, tiny_batch(), Graph.from_model(unusual_model, granularity), loss=broken)
    assert_same(before, state(unusual_model))


def test_gradients_the_user_accumulated_stay() -> None:
    model = tiny_model("llama", torch.float32)
    model(input_ids=tiny_batch().ids).logits.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    attribute(model, tiny_batch(), Graph.from_model(model))
    assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))


def test_dropout_of_a_model_in_training_mode_is_not_applied() -> None:
    model, batch = tiny_model("gpt_neox", hidden_dropout=0.5, attention_dropout=0.5), tiny_batch()
    graph = Graph.from_model(model, "head")
    evaluated = attribute(model, batch, graph).rows
    assert torch.equal(attribute(model.train(), batch, graph).rows, evaluated)


# Faults


def test_nan_in_a_weight_is_refused_with_the_first_sample_it_spoils() -> None:
    model, batch = tiny_model("llama", torch.float32), tiny_batch()
    used = [set(ids.tolist()) for ids in batch.ids]
    with torch.no_grad():
        model.model.embed_tokens.weight[min(used[1] - used[0])] = math.nan
    with pytest.raises(EaptkError, match="sample-1") as raised:
        attribute(model, batch, Graph.from_model(model))
    assert "sample-0" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_score_that_is_not_finite_is_refused_with_its_sample_and_edge(granularity: str) -> None:
    model, batch = tiny_model("llama", torch.float32), tiny_batch()

    def kink(logits: Tensor, batch: Batch) -> Tensor:
        """Finite for every sample, but of infinite slope for sample-1."""
        own = logits.square().mean((1, 2))
        return torch.stack([own[0], (own[1] - own[1].detach()).sqrt(), own[2]])

    graph = Graph.from_model(model, granularity)
    with pytest.raises(EaptkError, match=r"sample-1.*\binput→a0\S*<q>") as raised:
        attribute(model, batch, graph, loss=kink)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [{"n_layers": 3}, {"n_heads": 8}, {"n_heads": 4, "n_kv_heads": 4}, {"parallel": True}],
    ids=lambda change: ",".join(change),
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_graph_of_another_model_is_refused(granularity: str, change: dict[str, Any]) -> None:
    model = tiny_model("llama", torch.float32)
    fields = Graph.from_model(model, granularity).to_dict()
    with pytest.raises(EaptkError, match="graph"):
        attribute(model, tiny_batch(), Graph.from_dict({**fields, **change}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ablation": "patching"}, "corrupt_ids"),
        ({"loss": "logit_diff"}, "foil"),
        ({"ablation": "mean"}, "means"),
        ({"ablation": "zero", "loss": "kl"}, "patching"),
        ({"ablation": "resample"}, "resample"),
        ({"loss": "nlll"}, "nlll"),
    ],
    ids=["no-corrupt", "no-foils", "no-means", "kl-zero", "ablation", "loss"],
)
def test_what_a_method_lacks_is_named(options: dict[str, Any], message: str) -> None:
    model, batch = tiny_model("llama", torch.float32), tiny_batch()
    bare = Batch(batch.ids, batch.lengths, batch.targets, batch.names)
    with pytest.raises(EaptkError, match=message) as raised:
        attribute(model, bare, Graph.from_model(model), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, batch: None, r"the loss returned .*expected .*\[3\]"),
        (lambda logits, batch: logits.sum(), r"the loss returned shape \(\); expected \[3\]"),
        (lambda logits, batch: logits.detach().sum((1, 2)), "the loss does not depend on the logits"),
        (lambda logits, batch: torch.zeros(len(batch)), "the loss does not depend on the logits"),
    ],
    ids=["nothing", "one-number", "detached", "constant"],
)
def test_a_callable_that_is_no_loss_per_sample_is_refused(loss: Any, message: str) -> None:
    model = tiny_model("llama", torch.float32)
    with pytest.raises(EaptkError, match=message):
        attribute(model, tiny_batch(), Graph.from_model(model), loss=loss)


def test_a_model_that_allows_no_gradients_is_refused() -> None:
    with torch.inference_mode():
        model = tiny_model("llama", torch.float32)
    with pytest.raises(EaptkError, match=r"made under torch.inference_mode\(\)"):
        attribute(model, tiny_batch(), Graph.from_model(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_wrapper_without_a_config_is_named() -> None:
    model = nn.DataParallel(tiny_model("llama", torch.float32))
    with pytest.raises(EaptkError, match="a DataParallel has no Hugging Face config"):
        Graph.from_model(model)


def test_a_sample_without_a_target_is_named() -> None:
    model, batch = tiny_model("llama", torch.float32), tiny_batch()
    targets = batch.targets.clone()
    targets[1] = -100
    with pytest.raises(EaptkError, match="sample 'sample-1' has no target"):
        attribute(model, replace(batch, targets=targets), Graph.from_model(model))


def test_a_sample_whose_foil_is_shorter_than_its_answer_is_named() -> None:
    model, whole = tiny_model("llama", torch.float32), Sample("whole", (1, 2), (3, 4), foil_ids=(5, 6))
    batch = collate([whole, replace(whole, id="short", foil_ids=(5,))])
    with pytest.raises(EaptkError, match="sample 'short' has a shorter foil than answer"):
        attribute(model, batch, Graph.from_model(model), loss="logit_diff")


@pytest.mark.parametrize("change", ["other-granularity", "missing", "other-width"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_means_of_another_graph_are_refused(granularity: str, change: str) -> None:
    model, batch = tiny_model("llama", torch.float32), tiny_batch()
    graph = Graph.from_model(model, granularity)
    other = Graph.from_model(model, "head" if granularity == "block" else "block")
    means = source_means(model, [batch], other if change == "other-granularity" else graph)
    if change == "missing":
        del means["m1"]
    if change == "other-width":
        means["m1"] = means["m1"][:-1]
    with pytest.raises(EaptkError, match="means"):
        attribute(model, batch, graph, ablation="mean", means=means)
