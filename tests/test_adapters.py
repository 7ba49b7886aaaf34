"""Models with PEFT adapters in place score as the same models with the adapters merged into their weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoints import save_checkpoint
from oracle import relative_error
from safetensors.torch import load_file, save_file
from tiny import tiny_batch, tiny_model
from torch import Tensor, nn

from eaptk import EaptkError, Graph, attribute
from eaptk.graph import Granularity
from eaptk.loading import load_config, load_model, load_tokenizer, weights_fingerprint

GRANULARITIES = ["block", "head"]
SAME = 1e-5
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Every projection of a layer, attention and MLP, by the last part of its path.
TARGETS = {
    "llama": PROJECTIONS,
    "qwen2": PROJECTIONS,
    "qwen3": PROJECTIONS,
    "gemma2": PROJECTIONS,
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def with_adapter(name: str, seed: int = 0, **settings: Any) -> peft.PeftModel:
    """A tiny float32 model with a LoRA of random weights, as large as the model's own."""
    model = tiny_model(name, torch.float32)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": TARGETS[name], "init_lora_weights": False}
        | {"fan_in_fan_out": name == "gpt2", "task_type": "CAUSAL_LM"}
        | settings
    )
    return peft.get_peft_model(model, config)


def rows(model: nn.Module, granularity: Granularity = "head", **options: Any) -> Tensor:
    return attribute(model, tiny_batch(), Graph.from_model(model, granularity), **options).rows


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_in_place_scores_as_merged(name: str, granularity: Granularity) -> None:
    adapted = rows(with_adapter(name), granularity)
    merged = rows(with_adapter(name).merge_and_unload(), granularity)
    assert relative_error(adapted, merged) < SAME
    assert relative_error(adapted, rows(tiny_model(name, torch.float32), granularity)) > 0.1


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_each_projection_of_the_attention_may_be_adapted_alone(projection: str) -> None:
    adapted = rows(with_adapter("qwen2", target_modules=[projection]))
    assert (
        relative_error(adapted, rows(with_adapter("qwen2", target_modules=[projection]).merge_and_unload()))
        < SAME
    )


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_variants_of_lora_score_as_merged(settings: dict[str, bool]) -> None:
    adapted = rows(with_adapter("qwen2", **settings, target_modules=["q_proj", "v_proj", "o_proj"]))
    merged = with_adapter("qwen2", **settings, target_modules=["q_proj", "v_proj", "o_proj"])
    if "lora_bias" in settings:  # PEFT merges it only where there is a bias to add it to
        for layer in merged.base_model.model.model.layers:
            own = layer.self_attn.o_proj.base_layer
            own.bias = nn.Parameter(torch.zeros(own.out_features))
    assert relative_error(adapted, rows(merged.merge_and_unload())) < SAME


def test_other_kinds_of_adapters_score_as_merged() -> None:
    def model() -> peft.PeftModel:
        torch.manual_seed(0)
        config = peft.LoHaConfig(r=3, target_modules=PROJECTIONS[:4], init_weights=False)
        return peft.get_peft_model(tiny_model("llama", torch.float32), config)

    assert relative_error(rows(model()), rows(model().merge_and_unload())) < SAME


def test_adapters_that_are_mixed_switched_off_or_switched_are_what_they_are_now() -> None:
    model, second = with_adapter("llama"), with_adapter("llama", seed=1)
    model.add_adapter("second", second.peft_config["default"])
    model.set_adapter("second")
    model.load_state_dict(
        {
            name.replace(".default.", ".second."): value
            for name, value in second.state_dict().items()
            if "lora_" in name
        },
        strict=False,
    )
    assert relative_error(rows(model), rows(second)) < SAME
    model.set_adapter("default")
    assert relative_error(rows(model), rows(with_adapter("llama"))) < SAME
    with model.disable_adapter():
        assert relative_error(rows(model), rows(tiny_model("llama", torch.float32))) < SAME
    model.base_model.set_adapter(["default", "second"])
    both = rows(model)
    assert relative_error(both, rows(model.merge_and_unload())) < SAME


