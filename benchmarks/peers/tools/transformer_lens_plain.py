"""transformer-lens 2: a `HookedTransformer` and edge attribution patching as most scripts write it.

What every source writes on the corrupted prompt minus on the clean one goes into one tensor [B, T, n_sources, D];
a backward hook at every destination multiplies it, up to the last source written before, with the gradient in one
einsum.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from names import head_nodes
from tools.hooked_transformer import from_folder
from tools.loss import scalar
from torch import Tensor
from transformer_lens import HookedTransformer


def load(folder: Path, dtype: torch.dtype, form: dict[str, Any]) -> HookedTransformer:
    return from_folder(folder, dtype, ungroup=False)


def score(model: HookedTransformer, ids: Tensor, other: Tensor) -> Tensor:
    """[n_sources, n_destinations], summed over the batch."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    kv_heads = model.cfg.n_key_value_heads or n_heads
    per_layer = n_heads + 1
    n_sources, n_destinations = 1 + n_layers * per_layer, n_layers * (n_heads + 2 * kv_heads + 1) + 1
    shape = (*ids.shape, n_sources, model.cfg.d_model)
    difference = torch.zeros(shape, dtype=model.cfg.dtype)
    scores = torch.zeros(n_sources, n_destinations, dtype=model.cfg.dtype)

    def write(value: Tensor, hook: Any, first: int, sign: int) -> None:
        value = value.detach()
        last = first + (value.shape[2] if value.ndim == 4 else 1)
        difference[:, :, first:last] += sign * (value if value.ndim == 4 else value.unsqueeze(2))

    def read(gradient: Tensor, hook: Any, reach: int, first: int) -> None:
        if gradient.ndim == 3:
            gradient = gradient.unsqueeze(2)
        last = first + gradient.shape[2]
        scores[:reach, first:last] += torch.einsum("btsd,btnd->sn", difference[:, :, :reach], gradient)

    def track(value: Tensor, hook: Any) -> Tensor:
        return value.requires_grad_()

    def writers(sign: int) -> list[tuple[str, Any]]:
        hooks = [("blocks.0.hook_resid_pre", partial(write, first=0, sign=sign))]
        for layer in range(n_layers):
            first = 1 + layer * per_layer
            hooks += [
                (f"blocks.{layer}.attn.hook_result", partial(write, first=first, sign=sign)),
                (f"blocks.{layer}.hook_mlp_out", partial(write, first=first + n_heads, sign=sign)),
            ]
        return hooks

    readers = []
    column = 0
    for layer in range(n_layers):
        reach = 1 + layer * per_layer
        for branch, n in (("q", n_heads), ("k", kv_heads), ("v", kv_heads)):
            readers.append((f"blocks.{layer}.hook_{branch}_input", partial(read, reach=reach, first=column)))
            column += n
        readers.append((f"blocks.{layer}.hook_mlp_in", partial(read, reach=reach + n_heads, first=column)))
        column += 1
    last = f"blocks.{n_layers - 1}.hook_resid_post"
    readers.append((last, partial(read, reach=n_sources, first=column)))

    with torch.no_grad():
        model.run_with_hooks(other, fwd_hooks=writers(1))
    with model.hooks(fwd_hooks=[("hook_embed", track), *writers(-1)], bwd_hooks=readers):
        scalar(model(ids), ids).backward()
    return scores


def edges(model: HookedTransformer, scores: Tensor) -> tuple[np.ndarray, list[str], list[str]]:
    n_heads = model.cfg.n_heads
    names = head_nodes(model.cfg.n_layers, n_heads, model.cfg.n_key_value_heads or n_heads)
    return scores.float().numpy(), *names
