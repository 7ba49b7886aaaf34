"""The model's own greedy answers, whose likelihood the loss of the paper is taken on (arXiv 2509.21044)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from eaptk.batch import Sample
from eaptk.capture import frozen
from eaptk.weights import device_of


def greedy_answers(
    model: Any,
    samples: Sequence[Sample],
    batches: Iterable[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[int] = (),
) -> Iterator[dict[int, list[int]]]:
    """Answer every prompt with the most likely token at each step, one batch at a time.

    An answer ends with the model's end-of-sequence token, which is part of it (an answer so has at least one
    token), or after `max_new_tokens`. Penalties and sampling of the checkpoint's generation config are not
    applied: the answer is the one whose every token the model finds most likely.

    Args:
        model: a Hugging Face causal LM; it is left as found.
        samples: whose prompts to answer.
        batches: indices of the samples to answer together. Prompts are padded on the left to the longest of a
            batch, which can turn the balance between two equally likely tokens: use the same batches again.
        max_new_tokens: tokens of the longest answer.
        stop: tokens that end an answer as the model's own do.

    Yields:
        Answers by index of sample.
    """
    ends = [*end_tokens(model), *stop]
    for batch in batches:
        prompts = [samples[index].prompt_ids for index in batch]
        generated = _generate(model, prompts, max_new_tokens, ends)
        yield {index: _until_end(row, ends) for index, row in zip(batch, generated, strict=True)}


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: list[int]
) -> list[list[int]]:
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    neutral = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=0,
        use_cache=True,
    )
    with frozen(model), _as_only_config(model, neutral), torch.no_grad():
        device = device_of(model)
        full: Tensor = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
    rows: list[list[int]] = full[:, width:].tolist()
    return rows


@contextmanager
def _as_only_config(model: Any, config: Any) -> Iterator[None]:
    """`generate` fills gaps of the config it is given from the model's own; leave it none to fill from."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def end_tokens(model: Any) -> list[int]:
    """End-of-sequence tokens of the generation config, or of the config."""
    for config in (model.generation_config, model.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return [int(end) for end in (ends if isinstance(ends, (list, tuple)) else [ends])]
    return []


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens
