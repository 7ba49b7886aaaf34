"""Whole programs timed side by side: processes that have the machine in turns of a second.

What a machine does in one minute and in the next differs by more than what is asked of a program that takes minutes,
most of all where others use it too. So the programs run at the same time, all but one stopped by a signal, and each is
timed by the seconds of its own turns: its threads, those that write included, do nothing between them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

#: [2] seconds: of the program's turns, and of processor time.
Times = npt.NDArray[np.float64]

_TURN = 1.0


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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted({program.task.__module__ for program in programs.values()}))
    over = context.Event()
    pipes, processes = {}, {}
    for name, program in programs.items():
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=_run, args=(program, theirs, over), daemon=True)
        processes[name].start()
        theirs.close()
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    found: dict[str, Times] = {}
    try:
        for name in programs:
            _heard(name, pipes[name])
            _signal(processes[name], signal.SIGSTOP)
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
    finally:
        for process in processes.values():
            process.kill()
    return found


def _run(program: Program, pipe: Connection, over: Any) -> None:
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
