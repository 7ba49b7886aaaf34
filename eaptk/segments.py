"""Long sequences, a segment of tokens at a time: nothing is kept of all layers and all tokens but keys and values.

Causal attention reads earlier positions through their keys and values alone. So these are found first, segment by
segment, for all positions; then, from the last segment to the first, each is run once more, with its backward pass,
and contracted. What later segments' losses ask of its keys and values has been added up by then, and what it asks of
earlier ones is added in turn. Scores are sums over tokens, so those of segments add up: the same as of the whole, to
rounding, as are the gradients.

Memory is four tensors [T, kv heads × head_dim] a layer and what one segment takes, instead of a layer's input, its
two sources, and more; the price is a third forward pass beside checkpointing's two.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from eaptk import losses
from eaptk.batch import Batch
from eaptk.capture import Capture, frozen
from eaptk.contraction import Contraction, operands
from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.losses import LOSSES, Targets
from eaptk.passes import Halves, loss_scale
from eaptk.request import Request, prepare
from eaptk.sites import Sites


def by_segments(
    model: nn.Module, batch: Batch, graph: Graph, request: Request, size: int
) -> tuple[Tensor, Tensor]:
    """Rows [B, n_edges] and losses [B], on the model's device; the loss is a named one."""
    loss = request.loss
    assert not callable(loss)
    with frozen(model):
        targets, lengths, (n_samples, n_tokens) = Targets.of(batch), batch.lengths.tolist(), batch.ids.shape
        parts = [(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size)]
        places = [_within(targets, n_tokens, *part) for part in parts]
        batch = prepare(model, batch, request.ablation, loss, request.means)
        ids, others = batch.ids, batch.corrupt_ids if request.ablation == "patching" else None
        if loss == "kl":
            assert others is not None
            ids, others = others, ids
        sites, device = Sites(model, graph), batch.ids.device
        places = [part.to(device) for part in places]
        halves, scale = Halves(model, sites), loss_scale(model)
        flush_layers = 1 if request.flush_layers is None else request.flush_layers
        none = torch.zeros(0, dtype=torch.int64, device=device)
        past = _fill(model, sites, ids, size, lambda part, kept: halves.hidden(part, none, kept))
        other_past = other = clean = None
        if others is not None:
            other_past = _fill(model, sites, others, size, lambda part, kept: halves.hidden(part, none, kept))
        rows: Tensor | None = None
        wide = torch.promote_types(sites.dtype, torch.float32)
        sample_losses = torch.zeros(n_samples, dtype=wide, device=device)
        for (start, end), here in zip(reversed(parts), reversed(places), strict=True):
            if rows is None and not len(here.tokens):
                continue  # nothing here has a gradient
            if others is not None:
                assert other_past is not None
                with torch.no_grad(), Capture(sites, gradients=False) as capture:
                    hidden = halves.hidden(others[:, start:end], here.index, other_past.open(model, start))
                other, clean = capture.values, hidden if loss == "kl" else None
            with torch.enable_grad(), Capture(sites, gradients=True, recompute=True) as run:
                hidden = halves.hidden(ids[:, start:end], here.index, past.open(model, start))
                sources = operands(run, request, other)
                part, ends = None, past.ends(end)
                if not len(here.tokens):
                    ends.append((hidden, hidden.detach()))  # of no position, so that all gradients are there
                else:
                    values = losses.of_positions(loss, hidden, here, halves, clean, scale)
                    shares = values * here.shares.to(wide)
                    sample_losses += torch.stack([own.sum() for own in shares.detach().split(here.counts)])
                    part = shares.sum() * scale
                    del values, shares
                contraction = Contraction(run, sources, _lengths_within(lengths, start, end), flush_layers)
                run.backward(part, contraction.layer_left, ends=ends, leaves=past.leaves())
                found = contraction.finish()
                rows = found if rows is None else rows.add_(found)
        assert rows is not None
    return rows / scale, sample_losses


