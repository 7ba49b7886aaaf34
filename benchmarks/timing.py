"""Contenders timed in turns, and how sure their medians are.

Machines have other users, clocks and temperatures change: what ran a second later is compared, in ratios within a
round. Caches and the heap are as the one before left them: the order is drawn anew each round, the same each time that
it is run, so that everyone comes after everyone else and never after itself. A median's interval is between two of its
own measurements, at ranks that hold it in 95 % of cases whatever the distribution, if rounds are independent; a machine
that grows slower meanwhile makes it too narrow.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from math import comb
from typing import Any

import torch

#: Rounds before the clock counts: a batch takes tens of thousands of page faults until the heap has grown to
#: what the pass needs, and in a run of many batches only the first few pay for them.
WARM_UP = 6
LEAST_ROUNDS, MOST_ROUNDS = 3, 40
CONFIDENCE = 0.95


def clocked(work: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of one call, until the card, if there is one, has done what it was given."""

    def seconds() -> float:
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    return seconds


def wait() -> None:
    """Until nothing is running on a card."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(
    contenders: Mapping[str, Callable[[], float]],
    seconds: float,
    *,
    warm_up: int = WARM_UP,
    most: int = MOST_ROUNDS,
) -> dict[str, list[float]]:
    """What each contender says that it took, by rounds, in which one comes after the other; see `rounds`."""
    return rounds(
        list(contenders),
        lambda order: {name: contenders[name]() for name in order},
        seconds,
        warm_up=warm_up,
        most=most,
    )


def rounds(
    names: list[str],
    one_round: Callable[[Sequence[str]], Mapping[str, float]],
    seconds: float,
    *,
    warm_up: int = WARM_UP,
    most: int = MOST_ROUNDS,
) -> dict[str, list[float]]:
    """What each contender took, by rounds.

    Args:
        one_round: given the order of the contenders, what each of them took.
        seconds: about how long all of it may take. Warming up starts no round after a sixth of it; then there are
            three rounds at least, but fewer if these have taken twice the time there is.
        warm_up: rounds that do not count, at most.
        most: rounds that count, at most.
    """
    started = time.perf_counter()
    for _ in range(warm_up):
        if time.perf_counter() - started < seconds / 6:
            one_round(names)
    taken: dict[str, list[float]] = {name: [] for name in names}
    order, shuffler, last = list(names), random.Random(0), ""
    for done in range(most):
        spent = time.perf_counter() - started
        if done and spent > seconds and (done >= LEAST_ROUNDS or spent > 2 * seconds):
            break
        shuffler.shuffle(order)
        while order[0] == last and len(order) > 1:
            shuffler.shuffle(order)
        for name, one in one_round(order).items():
            taken[name].append(one)
        last = order[-1]
    return taken


def ratios(seconds: Mapping[str, Sequence[float]], of: str, to: str) -> dict[str, Any]:
    """One contender beside another, round by round."""
    return summary([a / b for a, b in zip(seconds[of], seconds[to], strict=True)])


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, its interval, and the values themselves."""
    return {"median": statistics.median(values), "interval": interval(values), "each": list(values)}


def interval(values: Sequence[float]) -> list[float] | None:
    """Between which two measurements the median lies, with `CONFIDENCE`.

    The narrowest pair of ranks, equally far from both ends, that holds it often enough; None of fewer than six
    values, of which even the smallest and the largest do not.
    """
    n, ordered = len(values), sorted(values)
    outside, rank = 0.0, 0
    while 2 * (outside := outside + comb(n, rank) / 2**n) <= 1 - CONFIDENCE:
        rank += 1
    return [ordered[rank - 1], ordered[n - rank]] if rank else None
