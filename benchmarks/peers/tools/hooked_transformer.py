"""A `HookedTransformer` of transformer-lens 2 from saved weights, unprocessed, split as edges need it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformer_lens import HookedTransformer, loading_from_pretrained


def from_folder(folder: Path, dtype: torch.dtype, ungroup: bool) -> HookedTransformer:
    """The model, in eval mode, its parameters frozen.

    Args:
        ungroup: give each query head key and value heads of its own.
    """
    config = loading_from_pretrained.get_pretrained_model_config(str(folder), dtype=dtype, device="cpu")
    config.tokenizer_name = None
    config.use_attn_result = True
    config.use_split_qkv_input = True
    config.use_hook_mlp_in = True
    if ungroup and config.n_key_value_heads is not None:
        config.ungroup_grouped_query_attention = True
    model = HookedTransformer(config, move_to_device=False)
    weights = loading_from_pretrained.get_pretrained_state_dict(str(folder), config, dtype=dtype)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval().requires_grad_(False)