def test_a_step_of_training_between_two_batches_is_seen() -> None:
    model = with_adapter("llama")
    rows(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(-2)
    assert relative_error(rows(model), rows(model.merge_and_unload())) < SAME


def test_the_model_is_left_as_found() -> None:
    model = with_adapter("qwen2").train()
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    rows(model)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        trained, content = before[name]
        assert (parameter.requires_grad, parameter.grad) == (trained, None)
        assert torch.equal(parameter, content)


def test_modules_that_an_adapter_replaces_whole_are_read_in_its_version() -> None:
    def model() -> peft.PeftModel:
        found = with_adapter("llama", modules_to_save=["input_layernorm", "lm_head"])
        with torch.no_grad():
            for name, parameter in found.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(1.7)
        return found

    assert relative_error(rows(model()), rows(model().merge_and_unload())) < SAME


def test_patching_and_checkpointing_work_with_adapters() -> None:
    options: dict[str, Any] = {"ablation": "patching", "checkpoint": True, "flush_layers": 1}
    adapted = rows(with_adapter("qwen2"), **options)
    assert relative_error(adapted, rows(with_adapter("qwen2").merge_and_unload(), **options)) < SAME


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_virtual_tokens_are_refused(config: peft.PeftConfig) -> None:
    model = peft.get_peft_model(tiny_model("llama", torch.float32), config)
    with pytest.raises(
        EaptkError, match=r"adapter 'default' \(P\w+_TUNING\) does not change the model's weights alone"
    ):
        rows(model)


def test_an_adapter_of_norms_is_to_be_merged() -> None:
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"])
    model = peft.get_peft_model(tiny_model("llama", torch.float32), config)
    with pytest.raises(EaptkError, match=r"gain and ε of LNTuningLayer .*; merge an adapter of norms"):
        rows(model)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base model, and an adapter of it."""
    base = save_checkpoint(tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    peft.get_peft_model(load_model(base), config).save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def test_a_folder_with_an_adapter_is_a_model(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    model = load_model(adapter, device="cpu")
    assert load_config(adapter).to_dict() == load_config(base).to_dict()
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(base).get_vocab()
    given = peft.PeftModel.from_pretrained(load_model(base, device="cpu"), adapter)
    graph = Graph.from_model(model, "head")
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]]), "labels": torch.tensor([[-100, -100, 5, 6, 7]])}
    assert torch.equal(attribute(model, batch, graph).rows, attribute(given, batch, graph).rows)
    assert weights_fingerprint(model) == weights_fingerprint(given)
    assert model.name_or_path == str(adapter)


def test_the_fingerprint_tells_adapters_apart_by_weights_and_by_scale(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    found = {weights_fingerprint(load_model(base)), weights_fingerprint(load_model(adapter))}
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    found.add(weights_fingerprint(load_model(adapter)))
    model = load_model(adapter)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B["default"].weight[0, 0] += 1e-3
    found.add(weights_fingerprint(model))
    given = peft.PeftModel.from_pretrained(load_model(base), adapter)
    with given.disable_adapter():
        found.add(weights_fingerprint(given))
    assert len(found) == 5


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("base_model.model.", "base_model.model.language_model."),
        lambda key: key if "layers.0." in key else None,
    ],
    ids=["other names", "half of it"],
)
def test_an_adapter_of_which_weights_are_missing_is_refused(
    folders: tuple[Path, Path], rename: Callable[[str], str | None]
) -> None:
    _, adapter = folders
    file = adapter / "adapter_model.safetensors"
    save_file({new: value for key, value in load_file(file).items() if (new := rename(key))}, file)
    with pytest.raises(
        EaptkError, match=r"the adapter .* is not of its base model: Found missing adapter keys"
    ):
        load_model(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"base_model_name_or_path": None},
            "adapter_config.json names no base model; set its base_model_name_or_path",
        ),
        ({"base_model_name_or_path": "./nowhere"}, "nowhere is no model: no such folder"),
        ({"r": 5}, "cannot load the adapter "),
    ],
    ids=["no base", "base elsewhere", "other rank"],
)
def test_an_adapter_that_cannot_be_loaded_is_one_line(
    folders: tuple[Path, Path], change: dict[str, Any], message: str
) -> None:
    _, adapter = folders
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(EaptkError) as error:
        load_model(adapter)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
