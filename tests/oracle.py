"""Edge scores from their definition, by perturbing the forward pass. Slow, and short enough to audit.

1. Run the model and record what every source adds to the residual stream: O_s [T, D].
2. Choose what takes its place, O'_s: zero, the corrupted run's, or a mean.
3. Run the model again, where each destination d reads H_d + Σ_s ε[s, d]·(O'_s − O_s) in place of H_d, before
   its own norm, and nothing else changes: q, k and v read streams of their own, and so does each head.
4. The score of the edge s→d is dL/dε[s, d] at ε = 0. One backward pass computes them all, as the derivative
   by ε, a plain leaf of the computation; `finite_difference` takes the same derivative without autograd.

Samples go through one at a time and unpadded, so neither batching nor padding can matter. Hooks here only
ever replace what is computed *forward*; nothing looks at a gradient of the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eaptk.batch import Batch
from eaptk.graph import Graph, Node

#: The loss of one sample: logits [T, V] to a scalar.
SampleLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """The modules of one decoder layer."""

    attention: nn.Module
    attention_norm: nn.Module
    projections: dict[str, nn.Module]  # by branch: q, k, v; one and the same module three times if fused
    output_projection: nn.Module
    mlp: nn.Module
    mlp_norm: nn.Module
    attention_post_norm: nn.Module | None = None
    mlp_post_norm: nn.Module | None = None


def decoder_layers(model: nn.Module) -> tuple[list[Layer], nn.Module]:
    """The layers of a model, and its final norm."""
    kind = model.config.model_type
    if kind == "gpt2":
        layers = [
            Layer(b.attn, b.ln_1, dict.fromkeys("qkv", b.attn.c_attn), b.attn.c_proj, b.mlp, b.ln_2)
            for b in model.transformer.h
        ]
        return layers, model.transformer.ln_f
    if kind == "gpt_neox":
        layers = [
            Layer(
                b.attention,
                b.input_layernorm,
                dict.fromkeys("qkv", b.attention.query_key_value),
                b.attention.dense,
                b.mlp,
                b.post_attention_layernorm,
            )
            for b in model.gpt_neox.layers
        ]
        return layers, model.gpt_neox.final_layer_norm
    layers = []
    for b in model.model.layers:
        a = b.self_attn
        projections = {"q": a.q_proj, "k": a.k_proj, "v": a.v_proj}
        if kind == "gemma2":
            layer = Layer(
                a,
                b.input_layernorm,
                projections,
                a.o_proj,
                b.mlp,
                b.pre_feedforward_layernorm,
                b.post_attention_layernorm,
                b.post_feedforward_layernorm,
            )
        elif kind == "phi":
            layer = Layer(a, b.input_layernorm, projections, a.dense, b.mlp, b.input_layernorm)
        else:
            layer = Layer(a, b.input_layernorm, projections, a.o_proj, b.mlp, b.post_attention_layernorm)
        layers.append(layer)
    final = model.model.final_layernorm if kind == "phi" else model.model.norm
    return layers, final


def head_width(model: nn.Module) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def columns(model: nn.Module, branch: str, head: int) -> list[int]:
    """Which outputs of its projection are head `head` of `branch`: a query head, or a key/value head."""
    width = head_width(model)
    start = head * width
    if model.config.model_type == "gpt2":  # all queries, then all keys, then all values
        start += "qkv".index(branch) * model.config.hidden_size
    if model.config.model_type == "gpt_neox":  # head by head: its query, its key, its value
        start = (3 * head + "qkv".index(branch)) * width
    return list(range(start, start + width))


def columns_read(model: nn.Module, graph: Graph, destination: Node) -> dict[str, list[int]]:
    """By branch, the projection outputs that belong to an attention destination."""
    branches = [destination.branch] if destination.branch else ["q", "k", "v"]
    read = {}
    for branch in branches:
        n_heads = graph.n_heads if branch == "q" else graph.n_kv_heads
        heads = range(n_heads) if destination.head is None else [destination.head]
        read[branch] = [column for head in heads for column in columns(model, branch, head)]
    return read


def is_edge(graph: Graph, source: Node, destination: Node) -> bool:
    """Whether `source` is written before `destination` reads."""
    if source.kind == "input":
        return True
    if source.layer != destination.layer:
        return source.layer < destination.layer
    return source.kind == "attention" and destination.kind == "mlp" and not graph.parallel


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [T, V] of one unpadded sequence [T]."""
    return model(input_ids=ids[None], use_cache=False).logits[0]


