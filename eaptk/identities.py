"""What must hold on any model, checked on the user's own: identities that a wrong entry or hook would break.

1. Sources rebuild the stream: the outputs written before a destination add up to what it reads.
2. Column sums: Σ_s I(s→d) = −Σ_t ⟨∇_{H_d}, H_d⟩. Norms do not see their input's scale (up to ε), so both vanish.
3. Splits add up: heads to their block, and q + k + v to the merged destination.
4. Direct perturbation: scale one source by 1 − ε where one destination reads it, in the forward pass;
   dL/dε at 0 is the edge's score. Shares nothing with the hooks that read gradients.
5. Linear in the loss, and no matter which batch a sample is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eaptk.attribution import attribute
from eaptk.batch import Batch, Sample, collate
from eaptk.capture import Capture, frozen
from eaptk.graph import Graph, Node
from eaptk.intervention import norm_before, reading_less, refuse_divided, removed
from eaptk.kernels import Source, contract
from eaptk.losses import Targets
from eaptk.passes import Halves, sample_losses
from eaptk.sites import Sites
from eaptk.weights import bare, device_of, dtype_of, features

#: Largest relative error that passes. In half precision the model's own rounding is all that is seen.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}


#: Name of an identity, relative error, and where that is worst.
Finding = tuple[str, float, str]


@dataclass(frozen=True)
class Check:
    """One identity's outcome: `error` is a relative Frobenius norm, `where` the node or edge it is worst at."""

    name: str
    error: float
    tolerance: float
    where: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def check(
    model: nn.Module, samples: Sequence[Sample] | None = None, *, n_edges: int = 12, seed: int = 0
) -> list[Check]:
    """Run the identities on `model`.

    Args:
        model: a Hugging Face causal LM.
        samples: what to run them on; default: a few of random tokens.
        n_edges: how many random edges a granularity to perturb directly (a forward and backward pass each).
        seed: of the random tokens and edges.
    """
    model = bare(model)
    tolerance = TOLERANCE[dtype_of(model)]
    random = np.random.default_rng(seed)
    samples = list(samples or _random_samples(model.get_input_embeddings().weight.shape[0], random))  # type: ignore[operator]
    batch = collate(samples).to(device_of(model))
    graphs = {
        (granularity, qkv): Graph.from_model(model, granularity, qkv)
        for granularity in ("block", "head")
        for qkv in ("split", "merged")
    }
    refuse_divided(Sites(model, graphs["block", "split"]))
    rows = {key: attribute(model, batch, graph).rows for key, graph in graphs.items()}
    found: list[Finding] = []
    with frozen(model):
        sites = Sites(model, graphs["block", "split"])
        with _streams(sites) as streams, torch.enable_grad(), Capture(sites, gradients=True) as run:
            loss = sample_losses(model, sites, batch)
            run.backward(loss.sum())
        found.append(_streams_rebuilt(sites, batch, run, streams))
        found.append(_column_sums(sites, batch, run, streams, rows["block", "split"]))
        folded = _fold(rows["block", "split"], graphs["block", "split"], graphs["block", "merged"])
        found.append(("q + k + v equal merged", _error(folded, rows["block", "merged"]), "all edges"))
        folded = _fold(rows["head", "split"], graphs["head", "split"], graphs["block", "split"])
        folded += _head_biases(sites, batch, run)
        found.append(("heads add up to blocks", _error(folded, rows["block", "split"]), "all edges"))
        for granularity in ("block", "head"):
            graph = graphs[granularity, "split"]
            columns = random.choice(graph.n_edges, min(n_edges, graph.n_edges), replace=False)
            found.append(
                _perturbed(model, Sites(model, graph), batch, rows[granularity, "split"], columns.tolist())
            )
    graph = graphs["block", "split"]
    parts = [attribute(model, batch, graph, loss=loss).rows for loss in (_mean_logit, _sum_of_losses)]
    found.append(("linear in the loss", _error(parts[1], parts[0] + rows["block", "split"]), "all edges"))
    alone = torch.cat([attribute(model, collate([sample]), graph).rows for sample in samples])
    found.append(("same alone as in a batch", _error(alone, rows["block", "split"]), "all edges"))
    return [Check(name, error, tolerance, where) for name, error, where in found]


def _random_samples(vocabulary: int, random: np.random.Generator) -> list[Sample]:
    lengths = ((12, 5), (7, 9), (16, 3))
    tokens = [tuple(random.integers(0, vocabulary, sum(pair)).tolist()) for pair in lengths]
    return [
        Sample(id=f"random-{i}", prompt_ids=ids[:n], answer_ids=ids[n:])
        for i, (ids, (n, _)) in enumerate(zip(tokens, lengths, strict=True))
    ]


def _mean_logit(logits: Tensor, batch: Batch) -> Tensor:
    targets = Targets.of(batch)
    at_loss = logits.flatten(0, 1)[targets.index]
    return targets.means(at_loss.gather(1, at_loss.argmax(1, keepdim=True))[:, 0].float())


