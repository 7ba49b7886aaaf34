"""An architecture entry resolved on a loaded model: its modules, weights by head, and norms."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eaptk.architecture import Architecture, find_architecture
from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.shards import Shards
from eaptk.weights import bare, dtype_of, execution_device, features, in_place, matrix

BRANCHES = ("q", "k", "v")


@dataclass(frozen=True)
class LayerSites:
    """Modules of one layer, named as in `Architecture`."""

    block: nn.Module
    attention_norm: nn.Module
    mlp_norm: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_output: nn.Module
    attention_write: nn.Module
    mlp_write: nn.Module
    mlp_read: nn.Module
    attention_post_norm: nn.Module | None

    @property
    def shared_norm(self) -> bool:
        """Attention and MLP read the output of one norm."""
        return self.attention_norm is self.mlp_norm


class Reader(NamedTuple):
    """One destination operand: a node, or all query, key or value heads of a layer.

    Args:
        name: ``a3<q>``, ``a3``, ``m3``, ``logits``.
        layer: the backward pass knows its gradient once it has left this layer.
        reach: number of sources it reads: the first ones.
        rows: number of nodes.
        branch: ``q``, ``k`` or ``v`` where its nodes are heads, else None.
        normed: its gradient is taken behind the attention's norm.
    """

    name: str
    layer: int
    reach: int
    rows: int
    branch: str | None
    normed: bool

    @property
    def group_key(self) -> Hashable:
        """Equal for those whose gradients go back through one norm together; see `kernels.reference`."""
        return (self.layer, self.branch is None) if self.normed else self.name


class Sites:
    """Where `graph`'s sources and destinations are in `model`, which may be a PEFT model.

    Of a model that is sharded over processes (`shards`) a process has its part of the heads.

    Raises:
        EaptkError: the model's type has no architecture entry, a path of the entry leads nowhere, or the
            graph was made for another model; heads are not shared out evenly.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        model = bare(model)
        self.dtype = dtype_of(model)
        self.architecture = find_architecture(model.config)
        expected = Graph.from_model(model, graph.granularity, graph.qkv)
        if graph != expected:
            raise EaptkError(f"the graph does not fit the model: it has {graph}, the model {expected}")
        self.graph = graph
        self.layers = [
            self._layer(block, i) for i, block in enumerate(self._find(model, self.architecture.layers))
        ]
        if len(self.layers) != graph.n_layers:
            raise EaptkError(f"the config says {graph.n_layers} layers, the model has {len(self.layers)}")
        self.final_norm: nn.Module = self._find(model, self.architecture.final_norm)
        self.unembedding = model.get_output_embeddings()  # type: ignore[operator]
        if self.unembedding is None:
            raise EaptkError(
                f"{type(model).__name__} has no output embeddings; load it with AutoModelForCausalLM"
            )
        first = self.layers[0]
        projections = dict.fromkeys((first.query, first.key, first.value, first.attention_output))
        self.shards = Shards.of(list(projections), graph)

    @cached_property
    def devices(self) -> list[torch.device]:
        """Where layers compute, in order of first use."""
        return list(dict.fromkeys(execution_device(layer.attention_output) for layer in self.layers))

    @cached_property
    def vocabulary(self) -> int:
        """Number of logits; packed weights of an unembedding have another shape."""
        _, written = features(self.unembedding) or self.unembedding.weight.shape[::-1]
        return int(written)

    @cached_property
    def readers(self) -> list[Reader]:
        """Destination operands in order of reading."""
        graph = self.graph
        split, heads = graph.qkv == "split", graph.granularity == "head"
        reach = {(node.kind, node.layer): graph.sources_before(node) for node in graph.destinations}
        found = []
        for i, layer in enumerate(self.layers):
            reads, shared = reach["attention", i], layer.shared_norm
            if not split:
                found.append(Reader(f"a{i}", i, reads, 1, None, shared))
            for branch in BRANCHES if split else ():
                rows = graph.n_heads if branch == "q" else graph.n_kv_heads
                found.append(
                    Reader(f"a{i}<{branch}>", i, reads, rows if heads else 1, branch if heads else None, True)
                )
            found.append(Reader(f"m{i}", i, reach["mlp", i], 1, None, shared))
        last = graph.n_layers
        return [*found, Reader("logits", last, reach["logits", last], 1, None, False)]

    def _layer(self, block: nn.Module, index: int) -> LayerSites:
        entry: Architecture = self.architecture
        post_norm = entry.attention_post_norm
        paths = {
            name: getattr(entry, name)
            for name in LayerSites.__dataclass_fields__
            if name not in ("block", "attention_post_norm")
        }
        where = f"layer {index}"
        return LayerSites(
            block=block,
            attention_post_norm=None if post_norm is None else self._find(block, post_norm, where),
            **{name: self._find(block, path, where) for name, path in paths.items()},
        )

    def _find(self, root: nn.Module, path: str, where: str = "the model") -> Any:
        try:
            return root.get_submodule(path)
        except AttributeError:
            raise EaptkError(
                f"architecture entry {self.architecture.model_type!r}: {where} has no module {path!r}; "
                f"compare the entry with the model's named_modules()"
            ) from None

    def norm_facts(self, norm: nn.Module) -> tuple[Tensor, float, bool]:
        """Gain [D], ε, and whether the norm removes the mean."""
        kind = self.architecture.norm
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if eps is None or not isinstance(getattr(norm, "weight", None), Tensor):
            raise EaptkError(
                f"cannot read gain and ε of {type(norm).__name__} as a {kind!r} norm; merge an adapter of norms, or "
                f"correct the architecture entry"
            )
        gain = in_place(norm, "weight")
        if kind == "rms_plus_one":
            gain = gain.to(torch.promote_types(gain.dtype, torch.float32)) + 1
        return gain, float(eps), kind == "layer"

    def output_weight(self, layer: LayerSites) -> Tensor:
        """[heads, head_dim, D]: the output projection's rows, by head."""
        return matrix(layer.attention_output, self.dtype).unflatten(0, (self._heads[0], -1))

    def branch_weight(self, layer: LayerSites, branch: str) -> Tensor:
        """[heads, head_dim, D]: the rows that project the normed stream to queries, keys or values."""
        module = {"q": layer.query, "k": layer.key, "v": layer.value}[branch]
        return self._branch(matrix(module, self.dtype).T, 0, branch)

    def branch_values(self, projected: Tensor, branch: str) -> Tensor:
        """[B, T, heads, head_dim]: one branch of a projection's output (or of the gradient there)."""
        return self._branch(projected, projected.ndim - 1, branch)

    def _branch(self, x: Tensor, axis: int, branch: str) -> Tensor:
        index, sizes = "qkv".index(branch), self._heads
        if self.architecture.fused == "blocks":
            head_dim = x.shape[axis] // sum(sizes)
            x = x.narrow(axis, sum(sizes[:index]) * head_dim, sizes[index] * head_dim)
        elif self.architecture.fused == "heads":
            return x.unflatten(axis, (sizes[0], 3, -1)).select(axis + 1, index)
        return x.unflatten(axis, (sizes[index], -1))

    def by_head(self, heads: Tensor) -> Tensor:
        """[B, T, heads, head_dim]: the output projection's input, of the heads that this process has."""
        return heads.unflatten(-1, (self._heads[0], -1))

    @property
    def _heads(self) -> tuple[int, int, int]:
        """Query, key and value heads of a layer that this process has."""
        parts = 1 if self.shards is None else self.shards.size
        n_kv_heads = self.graph.n_kv_heads // parts
        return self.graph.n_heads // parts, n_kv_heads, n_kv_heads