def check_segment(size: int, loss: Any) -> None:
    """Raises:
    EaptkError: a segment of no tokens; a loss that is a callable.
    """
    if size < 1:
        raise EaptkError(f"segment is {size}; it must be at least 1")
    if callable(loss):
        raise EaptkError(
            f"by segments a loss is a named one, which is a sum over tokens: {', '.join(LOSSES)}"
        )


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, kv heads, T, head_dim] of one layer, and the gradients that reach them."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.n_tokens = n_tokens
        self.start = 0
        self.all: list[Tensor] = []
        self.slopes: list[Tensor] = []
        #: Keys and values before the segment, as leaves; and the segment's own, in its graph.
        self.before: list[Tensor] = []
        self.own: tuple[Tensor, Tensor] | None = None

    def open(self, start: int) -> None:
        self.start, self.own, self.before = start, None, []
        if not torch.is_grad_enabled():
            return
        if not self.slopes:
            self.slopes = [torch.zeros_like(each) for each in self.all]
        for each, slope in zip(self.all, self.slopes, strict=True):
            leaf = each[:, :, :start].detach().requires_grad_()
            leaf.register_hook(partial(_taken, slope[:, :, :start]))
            self.before.append(leaf)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        own, end = (key_states, value_states), self.start + key_states.shape[-2]
        if not torch.is_grad_enabled():
            if not self.all:
                self.all = [x.new_empty(*x.shape[:2], self.n_tokens, x.shape[3]) for x in own]
            for each, x in zip(self.all, own, strict=True):
                each[:, :, self.start : end] = x
            return tuple(each[:, :, :end] for each in self.all)
        if self.own is None:  # not when the layer runs again
            self.own = own
        if not self.start:
            return own
        return tuple(torch.cat(pair, 2) for pair in zip(self.before, own, strict=True))

    def get_seq_length(self) -> int:
        return self.start


def _taken(slope: Tensor, gradient: Tensor) -> Tensor:
    """Add a gradient up at once, and hand on what takes no memory: autograd gathers those of all leaves."""
    slope += gradient
    return gradient.new_zeros(()).expand_as(gradient)


class _Past:
    """Keys and values of one prompt, which segments read and write."""

    def __init__(self, sites: Sites, n_tokens: int) -> None:
        self._layers = [_Layer(n_tokens) for _ in sites.layers]
        self._cache = Cache(layers=self._layers)

    def open(self, model: nn.Module, start: int) -> dict[str, Any]:
        """Arguments of a forward pass over a segment that begins there: without gradients it is written, too."""
        for layer in self._layers:
            layer.open(start)
        named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        return {named: self._cache, "use_cache": True}

    def ends(self, end: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the segment that ends here, each with the gradient that later ones send it."""
        found = []
        for layer in self._layers:
            assert layer.own is not None
            slopes = [slope[:, :, layer.start : end] for slope in layer.slopes]
            found += list(zip(layer.own, slopes, strict=True))
        return found

    def leaves(self) -> list[Tensor]:
        """Keys and values that the segment reads of earlier ones; their gradients are added where `ends` finds them."""
        return [leaf for layer in self._layers for leaf in layer.before if layer.start]


def _fill(
    model: nn.Module, sites: Sites, ids: Tensor, size: int, run: Callable[[Tensor, dict[str, Any]], Any]
) -> _Past:
    """The past of all of ids [B, T]."""
    past = _Past(sites, ids.shape[1])
    with torch.no_grad():
        for start in range(0, ids.shape[1], size):
            run(ids[:, start : start + size], past.open(model, start))
    return past


def _within(targets: Targets, n_tokens: int, start: int, end: int) -> Targets:
    """Targets of a batch in one segment of it, with the shares they have of the whole; read before any pass."""
    sample, at = targets.index // n_tokens, targets.index % n_tokens
    here = ((at >= start) & (at < end)).nonzero().flatten()
    sample = sample[here]
    counts = torch.bincount(sample, minlength=len(targets.counts)).tolist()
    return Targets(
        sample * (end - start) + at[here] - start,
        tuple(counts),
        targets.shares[here],
        targets.tokens[here],
        None if targets.foils is None else targets.foils[here],
    )


def _lengths_within(lengths: Sequence[int], start: int, end: int) -> list[int]:
    """Real tokens of each sample in a segment; one for those it has none of, as padding scores nothing."""
    return [min(max(length - start, 1), end - start) for length in lengths]
