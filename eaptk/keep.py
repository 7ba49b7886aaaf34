"""What a run keeps of each sample's row of scores.

Two choices: *which edges* (`Keep.columns`; all unless some are named), and *how*:

    rows            the scores themselves
    statistics      what the metrics need of a row (see `eaptk.statistics`), given a histogram
    top-k           the k strongest of the sample's edges by |W|, and their columns
    layer pairs     for each source layer and destination layer, ΣW and Σ|W| over the edges between them

ΣW is, edges being linear in what passes along them, the score of the two layers' edge taken as one; Σ|W| does not let
edges of opposite sign cancel, and is what intensity is made of. Neither gives the other, so both are kept.

Everything is picked on the device that the scores are on; nothing of a row depends on the others of its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.statistics import Histogram, Summary, summarise
from eaptk.sweep import Integers, indices

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor

RowDtype = Literal["float32", "float16"]

#: What is kept of a batch: one array, several by name, or statistics.
Entries = npt.NDArray[Any] | dict[str, npt.NDArray[Any]] | Summary


@dataclass(frozen=True, eq=False)
class Keep:
    """What is kept of a row of scores; see the module.

    Args:
        graph: whose edges are scored.
        row_dtype: of what is stored of scores.
        histogram: keep statistics, counted in its bins.
        columns: keep only these edges: columns or a boolean mask; None for all. All of them is the same as None.
        top: keep so many of them a sample.
        layer_pairs: keep sums over pairs of layers.

    Raises:
        EaptkError: two ways of keeping at once, no edge, or columns and numbers that the graph does not have.
    """

    graph: Graph
    row_dtype: RowDtype = "float32"
    histogram: Histogram | None = None
    columns: Integers | None = field(default=None, repr=False)
    top: int | None = None
    layer_pairs: bool = False
    #: Where a manifest was read: what it says of the columns, which it does not hold.
    recorded: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.columns is not None:
            columns = np.unique(indices(self.columns, self.graph.n_edges, "edge"))
            if not len(columns):
                raise EaptkError("no edge is selected; there is nothing to keep")
            object.__setattr__(self, "columns", columns if len(columns) < self.graph.n_edges else None)
        ways = {
            "metrics only": self.histogram is not None,
            "the strongest edges of each sample": self.top is not None,
            "sums over layer pairs": self.layer_pairs,
        }
        chosen = [name for name, is_chosen in ways.items() if is_chosen]
        if len(chosen) > 1:
            raise EaptkError(f"a run keeps {' or '.join(chosen)}, not both; score twice for both")
        if self.histogram is not None and self.row_dtype != "float32":
            raise EaptkError(
                f"row_dtype {self.row_dtype!r} is for rows, and a run of metrics only stores none"
            )
        if self.top is not None and not 1 <= self.top < self.n_edges:
            raise EaptkError(
                f"top is {self.top}; it must be at least 1 and less than the {self.n_edges:,} edges there are to "
                f"choose from (to keep them all, leave it out)"
            )

    @property
    def n_edges(self) -> int:
        """How many edges are kept, or chosen from, or added up."""
        if self.recorded is not None and self.recorded["edges"] is not None:
            return int(self.recorded["edges"]["count"])
        return self.graph.n_edges if self.columns is None else len(self.columns)

    @property
    def whole(self) -> bool:
        """Whether every edge of `kept_graph` is kept, or chosen from."""
        if self.layer_pairs:
            return self._n_pairs == self.kept_graph.n_edges
        return self.n_edges == self.graph.n_edges

    def is_of(self, stored: Integers) -> bool:
        """Whether the edges to be kept of `kept_graph` are these, as far as the manifest tells."""
        if self.layer_pairs:
            return len(stored) == self._n_pairs
        edges = self.to_dict()["edges"]
        return edges is None or bool(edges == _facts(stored))

    @property
    def kept_graph(self) -> Graph:
        """The graph whose edges are stored: the pairs of layers, or the graph that was scored."""
        return self.graph.layers() if self.layer_pairs else self.graph

    @cached_property
    def arrays(self) -> dict[str, tuple[int, np.dtype[Any]]]:
        """Width and dtype of each array of one entry a sample, by name; none for statistics."""
        dtype = np.dtype(self.row_dtype)
        if self.histogram is not None:
            return {}
        if self.top is not None:
            return {"scores": (self.top, dtype), "columns": (self.top, np.dtype(np.int32))}
        if self.layer_pairs:
            return {"scores": (self._n_pairs, dtype), "absolute": (self._n_pairs, dtype)}
        return {"scores": (self.n_edges, dtype)}

    @property
    def description(self) -> str:
        """In words, for tables."""
        among = "" if self.n_edges == self.graph.n_edges else f" of {self.n_edges:,} chosen edges"
        if self.histogram is not None:
            return f"metrics only{among}: {self.histogram.bins} bins on [0, {self.histogram.upper:g}]"
        if self.top is not None:
            return f"the {self.top:,} strongest{among} of each, {self.row_dtype}"
        if self.layer_pairs:
            return f"sums{among} over {self._n_pairs:,} pairs of layers, {self.row_dtype}"
        return f"{self.row_dtype}{among}"

    def of(self, scores: Tensor, names: Sequence[str]) -> Entries:
        """What is kept of finite rows [B, n_edges] of the samples `names`.

        Raises:
            EaptkError: a number is beyond the range of the row dtype.
        """
        parts = self.reduce(scores)
        if self.histogram is not None:
            return summarise(parts["scores"], self.graph, self.histogram, self.columns)
        return self.entries({name: part.cpu() for name, part in parts.items()}, names)

    def reduce(self, scores: Tensor) -> dict[str, Tensor]:
        """The first half of `of`: `arrays` on the device of `scores`, which nothing waits for.

        For statistics the scores that are to be summarised.
        """
        import torch

        self._require_columns()
        dtype = getattr(torch, self.row_dtype)
        if self.layer_pairs:
            pairs = self._pairs_on(scores.device)
            signed, absolute = layer_sums(scores, self.graph, self._mask_on(scores.device))
            return {"scores": signed[:, pairs].to(dtype), "absolute": absolute[:, pairs].to(dtype)}
        columns = self._columns_on(scores.device)
        chosen = (scores if columns is None else scores[:, columns]).to(dtype)
        if self.top is None:
            return {"scores": chosen}
        places = torch.stack([strongest_places(row, self.top) for row in chosen])
        found = places if columns is None else columns[places]
        return {"scores": chosen.gather(1, places), "columns": found.int()}

    def entries(self, parts: Mapping[str, Tensor], names: Sequence[str]) -> Entries:
        """The second half: `parts` on the host, checked, as arrays.

        Raises:
            EaptkError: a number is beyond the range of the row dtype.
        """
        for part in parts.values():
            if not part.isfinite().all():
                row, place = (~part.isfinite()).nonzero()[0].tolist()
                edge = self.kept_graph.edge_name(self._stored_column(parts, row, place))
                raise EaptkError(
                    f"sample {names[row]!r}: the score of edge {edge} is beyond the range of {self.row_dtype}; "
                    f"use row dtype float32"
                )
        found = {name: part.numpy() for name, part in parts.items()}
        return found["scores"] if len(found) == 1 else found

    def table(self) -> pyarrow.Table:
        """``edges.parquet``: the edges that are stored, or that a sample's strongest are chosen from.

        A pair of layers has ``n_edges`` as well: how many were added up.
        """
        self._require_columns()
        if not self.layer_pairs:
            return self.graph.to_table(self.columns)
        return self.kept_graph.to_table(self._pairs).append_column(
            "n_edges", [self._edges_a_pair[self._pairs]]
        )

    def to_dict(self) -> dict[str, Any]:
        """What a manifest records; of the columns their number and fingerprint, as they lie in edges.parquet."""
        edges = None
        if self.recorded is not None:
            edges = self.recorded["edges"]
        elif self.columns is not None:
            edges = _facts(self.columns)
        return {
            "row_dtype": self.row_dtype,
            "metrics_only": None if self.histogram is None else asdict(self.histogram),
            "edges": edges,
            "top": self.top,
            "layer_pairs": self._n_pairs if self.layer_pairs else None,
        }

    @classmethod
    def from_dict(cls, manifest: Mapping[str, Any], graph: Graph) -> Keep:
        """What a manifest says is kept of a row of `graph`. It knows sizes but no columns: nothing can be picked.

        Raises:
            KeyError, TypeError, ValueError, EaptkError: it says nothing that can be kept.
        """
        histogram, pairs = manifest.get("metrics_only"), manifest.get("layer_pairs")
        return cls(
            graph,
            manifest["row_dtype"],
            None if histogram is None else Histogram(**histogram),
            top=manifest.get("top"),
            layer_pairs=pairs is not None,
            recorded={"edges": manifest.get("edges"), "layer_pairs": pairs},
        )

    def _require_columns(self) -> None:
        if self.recorded is not None and self.recorded["edges"] is not None:
            raise ValueError(
                "a manifest does not hold the columns of the edges to keep; give the Keep it was made of"
            )

    @property
    def _n_pairs(self) -> int:
        return len(self._pairs) if self.recorded is None else int(self.recorded["layer_pairs"])

    @cached_property
    def _edges_a_pair(self) -> Integers:
        """[pairs]: how many of the edges to keep lie between the two layers of each edge of `kept_graph`."""
        pair = layer_pair(self.graph)
        return np.bincount(
            pair if self.columns is None else pair[self.columns], minlength=self.kept_graph.n_edges
        )

    @cached_property
    def _pairs(self) -> Integers:
        """Edges of `kept_graph` that any edge to keep belongs to."""
        return np.flatnonzero(self._edges_a_pair)

    @cached_property
    def _on_device(self) -> dict[tuple[str, Any], Tensor]:
        return {}

    def _columns_on(self, device: Any) -> Tensor | None:
        return None if self.columns is None else self._moved("columns", self.columns, device)

    def _pairs_on(self, device: Any) -> Tensor:
        return self._moved("pairs", self._pairs, device)

    def _mask_on(self, device: Any) -> Tensor | None:
        if self.columns is None:
            return None
        mask = np.zeros(self.graph.n_edges, dtype=bool)
        mask[self.columns] = True
        return self._moved("mask", mask, device)

    def _moved(self, name: str, array: npt.NDArray[Any], device: Any) -> Tensor:
        import torch

        # Indices of a large graph are as many bytes as a row or two: they cross to a device once a run.
        if (name, device) not in self._on_device:
            self._on_device[name, device] = torch.from_numpy(array).to(device)
        return self._on_device[name, device]

    def _stored_column(self, parts: Mapping[str, Tensor], row: int, place: int) -> int:
        if "columns" in parts:
            return int(parts["columns"][row, place])
        stored = self._pairs if self.layer_pairs else self.columns
        return place if stored is None else int(stored[place])


def strongest_places(row: Tensor, k: int) -> Tensor:
    """[k]: where the `k` largest |row| are, the largest first, of equal ones the first; row [E] float32 or float16."""
    import torch

    # Which of equal values `topk` takes differs between devices and calls, so no two may be equal: floats that are
    # not negative are ordered as their bits are, and what the bits leave of an int64 counts down the places.
    size = row.abs().float().view(torch.int32).long()
    place = torch.arange(len(row), device=row.device)
    return ((size << 32) | (2**32 - 1 - place)).topk(k).indices


def layer_sums(scores: Tensor, graph: Graph, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ΣW and Σ|W| of rows [B, n_edges] over the edges between two layers, each [B, edges of `graph.layers()`].

    In float64, always in one order.

    Args:
        mask: [n_edges], the edges to add up; None for all.
    """
    import torch

    if scores.device.type not in ("cpu", "cuda"):  # others may lack float64
        scores, mask = scores.cpu(), None if mask is None else mask.cpu()
    pairs = graph.layers()
    # Source s belongs to the source of `pairs` with this number: -1 is the input.
    layer = torch.tensor([node.layer + 1 for node in graph.sources], device=scores.device)
    belongs = torch.nn.functional.one_hot(layer, pairs.n_sources).double()
    found = scores.new_zeros((2, len(scores), pairs.n_edges), dtype=torch.float64)
    for first, last in _alike(graph):
        # Destinations of one layer that read the same sources are one block of columns.
        reach = int(graph.reach[first])
        block = slice(int(graph.offset[first]), int(graph.offset[last]))
        part = scores[:, block] if mask is None else scores[:, block] * mask[block]
        part = part.unflatten(1, (last - first, reach))
        pair = graph.destinations[first].layer
        start, width = int(pairs.offset[pair]), int(pairs.reach[pair])
        for sums, values in zip(found, (part, part.abs()), strict=True):
            by_source = values.sum(1, dtype=torch.float64)
            sums[:, start : start + width] += by_source @ belongs[:reach, :width]
    return found[0], found[1]


def _alike(graph: Graph) -> list[tuple[int, int]]:
    """Runs [first, last) of destinations that share their layer and what they read."""
    layer = np.array([node.layer for node in graph.destinations])
    starts = np.flatnonzero((np.diff(layer) != 0) | (np.diff(graph.reach) != 0)) + 1
    ends = [0, *starts.tolist(), graph.n_destinations]
    return list(pairwise(ends))


def layer_pair(graph: Graph) -> Integers:
    """[n_edges]: the edge of `graph.layers()` that each edge lies in."""
    source = np.array([node.layer + 1 for node in graph.sources])
    destination = np.array([node.layer for node in graph.destinations])
    offset = graph.layers().offset
    return offset[destination[graph.edge_destination]] + source[graph.edge_source]


def _facts(columns: Integers) -> dict[str, Any]:
    """Of a set of columns, in ascending order."""
    digest = hashlib.sha256(np.ascontiguousarray(columns, dtype="<i8").tobytes())
    return {"count": len(columns), "fingerprint": f"sha256:{digest.hexdigest()}"}
