"""A model whose heads are shared out over processes (transformers' tensor parallelism).

What is added to the residual stream, and gradients there, are whole in every process; heads are not. Every process
makes the same calls in the same order, as each call that names all of them waits for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eaptk.errors import EaptkError
from eaptk.graph import Graph


def refuse_uneven(graph: Graph, size: int) -> None:
    """Raises EaptkError where so many processes cannot each have as many heads as the others."""
    for what, n in (("attention", graph.n_heads), ("key/value", graph.n_kv_heads)):
        if n % size:
            raise EaptkError(
                f"{n} {what} heads cannot be shared out evenly over {size} processes; use a number of processes that "
                f"divides {n}"
            )


@dataclass(frozen=True)
class Shards:
    """This process's place among those that hold one model.

    Args:
        group: of `torch.distributed`.
        rank, size: this process's number there, of so many.
    """

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, projections: Sequence[nn.Module], graph: Graph) -> Shards | None:
        """Of a layer's query, key, value and output projection; None of a model that is whole in this process.

        Raises:
            EaptkError: the projections are not sharded by whole heads.
        """
        weights: list[Any] = [getattr(projection, "weight", None) for projection in projections]
        if not any(hasattr(weight, "device_mesh") for weight in weights):
            return None
        dims = [1 if weight is weights[-1] else 0 for weight in weights]
        for weight, dim in zip(weights, dims, strict=True):
            placements: tuple[Any, ...] = getattr(weight, "placements", ())
            if len(placements) != 1 or not placements[0].is_shard(dim):
                raise EaptkError(
                    f"the model's projections are sharded as {placements or 'no tensors'}, not by heads over one "
                    f"group of processes; load it with tp_plan='auto'"
                )
        mesh = weights[0].device_mesh
        shards = cls(mesh.get_group(), mesh.get_local_rank(), mesh.size())
        refuse_uneven(graph, shards.size)
        return shards

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """Every process's part, one after the other along `dim`."""
        return torch.cat(self.gather_parts(part), dim)

    def gather_parts(self, part: Tensor) -> list[Tensor]:
        """Every process's part, all of one shape."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(parts, part.contiguous(), group=self.group)
        return parts

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all processes' parts."""
        total = part.contiguous().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of all processes' numbers."""
        found = torch.tensor(number, device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group=self.group)
        return int(found)

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """This process's part of what all have."""
        return whole.chunk(self.size, dim)[self.rank]
