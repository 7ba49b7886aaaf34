"""The computation graph: which sources each destination reads, and where an edge's score is stored.

A pre-norm decoder keeps one residual stream. *Sources* add to it in a fixed order, *destinations* read
it. The edge s→d exists iff s is written before d reads, so the sources a destination sees are always a
prefix of the order of writing, and the real edges pack into one row without a mask:

    column(s, d) = offset(d) + index(s),    offset(d) = Σ_{d' before d} reach(d')

where reach(d) is the number of sources written before d reads.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from eaptk.architecture import find_architecture
from eaptk.errors import EaptkError

if TYPE_CHECKING:
    import networkx
    import pandas
    import pyarrow

#: What a model can be scored at.
Granularity = Literal["block", "head"]
#: What a graph's nodes can be: a layer as one node is what scores are added up to, see `Graph.layers`.
Level = Literal["block", "head", "layer"]
Qkv = Literal["split", "merged"]
Kind = Literal["input", "attention", "mlp", "layer", "logits"]


@dataclass(frozen=True)
class Node:
    """A source or a destination. `layer` is −1 for ``input`` and the number of layers for ``logits``."""

    kind: Kind
    layer: int
    head: int | None = None
    branch: Literal["q", "k", "v"] | None = None

    @property
    def name(self) -> str:
        """The field's name for it: ``input``, ``a3``, ``a3.h1``, ``a3.h1<q>``, ``m5``, ``logits``; ``l3``."""
        if self.kind in ("input", "logits"):
            return self.kind
        stem = f"{self.kind[0]}{self.layer}"
        head = "" if self.head is None else f".h{self.head}"
        branch = "" if self.branch is None else f"<{self.branch}>"
        return stem + head + branch


