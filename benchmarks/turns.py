"""Programs and calls timed side by side: processes that have the machine in turns.

What a machine does in one minute and in the next differs by more than what is asked of a program that takes minutes,
most of all where others use it too. So the programs run at the same time, all but one stopped by a signal, and each is
timed by the seconds of its own turns: its threads, those that write included, do nothing between them.

The same holds of one second and the next, and hardly less of shorter times. So of calls that take a second each, a
round in many short turns tells more than one in which each has its turn.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

#: [2] seconds: of the program's turns, and of processor time.
Times = npt.NDArray[np.float64]

_TURN = 1.0
#: Seconds of a call's slices: of fewer, what fills caches anew after each would be some of what is measured.
_SLICE = 0.05
#: Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


class Pace:
    """What a program in turns says of itself: `task(pace)` calls these."""

    def __init__(self, pipe: Connection, over: Any) -> None:
        self._pipe, self._over = pipe, over
        self.marks: list[tuple[float, float]] = []

    def ready(self) -> None:
        """All is prepared; returns when all programs are."""
        self._pipe.send(None)
        self._pipe.recv()

    def mark(self) -> None:
        """Something is done that is to be timed."""
        self.marks.append((time.perf_counter(), time.process_time()))

    @property
    def is_over(self) -> bool:
        """Whether only programs that go on until all others have ended are left."""
        return bool(self._over.is_set())


@dataclass(frozen=True)
class Program:
    """Args:
    task: a function of a module, called with a `Pace` and `arguments`.
    ends: by itself, or when all others have.
    """

    task: Callable[..., None]
    arguments: tuple[Any, ...] = ()
    ends: bool = True


def in_turns(programs: Mapping[str, Program]) -> dict[str, Times]:
    """[n, 2] seconds between each two marks of each program.

    Raises:
        RuntimeError: a program has failed.
    """
    context = _server(program.task for program in programs.values())
    over = context.Event()
    tasks = {name: partial(_run, program, over) for name, program in programs.items()}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    found: dict[str, Times] = {}
    with _standing(context, tasks) as (pipes, processes):
        for pipe in pipes.values():
            pipe.send(None)
        while len(found) < len(programs):
            for name in [name for name in programs if name not in found]:
                began = time.perf_counter()
                _signal(processes[name], signal.SIGCONT)
                has_ended = pipes[name].poll(_TURN)
                if not has_ended:
                    _signal(processes[name], signal.SIGSTOP)
                turns[name].append((began, time.perf_counter()))
                if has_ended:
                    found[name] = _between(turns[name], _heard(name, pipes[name]))
            if all(name in found for name, program in programs.items() if program.ends):
                over.set()
    return found


@contextmanager
def in_slices(
    prepared: Mapping[str, partial[Callable[[], Any]]],
) -> Iterator[Callable[[Sequence[str]], dict[str, float]]]:
    """A round of calls, each in a process of its own: given the order, it says how many seconds each has had.

    All calls begin and end within the same time. A call that took longer the last time has longer slices.

    Args:
        prepared: functions of modules that, called in the new process, return the call to be timed.

    Raises:
        RuntimeError: a call, or what prepares it, has failed.
    """
    context = _server(make.func for make in prepared.values())
    tasks = {name: partial(_call, make) for name, make in prepared.items()}
    last = dict.fromkeys(prepared, _SLICE)
    with _standing(context, tasks) as (pipes, processes):

        def one_round(order: Sequence[str]) -> dict[str, float]:
            n_slices = max(1, round(max(last[name] for name in order) / _SLICE))
            slices = {name: last[name] / n_slices for name in order}
            spent, left = dict.fromkeys(order, 0.0), list(order)
            for name in order:
                pipes[name].send(None)
            while left:
                for name in list(left):
                    began = time.perf_counter()
                    _signal(processes[name], signal.SIGCONT)
                    has_ended = pipes[name].poll(slices[name])
                    spent[name] += time.perf_counter() - began
                    if has_ended:
                        _heard(name, pipes[name])  # before a signal, as it may be gone
                        left.remove(name)
                    _signal(processes[name], signal.SIGSTOP)
            last.update(spent)
            return spent

        yield one_round


@contextmanager
def _standing(
    context: multiprocessing.context.ForkServerContext, tasks: Mapping[str, Callable[[Connection], None]]
) -> Iterator[tuple[dict[str, Connection], dict[str, Any]]]:
    """Pipes to processes, and these, each stopped once its task has said that it is ready; they end with the block."""
    pipes, processes = {}, {}
    try:
        for name, task in tasks.items():
            pipes[name], theirs = context.Pipe()
            processes[name] = context.Process(target=task, args=(theirs,), daemon=True)
            processes[name].start()
            theirs.close()
        for name in tasks:
            _heard(name, pipes[name])
            _signal(processes[name], signal.SIGSTOP)
        yield pipes, processes
    finally:
        for process in processes.values():
            process.kill()


def _server(tasks: Iterable[Callable[..., Any]]) -> multiprocessing.context.ForkServerContext:
    """Of processes, which begin with the tasks' modules imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted({task.__module__ for task in tasks}))
    return context


def _keep_the_heap() -> None:
    """What is freed stays with the process, where the C library can do that (glibc's `mallopt`).

    Otherwise tensors' pages go back to the system now and then, and from a virtual machine to its host, and come again
    one fault at a time: a good part of what tells one pass from the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _call(make: Callable[[], Callable[[], Any]], pipe: Connection) -> None:
    _keep_the_heap()
    call = make()
    while True:
        pipe.send(None)
        pipe.recv()
        call()


def _run(program: Program, over: Any, pipe: Connection) -> None:
    pace = Pace(pipe, over)
    program.task(pace, *program.arguments)
    pipe.send(pace.marks)


def _heard(name: str, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"{name} has failed, see above") from None


def _signal(process: Any, number: signal.Signals) -> None:
    os.kill(process.pid, number)


def _between(turns: list[tuple[float, float]], marks: list[tuple[float, float]]) -> Times:
    """What the clocks have run between marks, of the wall's in turns alone."""
    begins, ends = np.array(turns).T
    walls, processor = np.array(marks).T
    own = (np.minimum(walls[:, None], ends) - begins).clip(min=0).sum(1)
    return np.diff(np.stack([own, processor], 1), axis=0)
