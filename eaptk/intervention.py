"""What an edge does, by running the model without it: no gradient, no first order.

One destination alone reads the stream with what one source wrote taken away, or replaced; everything else reads
the stream as it is, and the model runs on from there. The source was written before the destination reads, so it
wrote what it writes in a clean run: each edge costs one forward pass. This is the finite change whose first-order
prediction `eaptk.attribution` computes for all edges at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eaptk.batch import Batch
from eaptk.capture import Capture, frozen
from eaptk.errors import EaptkError
from eaptk.graph import Graph, Node
from eaptk.kernels import Source
from eaptk.losses import LossFunction, LossName, Targets
from eaptk.passes import Halves, sample_losses
from eaptk.request import Ablation, check_means, prepare
from eaptk.sites import Sites
from eaptk.weights import bare, dtype_of


def exact_effects(
    model: nn.Module,
    batch: Batch | Mapping[str, Any],
    graph: Graph,
    columns: Sequence[int],
    *,
    ablation: Ablation = "zero",
    loss: LossName | LossFunction = "nll",
    means: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Change of each sample's loss when one edge alone carries O' in place of O; `attribute` predicts it.

    With loss ``"kl"``, as in `attribute`, the corrupted run is where edges are looked at: the effect is
    KL(clean ‖ corrupted) less what is left of it when the edge alone carries what it carries in the clean run.

    Args:
        model, batch, graph, ablation, loss, means: as for `attribute`.
        columns: [e] of the edges, numbered as in `graph`; a forward pass of the batch each.

    Returns:
        [B, e] float64 on the CPU, in units of the loss. The loss is the model's, so effects below its rounding
        (for float32 about 1e-6 of the loss) are noise.

    Raises:
        EaptkError: what `attribute` refuses; no such column; a model in half precision, whose rounding is
            larger than what an edge does; the loss of a run without the edge is not finite.
    """
    model = bare(model)
    batch = prepare(model, batch, ablation, loss, means)
    dtype = dtype_of(model)
    if torch.finfo(dtype).bits < 32:
        raise EaptkError(
            f"the model is in {str(dtype).removeprefix('torch.')}, whose rounding hides what a single edge does; "
            f"load it in float32"
        )
    outside = [column for column in columns if not 0 <= column < graph.n_edges]
    if outside:
        raise EaptkError(f"there is no edge {outside[0]}; they are numbered 0 to {graph.n_edges - 1}")
    sites, targets = Sites(model, graph), Targets.of(batch)
    refuse_divided(sites)
    halves = Halves(model, sites)
    effects = torch.zeros(len(batch), len(columns), dtype=torch.float64)
    with frozen(model), torch.no_grad(), torch.autocast(batch.ids.device.type, enabled=False):
        with Capture(sites, gradients=False) as clean:
            clean_hidden = halves.hidden(batch.ids, targets.index)
        replacements, sign = means, 1
        if means is not None:
            check_means(means, clean)
        if ablation == "patching":
            assert batch.corrupt_ids is not None
            corrupted = replace(batch, ids=batch.corrupt_ids)
            with Capture(sites, gradients=False) as other:
                halves.hidden(corrupted.ids, targets.index)
            replacements = other.values
        sources = clean.sources(replacements)
        if loss == "kl":
            # The KL falls as the edge is restored; by as much the edge alone had raised it.
            batch, sources, sign = corrupted, other.sources(clean.values), -1
        changes = [removed(source, row) for source in sources for row in range(source.rows)]
        before = sample_losses(model, sites, batch, loss, clean_hidden)
        for k, column in enumerate(columns):
            node = graph.destinations[graph.edge_destination[column]]
            with reading_less(sites, node, changes[graph.edge_source[column]]):
                after = sample_losses(model, sites, batch, loss, clean_hidden)
            effects[:, k] = sign * (after.double() - before.double()).cpu()
    bad = (~effects.isfinite()).nonzero().tolist()
    if bad:
        sample, k = bad[0]
        raise EaptkError(
            f"sample {batch.names[sample]!r}: without edge {graph.edge_name(columns[k])} the loss is not finite "
            f"(check the weights)"
        )
    return effects


def refuse_divided(sites: Sites) -> None:
    """Raises EaptkError of a model that is not whole on one device and in this process."""
    if sites.shards is not None or len(sites.devices) > 1:
        raise EaptkError(
            "edges can be cut in a model on one device alone; load it without device_map and tensor parallelism"
        )


def removed(source: Source, row: int) -> Tensor:
    """[B, T, D]: O − O', what the stream lacks where an edge from one row of a source operand is cut."""
    value = source.value if source.replacement is None else source.value - source.replacement
    if source.weight is None:
        return value
    weight = source.weight[row] if source.gain is None else source.weight[row] * source.gain
    return value[..., row, :].to(weight.dtype) @ weight


@contextmanager
def reading_less(sites: Sites, node: Node, change: Tensor) -> Iterator[None]:
    """Let `node` alone read the stream minus `change` [B, T, D]; everything else reads the stream as it is."""
    norm = norm_before(sites, node)
    normed: list[Tensor] = []

    def through_norm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        normed.append(norm.forward(args[0] - change.to(args[0].dtype)))

    def whole(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (normed[0], *args[1:])

    def some_heads(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        mine = torch.zeros_like(output, dtype=torch.bool)
        assert node.branch is not None
        branch = sites.branch_values(mine, node.branch)
        (branch if node.head is None else branch[..., node.head, :]).fill_(True)
        return torch.where(mine, module.forward(normed[0]), output)

    hooks = [norm.register_forward_pre_hook(through_norm)]
    if node.kind == "attention":
        layer = sites.layers[node.layer]
        branches = {"q": layer.query, "k": layer.key, "v": layer.value}
        if node.branch is not None:
            hooks.append(branches[node.branch].register_forward_hook(some_heads))
        else:
            hooks += [p.register_forward_pre_hook(whole) for p in dict.fromkeys(branches.values())]
    elif node.kind == "mlp" and sites.layers[node.layer].shared_norm:
        hooks.append(sites.layers[node.layer].mlp_read.register_forward_pre_hook(whole))
    else:
        hooks.append(norm.register_forward_hook(lambda module, args, output: normed[0]))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def norm_before(sites: Sites, node: Node) -> nn.Module:
    """The norm between the stream and a destination."""
    if node.kind == "logits":
        return sites.final_norm
    layer = sites.layers[node.layer]
    return layer.attention_norm if node.kind == "attention" else layer.mlp_norm