@dataclass(frozen=True)
class Graph:
    """Sources, destinations and real edges of a decoder.

    Args:
        n_layers: number of decoder layers.
        n_heads: query heads a layer.
        n_kv_heads: key/value heads a layer (equal to `n_heads` without grouped-query attention).
        granularity: ``"block"``: one node per attention block and MLP; ``"head"``: one per head; ``"layer"``: one
            per layer (see `layers`).
        qkv: ``"split"``: q, k and v read separately; ``"merged"``: one destination ``a{l}`` a layer.
        parallel: the MLP reads the same stream as the attention of its layer (GPT-NeoX).
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    granularity: Level = "block"
    qkv: Qkv = "split"
    parallel: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("granularity", self.granularity, ("block", "head", "layer")),
            ("qkv", self.qkv, ("split", "merged")),
        ):
            if value not in allowed:
                raise EaptkError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        if min(self.n_layers, self.n_heads, self.n_kv_heads) < 1 or self.n_heads % self.n_kv_heads:
            raise EaptkError(
                f"a graph needs at least one layer and a number of heads divisible by that of key/value "
                f"heads; got layers={self.n_layers}, heads={self.n_heads}, key/value heads={self.n_kv_heads}"
            )

    @classmethod
    def from_config(cls, config: Any, granularity: Level = "block", qkv: Qkv = "split") -> Graph:
        """The graph of a Hugging Face config.

        Raises:
            EaptkError: the config's `model_type` has no architecture entry, or `granularity` is ``"layer"``.
        """
        if granularity == "layer":
            raise EaptkError(
                "nothing is scored at layer granularity; score blocks or heads, and keep sums over layer pairs"
            )
        architecture = find_architecture(config)
        return cls(
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            granularity=granularity,
            qkv=qkv,
            parallel=architecture.parallel(config),
        )

    @classmethod
    def from_model(cls, model: Any, granularity: Level = "block", qkv: Qkv = "split") -> Graph:
        """The graph of a loaded Hugging Face model; see `from_config`."""
        if not hasattr(model, "config"):
            raise EaptkError(
                f"a {type(model).__name__} has no Hugging Face config; give the causal LM inside it"
            )
        return cls.from_config(model.config, granularity, qkv)

    @cached_property
    def sources(self) -> tuple[Node, ...]:
        """Sources in order of writing: ``input``, then per layer the attention block (or its heads) and the MLP."""
        nodes = [Node("input", -1)]
        if self.granularity == "layer":
            return (*nodes, *(Node("layer", layer) for layer in range(self.n_layers)))
        for layer in range(self.n_layers):
            heads = range(self.n_heads) if self.granularity == "head" else [None]
            nodes += [Node("attention", layer, head) for head in heads]
            nodes.append(Node("mlp", layer))
        return tuple(nodes)

    @cached_property
    def destinations(self) -> tuple[Node, ...]:
        """Destinations in order of reading: per layer the attention's and the MLP's; then ``logits``."""
        nodes: list[Node] = []
        if self.granularity == "layer":
            nodes = [Node("layer", layer) for layer in range(self.n_layers)]
            return (*nodes, Node("logits", self.n_layers))
        for layer in range(self.n_layers):
            if self.qkv == "merged":
                nodes.append(Node("attention", layer))
            else:
                for branch, n_heads in (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads)):
                    heads = range(n_heads) if self.granularity == "head" else [None]
                    nodes += [Node("attention", layer, head, branch) for head in heads]  # type: ignore[arg-type]
            nodes.append(Node("mlp", layer))
        nodes.append(Node("logits", self.n_layers))
        return tuple(nodes)

    @property
    def n_sources(self) -> int:
        return len(self.sources)

    @property
    def n_destinations(self) -> int:
        return len(self.destinations)

    @property
    def n_edges(self) -> int:
        """Number of real edges, the width of a score row."""
        return int(self.offset[-1])

    def sources_before(self, destination: Node) -> int:
        """How many sources are written before `destination` reads."""
        per_layer = {"head": self.n_heads + 1, "block": 2, "layer": 1}[self.granularity]
        seen = 1 + destination.layer * per_layer
        if destination.kind == "mlp" and not self.parallel:
            seen += per_layer - 1
        if destination.kind == "layer" and not self.parallel:
            seen += 1  # its MLP reads its attention
        return seen

    @cached_property
    def reach(self) -> npt.NDArray[np.int64]:
        """[n_destinations]: how many sources each destination reads; they are the first ones."""
        return np.array([self.sources_before(d) for d in self.destinations], dtype=np.int64)

    @cached_property
    def offset(self) -> npt.NDArray[np.int64]:
        """[n_destinations + 1]: the first column of each destination's edges; the last entry is n_edges."""
        return np.concatenate([[0], np.cumsum(self.reach)])

    @cached_property
    def edge_source(self) -> npt.NDArray[np.int64]:
        """[n_edges]: index of each column's source."""
        return np.concatenate([np.arange(reach) for reach in self.reach])

    @cached_property
    def edge_destination(self) -> npt.NDArray[np.int64]:
        """[n_edges]: index of each column's destination."""
        return np.repeat(np.arange(self.n_destinations), self.reach)

    def layers(self) -> Graph:
        """The same decoder with a node a layer: its edges are the pairs of layers that any edge joins.

        Sources ``input``, ``l0``, ``l1``, …, destinations ``l0``, ``l1``, …, ``logits``. A layer reads itself where
        its MLP reads its attention.
        """
        return replace(self, granularity="layer")

    @cached_property
    def _source_index(self) -> dict[str, int]:
        return {node.name: i for i, node in enumerate(self.sources)}

    @cached_property
    def _destination_index(self) -> dict[str, int]:
        return {node.name: i for i, node in enumerate(self.destinations)}

    def column(self, source: str, destination: str) -> int:
        """The column of the edge `source`→`destination`, both by name.

        Raises:
            EaptkError: no such node, or the source is written only after the destination reads.
        """
        s = _look_up(source, self._source_index, "source")
        d = _look_up(destination, self._destination_index, "destination")
        if s >= self.reach[d]:
            raise EaptkError(f"no edge {source}→{destination}: {source} is written after {destination} reads")
        return int(self.offset[d]) + s

    def edge_name(self, column: int) -> str:
        """``source→destination`` of a column."""
        source = self.sources[self.edge_source[column]].name
        return f"{source}→{self.destinations[self.edge_destination[column]].name}"

    def matrix(self, rows: npt.ArrayLike) -> npt.NDArray[Any]:
        """Unpack [..., n_edges] into [..., n_sources, n_destinations], 0 where there is no edge."""
        rows = np.asarray(rows)
        if rows.shape[-1:] != (self.n_edges,):
            raise EaptkError(
                f"rows have shape {rows.shape}; the last axis must be the graph's {self.n_edges} edges"
            )
        dense = np.zeros((*rows.shape[:-1], self.n_sources, self.n_destinations), dtype=rows.dtype)
        dense[..., self.edge_source, self.edge_destination] = rows
        return dense

    def pack(self, matrix: npt.ArrayLike) -> npt.NDArray[Any]:
        """The inverse of `matrix`: [..., n_sources, n_destinations] to [..., n_edges]."""
        matrix = np.asarray(matrix)
        if matrix.shape[-2:] != (self.n_sources, self.n_destinations):
            raise EaptkError(
                f"matrix has shape {matrix.shape}; the last two axes must be "
                f"({self.n_sources}, {self.n_destinations})"
            )
        packed: npt.NDArray[Any] = matrix[..., self.edge_source, self.edge_destination]
        return packed

    def to_dict(self) -> dict[str, Any]:
        """The defining fields, JSON-ready; `from_dict` restores the graph."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Graph:
        return cls(**fields)

    def to_frame(self, columns: npt.ArrayLike | None = None) -> pandas.DataFrame:
        """One row an edge: column, source, destination, source_layer, destination_layer.

        Args:
            columns: of these edges, in this order; None for all.
        """
        return self.to_table(columns).to_pandas()

    def to_table(self, columns: npt.ArrayLike | None = None) -> pyarrow.Table:
        """`to_frame` as an Arrow table, which of millions of edges is had much sooner."""
        import pyarrow

        columns = self._columns(columns)
        names, layers = {}, {}
        for role, nodes, index in (
            ("source", self.sources, self.edge_source[columns]),
            ("destination", self.destinations, self.edge_destination[columns]),
        ):
            once = [node.name for node in nodes]
            names[role] = pyarrow.DictionaryArray.from_arrays(
                index.astype(np.int32), once
            ).dictionary_decode()
            layers[f"{role}_layer"] = np.array([node.layer for node in nodes], dtype=np.int32)[index]
        return pyarrow.table({"column": columns, **names, **layers})

    def to_networkx(
        self, row: npt.ArrayLike | None = None, columns: npt.ArrayLike | None = None
    ) -> networkx.DiGraph:
        """A digraph of real edges; `row` [e] becomes the edge attribute ``score``.

        Args:
            row: a score for each of `columns`.
            columns: the edges to draw; None for all. Nodes are there in any case.

        A node that both reads and writes appears once for reading and once for writing where the names
        differ (``a0<q>`` and ``a0``); they are joined by no edge, as no score belongs there.
        """
        import networkx

        graph = networkx.DiGraph()
        for node in (*self.sources, *self.destinations):
            graph.add_node(node.name, kind=node.kind, layer=node.layer, head=node.head, branch=node.branch)
        scores = None if row is None else np.asarray(row)
        for place, column in enumerate(self._columns(columns).tolist()):
            source = self.sources[self.edge_source[column]].name
            destination = self.destinations[self.edge_destination[column]].name
            attributes = {"column": column} | ({} if scores is None else {"score": float(scores[place])})
            graph.add_edge(source, destination, **attributes)
        return graph

    def _columns(self, columns: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
        return np.arange(self.n_edges) if columns is None else np.asarray(columns, dtype=np.int64)


def _look_up(name: str, index: dict[str, int], role: str) -> int:
    if name in index:
        return index[name]
    close = difflib.get_close_matches(name, index, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise EaptkError(f"no {role} named {name!r} in this graph{hint}")
