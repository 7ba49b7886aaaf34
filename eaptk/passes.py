"""Passes of a model as attribution needs them: to the hidden states that carry loss, and from those to the loss.

A model is taken as two halves, both run by its own code: up to what the unembedding reads, and from there to logits
(unembedding, scale, soft-cap). The second half runs on a few positions at a time (`eaptk.losses`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eaptk import losses
from eaptk.batch import Batch
from eaptk.capture import replaced_forward
from eaptk.errors import EaptkError
from eaptk.losses import LossFunction, LossName, Targets
from eaptk.sites import Sites
from eaptk.weights import dtype_of

#: Float16 gradients of a mean loss fall below its smallest number; a power of two keeps them, exactly undone.
FLOAT16_LOSS_SCALE = 2.0**12


class Halves:
    """A causal LM, `model.config` and all, as two halves. Hooks and replaced forwards are there during a call alone."""

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self._model = model
        #: What runs all layers.
        self._trunk = model.get_submodule(sites.architecture.layers.rpartition(".")[0])
        self._unembedding = sites.unembedding
        self.vocabulary = sites.vocabulary
        self._ids: Tensor | None = None
        #: What the trunk returned, of one position.
        self._output: Any = None

    def hidden(self, ids: Tensor, index: Tensor, past: Mapping[str, Any] | None = None) -> Tensor:
        """[N, D]: what the unembedding reads at positions `index` of the flattened ids [B, T].

        Args:
            past: arguments of the model that say what came before (`eaptk.segments`).
        """
        found: list[Tensor] = []

        def read(states: Tensor) -> Tensor:
            found.append(states.flatten(0, 1).index_select(0, index.to(states.device)))
            return states[:1, :1].detach()

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._output = type(output)(last_hidden_state=output[0][:1, :1].detach())

        handle = self._trunk.register_forward_hook(keep)
        try:
            with self._unembedding_reads(read):
                self._model(input_ids=ids, **(past or {"use_cache": False}))
        finally:
            handle.remove()
        self._ids = ids[:1, :1]
        return found[0]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, D] to logits [n, V]; after a call of `hidden`."""
        with (
            replaced_forward(self._trunk, lambda *args, **kwargs: self._output),
            self._unembedding_reads(lambda states: hidden[None]),
        ):
            logits: Tensor = self._model(input_ids=self._ids, use_cache=False).logits
        return logits.squeeze(0)  # of an index the gradient would be copied into zeros

    @contextmanager
    def _unembedding_reads(self, change: Any) -> Iterator[None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (change(args[0]),)

        handle = self._unembedding.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def sample_losses(
    model: nn.Module,
    sites: Sites,
    batch: Batch,
    loss: LossName | LossFunction = "nll",
    clean: Tensor | None = None,
) -> Tensor:
    """[B]: losses of a forward pass; differentiable. The batch is on the model's device.

    Args:
        clean: [N, D], hidden states of the clean run at the positions that carry loss, for loss ``"kl"``.
    """
    if callable(loss):
        return of_callable(model, batch, loss)
    targets, halves = Targets.of(batch), Halves(model, sites)
    hidden = halves.hidden(batch.ids, targets.index)
    return targets.means(losses.of_positions(loss, hidden, targets, halves, clean))


def of_callable(model: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
    """[B]: losses of one's own, of logits at every position.

    Raises:
        EaptkError: what it returns is no number a sample, or does not depend on the logits though it should.
    """
    sample_losses = loss(model(input_ids=batch.ids, use_cache=False).logits, batch)
    is_tensor = isinstance(sample_losses, Tensor)
    if not is_tensor or sample_losses.shape != (len(batch),):
        found = f"shape {tuple(sample_losses.shape)}" if is_tensor else type(sample_losses).__name__
        raise EaptkError(f"the loss returned {found}; expected [{len(batch)}], one number a sample")
    if torch.is_grad_enabled() and not sample_losses.requires_grad:
        raise EaptkError(
            "the loss does not depend on the logits; compute it from them without detach() or no_grad()"
        )
    return sample_losses


def loss_scale(model: nn.Module) -> float:
    return FLOAT16_LOSS_SCALE if dtype_of(model) == torch.float16 else 1.0
