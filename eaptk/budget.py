"""How many tokens go into a batch, where nobody says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eaptk.graph import Graph
from eaptk.plan import Plan, Work, free_memory
from eaptk.sites import Sites
from eaptk.weights import device_of

#: Where more tokens a batch no longer make a device faster, and where fewer do not make batches much smaller.
_MOST = {"cpu": 2048}
_MOST_OF_A_CARD = 16384
_LEAST = 256


def tokens_that_fit(model: Any, graph: Graph, lengths: Sequence[int], patched: bool) -> int:
    """Tokens of the largest batch that memory holds without checkpointing, by the planner's estimates.

    Args:
        lengths: [n] tokens of the samples: batches are of long ones, or of many short ones. One that is longer than a
            batch is scored alone, with dials of its own, and does not make batches of the others smaller.
        patched: sources of two prompts are held.
    """
    sites, device = Sites(model, graph), device_of(model)
    memory = free_memory(device)
    tokens = _MOST.get(device.type, _MOST_OF_A_CARD)
    while tokens > _LEAST:
        short = [n for n in lengths if n <= tokens] or [min(lengths)]
        shapes = [(max(1, tokens // n), n) for n in {min(short), max(short)}]
        works = [Work.of(model, sites, b, n, n_loss=b * n, patched=patched) for b, n in shapes]
        if all(Plan.within(memory, work, None, False).fits for work in works):
            break
        tokens //= 2
    return tokens
