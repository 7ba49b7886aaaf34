"""Per-sample losses. The loss of a batch is their sum, so no sample's gradient depends on its neighbours.

Each is a mean over the sample's own positions that carry loss, from logits in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from eaptk.batch import NO_TARGET, Batch
from eaptk.errors import EaptkError

#: A loss of one's own: (logits [B, T, V], batch) → [B].
LossFunction = Callable[[Tensor, Batch], Tensor]
LossName = Literal["nll", "logit_diff", "kl"]
LOSSES: tuple[LossName, ...] = ("nll", "logit_diff", "kl")


def loss_positions(batch: Batch) -> Tensor:
    """[N]: positions that carry loss, as indices into the flattened [B·T], sample by sample."""
    return (batch.targets != NO_TARGET).flatten().nonzero().flatten()


def mean_by_sample(values: Tensor, batch: Batch) -> Tensor:
    """[N] values at the loss positions to [B], the mean over each sample's own."""
    counts = (batch.targets != NO_TARGET).sum(1).tolist()
    return torch.stack([part.mean() for part in values.split(counts)])


def of_samples(
    loss: LossName | LossFunction, logits: Tensor, batch: Batch, clean_logits: Tensor | None = None
) -> Tensor:
    """[B]: the named loss, of logits [N, V] at the loss positions, or a callable's, of logits [B, T, V].

    Args:
        clean_logits: [N, V], for loss ``"kl"``.
    """
    if callable(loss):
        return loss(logits, batch)
    if loss == "kl":
        assert clean_logits is not None
        return kl(logits, clean_logits, batch)
    return {"nll": nll, "logit_diff": logit_diff}[loss](logits, batch)


def nll(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the targets; logits [N, V] at the loss positions."""
    targets = batch.targets.flatten()[loss_positions(batch)]
    return mean_by_sample(
        torch.nn.functional.cross_entropy(_upcast(logits), targets, reduction="none"), batch
    )


def logit_diff(logits: Tensor, batch: Batch) -> Tensor:
    """Mean of logit(foil) − logit(target): low where the model prefers the answer; logits [N, V].

    Raises:
        EaptkError: the batch has no foils.
    """
    if batch.foils is None:
        raise EaptkError(
            "loss 'logit_diff' contrasts the answer with a foil: give every sample `foil` or `foil_ids`"
        )
    positions = loss_positions(batch)
    chosen = torch.stack([batch.foils.flatten()[positions], batch.targets.flatten()[positions]], dim=1)
    foil, target = _upcast(logits.gather(1, chosen)).unbind(1)
    return mean_by_sample(foil - target, batch)


def kl(logits: Tensor, clean_logits: Tensor, batch: Batch) -> Tensor:
    """Mean KL(clean ‖ current) over the loss positions; both logits [N, V]."""
    clean = torch.log_softmax(_upcast(clean_logits), -1)
    current = torch.log_softmax(_upcast(logits), -1)
    return mean_by_sample((clean.exp() * (clean - current)).sum(-1), batch)


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
