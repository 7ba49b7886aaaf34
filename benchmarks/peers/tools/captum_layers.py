"""captum: layer activations and layer gradients, joined to block-level edges with q, k and v merged.

Its layer attribution names a gradient by a module. A projection's input is one tensor for q, k and v, and a norm's
input is the stream itself, which all later readers share: so neither the branches nor single heads can be told
apart, and the last step, from a norm's output back to the stream it read, is autograd's, not captum's. That stream
is the sum of what was written before, so three forward passes do: captum gives gradients without activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from captum.attr import LayerActivation, LayerGradientXActivation
from names import block_nodes
from tools.loss import next_token_nll
from torch import Tensor, nn


class Modules:
    """What captum is given: writers in order of writing, the embedding first, norms in order of reading."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.writers: list[nn.Module] = []
        self.norms: list[nn.Module] = []
        if model.config.model_type == "gpt2":
            self.writers.append(model.transformer.drop)
            for block in model.transformer.h:
                self.norms += [block.ln_1, block.ln_2]
                self.writers += [block.attn.c_proj, block.mlp]
            self.norms.append(model.transformer.ln_f)
        else:
            self.writers.append(model.model.embed_tokens)
            for block in model.model.layers:
                self.norms += [block.input_layernorm, block.post_attention_layernorm]
                self.writers += [block.self_attn.o_proj, block.mlp]
            self.norms.append(model.model.norm)

    def loss(self, ids: Tensor) -> Tensor:
        return next_token_nll(self.model(input_ids=ids, use_cache=False).logits, ids)


def load(folder: Path, dtype: torch.dtype, form: dict[str, Any]) -> Modules:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return Modules(model.requires_grad_(False))


def score(modules: Modules, ids: Tensor, other: Tensor) -> Tensor:
    """[n_sources, n_destinations], summed over the batch."""
    gradients = LayerGradientXActivation(modules.loss, modules.norms, multiply_by_inputs=False).attribute(ids)
    writers = LayerActivation(modules.loss, modules.writers)
    difference = torch.stack([_tensor(value) for value in writers.attribute(other)], 2)
    clean = [_tensor(value) for value in writers.attribute(ids)]
    scores = torch.zeros(difference.shape[2], len(modules.norms), dtype=difference.dtype)
    stream = torch.zeros_like(clean[0])
    for d, (norm, gradient, written) in enumerate(zip(modules.norms, gradients, clean, strict=True)):
        difference[:, :, d] -= written
        stream = (stream + written).detach().requires_grad_()
        (back,) = torch.autograd.grad(norm(stream), stream, _tensor(gradient))
        reach = d + 1
        scores[:reach, d] = torch.einsum("btsd,btd->s", difference[:, :, :reach], back)
    return scores


def edges(modules: Modules, scores: Tensor) -> tuple[np.ndarray, list[str], list[str]]:
    return scores.float().numpy(), *block_nodes(modules.model.config.num_hidden_layers, "merged")


def _tensor(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value[0] if isinstance(value, tuple) else value