def _sum_of_losses(logits: Tensor, batch: Batch) -> Tensor:
    targets = Targets.of(batch)
    at_loss = logits.flatten(0, 1)[targets.index]
    wide = at_loss.to(torch.promote_types(at_loss.dtype, torch.float32))
    nll = torch.nn.functional.cross_entropy(wide, targets.tokens, reduction="none")
    return targets.means(nll) + _mean_logit(logits, batch)


def _error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    scale = expected.norm().item()
    return (got - expected).norm().item() / scale if scale else float("inf")


def _streams_rebuilt(sites: Sites, batch: Batch, run: Capture, streams: dict[Node, Tensor]) -> Finding:
    real = (torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]).to(batch.ids.device)
    values = [value.double() for value in run.values.values()]
    worst, where = 0.0, "every stream"
    for node, stream in streams.items():
        rebuilt = torch.stack(values[: sites.graph.sources_before(node)]).sum(0)
        error = _error(rebuilt[real], stream[real])
        if error > worst:
            worst, where = error, f"read by {node.name}"
    return "sources rebuild the stream", worst, where


def _column_sums(
    sites: Sites, batch: Batch, run: Capture, streams: dict[Node, Tensor], rows: Tensor
) -> Finding:
    graph = sites.graph
    differences, sizes = [], []
    for index, (node, destination) in enumerate(zip(graph.destinations, run.destinations(), strict=True)):
        whole = contract([Source(streams[node])], [replace(destination, reach=1)], batch.lengths.tolist())
        column = rows[:, graph.offset[index] : graph.offset[index + 1]].double()
        differences.append((column.sum(1) - whole[:, 0].cpu()).norm().item())
        sizes.append(column.abs().sum(1).norm().item())
    worst = int(np.argmax(differences))
    # Both sums are near zero, so the largest column of |scores| is the scale to judge them by.
    return "column sums equal the stream's", differences[worst] / max(sizes), graph.destinations[worst].name


def _head_biases(sites: Sites, batch: Batch, run: Capture) -> Tensor:
    """[B, n_edges]: the part of each block's score that is its output projection's bias, which no head wrote."""
    graph = sites.graph
    scores = torch.zeros(len(batch), graph.n_edges, dtype=torch.float64)
    destinations = [replace(destination, reach=1) for destination in run.destinations()]
    for index, layer in enumerate(sites.layers):
        shape = features(layer.attention_output)
        if shape is None or layer.attention_post_norm is not None:
            continue
        # Of an adapted projection the adapter may have one as well.
        bias = layer.attention_output.forward(run.values["input"].new_zeros(1, 1, shape[0]))
        written = Source(bias.detach().expand_as(run.values[f"a{index}"]))
        columns = contract([written], destinations, batch.lengths.tolist()).double().cpu()
        source = [node.name for node in graph.sources].index(f"a{index}")
        for d in (graph.reach > source).nonzero()[0]:
            scores[:, graph.offset[d] + source] = columns[:, d]
    return scores


def _fold(rows: Tensor, fine: Graph, coarse: Graph) -> Tensor:
    """Add up rows of `fine` into the edges of `coarse` that they split: heads into blocks, branches into one."""

    def parent(node: Node, names: set[str]) -> str:
        whole = replace(node, head=None)
        return whole.name if whole.name in names else replace(whole, branch=None).name

    sources = {node.name for node in coarse.sources}
    destinations = {node.name for node in coarse.destinations}
    columns = [
        coarse.column(parent(fine.sources[s], sources), parent(fine.destinations[d], destinations))
        for s, d in zip(fine.edge_source, fine.edge_destination, strict=True)
    ]
    folded = torch.zeros(len(rows), coarse.n_edges, dtype=torch.float64)
    return folded.index_add_(1, torch.tensor(columns), rows.double())


def _perturbed(model: nn.Module, sites: Sites, batch: Batch, rows: Tensor, columns: Sequence[int]) -> Finding:
    with torch.no_grad(), Capture(sites, gradients=False) as capture:
        Halves(model, sites).hidden(batch.ids, Targets.of(batch).index)
    written = [removed(source, row) for source in capture.sources() for row in range(source.rows)]
    derivatives = []
    for column in columns:
        node = sites.graph.destinations[sites.graph.edge_destination[column]]
        epsilon = torch.zeros(
            len(batch), 1, 1, dtype=written[0].dtype, device=written[0].device, requires_grad=True
        )
        change = epsilon * written[sites.graph.edge_source[column]]
        with torch.enable_grad(), reading_less(sites, node, change):
            loss = sample_losses(model, sites, batch)
        derivatives.append(torch.autograd.grad(loss.sum(), epsilon)[0].flatten().cpu())
    expected = torch.stack(derivatives, dim=1).double()
    got = rows[:, columns].double()
    worst = int((got - expected).norm(dim=0).argmax())
    name = f"direct perturbation, {sites.graph.granularity} level"
    return name, _error(got, expected), sites.graph.edge_name(columns[worst])


@contextmanager
def _streams(sites: Sites) -> Iterator[dict[Node, Tensor]]:
    """The residual stream that each destination reads, filled in by a forward pass inside."""
    streams: dict[Node, Tensor] = {}

    def read(node: Node) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            streams[node] = args[0].detach()

        return hook

    hooks = []
    for node in sites.graph.destinations:
        hooks.append(norm_before(sites, node).register_forward_pre_hook(read(node)))
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()
