"""Generated answers, kept as they come: a file of JSON lines that only grows, of which a kill tears off nothing
but the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from eaptk.errors import EaptkError


def read_journal(path: Path) -> dict[int, list[int]]:
    """Answers kept so far, row to token ids; none where there is no file.

    Raises:
        EaptkError: the file is damaged.
    """
    if not path.exists():
        return {}
    whole = path.read_bytes().rpartition(b"\n")[0]  # the last line may be torn
    try:
        return dict(json.loads(line) for line in whole.splitlines())
    except (TypeError, ValueError) as error:
        raise EaptkError(
            f"{path} is damaged ({error}); delete it, and its prompts are answered again"
        ) from error


def append_journal(path: Path, answers: Mapping[int, Sequence[int]]) -> None:
    """Make more answers durable, a line each."""
    with open(path, "ab") as file:
        _cut_torn_line(path, file)
        for row, tokens in answers.items():
            file.write(json.dumps([row, list(tokens)]).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_torn_line(path: Path, file: BinaryIO) -> None:
    """What a kill tore off must not run into the next line. Where nothing was, the file, maybe long, is not read."""
    with open(path, "rb") as kept:
        size = kept.seek(0, os.SEEK_END)
        kept.seek(max(0, size - 1))
        if kept.read() in (b"", b"\n"):
            return
        kept.seek(0)
        file.truncate(kept.read().rfind(b"\n") + 1)
