"""Losses from logits that are never all there at once: the same numbers, the same gradients, a bounded height."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accounting import peak_bytes
from oracle import relative_error
from tiny import NAMES, VOCABULARY, tiny_batch, tiny_model, tiny_samples
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eaptk import Batch, Graph, attribute, collate, losses
from eaptk.capture import frozen
from eaptk.losses import LOSSES, Targets
from eaptk.passes import Halves
from eaptk.sites import Sites


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three positions, where a tiny batch has some twenty."""
    monkeypatch.setitem(losses.CHUNK, "cpu", 0)
    monkeypatch.setattr(losses, "MIN_POSITIONS", 3)


def plain(loss: str, logits: Tensor, clean: Tensor, batch: Batch) -> Tensor:
    """[B], in PyTorch's own functions, from the logits [B, T, V] of all positions."""
    assert batch.foils is not None
    found = []
    for b in range(len(batch)):
        at = batch.targets[b] >= 0
        own, targets, foils = logits[b, at], batch.targets[b, at, None], batch.foils[b, at, None]
        if own.dtype != torch.float64:
            own = own.float()
        if loss == "nll":
            found.append(cross_entropy(own, targets[:, 0]))
        elif loss == "logit_diff":
            found.append((own.gather(1, foils) - own.gather(1, targets)).mean())
        else:
            was = clean[b, at].to(own).log_softmax(-1)
            found.append((was.exp() * (was - own.log_softmax(-1))).sum(-1).mean())
    return torch.stack(found)


def both(model: nn.Module, batch: Batch, loss: str, scale: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """Losses [B] and their gradient at the embeddings, by eaptk's way and by the plain one."""
    assert batch.corrupt_ids is not None
    sites = Sites(model, Graph.from_model(model))
    found = {}
    with frozen(model):
        halves, targets = Halves(model, sites), Targets.of(batch)
        with torch.no_grad():
            clean = halves.hidden(batch.corrupt_ids, targets.index)
            clean_logits = model(input_ids=batch.corrupt_ids, use_cache=False).logits
        for way in ("chunked", "plain"):
            leaf: list[Tensor] = []

            def root(module: nn.Module, args: Any, output: Tensor, leaf: list[Tensor] = leaf) -> Tensor:
                # Of the whole sequence; the head alone runs on one token.
                if not leaf:
                    leaf.append(output.detach().requires_grad_())
                return leaf[0] if output.shape == leaf[0].shape else output

            handle = model.get_input_embeddings().register_forward_hook(root)
            try:
                if way == "chunked":
                    hidden = halves.hidden(batch.ids, targets.index)
                    values = losses.of_positions(loss, hidden, targets, halves, clean, scale)
                    own = targets.means(values)
                else:
                    logits = model(input_ids=batch.ids, use_cache=False).logits
                    own = plain(loss, logits, clean_logits, batch)
                (gradient,) = torch.autograd.grad((own * scale).sum(), leaf[0])
            finally:
                handle.remove()
            found[way] = own.detach(), gradient / scale
    return found


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_give_the_plain_losses_and_their_gradients(name: str, loss: str) -> None:
    found = both(tiny_model(name), tiny_batch(), loss)
    for chunked, expected in zip(found["chunked"], found["plain"], strict=True):
        assert relative_error(chunked, expected) < 1e-12


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("config", "name"), [("GraniteConfig", "logits_scaling"), ("CohereConfig", "logit_scale")]
)
def test_a_scale_of_the_logits_is_the_models_own(config: str, name: str) -> None:
    import transformers

    from eaptk.architecture import Architecture, register_architecture

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "intermediate_size": 40}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    made = getattr(transformers, config)(
        num_attention_heads=4, num_key_value_heads=2, **shape, **ends, **{name: 3.0}
    )
    model = transformers.AutoModelForCausalLM.from_config(made).double().eval()
    entry = Architecture(made.model_type, **({"mlp_norm": "input_layernorm"} if "Cohere" in config else {}))
    register_architecture(entry)
    found = both(model, tiny_batch(), "nll")
    for chunked, expected in zip(found["chunked"], found["plain"], strict=True):
        assert relative_error(chunked, expected) < 1e-6  # its norms are float32


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_half_precision_is_as_near_to_the_truth_as_the_plain_way(
    name: str, loss: str, dtype: torch.dtype
) -> None:
    model = tiny_model(name, dtype)
    scale = 4096.0 if dtype == torch.float16 else 1.0
    found = both(model, tiny_batch(8), loss, scale)
    truth = both(tiny_model(name, dtype).double(), tiny_batch(8), loss)["plain"]
    for chunked, plainly, exact in zip(found["chunked"], found["plain"], truth, strict=True):
        assert relative_error(chunked, exact) < 1.05 * relative_error(plainly, exact) + 1e-6


@pytest.mark.parametrize("granularity", ["block", "head"])
@pytest.mark.parametrize("loss", LOSSES)
def test_how_positions_are_divided_does_not_change_a_score(
    loss: str, granularity: str, request: pytest.FixtureRequest
) -> None:
    model, batch = tiny_model("gemma2"), tiny_batch()
    graph = Graph.from_model(model, granularity)
    whole = attribute(model, batch, graph, ablation="patching", loss=loss)
    request.getfixturevalue("small_chunks")
    divided = attribute(model, batch, graph, ablation="patching", loss=loss)
    assert relative_error(divided.rows, whole.rows) < 1e-12
    assert relative_error(divided.loss, whole.loss) < 1e-12


@pytest.fixture
def wide() -> tuple[nn.Module, list[Batch]]:
    """A model whose logits would outweigh all else, and batches of 128 and 256 tokens."""
    model = tiny_model("llama", torch.float32, vocab_size=4096, max_position_embeddings=256)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4096, (1, 256), generator=generator)
    return model, [Batch.from_mapping({"input_ids": ids[:, :n]}) for n in (128, 256)]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_logits_of_all_positions_are_never_there_at_once(
    wide: tuple[nn.Module, list[Batch]], checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = wide
    graph = Graph.from_model(model)
    monkeypatch.setitem(losses.CHUNK, "cpu", 0)

    def peak(batch: Batch) -> int:
        return peak_bytes(lambda: attribute(model, batch, graph, checkpoint=checkpoint))

    less, more = map(peak, batches)
    logits = 4 * 128 * 4096
    assert more - less < 0.5 * logits


def test_the_model_runs_no_layer_for_its_head() -> None:
    model = tiny_model("llama")
    sites, batch = Sites(model, Graph.from_model(model)), tiny_batch()
    halves, targets = Halves(model, sites), Targets.of(batch)
    with torch.no_grad():
        hidden = halves.hidden(batch.ids, targets.index)
        ran: list[nn.Module] = []
        for layer in sites.layers:
            layer.block.register_forward_hook(lambda module, args, output: ran.append(module))
        logits = halves(hidden)
        assert not ran
        every = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)[targets.index]
    torch.testing.assert_close(logits, every, rtol=1e-12, atol=1e-12)


def test_positions_are_counted_sample_by_sample() -> None:
    samples = tiny_samples(4)
    targets = Targets.of(collate(samples))
    assert list(targets.counts) == [len(sample.answer_ids) for sample in samples]
    assert targets.tokens.tolist() == [token for sample in samples for token in sample.answer_ids]
    assert targets.foils is not None
    assert targets.foils.tolist() == [token for sample in samples for token in sample.foil_ids or ()]
