"""Disks that are full or read-only: real file systems, mounted in a namespace of the test's own."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_records, save_checkpoint, write_jsonl

import eaptk
from eaptk.loading import load_config
from eaptk.store import Run, RunWriter


def in_namespace(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script in which ``$1`` … are `arguments`, and mounts are nobody else's."""
    assert shutil.which("unshare"), "these tests mount disks of their own: install unshare (util-linux)"
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-euc", script, "sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def score_command(model: Path, data: Path, out: str) -> str:
    words = [sys.executable, "-m", "eaptk", "score", "--model", str(model), "--data", str(data)]
    return f"{shlex.join(words)} --out {out}"


def assert_one_line(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("eaptk: error: ")
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def test_a_disk_too_small_fails_at_the_start_with_needed_and_free_bytes(model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ({"prompt": "w1", "answer": "w2"} for _ in range(4000)))
    (tmp_path / "disk").mkdir()
    command = score_command(model, data, '"$1/run" --granularity head')
    result = in_namespace(f'mount -t tmpfs -o size=1m tmpfs "$1"; exec {command}', tmp_path / "disk")
    assert_one_line(result)
    edges = eaptk.Graph.from_config(load_config(model), "head").n_edges
    assert re.search(rf"need {128 + 4000 * edges * 4} bytes and its disk has \d+ free;", result.stderr)


def test_a_disk_that_fills_up_later_loses_no_finished_row(model: Path, tmp_path: Path) -> None:
    """Rows have their space; what finds none is samples.parquet with the losses."""
    data = write_jsonl(tmp_path / "data.jsonl", make_records(30))
    whole = eaptk.score(model, data, tmp_path / "whole", progress=False)
    half = unfinished_copy(whole, tmp_path / "half")
    (tmp_path / "disk").mkdir()
    command = score_command(model, data, '"$1/run"')
    script = f"""
        mount -t tmpfs -o size=1m tmpfs "$1"
        cp -r "$2" "$1/run"
        cat /dev/zero > "$1/filler" 2>/dev/null || true
        code=0; {command} || code=$?
        rm "$1/filler"
        cp -r "$1/run" "$3"
        {command} >&2
        cp -r "$1/run" "$4"
        exit $code
    """
    result = in_namespace(script, tmp_path / "disk", half, tmp_path / "full", tmp_path / "freed")
    error, summary = result.stderr.splitlines()
    assert error == (
        f"eaptk: error: cannot write run {tmp_path}/disk/run: No space left on device; "
        f"free some space and repeat the command, finished rows are kept"
    )
    assert result.returncode == 1
    assert "30 samples" in summary
    assert Run.open(tmp_path / "full").complete
    assert (tmp_path / "freed/scores.npy").read_bytes() == (whole.path / "scores.npy").read_bytes()
    assert np.array_equal(Run.open(tmp_path / "freed").loss, whole.loss)


def test_a_read_only_folder_is_named(model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", make_records(2))
    (tmp_path / "disk").mkdir()
    command = score_command(model, data, '"$1/run"')
    result = in_namespace(f'mount -t tmpfs -o ro tmpfs "$1"; exec {command}', tmp_path / "disk")
    assert_one_line(result)
    assert f"cannot write run {tmp_path}/disk/run: Read-only file system; choose a folder" in result.stderr


def test_a_run_on_a_read_only_disk_can_still_be_read(model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", make_records(2))
    run = eaptk.score(model, data, tmp_path / "disk/run", progress=False)
    script = (
        f'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; {sys.executable} -m eaptk inspect "$1/run"'
    )
    result = in_namespace(script, tmp_path / "disk")
    assert result.returncode == 0, result.stderr
    assert f"{run.n_samples} of {run.n_samples} done" in result.stdout


def unfinished_copy(run: Run, path: Path) -> Path:
    """The same run, stopped when half of its rows were done."""
    half = run.n_samples // 2
    with RunWriter(path, {k: v for k, v in run.manifest.items() if k != "schema"}) as writer:
        writer.begin(run.samples.drop_columns(["loss"]))
        writer.write(list(range(half)), np.array(run.scores[:half]), run.loss[:half])
    return path
