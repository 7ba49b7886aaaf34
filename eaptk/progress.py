"""How far what takes minutes is, on standard error: a bar, or where that is no terminal a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Seconds between two lines; what takes less has none.
A_LINE_EVERY = 60.0


@contextmanager
def progress_bar(
    what: str, total: int, done: int, shown: bool, unit: str = "tokens"
) -> Iterator[Callable[[int], None]]:
    """Speed and time left, as the module says; the block calls what it is given with how much more is done."""
    from rich.console import Console

    console = Console(stderr=True)
    if shown and not console.is_terminal:
        yield _Lines(what, total, done, unit)
        return
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} {unit}/s")

    with Progress(
        "{task.description}",
        BarColumn(),
        TaskProgressColumn(),
        Speed(),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    ) as bars:
        task = bars.add_task(what, total=total, completed=done)
        yield lambda more: bars.advance(task, more)


class _Lines:
    def __init__(self, what: str, total: int, done: int, unit: str) -> None:
        self._what, self._total, self._done, self._unit = what, total, done, unit
        self._first = done
        self._began = self._said = time.monotonic()

    def __call__(self, more: int) -> None:
        self._done += more
        now = time.monotonic()
        if now - self._said < A_LINE_EVERY:
            return
        self._said = now
        speed = (self._done - self._first) / (now - self._began)
        left = (self._total - self._done) / speed if speed else float("inf")
        print(
            f"{self._what}: {self._done / self._total:.1%} of {self._total:,} {self._unit}, {speed:,.0f} a second, "
            f"{left / 60:,.0f} minutes left",
            file=sys.stderr,
            flush=True,
        )
