"""Edge attribution as the usual scripts do it: the peer that eaptk is measured against.

What every source writes goes into one tensor [B, T, n_sources, D]; each head's copy of the stream gets a backward
hook, and each hook multiplies its gradients [B, T, heads, D] with all earlier sources in one einsum. Kept from the
scripts: the dense tensor, a stream a head before norm and projection, one einsum a destination and layer. Spared
to be fair: samples are kept apart, key and value heads are not repeated to query heads, and parameters are frozen.

For models laid out like Llama (Qwen2, Mistral).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from eaptk import Batch, Graph
from eaptk.capture import frozen
from eaptk.passes import sample_losses
from eaptk.sites import Sites


def dense_scores(model: nn.Module, batch: Batch, graph: Graph) -> Tensor:
    """[B, n_sources, n_destinations] of zero ablation and nll, head level with split q, k, v; 0 where no edge is."""
    sites = Sites(model, graph)
    batch = batch.to(next(model.parameters()).device)
    weight = next(model.parameters())
    n_samples, n_tokens = batch.ids.shape
    width, heads = weight.shape[1], graph.n_heads
    written = torch.zeros(
        n_samples, n_tokens, graph.n_sources, width, dtype=weight.dtype, device=weight.device
    )
    scores = torch.zeros(n_samples, graph.n_sources, graph.n_destinations, device=weight.device)
    first_source = {(node.kind, node.layer): i for i, node in reversed(list(enumerate(graph.sources)))}
    first_destination = {
        (node.kind, node.layer, node.branch): i for i, node in reversed(list(enumerate(graph.destinations)))
    }

    def write(start: int, value: Tensor) -> None:
        written[:, :, start : start + value.shape[2]] = value.detach()

    def read(stream: Tensor, destination: int, rows: int) -> Tensor:
        """[B, T, rows, D]: a copy of the stream for each of `rows` destinations, scored on the way back."""
        copies = stream.unsqueeze(2).expand(-1, -1, rows, -1).clone()
        reach = int(graph.reach[destination])

        def score(gradient: Tensor) -> None:
            found = torch.einsum("btsd,btnd->bsn", written[:, :, :reach], gradient)
            scores[:, :reach, destination : destination + rows] -= found

        copies.register_hook(score)
        return copies

    with ExitStack() as hooks:

        def before(module: nn.Module, hook: Callable[..., Any]) -> None:
            hooks.callback(module.register_forward_pre_hook(hook).remove)

        def after(module: nn.Module, hook: Callable[..., Any]) -> None:
            hooks.callback(module.register_forward_hook(hook).remove)

        streams: dict[int, Tensor] = {}

        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            stream = args[0].detach().requires_grad_()
            write(0, stream.unsqueeze(2))
            return (stream, *args[1:])

        before(sites.layers[0].block, enter)
        for index, layer in enumerate(sites.layers):
            norm, n_kv = layer.attention_norm, graph.n_kv_heads

            def keep(module: nn.Module, args: tuple[Tensor, ...], index: int = index) -> None:
                streams[index] = args[0]

            before(norm, keep)
            for branch, module, n in (
                ("q", layer.query, heads),
                ("k", layer.key, n_kv),
                ("v", layer.value, n_kv),
            ):
                destination = first_destination["attention", index, branch]

                def project(
                    module: nn.Linear,
                    args: Any,
                    output: Tensor,
                    index: int = index,
                    norm: nn.Module = norm,
                    n: int = n,
                    destination: int = destination,
                ) -> Tensor:
                    normed = norm.forward(read(streams[index], destination, n))
                    split = module.weight.unflatten(0, (n, -1))
                    projected = torch.einsum("btnd,nhd->btnh", normed, split).flatten(2)
                    return projected if module.bias is None else projected + module.bias

                after(module, project)

            def heads_written(
                module: nn.Linear, args: tuple[Tensor, ...], start: int = first_source["attention", index]
            ) -> None:
                z = args[0].detach().unflatten(-1, (heads, -1))
                write(start, torch.einsum("btnh,dnh->btnd", z, module.weight.unflatten(1, (heads, -1))))

            def mlp_written(
                module: nn.Module, args: Any, output: Tensor, start: int = first_source["mlp", index]
            ) -> None:
                write(start, output.unsqueeze(2))

            before(layer.attention_output, heads_written)
            after(layer.mlp_write, mlp_written)
            _read_before(before, read, layer.mlp_norm, first_destination["mlp", index, None])
        _read_before(before, read, sites.final_norm, graph.n_destinations - 1)
        with frozen(model), torch.enable_grad():
            loss = sample_losses(model, sites, batch).sum()
            loss.backward()
    return scores


def _read_before(before: Any, read: Callable[..., Tensor], module: nn.Module, destination: int) -> None:
    before(module, lambda module, args: (read(args[0], destination, 1).squeeze(2),))
