"""Per-sample losses. The loss of a batch is their sum, so no sample's gradient depends on its neighbours.

A named loss is a mean over the sample's own positions that carry loss (`Targets`), from logits in float32 or better.
Those of all positions are never there at once: logits are formed from hidden states by chunks of positions, and with
them at once the gradient that goes back to the hidden states, so that of a chunk nothing is left to keep.

Why not Liger-Kernel's fused linear cross-entropy, which does the like: it multiplies by the unembedding's weight
itself, so a logit scale, an adapter or a quantised unembedding would be passed over; it waits for the device in the
middle of the pass (it counts targets); and it knows neither the contrast with a foil nor KL. What it saves, float32
copies of a chunk's logits, does not grow with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from eaptk.batch import NO_TARGET, Batch
from eaptk.kernels.tiles import cdiv

#: A loss of one's own: (logits [B, T, V], batch) → [B].
LossFunction = Callable[[Tensor, Batch], Tensor]
LossName = Literal["nll", "logit_diff", "kl"]
LOSSES: tuple[LossName, ...] = ("nll", "logit_diff", "kl")
#: Logits of a chunk, by type of device: about a last-level cache; so many positions that reading the unembedding's
#: weight for them is worth it.
CHUNK = {"cpu": 2**22, "cuda": 2**26}
#: Fewest positions of a chunk: below it the products degenerate to vector ones.
MIN_POSITIONS = 64


class Head(Protocol):
    """What a model makes of its last hidden states."""

    #: V.
    vocabulary: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, D] to logits [n, V]."""


@dataclass(frozen=True)
class Targets:
    """The N positions of a batch that carry loss, sample by sample.

    Args:
        index: [N], into the flattened [B·T].
        counts: [B], how many each sample has.
        shares: [N] float64, one over its sample's count.
        tokens: [N], what is to be predicted.
        foils: [N], what that is contrasted with, or None.
    """

    index: Tensor
    counts: tuple[int, ...]
    shares: Tensor
    tokens: Tensor
    foils: Tensor | None

    @classmethod
    def of(cls, batch: Batch) -> Targets:
        """Of a batch; where its tensors are on a device, this waits for the device."""
        carries = batch.targets != NO_TARGET
        index = carries.flatten().nonzero().flatten()
        foils = None if batch.foils is None else batch.foils.flatten()[index]
        counts = carries.sum(1)
        shares = (1 / counts.double()).repeat_interleave(counts)
        return cls(index, tuple(counts.tolist()), shares, batch.targets.flatten()[index], foils)

    def to(self, device: torch.device) -> Targets:
        foils = None if self.foils is None else self.foils.to(device)
        return Targets(
            self.index.to(device), self.counts, self.shares.to(device), self.tokens.to(device), foils
        )

    def means(self, values: Tensor, first: int | None = None) -> Tensor:
        """[N] values to [B]: the mean over each sample's positions, or over its `first` ones."""
        return torch.stack([part[:first].mean() for part in values.split(self.counts)])


def chunk_positions(vocabulary: int, device: str) -> int:
    """Most positions whose logits are there at once; by shapes alone, as it decides how sums round."""
    return max(MIN_POSITIONS, CHUNK.get(device, CHUNK["cuda"]) // vocabulary)


def of_positions(
    loss: LossName,
    hidden: Tensor,
    targets: Targets,
    head: Head,
    clean: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """[N]: the named loss at each position; differentiable, its gradient found with it.

    Args:
        hidden: [N, D], the states that the unembedding reads there.
        clean: [N, D], those of the clean run, for loss ``"kl"``.
        scale: what the samples' mean losses will be multiplied by before the backward pass. The gradient is formed
            at that scale, and brought to any other by a product: exact, if it is another power of two.
    """
    found: Tensor = _OfPositions.apply(hidden, loss, targets, head, clean, scale)  # type: ignore[no-untyped-call]
    return found


class _OfPositions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        loss: LossName,
        targets: Targets,
        head: Head,
        clean: Tensor | None,
        scale: float,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = targets.shares.to(wide) * scale
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        values = []
        most = chunk_positions(head.vocabulary, hidden.device.type)
        size = cdiv(len(hidden), cdiv(len(hidden), most))  # chunks of one size, rather than a small last one
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            own = hidden[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(own)
            foils = None if targets.foils is None else targets.foils[part]
            clean_logits = None if clean is None else torch.log_softmax(head(clean[part]), -1, wide)
            value, slope = _SLOPES[loss](logits.detach(), targets.tokens[part], foils, clean_logits, wide)
            values.append(value)
            if gradient is not None:
                slope *= weights[part, None]
                gradient[part] = torch.autograd.grad(logits, own, slope.to(logits.dtype))[0]
            del logits, slope, clean_logits
        ctx.save_for_backward(gradient, weights)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        gradient, weights = ctx.saved_tensors
        ratio = (slopes[0] / weights)[:, None].to(gradient.device)
        return torch.mul(gradient, ratio, out=torch.empty_like(gradient)), *[None] * 5


# Each: logits [n, V] → values [n] and their derivatives by the logits [n, V], both `wide`.


def _nll(
    logits: Tensor, tokens: Tensor, foils: Tensor | None, clean: Tensor | None, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    slope = torch.log_softmax(logits, -1, wide)
    at = tokens[:, None]
    value = -slope.gather(1, at)[:, 0]
    slope.exp_()
    return value, slope.scatter_(1, at, slope.gather(1, at) - 1)


def _logit_diff(
    logits: Tensor, tokens: Tensor, foils: Tensor | None, clean: Tensor | None, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Logit of the foil − logit of the target: low where the model prefers the answer."""
    assert foils is not None
    foil, target = foils[:, None], tokens[:, None]
    value = logits.gather(1, foil).to(wide) - logits.gather(1, target).to(wide)
    slope = torch.zeros_like(logits, dtype=wide).scatter_(1, foil, 1.0)
    return value[:, 0], slope.scatter_(1, target, slope.gather(1, target) - 1)


def _kl(
    logits: Tensor, tokens: Tensor, foils: Tensor | None, clean: Tensor | None, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """KL(clean ‖ current), of logarithms of the clean run's probabilities."""
    assert clean is not None
    slope = torch.log_softmax(logits, -1, wide)
    clean_odds = clean.exp()
    value = (clean_odds * (clean - slope)).sum(-1)
    return value, slope.exp_().sub_(clean_odds)


_SLOPES = {"nll": _nll, "logit_diff": _logit_diff, "kl": _kl}
