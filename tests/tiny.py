"""Tiny random decoders of every supported family, and batches to feed them.

Weights are drawn so that activations are of order one: at the default scale of 0.02 a random model is nearly
linear, and most mistakes in a gradient would go unseen. Gains and biases are random too: no term vanishes.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

from eaptk.batch import Batch, Sample, collate

VOCABULARY = 61
LONGEST = 12

_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_NEOX = {**_SHAPE, "intermediate_size": 40, "num_attention_heads": 4, "rotary_pct": 0.5}

#: name -> (config class, its arguments). The window of 4 is shorter than every sequence that is fed.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_SHAPE, **_GQA, "intermediate_size": 40}),
    "mistral": ("MistralConfig", {**_SHAPE, **_GQA, "intermediate_size": 40, "sliding_window": None}),
    "mistral-window": ("MistralConfig", {**_SHAPE, **_GQA, "intermediate_size": 40, "sliding_window": 4}),
    "qwen2": (
        "Qwen2Config",
        {**_SHAPE, "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 40}
        | {"num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "qwen3": ("Qwen3Config", {**_SHAPE, **_GQA, "intermediate_size": 40, "head_dim": 12}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64},
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_NEOX, "num_hidden_layers": 3, "use_parallel_residual": True}),
    "gpt_neox-serial": ("GPTNeoXConfig", {**_NEOX, "use_parallel_residual": False}),
    "gemma2": (
        "Gemma2Config",
        {**_SHAPE, **_GQA, "intermediate_size": 40, "head_dim": 12, "query_pre_attn_scalar": 20}
        | {"sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    ),
    # Not built in: for `register_architecture`.
    "phi": ("PhiConfig", {**_SHAPE, **_GQA, "intermediate_size": 40}),
    "stablelm": ("StableLmConfig", {**_SHAPE, **_GQA, "intermediate_size": 40, "use_qkv_bias": True}),
}

NAMES = [name for name in _CONFIGS if name not in ("phi", "stablelm")]


def tiny_model(
    name: str,
    dtype: torch.dtype = torch.float64,
    attention: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> nn.Module:
    """A random model in eval mode; the same name and seed give the same weights (to rounding) in every dtype.

    In float64 all of its arithmetic is float64. `attention` defaults to sdpa, except for soft-capped scores,
    which sdpa cannot compute: "eager", or "exact" in float64 (Hugging Face's eager softmax is float32).
    """
    class_name, arguments = _CONFIGS[name]
    config = getattr(transformers, class_name)(**{**arguments, **_no_special_tokens, **overrides})
    if attention is None:
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        attention = "sdpa" if not capped else "exact" if dtype == torch.float64 else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    _randomise(model, torch.Generator().manual_seed(seed))
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        float64_norms(model)
    return model


_no_special_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    tied = model.config.tie_word_embeddings
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, nn.Embedding):
                # A tied embedding is also the unembedding, and Gemma multiplies it by √width.
                scale = 1.5 * parameter.shape[1] ** -0.5 if tied and parameter.shape[0] == VOCABULARY else 1.0
                parameter.copy_(scale * noise)
            elif name == "bias":
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:
                offset = 0.0 if "Gemma" in type(module).__name__ else 1.0
                parameter.copy_(offset + 0.3 * noise)
            else:
                fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[1]
                parameter.copy_(1.5 * fan_in**-0.5 * noise)


def float64_norms(model: nn.Module) -> None:
    """Hugging Face's RMS norms compute in float32 whatever the model's dtype; these do not."""

    def rms(norm: nn.Module, x: Tensor) -> Tensor:
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    def rms_plus_one(norm: nn.Module, x: Tensor) -> Tensor:
        return (1.0 + norm.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(rms if hasattr(module, "variance_epsilon") else rms_plus_one, module)


def _exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention by its formula, in the operands' own precision."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("exact", _exact_attention)
AttentionMaskInterface.register("exact", eager_mask)


def tiny_samples(n: int, seed: int = 0, shortest: int = 5) -> list[Sample]:
    """`n` samples of different lengths up to `LONGEST` tokens, each with a corrupted prompt and foils."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, VOCABULARY, (count,), generator=generator).tolist())

    samples = []
    for i in range(n):
        length = int(torch.randint(shortest, LONGEST + 1, (), generator=generator))
        answer = int(torch.randint(1, length - 1, (), generator=generator))
        prompt = length - answer + 1
        samples.append(
            Sample(
                id=f"sample-{i}",
                prompt_ids=tokens(prompt),
                answer_ids=tokens(answer),
                corrupt_ids=tokens(prompt),
                foil_ids=tokens(answer),
            )
        )
    return samples


def tiny_batch(n: int = 3, seed: int = 0) -> Batch:
    return collate(tiny_samples(n, seed))
