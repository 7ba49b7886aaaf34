"""nnsight: two traces that read what plain edge attribution patching needs, and the definition written out.

Kept from the scripts: what sources write on the corrupted prompt minus on the clean one is one tensor
[B, T, n_sources, D], and every destination group has its gradients at full width and one einsum. A trace of the
corrupted prompt adds to that tensor, the one that gradients are taken in subtracts from it; gradients are read where
projections write, narrow, and nothing in the model is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnsight
import numpy as np
import torch
import transformers
from names import block_nodes, head_nodes
from tools.loss import scalar
from torch import Tensor, nn


@dataclass
class Block:
    """Where a layer is read, as nnsight's handles."""

    attention_norm: Any
    projections: list[Any]
    attention_output: Any
    mlp_norm: Any
    mlp: Any


class Traced:
    """The model under nnsight and what the definition needs of its weights."""

    def __init__(self, model: nn.Module, by_head: bool) -> None:
        config = model.config
        self.by_head = by_head
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.n_kv_heads = getattr(config, "num_key_value_heads", self.n_heads)
        self.width = config.hidden_size
        self.nnsight = nnsight.NNsight(model)
        if config.model_type == "gpt2":
            stem = self.nnsight.transformer
            self.final_norm = stem.ln_f
            self.blocks = [Block(b.ln_1, [b.attn.c_attn], b.attn.c_proj, b.ln_2, b.mlp) for b in stem.h]
            weight_in: Callable[[int], list[Tensor]] = lambda i: list(  # noqa: E731
                model.transformer.h[i].attn.c_attn.weight.T.chunk(3)
            )
            self.weight_out = [b.attn.c_proj.weight for b in model.transformer.h]
            self.norms = [(b.ln_1, b.ln_2) for b in model.transformer.h]
            self.last_norm = model.transformer.ln_f
        else:
            stem = self.nnsight.model
            self.final_norm = stem.norm
            self.blocks = [
                Block(
                    b.input_layernorm,
                    [b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj],
                    b.self_attn.o_proj,
                    b.post_attention_layernorm,
                    b.mlp,
                )
                for b in stem.layers
            ]
            weight_in = lambda i: [  # noqa: E731
                getattr(model.model.layers[i].self_attn, f"{branch}_proj").weight for branch in "qkv"
            ]
            self.weight_out = [b.self_attn.o_proj.weight.T for b in model.model.layers]
            self.norms = [(b.input_layernorm, b.post_attention_layernorm) for b in model.model.layers]
            self.last_norm = model.model.norm
        self.weight_in = [weight_in(i) for i in range(self.n_layers)]

    def nodes(self) -> tuple[list[str], list[str]]:
        if self.by_head:
            return head_nodes(self.n_layers, self.n_heads, self.n_kv_heads)
        return block_nodes(self.n_layers, "split")


def load(folder: Path, dtype: torch.dtype, form: dict[str, Any]) -> Traced:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return Traced(model.requires_grad_(False), by_head=form["granularity"] == "head")


def _attention(traced: Traced, index: int) -> Tensor:
    """[B, T, n, D]: what the heads of a layer write, or all of them together."""
    output = traced.blocks[index].attention_output
    if not traced.by_head:
        return output.output[:, :, None]
    weight = traced.weight_out[index].unflatten(0, (traced.n_heads, -1))
    return torch.einsum("bthe,hed->bthd", output.input.detach().unflatten(-1, (traced.n_heads, -1)), weight)


def _add(difference: Tensor, first: int, value: Tensor, sign: int) -> None:
    difference[:, :, first : first + value.shape[2]].add_(value.detach(), alpha=sign)


def score(traced: Traced, ids: Tensor, other: Tensor) -> Tensor:
    """[n_sources, n_destinations], summed over the batch."""
    n_sources, n_destinations = map(len, traced.nodes())
    per_layer = traced.n_heads + 1 if traced.by_head else 2
    dtype = traced.weight_in[0][0].dtype
    difference = torch.zeros(*ids.shape, n_sources, traced.width, dtype=dtype)
    with torch.no_grad(), traced.nnsight.trace(other):
        _add(difference, 0, traced.blocks[0].attention_norm.input[:, :, None], 1)
        for index, block in enumerate(traced.blocks):
            first = 1 + index * per_layer
            _add(difference, first, _attention(traced, index), 1)
            _add(difference, first + per_layer - 1, block.mlp.output[:, :, None], 1)
    with traced.nnsight.trace(ids):
        streams, outputs = nnsight.save([]), nnsight.save([])
        for index, block in enumerate(traced.blocks):
            first = 1 + index * per_layer
            stream = block.attention_norm.input
            if index == 0:
                stream.requires_grad_()
                _add(difference, 0, stream[:, :, None], -1)
            streams.append(stream)
            outputs.extend([projection.output for projection in block.projections])
            _add(difference, first, _attention(traced, index), -1)
            streams.append(block.mlp_norm.input)
            outputs.append(block.mlp_norm.output)
            _add(difference, first + per_layer - 1, block.mlp.output[:, :, None], -1)
        streams.append(traced.final_norm.input)
        outputs.append(traced.final_norm.output)
        loss = scalar(traced.nnsight.output.logits, ids).save()
    gradients = list(torch.autograd.grad(loss, list(outputs)))

    scores = torch.zeros(n_sources, n_destinations, dtype=dtype)
    column = 0

    def contract(norm: nn.Module, stream: Tensor, normed: Tensor, reach: int) -> None:
        """Gradients [B, T, n, D] where the norm writes, of n destinations in a row."""
        nonlocal column
        copies = stream.detach()[:, :, None].expand(normed.shape).clone().requires_grad_()
        (read,) = torch.autograd.grad(norm(copies), copies, normed)
        last = column + normed.shape[2]
        scores[:reach, column:last] = torch.einsum("btsd,btnd->sn", difference[:, :, :reach], read)
        column = last

    for index in range(traced.n_layers):
        attention_norm, mlp_norm = traced.norms[index]
        reach = 1 + index * per_layer
        branches = [gradients.pop(0) for _ in traced.blocks[index].projections]
        if len(branches) == 1:
            branches = list(branches[0].chunk(3, -1))
        sizes = (traced.n_heads, traced.n_kv_heads, traced.n_kv_heads)
        for gradient, weight, size in zip(branches, traced.weight_in[index], sizes, strict=True):
            n = size if traced.by_head else 1
            wide = torch.einsum(
                "btne,ned->btnd", gradient.unflatten(-1, (n, -1)), weight.unflatten(0, (n, -1))
            )
            contract(attention_norm, streams[2 * index], wide, reach)
        contract(mlp_norm, streams[2 * index + 1], gradients.pop(0)[:, :, None], reach + per_layer - 1)
    contract(traced.last_norm, streams[-1], gradients.pop(0)[:, :, None], n_sources)
    return scores


def edges(traced: Traced, scores: Tensor) -> tuple[np.ndarray, list[str], list[str]]:
    return scores.float().numpy(), *traced.nodes()
