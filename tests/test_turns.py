"""Programs in turns, calls in slices: each is timed by its own, whatever the others do."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest

from benchmarks.turns import Pace, Program, in_slices, in_turns


def works(pace: Pace, seconds: float) -> None:
    pace.ready()
    pace.mark()
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    pace.mark()


def works_on(pace: Pace) -> None:
    pace.ready()
    pace.mark()
    while not pace.is_over:
        time.sleep(0.01)
        pace.mark()


def fails(pace: Pace) -> None:
    raise ValueError("as it must")


def test_a_program_is_timed_by_its_own_turns() -> None:
    found = in_turns(
        {
            "one": Program(works, (1.2,)),
            "other": Program(works, (0.3,)),
            "lasting": Program(works_on, ends=False),
        }
    )
    for name, seconds in (("one", 1.2), ("other", 0.3)):
        wall, processor = found[name][0]
        assert processor == pytest.approx(seconds, abs=0.05)
        # Not the second or two that others had between; on a busy machine a turn gives less than its length.
        assert processor - 0.05 <= wall <= 3 * seconds
    assert len(found["lasting"]) > 1


def test_a_program_that_fails_is_named() -> None:
    with pytest.raises(RuntimeError, match="broken has failed"):
        in_turns({"broken": Program(fails)})


def busy(seconds: float) -> Callable[[], None]:
    def call() -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return call


def fails_when_called() -> Callable[[], None]:
    return partial(fails, None)


def test_a_call_is_timed_by_its_own_slices_and_not_those_of_the_others() -> None:
    with in_slices({"short": partial(busy, 0.2), "long": partial(busy, 0.4)}) as one_round:
        began = time.monotonic()
        rounds = [one_round(order) for order in (["short", "long"], ["long", "short"])]
        wall = time.monotonic() - began
    assert [list(taken) for taken in rounds] == [["short", "long"], ["long", "short"]]
    for taken in rounds:
        assert taken["short"] > 0.18
        assert taken["long"] > 0.38
    # No moment is counted twice.
    assert sum(sum(taken.values()) for taken in rounds) <= wall


@pytest.mark.parametrize("broken", [partial(fails, None), partial(fails_when_called)])
def test_a_call_that_fails_is_named(broken: partial[Callable[[], None]]) -> None:
    with (
        pytest.raises(RuntimeError, match="broken has failed"),
        in_slices({"right": partial(busy, 0.01), "broken": broken}) as one_round,
    ):
        one_round(["right", "broken"])
