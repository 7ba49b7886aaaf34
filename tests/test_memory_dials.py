"""Flush groups and checkpointing: memory for time, and not one bit of a score."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from accounting import bytes_left, peak_bytes
from tiny import NAMES, tiny_batch, tiny_model
from torch import Tensor, nn

from eaptk import Batch, EaptkError, Graph, Sample, attribute, collate
from eaptk.capture import Capture, frozen
from eaptk.kernels import Destination, Source, contract
from eaptk.kernels.reference import MIN_TOKENS
from eaptk.sites import Sites

GRANULARITIES = ["block", "head"]
LAYERS = 9


def deep(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    depth = {"n_layer" if name == "gpt2" else "num_hidden_layers": LAYERS}
    return tiny_model(name, dtype, **depth, **overrides)


@pytest.mark.parametrize("flush_layers", [1, 4])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("name", "qkv"),
    [*((name, "split") for name in NAMES), *((name, "merged") for name in ("llama", "gpt2", "gpt_neox"))],
)
def test_how_many_layers_are_contracted_at_once_does_not_change_a_bit(
    name: str, granularity: str, qkv: str, flush_layers: int
) -> None:
    model, batch = deep(name), tiny_batch()
    graph = Graph.from_model(model, granularity, qkv)
    whole = attribute(model, batch, graph, flush_layers=LAYERS)
    assert torch.equal(attribute(model, batch, graph, flush_layers=flush_layers).rows, whole.rows)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_running_layers_again_does_not_change_a_bit(name: str, granularity: str) -> None:
    model, batch = deep(name), tiny_batch()
    graph = Graph.from_model(model, granularity)
    kept = attribute(model, batch, graph, checkpoint=False)
    again = attribute(model, batch, graph, checkpoint=True)
    assert torch.equal(again.rows, kept.rows)
    assert torch.equal(again.loss, kept.loss)


@pytest.mark.parametrize(
    "method", [{"ablation": "patching"}, {"ablation": "patching", "loss": "kl"}], ids=["patching", "kl"]
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_neither_does_either_under_another_method(
    name: str, granularity: str, method: dict[str, Any]
) -> None:
    model, batch = deep(name), tiny_batch()
    graph = Graph.from_model(model, granularity)
    whole = attribute(model, batch, graph, flush_layers=LAYERS, checkpoint=False, **method)
    frugal = attribute(model, batch, graph, flush_layers=1, checkpoint=True, **method)
    assert torch.equal(frugal.rows, whole.rows)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_flush_groups_of_sequences_contracted_in_several_chunks_agree_to_the_bit(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eaptk.kernels.reference.SCRATCH", 0)  # the smallest chunks
    model = deep("qwen2", max_position_embeddings=128)
    graph = Graph.from_model(model, granularity)
    batch = collate([Sample("long", (1,) * 7 * MIN_TOKENS, (2, 3)), Sample("short", (4, 5), (6,))])
    whole = attribute(model, batch, graph, flush_layers=LAYERS)
    assert torch.equal(attribute(model, batch, graph, flush_layers=2).rows, whole.rows)


def test_a_sample_is_cut_the_same_way_beside_a_longer_one() -> None:
    """Only the model's own passes may round its row differently; beside those of its own length, products may too."""
    generator = torch.Generator().manual_seed(0)

    def random(tokens: int) -> Tensor:
        return torch.randn(2, tokens, 512, generator=generator)

    sources, destinations = [Source(random(2600)) for _ in range(9)], [Destination(random(2600), 9)]
    alone = (
        [Source(s.value[:1, :1500]) for s in sources],
        [Destination(d.gradient[:1, :1500], d.reach) for d in destinations],
    )
    together = contract(sources, destinations, [1500, 2600])
    assert torch.equal(contract(*alone, [1500]), together[:1])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_each_dial_saves_memory(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eaptk.kernels.reference.SCRATCH", 2**16)  # of no matter here
    model = deep("llama", hidden_size=64, intermediate_size=160, max_position_embeddings=512)
    graph = Graph.from_model(model, granularity)
    batch = collate([Sample("long", (1,) * 400, (2, 3))])

    def peak(flush_layers: int, checkpoint: bool) -> int:
        return peak_bytes(
            lambda: attribute(model, batch, graph, flush_layers=flush_layers, checkpoint=checkpoint)
        )

    neither, again, both = peak(LAYERS, False), peak(LAYERS, True), peak(1, True)
    assert both < 0.8 * again < 0.6 * neither


def broken(logits: Tensor, batch: Batch) -> Tensor:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpoint": True, "flush_layers": 1},
        {"ablation": "patching", "loss": "kl"},
        {"segment": 5},
        {"loss": broken},
    ],
    ids=["plain", "checkpoint", "kl", "segment", "error"],
)
def test_nothing_of_a_batch_waits_for_pythons_collector(options: dict[str, Any]) -> None:
    """All sources in one reference cycle would be there still while the next batches run."""
    model, batch = tiny_model("llama"), tiny_batch()
    graph = Graph.from_model(model, "head")

    def score() -> None:
        with suppress(ZeroDivisionError):
            attribute(model, batch, graph, **options)

    score()  # what is made once a model
    assert bytes_left(score) == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_flushed_gradient_is_let_go_of(granularity: str) -> None:
    model, batch = deep("qwen2"), tiny_batch()
    sites = Sites(model, Graph.from_model(model, granularity))
    alive = []
    with frozen(model), torch.enable_grad(), Capture(sites, gradients=True) as run:
        loss = model(input_ids=batch.ids, use_cache=False).logits.square().mean()

        def left(layer: int) -> None:
            run.release([r for r in sites.readers if r.layer >= layer and r.name in run.gradients])
            alive.append((len(run.gradients), len(run.streams)))

        run.backward(loss, left)
    # All of the layer just left are gone; none of those below is there yet, but for their streams.
    assert alive == [(0, layer) for layer in range(LAYERS - 1, 0, -1)]


def test_layers_are_left_from_the_last_to_the_first_with_their_gradients_complete() -> None:
    model, batch = deep("gpt_neox"), tiny_batch()
    sites = Sites(model, Graph.from_model(model, "block", "merged"))
    seen = []
    with frozen(model), torch.enable_grad(), Capture(sites, gradients=True) as run:
        loss = model(input_ids=batch.ids, use_cache=False).logits.square().mean()
        snapshots = {}

        def left(layer: int) -> None:
            seen.append(layer)
            snapshots[layer] = {
                r.name: run.gradients[r.name].clone() for r in sites.readers if r.layer >= layer
            }

        run.backward(loss, left)
    assert seen == list(range(LAYERS - 1, 0, -1))
    for snapshot in snapshots.values():
        assert all(torch.equal(gradient, run.gradients[name]) for name, gradient in snapshot.items())


def test_a_layer_with_a_forward_of_its_own_gets_it_back() -> None:
    model, batch = deep("llama"), tiny_batch()
    layer = model.model.layers[1]
    own = layer.forward = layer.forward
    attribute(model, batch, Graph.from_model(model), checkpoint=True)
    assert vars(layer)["forward"] is own
    assert "forward" not in vars(model.model.layers[0])


def test_a_group_of_no_layers_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(EaptkError, match="flush_layers is 0; it must be at least 1"):
        attribute(model, tiny_batch(), Graph.from_model(model), flush_layers=0)


def test_a_loss_that_fails_under_checkpointing_leaves_the_model_as_found() -> None:
    model = tiny_model("llama")

    with pytest.raises(ZeroDivisionError):
        attribute(model, tiny_batch(), Graph.from_model(model), loss=broken, checkpoint=True)
    assert all("forward" not in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_kernels_bits_do_not_depend_on_flush_groups_either(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAPTK_BACKEND", "triton")
    model, batch = tiny_model("llama", torch.bfloat16, num_hidden_layers=5), tiny_batch(1)
    graph = Graph.from_model(model, granularity)
    whole = attribute(model, batch, graph, flush_layers=5)
    assert torch.equal(attribute(model, batch, graph, flush_layers=1).rows, whole.rows)
