"""Every block of the README and of docs/python.md is run as a reader would, in a clone."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from eaptk import architecture, cli

ROOT = Path(__file__).parents[1]
#: Commands of a shell, by which a reader lays files out.
SHELL = {"head", "ln"}


@pytest.mark.parametrize(("page", "at_least"), [("README.md", 12), ("docs/python.md", 12)])
def test_every_block_runs_in_order(
    page: str, at_least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    # What a page registers is gone after it.
    monkeypatch.setattr(architecture, "_REGISTRY", dict(architecture._REGISTRY))
    ran = 0
    names: dict[str, object] = {}  # one session: later blocks use what earlier ones imported
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    for language, block in blocks:
        if language == "python":
            exec(compile(block, page, "exec"), names)
            ran += 1
            continue
        assert language == "sh", f"a block in {language!r} is not run by this test"
        for line in block.splitlines():
            run_line(line)
            ran += 1
    assert ran >= at_least


def run_line(line: str) -> None:
    command, *arguments = shlex.split(line, comments=True)
    if command == "make":
        # The gate runs `make test` itself; here it is enough that the target is there.
        subprocess.run(["make", "-n", "-C", str(ROOT), *arguments], check=True, capture_output=True)
    elif command in SHELL:
        subprocess.run(line, shell=True, check=True)
    else:
        assert command == "eaptk"
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert not exit_.value.code, line
