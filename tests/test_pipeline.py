"""Threads beside the one that computes: order, bounds, errors, and nothing left behind."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from eaptk.pipeline import Behind, ahead


@pytest.fixture(autouse=True)
def _ends_in_time_and_leaves_no_thread() -> Iterator[None]:
    """What waits for ever is a failure here, not a suite that hangs."""

    def too_late(*_: Any) -> None:
        raise TimeoutError("a deadlock")

    before = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT)}
    signal.signal(signal.SIGALRM, too_late)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(30)
    yield
    signal.alarm(0)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert own_threads() == []


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("eaptk-")]


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


def failing_at(n: int, error: BaseException) -> Iterator[int]:
    yield from range(n)
    raise error


def interrupt() -> None:
    """What Ctrl-C does to the thread that waits."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]


class Thing:
    """Something that can be seen to be let go of."""


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("n", [0, 1, 100])
def test_items_come_in_order_whatever_the_depth(n: int, depth: int) -> None:
    assert list(ahead(iter(range(n)), depth)) == list(range(n))


def test_items_are_made_in_another_thread_while_the_caller_works() -> None:
    makers = list(ahead(threading.current_thread() for _ in range(3)))
    assert len(set(makers)) == 1
    assert makers[0] is not threading.current_thread()


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_is_made_than_the_depth_allows(depth: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    for taken, _ in enumerate(ahead(items(), depth), 1):
        until(lambda: len(made) >= min(taken + depth, 20))  # noqa: B023
        time.sleep(0.005)
        assert len(made) == min(taken + depth, 20)


def test_an_error_comes_after_the_items_before_it() -> None:
    items = ahead(failing_at(3, ZeroDivisionError("the fourth")), depth=8)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="the fourth"):
        next(items)
    assert next(items, "ended") == "ended"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_whatever_ends_the_maker_reaches_the_caller(error: BaseException) -> None:
    with pytest.raises(type(error)):
        list(ahead(failing_at(1, error)))


def test_what_is_no_iterable_is_an_error_of_the_caller() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        list(ahead(3))  # type: ignore[arg-type]


def endless() -> Iterator[int]:
    yield from iter(int, 1)


def test_a_caller_that_stops_early_ends_the_thread() -> None:
    for _ in ahead(endless()):
        break
    assert own_threads() == []


def test_an_error_of_the_caller_ends_the_thread_once_the_error_is_done_with() -> None:
    def work() -> None:
        for _ in ahead(endless()):
            raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="own") as caught:
        work()
    del caught
    gc.collect()
    assert own_threads() == []


def test_an_iterator_that_was_never_asked_starts_no_thread() -> None:
    unused = ahead(endless())
    assert own_threads() == []
    del unused


def test_an_interrupt_while_waiting_for_an_item_gets_through() -> None:
    def items() -> Iterator[int]:
        yield 0
        interrupt()
        time.sleep(0.05)
        yield 1

    with pytest.raises(KeyboardInterrupt):
        list(ahead(items()))


def test_items_are_the_callers_to_free() -> None:
    for thing in ahead(Thing() for _ in range(3)):
        held = weakref.ref(thing)
        del thing
        gc.collect()
        assert held() is None


def test_an_iterator_left_lying_about_does_not_keep_the_program_alive() -> None:
    code = """
import itertools, sys
from eaptk.pipeline import ahead
left = ahead(itertools.count())
print(next(left))
sys.left = left
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=25, check=True
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_calls_are_made_in_order_by_one_thread_and_are_over_on_leaving() -> None:
    made: list[tuple[int, threading.Thread]] = []
    with Behind() as behind:
        for i in range(100):
            behind.do(lambda i: made.append((i, threading.current_thread())), i)
    assert [i for i, _ in made] == list(range(100))
    assert len({thread for _, thread in made} - {threading.current_thread()}) == 1


@pytest.mark.parametrize("depth", [1, 4])
def test_the_caller_waits_while_the_backlog_is_full(depth: int) -> None:
    gate, asked = threading.Event(), []
    with Behind(depth) as behind:

        def open_when_full() -> None:
            until(lambda: len(asked) == depth)
            time.sleep(0.05)
            assert len(asked) == depth, "a call beyond the backlog was accepted"
            gate.set()

        watch = threading.Thread(target=open_when_full)
        watch.start()
        for i in range(depth + 1):
            behind.do(gate.wait)
            asked.append(i)
            assert gate.is_set() == (i == depth)
        watch.join()


def fail(message: str) -> None:
    raise OSError(message)


def test_the_first_error_comes_up_at_the_next_call_and_none_is_made_after_it() -> None:
    made: list[int] = []

    def work() -> None:
        with Behind(depth=1) as behind:
            behind.do(made.append, 0)
            behind.do(fail, "disk full")
            behind.do(made.append, 1)
            pytest.fail("the error did not come up")

    with pytest.raises(OSError, match="disk full"):
        work()
    assert made == [0]


def test_calls_queued_behind_one_that_fails_are_not_made() -> None:
    made: list[int] = []

    def work() -> None:
        with Behind() as behind:
            gate = threading.Event()
            behind.do(gate.wait)
            behind.do(fail, "disk full")
            behind.do(made.append, 1)
            gate.set()

    with pytest.raises(OSError, match="disk full"):
        work()
    assert made == []


def test_an_error_that_was_caught_comes_up_again_and_never_blocks() -> None:
    def work() -> None:
        with Behind(depth=1) as behind:
            behind.do(fail, "once")
            for _ in range(10):
                with pytest.raises(OSError, match="once"):
                    behind.do(print)

    with pytest.raises(OSError, match="once"):
        work()


@pytest.mark.parametrize("call", ["succeeds", "fails"])
def test_after_an_error_of_the_caller_what_is_queued_is_done_and_that_error_stands(call: str) -> None:
    made: list[int] = []

    def work() -> None:
        with Behind() as behind:
            behind.do(time.sleep, 0.05)
            behind.do(made.append, 1)
            if call == "fails":
                behind.do(fail, "disk full")
            raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        work()
    assert made == [1]


def test_an_interrupt_while_the_backlog_is_full_gets_through_and_what_is_queued_is_done() -> None:
    made: list[int] = []

    def slow() -> None:
        time.sleep(0.05)
        interrupt()
        time.sleep(0.05)

    def work() -> None:
        with Behind(depth=2) as behind:
            behind.do(slow)
            behind.do(made.append, 1)
            behind.do(made.append, 2)  # waits, and is interrupted

    with pytest.raises(KeyboardInterrupt):
        work()
    assert made == [1]


def test_an_interrupt_on_leaving_finishes_the_call_that_runs_and_makes_no_other() -> None:
    made: list[int] = []

    def slow() -> None:
        time.sleep(0.05)
        interrupt()
        time.sleep(0.1)
        made.append(0)

    def work() -> None:
        with Behind() as behind:
            behind.do(slow)
            behind.do(made.append, 1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert made == [0]


def test_what_a_call_was_given_is_freed_when_it_is_made() -> None:
    with Behind() as behind:
        thing = Thing()
        held = weakref.ref(thing)
        behind.do(id, thing)
        del thing
        until(lambda: held() is None)
