"""The soak in small: `benchmarks/soak.py` with few samples, in processes that start at once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path

import processes
import pytest

from benchmarks.soak import assert_same, soak


@dataclass(frozen=True)
class Forked:
    """The command line in processes forked from one that has imported everything."""

    team: processes.Team

    def pids(self) -> list[int]:
        return [member.pid for member in self.team.members if not member.has_ended()]

    def has_ended(self) -> bool:
        return not self.pids()

    def wait(self) -> int:
        return max(map(abs, self.team.wait()))

    def log(self) -> str:
        return "\n".join(self.team.logs)


def test_a_run_that_is_killed_again_and_again_ends_with_every_row(tmp_path: Path) -> None:
    number = count()

    def launch(size: int, words: list[str]) -> Forked:
        log = tmp_path / f"log-{next(number)}"
        return Forked(processes.start_team(size, "processes:eaptk", *words, log=log))

    found = soak(tmp_path, launch, 8000, 3, ["--tokens-per-batch", "64"], fill=False)
    assert len(found.killed_at) == 3
    assert max(found.killed_at) > 0
    assert found.rows_per_second > 0
    # The check would have seen a byte that is another.
    scores = tmp_path / "disturbed" / "scores.npy"
    scores.write_bytes(scores.read_bytes()[:-1] + b"\0")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "disturbed", tmp_path / "undisturbed")
