"""Where a model's sources and destinations are: one declarative entry an architecture.

An entry names modules by their path in the Hugging Face implementation; nothing here imports torch.
`register_architecture` adds an entry from outside the package. After registering one, run
`eaptk.check(model)`: a wrong path or a wrong norm breaks an identity there and is named.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eaptk.errors import EaptkError

Norm = Literal["rms", "rms_plus_one", "layer"]
FusedLayout = Literal["blocks", "heads"]


def _serial(config: Any) -> bool:
    return False


@dataclass(frozen=True)
class Architecture:
    """How one `config.model_type` lays out its residual stream.

    Paths of `layers` and `final_norm` start at the model, all others at one layer. The norm of
    every destination must be of the one kind `norm`:

    - ``"rms"``: x·ρ·γ with ρ = (mean(x²) + ε)^(−1/2);
    - ``"rms_plus_one"``: the same with gain 1 + γ (Gemma);
    - ``"layer"``: (x − μ)·ρ·γ + β.
    """

    model_type: str
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    #: Modules that project the normed stream to queries, keys and values; three times the same path when fused.
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    #: Output layout of a fused projection: ``"blocks"`` [q | k | v] or ``"heads"`` [head, (q, k, v), head_dim].
    fused: FusedLayout | None = None
    #: The projection that maps the concatenated heads to the model width.
    attention_output: str = "self_attn.o_proj"
    #: Modules whose output is exactly what is added to the stream.
    attention_write: str = "self_attn"
    mlp_write: str = "mlp"
    #: The module that reads the MLP's normed stream (told apart from attention where both share one norm).
    mlp_read: str = "mlp"
    #: A norm between `attention_output` and the stream (Gemma-2); it is then also `attention_write`.
    attention_post_norm: str | None = None
    norm: Norm = "rms"
    #: Whether attention and MLP of one layer read the same stream, given the model's config.
    parallel: Callable[[Any], bool] = _serial

    def __post_init__(self) -> None:
        if (self.fused is not None) != (self.query == self.key == self.value):
            raise EaptkError(
                f"architecture {self.model_type!r}: a fused projection needs `fused` and one path for "
                f"query, key and value; separate ones need three paths and no `fused`"
            )


#: Kinds of rotary positions whose frequencies transformers chooses anew for each forward pass, by its longest sample.
_BATCH_BOUND = ("dynamic", "longrope")

_REGISTRY: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Add (or replace) the entry for `architecture.model_type`."""
    _REGISTRY[architecture.model_type] = architecture


def registered_architectures() -> list[str]:
    """The model types that have an entry, sorted."""
    return sorted(_REGISTRY)


def find_architecture(config: Any) -> Architecture:
    """The entry for a Hugging Face config.

    Raises:
        EaptkError: the model is not a decoder, or its type has no entry; its attention reads what comes later, or its
            positions depend on what else is in a batch.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in _REGISTRY:
        _refuse_acausal(config)
        return _REGISTRY[model_type]
    if getattr(config, "is_encoder_decoder", False):
        raise EaptkError(
            f"model type {model_type!r} is an encoder-decoder: edge attribution needs a decoder-only model"
        )
    close = difflib.get_close_matches(str(model_type), _REGISTRY, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    raise EaptkError(
        f"model type {model_type!r} has no architecture entry (known: {', '.join(registered_architectures())})"
        f"{guess}. If it is a pre-norm decoder, describe it with "
        f"eaptk.register_architecture(eaptk.Architecture({model_type!r}, …)); encoder-only models have no causal edges"
    )


def _refuse_acausal(config: Any) -> None:
    if getattr(config, "is_causal", None) is False:
        raise EaptkError(
            "the config has is_causal false: attention reads later tokens too, so there are no causal edges"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    # Of some models each kind of layer has its own.
    each = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    bound = sorted({str(found["rope_type"]) for found in each if found.get("rope_type") in _BATCH_BOUND})
    if bound:
        raise EaptkError(
            f"rotary positions of type {bound[0]!r} follow the longest sample of a batch, so a sample's scores would "
            f"depend on its neighbours; give the config another rope_type (default, linear, yarn, llama3)"
        )


for _model_type in ("llama", "mistral", "qwen2", "qwen3"):
    register_architecture(Architecture(_model_type))

register_architecture(
    Architecture(
        "gpt2",
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        fused="blocks",
        attention_output="attn.c_proj",
        attention_write="attn",
        norm="layer",
    )
)

register_architecture(
    Architecture(
        "gpt_neox",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        query="attention.query_key_value",
        key="attention.query_key_value",
        value="attention.query_key_value",
        fused="heads",
        attention_output="attention.dense",
        attention_write="attention",
        norm="layer",
        parallel=lambda config: bool(config.use_parallel_residual),
    )
)

register_architecture(
    Architecture(
        "gemma2",
        mlp_norm="pre_feedforward_layernorm",
        attention_write="post_attention_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_write="post_feedforward_layernorm",
        norm="rms_plus_one",
    )
)
