"""Pieces of Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is words, all others figures."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def share(x: float) -> str:
    return f"{x:.0%}"


def error(x: float | str | None) -> str:
    """A relative error, or why there is none; – where none was asked for."""
    if x is None:
        return "–"
    return x if isinstance(x, str) else f"{x:.0e}"


def unfinished(gaps: list[str]) -> list[str]:
    """A paragraph on what a record lacks, if anything."""
    return [f"**Not of a whole run: {'; '.join(gaps)}.**"] if gaps else []
