"""A bar on standard error for what takes minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    what: str, total: int, done: int, shown: bool, unit: str = "tokens"
) -> Iterator[Callable[[int], None]]:
    """A bar with speed and time left on standard error; nothing if that is no terminal."""
    from rich.console import Console
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

    console = Console(stderr=True)
    with Progress(
        "{task.description}",
        BarColumn(),
        TaskProgressColumn(),
        Speed(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    ) as bars:
        task = bars.add_task(what, total=total, completed=done)
        yield lambda more: bars.advance(task, more)
