"""The loss every tool is given: the mean negative log-likelihood of each next token."""

from __future__ import annotations

import torch
from torch import Tensor


def next_token_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """[B] of logits [B, T, V] and the tokens [B, T] they were computed from."""
    log_probabilities = logits[:, :-1].log_softmax(-1)
    return -log_probabilities.gather(-1, ids[:, 1:, None]).mean((1, 2))


def scalar(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss of one sample, or the sum over several."""
    return torch.sum(next_token_nll(logits, ids))