@torch.no_grad()
def record(model: nn.Module, ids: Tensor, graph: Graph) -> dict[str, Tensor]:
    """What each source adds to the stream, by name: [T, D]."""
    layers, _ = decoder_layers(model)
    seen: dict[tuple[str, int], Tensor] = {}
    handles = []

    def keep_input(kind: str, i: int, module: nn.Module) -> None:
        handles.append(
            module.register_forward_pre_hook(lambda m, args: seen.__setitem__((kind, i), args[0].detach()))
        )

    def keep_output(kind: str, i: int, module: nn.Module) -> None:
        def hook(m: nn.Module, args: Any, out: Any) -> None:
            seen[kind, i] = (out[0] if isinstance(out, tuple) else out).detach()

        handles.append(module.register_forward_hook(hook))

    keep_input("input", -1, layers[0].attention_norm)
    for i, layer in enumerate(layers):
        keep_output("attention", i, layer.attention_post_norm or layer.attention)
        keep_output("mlp", i, layer.mlp_post_norm or layer.mlp)
        keep_input("heads", i, layer.output_projection)
        keep_output("unnormed", i, layer.attention)
    with hooked(*handles):
        run(model, ids)

    written = {}
    for source in graph.sources:
        if source.head is None:
            written[source.name] = seen[source.kind, source.layer][0]
            continue
        layer = layers[source.layer]
        heads = seen["heads", source.layer]
        width = head_width(model)
        alone = torch.zeros_like(heads)
        alone[..., source.head * width : (source.head + 1) * width] = heads[
            ..., source.head * width : (source.head + 1) * width
        ]
        project = layer.output_projection.forward
        wrote = project(alone) - project(torch.zeros_like(heads))  # without the bias, which no head wrote
        if layer.attention_post_norm is not None:
            # Every head is scaled by the statistic of the whole block's output.
            norm, whole = layer.attention_post_norm, seen["unnormed", source.layer]
            wrote = wrote * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + norm.eps) * (1 + norm.weight)
        written[source.name] = wrote[0]
    return written


def perturbed_loss(
    model: nn.Module, ids: Tensor, loss: SampleLoss, graph: Graph, change: dict[str, Tensor], epsilon: Tensor
) -> Tensor:
    """The loss when each destination d reads H_d + Σ_s ε[s, d]·change_s.

    Args:
        change: [T, D] by source.
        epsilon: [n_sources, n_destinations]; entries that are no edge are not looked at.
    """
    layers, final_norm = decoder_layers(model)
    streams: dict[int, Tensor] = {}
    handles = []

    def stream_of(destination: Node, stream: Tensor) -> Tensor:
        d = graph.destinations.index(destination)
        for s, source in enumerate(graph.sources):
            if is_edge(graph, source, destination):
                stream = stream + epsilon[s, d] * change[source.name]
        return stream

    def remember_stream(norm: nn.Module) -> None:
        handles.append(norm.register_forward_pre_hook(lambda m, args: streams.__setitem__(id(norm), args[0])))

    def reproject(layer: Layer, projection: nn.Module, readers: list[tuple[Node, list[int]]]) -> None:
        def hook(m: nn.Module, args: Any, out: Tensor) -> Tensor:
            out = out.clone()
            for destination, own in readers:
                stream = stream_of(destination, streams[id(layer.attention_norm)])
                out[..., own] = projection.forward(layer.attention_norm.forward(stream))[..., own]
            return out

        handles.append(projection.register_forward_hook(hook))

    def reread(layer: Layer, destination: Node) -> None:
        def hook(m: nn.Module, args: Any) -> tuple[Tensor]:
            return (layer.mlp_norm.forward(stream_of(destination, streams[id(layer.mlp_norm)])),)

        handles.append(layer.mlp.register_forward_pre_hook(hook))

    for i, layer in enumerate(layers):
        remember_stream(layer.attention_norm)
        if layer.mlp_norm is not layer.attention_norm:
            remember_stream(layer.mlp_norm)
        readers: dict[nn.Module, list[tuple[Node, list[int]]]] = {}
        for destination in graph.destinations:
            if destination.layer == i and destination.kind == "attention":
                for branch, own in columns_read(model, graph, destination).items():
                    readers.setdefault(layer.projections[branch], []).append((destination, own))
            if destination.layer == i and destination.kind == "mlp":
                reread(layer, destination)
        for projection, its_readers in readers.items():
            reproject(layer, projection, its_readers)
    logits = graph.destinations[-1]
    handles.append(final_norm.register_forward_pre_hook(lambda m, args: (stream_of(logits, args[0]),)))
    with hooked(*handles):
        return loss(run(model, ids))


def scores(
    model: nn.Module,
    ids: Tensor,
    loss: SampleLoss,
    graph: Graph,
    replacement: dict[str, Tensor] | None = None,
) -> Tensor:
    """[n_sources, n_destinations]: dL/dε of every edge, 0 where there is none.

    Args:
        ids: [T], one sequence.
        loss: of the logits [T, V].
        replacement: what takes the place of each source's output, [T, D] or [D]; None for zero.
    """
    change = changes(record(model, ids, graph), replacement)
    epsilon = torch.zeros(graph.n_sources, graph.n_destinations, dtype=model.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(perturbed_loss(model, ids, loss, graph, change, epsilon), epsilon)
    return gradient


@torch.no_grad()
def finite_difference(
    model: nn.Module,
    ids: Tensor,
    loss: SampleLoss,
    graph: Graph,
    source: str,
    destination: str,
    replacement: dict[str, Tensor] | None = None,
    step: float = 1e-4,
) -> float:
    """One edge's dL/dε by central difference."""
    change = changes(record(model, ids, graph), replacement)
    s = [node.name for node in graph.sources].index(source)
    d = [node.name for node in graph.destinations].index(destination)
    losses = []
    for epsilon_sd in (step, -step):
        epsilon = torch.zeros(graph.n_sources, graph.n_destinations, dtype=model.dtype)
        epsilon[s, d] = epsilon_sd
        losses.append(float(perturbed_loss(model, ids, loss, graph, change, epsilon)))
    return (losses[0] - losses[1]) / (2 * step)


def changes(written: dict[str, Tensor], replacement: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """O'_s − O_s by source."""
    if replacement is None:
        return {name: -value for name, value in written.items()}
    return {name: replacement[name] - value for name, value in written.items()}


def nll(targets: Tensor) -> SampleLoss:
    """Mean negative log-likelihood of targets [T]; −100 carries none."""

    def loss(logits: Tensor) -> Tensor:
        at = targets >= 0
        return -logits.log_softmax(-1)[at, targets[at]].mean()

    return loss


def logit_difference(targets: Tensor, foils: Tensor) -> SampleLoss:
    """Mean of logit[foil] − logit[target] over the positions that have a target."""

    def loss(logits: Tensor) -> Tensor:
        at = targets >= 0
        return (logits[at, foils[at]] - logits[at, targets[at]]).mean()

    return loss


def kl(targets: Tensor, clean_logits: Tensor) -> SampleLoss:
    """Mean of KL(clean ‖ this run) over the positions that have a target."""

    def loss(logits: Tensor) -> Tensor:
        at = targets >= 0
        clean = clean_logits[at].log_softmax(-1)
        return (clean.exp() * (clean - logits[at].log_softmax(-1))).sum(-1).mean()

    return loss


def batch_scores(
    model: nn.Module,
    batch: Batch,
    graph: Graph,
    ablation: str = "zero",
    loss: str | Callable[[Tensor, Tensor], Tensor] = "nll",
    means: dict[str, Tensor] | None = None,
) -> Tensor:
    """[B, n_sources, n_destinations] by `scores`, one sample after the other.

    Args:
        loss: one of the names `attribute` knows, or of (logits [T, V], targets [T]).
    """
    rows = []
    for b, length in enumerate(batch.lengths.tolist()):
        ids, targets = batch.ids[b, :length], batch.targets[b, :length]
        corrupt = None if batch.corrupt_ids is None else batch.corrupt_ids[b, :length]
        replacement = {"zero": None, "mean": means}.get(ablation)
        if ablation == "patching":
            replacement = record(model, corrupt, graph)
        if loss == "kl":
            # KL has no slope on the clean run itself: the perturbed run is the corrupted one.
            clean_logits = run(model, ids).detach()
            clean = record(model, ids, graph)
            towards_clean = scores(model, corrupt, kl(targets, clean_logits), graph, clean)
            rows.append(-towards_clean)
            continue
        if loss == "nll":
            sample_loss = nll(targets)
        elif loss == "logit_diff":
            sample_loss = logit_difference(targets, batch.foils[b, :length])
        else:
            sample_loss = partial(loss, targets=targets)
        rows.append(scores(model, ids, sample_loss, graph, replacement))
    return torch.stack(rows)


def mean_written(model: nn.Module, batch: Batch, graph: Graph) -> dict[str, Tensor]:
    """By source, the mean [D] of what it writes over all real tokens of the batch."""
    sequences = [ids[:length] for ids, length in zip(batch.ids, batch.lengths.tolist(), strict=True)]
    written = [record(model, ids, graph) for ids in sequences]
    return {name: torch.cat([w[name] for w in written]).mean(0) for name in written[0]}


def relative_error(ours: Any, expected: Any) -> float:
    """Relative Frobenius distance."""
    ours, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, expected))
    return float((ours - expected).norm() / expected.norm())
