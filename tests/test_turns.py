"""Programs in turns: each is timed by its own turns, and by its own processor time."""

from __future__ import annotations

import time

import pytest

from benchmarks.turns import Pace, Program, in_turns


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
