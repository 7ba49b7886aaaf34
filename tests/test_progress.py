"""What is said on the way where no terminal could show a bar."""

from __future__ import annotations

import pytest

from eaptk import progress
from eaptk.progress import progress_bar


def test_a_log_gets_a_line_now_and_then_with_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress_bar("scoring", 10_000, 1_000, shown=True) as advance:
        for _ in range(4):
            clock[0] += 25
            advance(1_000)
    assert capsys.readouterr().err == "scoring: 40.0% of 10,000 tokens, 40 a second, 2 minutes left\n"


@pytest.mark.parametrize("shown", [False, True])
def test_what_takes_no_minute_is_not_spoken_of(capsys: pytest.CaptureFixture[str], shown: bool) -> None:
    with progress_bar("scoring", 100, 0, shown) as advance:
        advance(100)
    assert capsys.readouterr() == ("", "")


def test_what_is_not_to_be_shown_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "A_LINE_EVERY", 0.0)
    with progress_bar("scoring", 100, 0, shown=False) as advance:
        advance(100)
    assert capsys.readouterr() == ("", "")
