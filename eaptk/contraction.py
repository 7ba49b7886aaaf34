"""The contraction of one backward pass: whole at its end, or by flush groups of layers on its way (`flush_cuts`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eaptk.capture import Capture
from eaptk.division import Division
from eaptk.errors import EaptkError
from eaptk.kernels import Source
from eaptk.plan import flush_cuts
from eaptk.request import Request, check_means


class Contraction:
    """Of the sources with the gradients that `run` records.

    Args:
        lengths: [B], how many leading positions of each sample can have a gradient.
        again: another backward pass through the same graph is to follow.
    """

    def __init__(
        self,
        run: Capture,
        sources: Sequence[Source],
        lengths: Sequence[int],
        flush_layers: int,
        again: bool = False,
    ) -> None:
        self._run = run
        self._sources = sources
        self._division = Division(run.sites, sources)
        self._lengths = lengths
        self._again = again
        self._cuts = flush_cuts(run.sites.readers, flush_layers)
        #: Readers not contracted yet: the first so many.
        self._left = len(run.sites.readers)
        self._parts: list[Tensor] = []

    def layer_left(self, layer: int) -> None:
        """The backward pass has left this layer."""
        if layer in self._cuts:
            self._flush(self._cuts[layer])

    def finish(self) -> Tensor:
        """[B, n_edges], once the backward pass has ended."""
        self._flush(0)
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts[::-1], 1)

    def _flush(self, first: int) -> None:
        readers = self._run.sites.readers[first : self._left]
        # Autocast would take the contraction's products in half precision.
        with torch.no_grad(), torch.autocast(self._sources[0].value.device.type, enabled=False):
            try:
                self._parts.append(self._division.contract(self._run.destinations(readers), self._lengths))
            except ValueError as error:
                entry = self._run.sites.architecture.model_type
                hint = (
                    f" (architecture entry {entry!r} names a wrong module)"
                    if ": shape " in str(error)
                    else ""
                )
                raise EaptkError(f"{error}{hint}") from error
        self._run.release(readers, self._again)
        self._left = first


def operands(run: Capture, request: Request, other: dict[str, Tensor] | None) -> list[Source]:
    """Operands of a forward pass, with what the ablation replaces them by.

    Args:
        other: sources of the other prompt; it is emptied, and so are the run's: operands alone hold them now.
    """
    if request.means is not None:
        check_means(request.means, run)
    if other is None:
        return run.sources(request.means, later=True)
    sources = run.sources(later=True)
    run.values.clear()
    # O − O' is all that is ever read. Half precision would round it.
    at_once = all(source.value.itemsize >= 4 for source in sources)
    for i, (source, name) in enumerate(zip(sources, [*other], strict=True)):
        value, replacement = source.value, other.pop(name)
        if request.loss == "kl":
            value, replacement = replacement, value
        sources[i] = (
            replace(source, value=value - replacement)
            if at_once
            else replace(source, value=value, replacement=replacement)
        )
    return sources
