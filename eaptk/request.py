"""What is asked of attribution, and refused before the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from eaptk.batch import NO_TARGET, Batch
from eaptk.capture import Capture
from eaptk.errors import EaptkError
from eaptk.losses import LOSSES, LossFunction, LossName
from eaptk.weights import device_of

Ablation = Literal["zero", "patching", "mean"]
ABLATIONS: tuple[Ablation, ...] = ("zero", "patching", "mean")


@dataclass(frozen=True)
class Request:
    """What is asked of a batch; see `attribute`."""

    ablation: Ablation
    loss: LossName | LossFunction
    means: Mapping[str, Tensor] | None
    flush_layers: int | None
    checkpoint: bool | None


def prepare(
    model: nn.Module,
    batch: Batch | Mapping[str, Any],
    ablation: Ablation,
    loss: LossName | LossFunction,
    means: Mapping[str, Tensor] | None,
) -> Batch:
    """The batch on the model's device; refuses what `attribute` refuses before it runs the model."""
    batch = as_batch(batch)
    check_request(batch, ablation, loss, means)
    check_tokens(batch, model)
    return batch.to(device_of(model))


def as_batch(batch: Batch | Mapping[str, Any]) -> Batch:
    return batch if isinstance(batch, Batch) else Batch.from_mapping(batch)


def check_request(
    batch: Batch, ablation: str, loss: LossName | LossFunction, means: Mapping[str, Tensor] | None
) -> None:
    if ablation not in ABLATIONS:
        raise EaptkError(f"ablation is {ablation!r}; it must be one of {', '.join(ABLATIONS)}")
    if not callable(loss) and loss not in LOSSES:
        raise EaptkError(f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}, or a callable")
    if ablation == "patching" and batch.corrupt_ids is None:
        raise EaptkError(
            "ablation 'patching' needs a corrupted prompt: give every sample `corrupt` or `corrupt_ids`"
        )
    if (ablation == "mean") != (means is not None):
        raise EaptkError(
            "ablation 'mean' needs means=eaptk.source_means(model, batches, graph), and only it takes them"
        )
    if loss == "kl" and ablation != "patching":
        raise EaptkError(
            f"loss 'kl' has no gradient on the clean run that ablation {ablation!r} uses; use 'patching'"
        )
    without = (batch.targets == NO_TARGET).all(1).nonzero().flatten().tolist()
    if without and not callable(loss):
        raise EaptkError(
            f"sample {batch.names[without[0]]!r} has no target, so no loss {loss!r}; give it an answer or labels"
        )
    if loss == "logit_diff":
        _check_foils(batch)


def _check_foils(batch: Batch) -> None:
    if batch.foils is None:
        raise EaptkError(
            "loss 'logit_diff' contrasts the answer with a foil: give every sample `foil` or `foil_ids`"
        )
    lacking = ((batch.targets != NO_TARGET) & (batch.foils == NO_TARGET)).any(1).nonzero().flatten().tolist()
    if lacking:
        raise EaptkError(
            f"sample {batch.names[lacking[0]]!r} has a shorter foil than answer; give it a foil token for each of the "
            f"answer's"
        )


def check_tokens(batch: Batch, model: nn.Module) -> None:
    """Raises EaptkError for tokens that the model does not know, and samples longer than its learned positions."""
    places = getattr(model.config, "n_positions", None)
    if places is not None and batch.ids.shape[1] > places:
        sample = int(batch.lengths.argmax())
        raise EaptkError(
            f"sample {batch.names[sample]!r} has {int(batch.lengths[sample]):,} tokens, the model's positions end at "
            f"{places:,}; cut it"
        )
    n_tokens = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    for name in ("ids", "corrupt_ids", "targets", "foils"):
        tokens = getattr(batch, name)
        if tokens is None:
            continue
        outside = (tokens < 0) | (tokens >= n_tokens)
        if name in ("targets", "foils"):
            outside &= tokens != NO_TARGET
        if bool(outside.any()):
            sample, position = outside.nonzero()[0].tolist()
            raise EaptkError(
                f"sample {batch.names[sample]!r}: token {int(tokens[sample, position])} of its {name} is outside the "
                f"vocabulary of {n_tokens}; was it tokenised for another model?"
            )


def check_means(means: Mapping[str, Tensor], run: Capture) -> None:
    """Raises EaptkError where means are not those of the sources that `run` captured."""
    for name, value in run.values.items():
        found = tuple(means[name].shape) if means.get(name) is not None else None
        needed = tuple(value.shape[2:])
        if len(needed) == 2:  # of all heads, whichever of them this process has
            needed = (run.sites.graph.n_heads, needed[1])
        if found != needed:
            raise EaptkError(
                f"means of {name!r} have shape {found}, the graph needs {needed}; "
                f"take them with eaptk.source_means for the same model and graph"
            )
