"""`check`: every identity holds on models that are described right, and breaks where the description is wrong."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from tiny import NAMES, tiny_model

from eaptk import EaptkError, Graph, architecture, attribute, check, register_architecture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_identity_holds(name: str, dtype: torch.dtype) -> None:
    found = check(tiny_model(name, dtype), n_edges=4)
    assert [f"{c.name}: {c.error}" for c in found if not c.passed] == []
    assert len(found) == 8


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"norm": "layer"}, "direct perturbation"),
        ({"mlp_write": "self_attn"}, "sources rebuild the stream"),
        ({"attention_write": "mlp"}, "sources rebuild the stream"),
        ({"final_norm": "model.layers.0.input_layernorm"}, "sources rebuild the stream"),
    ],
    ids=["norm", "mlp", "attention", "final-norm"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_wrong_entry_breaks_the_identity_that_names_it(
    change: dict[str, str], broken: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", dtype)
    entry = architecture.find_architecture(model.config)
    monkeypatch.setitem(architecture._REGISTRY, "llama", entry)
    register_architecture(dataclasses.replace(entry, **change))
    assert any(broken in found.name for found in check(model) if not found.passed)


def test_the_bias_of_an_adapter_belongs_to_no_head() -> None:
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], lora_bias=True, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama", torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.normal_()
    assert all(found.passed for found in check(model))


def test_an_entry_that_names_a_module_of_another_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    entry = architecture.find_architecture(model.config)
    monkeypatch.setitem(architecture._REGISTRY, "llama", entry)
    register_architecture(dataclasses.replace(entry, mlp_write="mlp.up_proj"))
    with pytest.raises(EaptkError, match=r"width.*architecture entry 'llama'"):
        attribute(model, {"input_ids": torch.tensor([[1, 2, 3]])}, Graph.from_model(model))
