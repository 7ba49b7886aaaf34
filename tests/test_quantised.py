"""Packed weights are scored as the linear maps they are, where a gradient flows through them, and refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import relative_error
from tiny import tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from eaptk import EaptkError, Graph, attribute
from eaptk.graph import Granularity
from eaptk.loading import load_config, load_model, weights_fingerprint
from eaptk.weights import check_backward, features, matrix

GRANULARITIES = ["block", "head"]
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
)
EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)
WIDTHS = {
    "llama": {"hidden_size": 64, "intermediate_size": 64},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 64},
}


def quantised(folder: Path, name: str, config: BitsAndBytesConfig) -> Path:
    """A checkpoint of a tiny model in bitsandbytes' packed weights."""
    tiny_model(name, torch.float32, **WIDTHS[name]).save_pretrained(folder / "whole")
    packed = AutoModelForCausalLM.from_pretrained(
        folder / "whole", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    packed.save_pretrained(folder / "packed")
    return folder / "packed"


def unpacked(name: str, packed: nn.Module) -> nn.Module:
    """The same model with its weights as plain tensors."""
    model, theirs = tiny_model(name, torch.float32, **WIDTHS[name]), dict(packed.named_modules())
    with torch.no_grad():
        for path, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                if own == "weight" and features(module) is not None:
                    weight = matrix(theirs[path], torch.float32)
                    parameter.copy_(weight if isinstance(module, Conv1D) else weight.T)
                else:
                    parameter.copy_(getattr(theirs[path], own))
    return model


def rows(model: nn.Module, granularity: Granularity) -> Tensor:
    return attribute(model, tiny_batch(), Graph.from_model(model, granularity)).rows


@pytest.mark.parametrize("name", WIDTHS)
def test_four_bits_score_as_the_weights_they_stand_for(tmp_path: Path, name: str) -> None:
    packed = load_model(quantised(tmp_path, name, FOUR_BITS), device="cpu")
    assert any(parameter.dtype == torch.uint8 for parameter in packed.parameters())
    plain = unpacked(name, packed)
    for granularity in GRANULARITIES:
        assert relative_error(rows(packed, granularity), rows(plain, granularity)) < 1e-6
    before = rows(tiny_model(name, torch.float32, **WIDTHS[name]), "block")
    assert relative_error(rows(packed, "block"), before) > 0.01


def test_a_pass_without_gradients_leaves_four_bits_as_they_were(tmp_path: Path) -> None:
    """On some CPUs bitsandbytes lays them out anew in such a pass: no gradient flows through them then."""
    folder = quantised(tmp_path, "llama", FOUR_BITS)
    packed, plain = load_model(folder, device="cpu"), unpacked("llama", load_model(folder, device="cpu"))
    graph, before = Graph.from_model(packed, "head"), rows(packed, "head")
    patched = [attribute(each, tiny_batch(), graph, ablation="patching").rows for each in (packed, plain)]
    assert relative_error(*patched) < 1e-6
    assert torch.equal(rows(packed, "head"), before)


def test_four_bits_that_were_laid_out_for_inference_before_are_refused(tmp_path: Path) -> None:
    packed = load_model(quantised(tmp_path, "llama", FOUR_BITS), device="cpu")
    before = rows(packed, "block")
    with torch.no_grad():
        packed(tiny_batch().ids)
    if not hasattr(packed.model.layers[0].self_attn.q_proj.weight.quant_state, "packing_format_for_cpu"):
        # A CPU without a layout of its own for them: they are as they were.
        assert torch.equal(rows(packed, "block"), before)
        return
    with pytest.raises(EaptkError, match="laid the model's 4-bit weights out for inference"):
        rows(packed, "block")


def with_adapter(model: nn.Module, **settings: bool) -> Any:
    """A LoRA of random weights, as large as the model's own, on the attention's projections."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **settings)
    )


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_an_adapter_on_four_bits_scores_as_merged(tmp_path: Path, settings: dict[str, bool]) -> None:
    folder = quantised(tmp_path, "llama", FOUR_BITS)
    packed, plain = load_model(folder, device="cpu"), unpacked("llama", load_model(folder, device="cpu"))
    adapted, merged = with_adapter(packed, **settings), with_adapter(plain, **settings)
    merged.load_state_dict({k: v for k, v in adapted.state_dict().items() if "lora_" in k}, strict=False)
    merged = merged.merge_and_unload()
    for granularity in GRANULARITIES:
        assert relative_error(rows(adapted.base_model.model, granularity), rows(merged, granularity)) < 1e-5


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "with adapter"])
def test_heads_of_eight_bits_add_up_to_blocks(tmp_path: Path, adapted: bool) -> None:
    """Activations are rounded to 8 bits on their way into a projection: what heads wrote adds up to as much."""
    packed = load_model(quantised(tmp_path, "llama", EIGHT_BITS), device="cpu")
    if adapted:
        packed = with_adapter(packed).base_model.model
    blocks, heads = Graph.from_model(packed, "block"), Graph.from_model(packed, "head")
    by_block = torch.from_numpy(blocks.matrix(rows(packed, "block").numpy()))
    by_head = torch.from_numpy(heads.matrix(rows(packed, "head").numpy()))
    for name in ("a0", "a1"):
        mine = [i for i, node in enumerate(heads.sources) if node.name.startswith(f"{name}.")]
        own = [node.name for node in blocks.sources].index(name)
        assert len(mine) == heads.n_heads
        assert relative_error(by_head[:, mine, -1].sum(1), by_block[:, own, -1]) < 0.05


def test_the_fingerprint_covers_what_packed_weights_are_scaled_by(tmp_path: Path) -> None:
    folder = quantised(tmp_path, "llama", FOUR_BITS)
    model = load_model(folder, device="cpu")
    before = weights_fingerprint(model)
    assert weights_fingerprint(load_model(folder, device="cpu")) == before
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.quant_state.absmax[0] += 1
    assert weights_fingerprint(model) != before


class Packed(nn.Linear):
    """A linear map without a weight of numbers: signs, and one scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.bias = linear.bias
        self.weight = nn.Parameter(torch.sign(linear.weight.detach()).to(torch.int8), requires_grad=False)
        self.scale = float(linear.weight.detach().abs().mean())
        self.calls = 0

    def plain(self) -> Tensor:
        return self.weight.to(torch.float64) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.linear(x, self.plain().to(x.dtype), self.bias)


def with_packed(name: str = "qwen2") -> tuple[nn.Module, nn.Module]:
    """A model whose attention's projections are packed, and the same with plain weights."""
    packed, plain = tiny_model(name), tiny_model(name)
    for mine, theirs in zip(packed.model.layers, plain.model.layers, strict=True):
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found = Packed(getattr(mine.self_attn, projection))
            setattr(mine.self_attn, projection, found)
            with torch.no_grad():
                getattr(theirs.self_attn, projection).weight.copy_(found.plain())
    return packed, plain


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_any_packed_linear_map_is_found_by_probing(
    granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eaptk.weights.PROBES", 7)
    packed, plain = with_packed()
    assert relative_error(rows(packed, granularity), rows(plain, granularity)) < 1e-12


def test_a_packed_linear_map_is_probed_once_until_it_changes() -> None:
    packed, _ = with_packed()
    projection: Any = packed.model.layers[0].self_attn.o_proj
    first = matrix(projection.eval(), torch.float64)
    calls = projection.calls
    assert matrix(projection, torch.float64) is first
    assert projection.calls == calls
    with torch.no_grad():
        projection.weight.neg_()
    assert torch.equal(matrix(projection, torch.float64), -first)


class OneWay(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class WrongWay(Packed):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return (y + y.detach()) / 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OneWay, r"the quantised weights of OneWay have no backward pass to activations on cpu \("),
        (
            WrongWay,
            "the backward pass of WrongWay's quantised weights on cpu is not that of their forward pass",
        ),
    ],
)
def test_weights_through_which_no_right_gradient_flows_are_refused(kind: type[Packed], message: str) -> None:
    with pytest.raises(EaptkError, match=message):
        check_backward(kind(nn.Linear(16, 8)).eval(), torch.float32)
    check_backward(Packed(nn.Linear(16, 8)).eval(), torch.float32)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_that_need_a_card_are_refused_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny_model("llama", torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    packed = {"quant_method": method, "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    with pytest.raises(
        EaptkError, match=rf"is quantised \({method}\), whose backward pass runs on a CUDA card alone"
    ):
        load_config(tmp_path)
