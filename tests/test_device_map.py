"""A model that is spread over devices, or waits on the CPU or on disk, scores as the model in one place."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from elsewhere import second_device
from oracle import relative_error
from tiny import tiny_batch, tiny_model, tiny_samples
from torch import Tensor, nn

from eaptk import EaptkError, Graph, attribute, division, source_means
from eaptk.architecture import find_architecture
from eaptk.generate import greedy_answers
from eaptk.graph import Granularity
from eaptk.loading import load_model, weights_fingerprint
from eaptk.sites import Sites
from eaptk.weights import device_of, is_offloaded

NAMES = ["llama", "gemma2", "gpt2", "gpt_neox"]
GRANULARITIES = ["block", "head"]
WAYS: list[dict[str, Any]] = [
    {},
    {"ablation": "patching", "loss": "kl"},
    {"ablation": "mean"},
    {"flush_layers": 1},
    {"checkpoint": False},
    {"segment": 4},
]


def rows(model: nn.Module, granularity: Granularity = "head", **options: Any) -> Tensor:
    graph = Graph.from_model(model, granularity)
    if options.get("ablation") == "mean":
        options["means"] = source_means(model, [tiny_batch(seed=1)], graph)
    return attribute(model, tiny_batch(), graph, **options).rows


def saved(folder: Path, name: str) -> Path:
    tiny_model(name, torch.float32).save_pretrained(folder)
    return folder


def places(model: nn.Module, first: str, others: str) -> dict[str, str]:
    """A device map: the first layer and all outside of layers in one place, other layers in another."""
    layers = find_architecture(model.config).layers
    trunk = layers.rpartition(".")[0]
    found = {f"{trunk}.{name}": first for name, _ in model.get_submodule(trunk).named_children()}
    found |= {name: first for name, _ in model.named_children() if name != trunk}
    del found[layers]
    return found | {f"{layers}.{i}": others if i else first for i in range(len(model.get_submodule(layers)))}


@pytest.mark.parametrize("first", ["cpu", "disk"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_that_wait_on_disk_give_the_same_bytes(tmp_path: Path, name: str, first: str) -> None:
    folder = saved(tmp_path, name)
    whole = load_model(folder, device="cpu")
    spread = load_model(folder, device_map=places(whole, first, "disk"))
    assert is_offloaded(spread)
    assert all(p.is_meta for p in spread.parameters()) == (first == "disk")
    assert device_of(spread) == torch.device("cpu")
    for granularity in GRANULARITIES:
        assert torch.equal(rows(spread, granularity), rows(whole, granularity))
    assert weights_fingerprint(spread) == weights_fingerprint(whole)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_every_way_of_scoring_works_on_weights_that_wait_on_the_cpu(
    granularity: Granularity, options: dict[str, Any]
) -> None:
    whole, waiting = (tiny_model("llama", torch.float32) for _ in range(2))
    cpu_offload(waiting, torch.device("cpu"))
    assert all(p.is_meta for p in waiting.parameters())
    assert torch.equal(rows(waiting, granularity, **options), rows(whole, granularity, **options))
    assert weights_fingerprint(waiting) == weights_fingerprint(whole)


def test_auto_places_a_model(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen2")
    found = load_model(folder, device_map="auto")
    assert relative_error(rows(found), rows(load_model(folder))) < 1e-5


def test_a_model_whose_weights_wait_answers_and_is_left_as_found(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    whole = load_model(folder, device="cpu")
    waiting = load_model(folder, device_map=places(whole, "disk", "disk"))
    samples = tiny_samples(3)
    before = [(name, p.requires_grad, p.device) for name, p in waiting.named_parameters()]
    answers = list(greedy_answers(waiting, samples, [[0, 1, 2]], 5))
    rows(waiting)
    assert answers == list(greedy_answers(whole, samples, [[0, 1, 2]], 5))
    assert [(name, p.requires_grad, p.device) for name, p in waiting.named_parameters()] == before


def test_no_layer_s_weights_are_held_while_another_s_are_used(tmp_path: Path) -> None:
    """What a backward pass keeps it keeps in place; so layers that wait are run again in it."""
    folder = saved(tmp_path, "llama")
    waiting = load_model(folder, device_map=places(tiny_model("llama"), "disk", "disk"))
    held: list[int] = []
    alive: set[int] = set()

    class Watched(dict):  # type: ignore[type-arg]
        """A store of weights that knows how many of what it gave are alive."""

        def __init__(self, own: Any) -> None:
            super().__init__()
            self.own = own

        def __getitem__(self, name: str) -> Tensor:
            value: Tensor = self.own[name].clone()
            alive.add(id(value.untyped_storage()))
            weakref.finalize(value.untyped_storage(), alive.discard, id(value.untyped_storage()))
            held.append(len(alive))
            return value

    layers = waiting.model.layers
    n_weights = sum(1 for layer in layers for _ in layer.parameters())
    for layer in layers:
        for module in layer.modules():
            hook = getattr(module, "_hf_hook", None)
            if hook is not None and hook.weights_map is not None:
                hook.weights_map = Watched(hook.weights_map)
    rows(waiting, "block")
    assert held
    assert max(held) < n_weights


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sources_may_be_contracted_in_any_number_of_parts(
    monkeypatch: pytest.MonkeyPatch, granularity: Granularity
) -> None:
    whole, waiting = (tiny_model("qwen2", torch.float32) for _ in range(2))
    cpu_offload(waiting, torch.device("cpu"))
    monkeypatch.setattr(division, "BROUGHT", 1)
    assert relative_error(rows(waiting, granularity), rows(whole, granularity)) < 1e-5
    limit = division.flush_limit(Sites(waiting, Graph.from_model(waiting, granularity)))
    assert limit == (1 if granularity == "head" else None)


def test_an_adapter_of_weights_that_wait_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    peft.get_peft_model(load_model(base), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    spread = places(tiny_model("llama"), "cpu", "disk")
    with pytest.raises(EaptkError, match="merge the adapter and save the whole model"):
        load_model(tmp_path / "adapter", device_map=spread)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": "nowhere"}, "cannot load the weights of"),
        ("everywhere", "cannot load the weights of"),
    ],
    ids=["no such device", "no such policy"],
)
def test_a_map_that_leads_nowhere_is_one_line(tmp_path: Path, device_map: Any, message: str) -> None:
    folder = saved(tmp_path, "llama")
    with pytest.raises(EaptkError) as error:
        load_model(folder, device_map=device_map)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def spread(model: nn.Module, away: str, device: torch.device) -> None:
    """Put the first or the last layers on another device, with the hooks that accelerate puts there."""
    entry = find_architecture(model.config)
    layers = list(model.get_submodule(entry.layers))
    ends = [model.get_submodule(entry.final_norm), model.get_output_embeddings()]  # type: ignore[operator]
    for module in layers[:1] if away == "first" else [*layers[1:], *ends]:
        for inner in module.modules():
            for name, parameter in inner.named_parameters(recurse=False):
                setattr(inner, name, nn.Parameter(parameter.detach().to(device)))
            for name, buffer in inner.named_buffers(recurse=False):
                setattr(inner, name, buffer.to(device))
        add_hook_to_module(module, AlignDevicesHook(execution_device=device))
    for module in layers[1:] + ends if away == "first" else layers[:1]:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))


@pytest.mark.parametrize("away", ["first", "last"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_over_two_devices_scores_as_on_one(name: str, granularity: Granularity, away: str) -> None:
    whole, over_two = (tiny_model(name, torch.float32, "eager") for _ in range(2))
    # The stand-in for a device has no module torch.utils.checkpoint could ask for its state.
    ways = [way for way in WAYS if not way.keys() & {"checkpoint", "segment"}]
    expected = [rows(whole, granularity, **way) for way in ways]
    with second_device() as device:
        spread(over_two, away, device)
        assert len(Sites(over_two, Graph.from_model(over_two)).devices) == 2
        found = [rows(over_two, granularity, **way) for way in ways]
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < 1e-5


def test_the_second_device_refuses_to_meet_the_first() -> None:
    with second_device() as device:
        with pytest.raises(RuntimeError, match="two devices"):
            torch.ones(2).to(device) + torch.ones(2)
        assert (torch.ones(2).to(device) + torch.ones(2, device=device)).to("cpu").tolist() == [2, 2]
