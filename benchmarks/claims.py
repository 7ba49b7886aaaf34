"""Processes that claim stretches of batches from one queue, event by event.

Each takes the next stretch when it has done its last, computes its batches one after the other and hands their rows
to a thread that writes them. All write to one disk, in the order the rows come. A process that is `backlog` batches
ahead of the disk waits for it. (`eaptk.scoring` in real; nothing else passes between processes.)

With enough processes the time is that of the longest stretch: more than there are stretches have nothing to do.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eaptk.dataset import plan_batches
from eaptk.scoring import stretches

#: Batches whose rows may wait for the disk, `depth` of `eaptk.pipeline.Behind`.
BACKLOG = 4
#: Of the logarithm of lengths.
SPREAD = 0.4


@dataclass(frozen=True)
class Batch:
    """One batch: seconds that a process computes, and that the disk takes for its rows."""

    compute: float
    write: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Of a simulation.

    Args:
        seconds: until the last row is on disk.
        busy: [processes] seconds spent computing.
        waited: [processes] seconds spent waiting for the disk.
    """

    seconds: float
    busy: tuple[float, ...]
    waited: tuple[float, ...]

    @property
    def efficiency(self) -> float:
        """Share of all processes' time that was spent computing."""
        return sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 1.0


def simulate(
    work: Sequence[Sequence[Batch]], processes: int, ready: Sequence[float] | None = None
) -> Outcome:
    """Let processes claim stretches, in order, until none is left.

    Args:
        work: batches of each stretch.
        processes: how many.
        ready: [processes] seconds at which each begins to claim; None: all at 0.
    """
    queue = iter(work)
    busy, waited = [0.0] * processes, [0.0] * processes
    written: list[deque[float]] = [deque(maxlen=BACKLOG) for _ in range(processes)]
    disk = last = 0.0
    #: Time, process, the stretch it is at, the batch of it that it starts then.
    events = [(at, process, (), 0) for process, at in enumerate(ready or [0.0] * processes)]
    heapq.heapify(events)
    computing: dict[int, Batch] = {}
    while events:
        now, process, stretch, index = heapq.heappop(events)
        if (done := computing.get(process)) is not None:
            # The backlog is full until the oldest of so many is written.
            if len(written[process]) == BACKLOG and (free := written[process][0]) > now:
                waited[process] += free - now
                heapq.heappush(events, (free, process, stretch, index))
                continue
            disk = max(disk, now) + done.write
            written[process].append(disk)
            last = max(last, disk)
            del computing[process]
        if index == len(stretch):
            stretch, index = next(queue, ()), 0
            if not stretch:
                continue
        batch = stretch[index]
        busy[process] += batch.compute
        computing[process] = batch
        heapq.heappush(events, (now + batch.compute, process, stretch, index + 1))
    return Outcome(last, tuple(busy), tuple(waited))


def lengths_of(n_samples: int, mean: int, seed: int = 0) -> list[int]:
    """Tokens of samples as they come, most of them near the mean: log-normal, from half of it to twice."""
    drawn = np.random.default_rng(seed).lognormal(-(SPREAD**2) / 2, SPREAD, n_samples)
    return np.rint(mean * np.clip(drawn, 0.5, 2)).astype(int).tolist()


def queue_of(lengths: Sequence[int], tokens_per_batch: int) -> list[list[tuple[int, int]]]:
    """(samples, tokens of the longest) of the batches of each stretch, as `eaptk.score` plans them."""
    plan = plan_batches(lengths, tokens_per_batch)
    return [[(len(plan[i]), max(lengths[j] for j in plan[i])) for i in part] for part in stretches(plan)]
