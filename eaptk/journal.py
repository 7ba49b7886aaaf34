"""Generated answers, kept as they come: a file of JSON lines that only grows, of which a kill tears off nothing
but the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

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
        # What a kill tore off must not run into the next line.
        kept = path.read_bytes().rpartition(b"\n")
        file.truncate(len(kept[0]) + len(kept[1]))
        for row, tokens in answers.items():
            file.write(json.dumps([row, list(tokens)]).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
