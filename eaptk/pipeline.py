"""Threads beside the one that computes: what it needs next is made ahead, what it leaves to do is done behind.

Both hold a bounded number of things, end with the block that uses them, and pass every error on to it. Waiting
is done on events, not by joining: until Python 3.13 a join that is interrupted takes its thread for dead.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from queue import SimpleQueue
from threading import Event, Semaphore, Thread, current_thread, main_thread
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds between two looks at whether the program is still there to take what was made.
_LOOK = 0.5


def ahead(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """`items` in their order, made by a thread of their own while the caller works on the ones before.

    The thread starts with the first item asked for and has ended when the iterator has: after the last item,
    after an error, and when the caller stops early (`close`, or letting go of the iterator).

    Args:
        items: iterated in that thread alone.
        depth: most items that are made, or in the making, and not yet taken; at least 1.

    Raises:
        BaseException: what making an item raised, after the items before it.
    """
    room, stop, ended = Semaphore(depth), Event(), Event()
    made: SimpleQueue[list[T] | BaseException | None] = SimpleQueue()
    thread = Thread(target=_make, args=(items, made, room, stop, ended), name="eaptk-ahead")
    try:
        thread.start()
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item.pop()  # what was made is the caller's to free
    finally:
        item = None  # an error holds this frame: without a reference back both are freed at once
        stop.set()
        room.release()
        if thread.is_alive() and thread is not current_thread():  # where the garbage collector may close us
            ended.wait()
            thread.join()


def _make(
    items: Iterable[T],
    made: SimpleQueue[list[T] | BaseException | None],
    room: Semaphore,
    stop: Event,
    ended: Event,
) -> None:
    try:
        source = iter(items)
        while _acquired(room) and not stop.is_set():
            made.put([next(source)])
    except StopIteration:
        made.put(None)
    except BaseException as error:
        made.put(error)
    finally:
        ended.set()


def _acquired(room: Semaphore) -> bool:
    """Whether there is room; waits for it as long as the program runs: an iterator may be left lying about."""
    while not room.acquire(timeout=_LOOK):
        if not main_thread().is_alive():
            return False
    return True


class Behind:
    """Calls that another thread makes, one after the other, while the caller goes on.

        with Behind() as behind:
            behind.do(write, rows)      # returns at once, unless `depth` calls wait already

    Leaving the block waits for the calls that are queued, after an error in the block too, unless it is
    interrupted once more. No call is made after one that failed.

    Args:
        depth: most calls that are queued or running; at least 1.

    Raises:
        BaseException: the first error of a call: from every later `do`, and on leaving the block, unless
            that is left by another error.
    """

    def __init__(self, depth: int = 4) -> None:
        self._room = Semaphore(depth)
        self._calls: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._given_up = False
        self._ended = Event()
        self._thread = Thread(target=self._work, name="eaptk-behind")

    def __enter__(self) -> Behind:
        try:
            self._thread.start()
        except BaseException:  # interrupted: there will be no leaving
            self._calls.put(None)
            raise
        return self

    def do(self, function: Callable[..., Any], *args: Any) -> None:
        """Have `function(*args)` called after all calls before; waits while the backlog is full."""
        self._room.acquire()
        if self._error is not None:
            self._room.release()
            raise self._error
        self._calls.put((function, args))

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._calls.put(None)
        try:
            self._ended.wait()
        except BaseException:  # interrupted while it waits: finish the call that runs, make no other
            self._given_up = True
            self._ended.wait()
            raise
        finally:
            if self._ended.is_set():
                self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                if self._error is None and not self._given_up:
                    function, args = call
                    try:
                        function(*args)
                    except BaseException as error:
                        self._error = error
                    del function, args
                del call  # rows are large: a call that is made holds none
                self._room.release()
        finally:
            self._ended.set()
