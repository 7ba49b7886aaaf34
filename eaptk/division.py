"""A contraction whose sources are not all at hand: it goes to where they are, part by part, and its scores come back.

Sources stay on the device, or with the process, that computed them. What travels is one flush group's destinations,
which are few, and each part's scores. Weights that wait elsewhere (`eaptk.weights`) are had for one part at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eaptk.kernels import Destination, Norm, Source, contract
from eaptk.sites import Sites
from eaptk.weights import at_hand, features

#: Bytes of projections made or brought for the purpose, about the most held at a time: of sources, and of destinations.
BROUGHT = 2**30


@dataclass(frozen=True)
class _Part:
    """Sources in one place: which operands, and the numbers [n] of their source rows in the graph."""

    operands: tuple[int, ...]
    rows: Tensor

    @property
    def device(self) -> torch.device:
        return self.rows.device


class Division:
    """Sources as they are spread over devices and processes.

    Args:
        sources: in order of writing; a weight on the meta device is had when it is needed.
    """

    def __init__(self, sites: Sites, sources: Sequence[Source]) -> None:
        self._sites = sites
        self._sources = sources
        self._heads = sites.shards if any(source.weight is not None for source in sources) else None
        self._parts = self._divide()

    def contract(self, destinations: Sequence[Destination], lengths: Sequence[int]) -> Tensor:
        """Scores [B, edges] as `eaptk.kernels.contract` gives them, on the first source's device."""
        shards = self._heads
        if shards is not None:
            destinations = [
                destination
                if destination.weight is None
                else replace(
                    destination,
                    gradient=shards.gather(destination.gradient, 2),
                    weight=shards.gather(destination.weight, 0),
                )
                for destination in destinations
            ]
        elif len(self._parts) == 1:
            return contract(self._ready(self._parts[0]), _moved(destinations, self._parts[0].device), lengths)
        scores: Tensor | None = None
        for part in self._parts:
            found = self._of_part(part, destinations, lengths)
            everyones = [found] if shards is None else shards.gather_parts(found)
            if scores is None:
                n_edges = sum(destination.rows * destination.reach for destination in destinations)
                scores = found.new_zeros(len(lengths), n_edges)
            for rank, each in enumerate(everyones):
                _spread(
                    each.to(scores.device), self._rows(part, rank).to(scores.device), destinations, scores
                )
        assert scores is not None
        return scores

    def _divide(self) -> list[_Part]:
        """Parts in order of their first source; sources of one device, unless their weights are too many."""
        groups: dict[tuple[torch.device, int], list[int]] = {}
        brought: dict[torch.device, int] = {}
        for i, source in enumerate(self._sources):
            device = source.value.device
            if source.weight is not None and source.weight.is_meta:
                brought[device] = brought.get(device, 0) + source.weight.nbytes
            groups.setdefault((device, brought.get(device, 0) // BROUGHT), []).append(i)
        starts, row = [], 0
        for source in self._sources:
            starts.append(row)
            row += source.rows if self._heads is None or source.weight is None else self._sites.graph.n_heads
        parts = []
        for (device, _), operands in groups.items():
            numbers = []
            for i in operands:
                source = self._sources[i]
                first = starts[i]
                if self._heads is not None and source.weight is not None:
                    first += self._heads.rank * source.rows
                numbers.append(torch.arange(first, first + source.rows))
            parts.append(_Part(tuple(operands), torch.cat(numbers).to(device)))
        return parts

    def _rows(self, part: _Part, rank: int) -> Tensor:
        """Source rows of the process `rank` in place of this one's."""
        if self._heads is None:
            return part.rows
        numbers, at = part.rows.clone(), 0
        for i in part.operands:
            source = self._sources[i]
            if source.weight is not None:
                numbers[at : at + source.rows] += (rank - self._heads.rank) * source.rows
            at += source.rows
        return numbers

    def _of_part(self, part: _Part, destinations: Sequence[Destination], lengths: Sequence[int]) -> Tensor:
        reading = [
            replace(destination, reach=reach)
            for destination, reach in zip(destinations, _reaches(part.rows, destinations), strict=True)
            if reach
        ]
        if not reading:
            return torch.zeros(len(lengths), 0, device=part.device)
        return contract(self._ready(part, reading[-1].reach), _moved(reading, part.device), lengths)

    def _ready(self, part: _Part, reach: int | None = None) -> list[Source]:
        """A part's operands with their weights, as far as they are read."""
        ready, row = [], 0
        for i in part.operands:
            source = self._sources[i]
            if reach is not None and row >= reach:
                break
            row += source.rows
            if source.weight is not None and source.weight.is_meta:
                layer = self._sites.layers[(i - 1) // 2]
                weight = self._sites.output_weight(layer).to(source.value.device)
                source = replace(source, weight=weight)
            ready.append(source)
        return ready


def flush_limit(sites: Sites) -> int | None:
    """Layers whose destinations may be contracted together, so that weights made for them are no more than `BROUGHT`.

    Returns:
        None if there is no such limit.
    """
    if sites.graph.granularity == "block":
        return None
    projections = [p for layer in sites.layers for p in (layer.query, layer.key, layer.value)]
    if sites.shards is None and all(map(at_hand, projections)):
        return None
    # A fused projection counts once.
    shapes = [features(projection) for projection in dict.fromkeys(projections[:3])]
    size = sum(read * written for read, written in filter(None, shapes))
    layers = max(1, BROUGHT // max(1, size * sites.dtype.itemsize))
    return layers if layers < len(sites.layers) else None


def _reaches(rows: Tensor, destinations: Sequence[Destination]) -> list[int]:
    """How many of these source rows each destination reads: the first ones, as they are in order."""
    reaches = torch.tensor([destination.reach for destination in destinations])
    return torch.searchsorted(rows.cpu(), reaches).tolist()


def _spread(found: Tensor, rows: Tensor, destinations: Sequence[Destination], scores: Tensor) -> None:
    """Write one part's scores into those of all sources."""
    n_samples, to, at = len(scores), 0, 0
    for destination, reach in zip(destinations, _reaches(rows, destinations), strict=True):
        n, whole = destination.rows, destination.reach
        if reach:
            block = found[:, at : at + n * reach].view(n_samples, n, reach)
            scores[:, to : to + n * whole].view(n_samples, n, whole)[:, :, rows[:reach]] = block.to(scores)
        to, at = to + n * whole, at + n * reach


def _moved(destinations: Sequence[Destination], device: torch.device) -> list[Destination]:
    """The same on one device; those that share a norm still do."""
    if all(destination.gradient.device == device for destination in destinations):
        return list(destinations)
    norms: dict[int, Norm] = {}
    moved = []
    for destination in destinations:
        norm, weight = destination.norm, destination.weight
        if norm is not None and id(norm) not in norms:
            norms[id(norm)] = replace(norm, stream=norm.stream.to(device), gain=norm.gain.to(device))
        moved.append(
            replace(
                destination,
                gradient=destination.gradient.to(device),
                weight=None if weight is None else weight.to(device),
                norm=None if norm is None else norms[id(norm)],
            )
        )
    return moved
