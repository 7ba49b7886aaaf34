"""Samples and batches: token ids, how many of them are real, and which logits carry loss.

A batch is always right-padded. With causal attention nothing real then ever sees padding, so no attention
mask is needed, positions count from 0, and a sample's numbers cannot depend on its neighbours, but for rounding.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eaptk.errors import EaptkError

#: In `Batch.targets` and `Batch.foils`: this position carries no loss.
NO_TARGET = -100


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its answer, as token ids.

    The sequence fed to the model is the prompt and the answer without its last token.

    Args:
        id: unique within a run.
        prompt_ids, answer_ids: at least one token each.
        group: the question this sample belongs to; samples of one group are not independent.
        corrupt_ids: a corrupted prompt with as many tokens as `prompt_ids` (patching).
        foil_ids: tokens the answer is contrasted with, as many as `answer_ids` (logit difference).
        extra: user columns, carried into samples.parquet.
    """

    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    group: str | None = None
    corrupt_ids: tuple[int, ...] | None = None
    foil_ids: tuple[int, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Tokens fed to the model."""
        return len(self.prompt_ids) + len(self.answer_ids) - 1


@dataclass(frozen=True)
class Batch:
    """Samples side by side, right-padded with token 0.

    Args:
        ids: [B, T] int64.
        lengths: [B] int64 on the CPU, number of real tokens of each sample.
        targets: [B, T] int64, the token that `logits[b, t]` is to predict, `NO_TARGET` where no loss is taken.
        names: [B] sample ids, for messages.
        corrupt_ids: [B, T], or None.
        foils: [B, T] like `targets`, or None.
    """

    ids: Tensor
    lengths: Tensor
    targets: Tensor
    names: tuple[str, ...]
    corrupt_ids: Tensor | None = None
    foils: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device` (`lengths` stays on the CPU, where loops run over it)."""
        moved = {
            name: value.to(device)
            for name in ("ids", "targets", "corrupt_ids", "foils")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    @classmethod
    def from_mapping(cls, tensors: Mapping[str, Any]) -> Batch:
        """A batch from what a Hugging Face tokenizer returns.

        Args:
            tensors: ``input_ids`` [B, T]; optional ``attention_mask`` [B, T] (padding on either side);
                optional ``labels`` [B, T] in the Hugging Face convention (labels[b, t] is token t itself,
                −100 for no loss; default: every token but the first); optional ``corrupt_ids`` [B, T], whose
                padding is that of ``input_ids``. What else tokenizers return says nothing more, and is left alone.

        Raises:
            EaptkError: a tensor is missing or has another shape, a sample has no real token or no target, positions
                are not counted from each sample's first token, or something here is unknown.
        """
        tensors = {name: value for name, value in tensors.items() if value is not None}
        unknown = [name for name in tensors if name not in (*_READ, *_LEFT_ALONE)]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), _READ, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it reads {', '.join(_READ)}"
            raise EaptkError(f"a batch mapping has no {unknown[0]!r}{hint}")
        if "input_ids" not in tensors:
            raise EaptkError(
                f"a batch mapping needs 'input_ids'; it has {', '.join(map(repr, tensors)) or 'nothing'}"
            )
        ids = _integers("input_ids", tensors["input_ids"])
        if ids.ndim != 2 or not len(ids):
            raise EaptkError(
                f"input_ids has shape {tuple(ids.shape)}; expected [batch, tokens], one sample or more"
            )
        mask = _integers("attention_mask", tensors.get("attention_mask", torch.ones_like(ids))).bool()
        labels = _integers("labels", tensors.get("labels", ids))
        corrupt = tensors.get("corrupt_ids")
        corrupt = None if corrupt is None else _integers("corrupt_ids", corrupt)
        positions = mask.cumsum(1) - 1
        given = _integers("position_ids", tensors.get("position_ids", positions))
        each = {"attention_mask": mask, "labels": labels, "corrupt_ids": corrupt, "position_ids": given}
        for name, value in each.items():
            if value is not None and value.shape != ids.shape:
                raise EaptkError(f"{name} has shape {tuple(value.shape)}, input_ids {tuple(ids.shape)}")

        if bool((given != positions)[mask].any()):
            raise EaptkError(
                "position_ids do not count each sample's tokens from 0: samples packed into one row would read each "
                "other; give each sample a row of its own"
            )
        targets = torch.full_like(ids, NO_TARGET)
        both_real = mask[:, 1:] & mask[:, :-1]
        targets[:, :-1] = torch.where(both_real, labels[:, 1:], NO_TARGET)
        # A stable sort by "is padding" moves every row's real tokens to the front, in order.
        front = torch.argsort((~mask).int(), dim=1, stable=True)
        real = torch.gather(mask, 1, front)

        def packed(value: Tensor, padding: int) -> Tensor:
            return torch.where(real, torch.gather(value, 1, front), padding)

        batch = cls(
            ids=packed(ids, 0),
            lengths=mask.sum(1).cpu(),
            targets=packed(targets, NO_TARGET),
            names=tuple(str(b) for b in range(len(ids))),
            corrupt_ids=None if corrupt is None else packed(corrupt, 0),
        )
        without = ((batch.targets != NO_TARGET).sum(1) == 0).nonzero().flatten().tolist()
        if without:
            raise EaptkError(
                f"sample {without[0]} of the batch has no token to predict; give it labels or more tokens"
            )
        return batch


#: What a mapping may hold: what is read, and what tokenizers return beside it.
_READ = ("input_ids", "attention_mask", "labels", "corrupt_ids", "position_ids")
_LEFT_ALONE = (
    "token_type_ids",
    "special_tokens_mask",
    "length",
    "offset_mapping",
    "overflow_to_sample_mapping",
)


def _integers(name: str, values: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EaptkError(f"{name} is no rectangle of numbers; tokenise with padding=True") from error
    if tensor.is_floating_point() or tensor.is_complex():
        raise EaptkError(f"{name} holds {tensor.dtype}; expected integers")
    return tensor.long()


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples side by side.

    Raises:
        EaptkError: no samples, or only some of them have `corrupt_ids` or `foil_ids`.
    """
    if not samples:
        raise EaptkError("cannot make a batch of no samples")
    for name in ("corrupt_ids", "foil_ids"):
        missing = [sample.id for sample in samples if getattr(sample, name) is None]
        if missing and len(missing) < len(samples):
            raise EaptkError(f"sample {missing[0]!r} has no {name} while others of its batch do")
    lengths = np.array([s.n_tokens for s in samples], dtype=np.int64)
    width, fed = lengths.max(), [s.answer_ids[:-1] for s in samples]
    at_answer = np.array([len(s.prompt_ids) - 1 for s in samples], dtype=np.int64)
    prompts, corrupts = [s.prompt_ids for s in samples], [s.corrupt_ids for s in samples]
    foils = [s.foil_ids for s in samples]
    return Batch(
        ids=_rectangle(_joined(prompts, fed), 0, width, 0),
        lengths=torch.from_numpy(lengths),
        targets=_rectangle([s.answer_ids for s in samples], at_answer, width, NO_TARGET),
        names=tuple(s.id for s in samples),
        corrupt_ids=None if None in corrupts else _rectangle(_joined(corrupts, fed), 0, width, 0),
        foils=None if None in foils else _rectangle(foils, at_answer, width, NO_TARGET),
    )


def _joined(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[int, ...]]:
    return [(*a, *b) for a, b in zip(first, second, strict=True)]


def _rectangle(rows: Sequence[Any], start: Any, width: int, padding: int) -> Tensor:
    """Each row from its `start` on, in a table [len(rows), width] of `padding`."""
    start = np.broadcast_to(start, len(rows))[:, None]
    end = start + np.array([len(row) for row in rows])[:, None]
    table = np.full((len(rows), width), padding, dtype=np.int64)
    position = np.arange(width)
    # All tokens at once: a loop over them in Python would hold up the thread that feeds the model.
    table[(start <= position) & (position < end)] = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
    return torch.from_numpy(table)
