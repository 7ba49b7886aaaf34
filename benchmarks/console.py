"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

#: Columns that a table needs where nobody looks at it as it is printed: a narrower terminal wraps cells.
TABLE_WIDTH = 160


def wide_console() -> Console:
    """One that is at least as wide as tables need."""
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    return console
