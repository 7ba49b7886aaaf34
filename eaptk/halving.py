"""What memory does not suffice for, done in halves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from eaptk.errors import EaptkError

T = TypeVar("T")

#: How torch says on a CPU, and libraries on a card, that an allocation failed, where it raises a plain RuntimeError.
_SAID = ("can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")


def in_halves(
    rows: Sequence[int], work: Callable[[Sequence[int]], T], may_halve: bool = True
) -> Iterator[tuple[Sequence[int], T | None]]:
    """`work` on all rows at once or, where memory does not suffice, on each half, and so on down to single rows.

    Args:
        may_halve: not where other processes do the same work with this one, and would wait for it.

    Yields:
        Rows in their order, and what work on them gave; None for a row that does not fit alone.

    Raises:
        EaptkError: memory does not suffice, and the work may not be halved.
    """
    waiting = [rows]
    while waiting:
        part = waiting.pop(0)
        found = _if_it_fits(part, work)
        if found is None and not may_halve:
            raise EaptkError(
                f"out of memory in a batch of {len(part)} samples, which processes that share a model cannot halve; "
                f"lower tokens_per_batch"
            )
        if found is None and len(part) > 1:
            middle = (len(part) + 1) // 2
            waiting[:0] = part[:middle], part[middle:]
        else:
            yield part, found
        del found  # or it would take its memory from the next part


def _if_it_fits(rows: Sequence[int], work: Callable[[Sequence[int]], T]) -> T | None:
    try:
        return work(rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Only now, as the error's traceback held all that the work had made.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)
