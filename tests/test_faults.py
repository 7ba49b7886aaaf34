"""What goes wrong while a run is going: each ends in one clear line and loses no finished row."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import processes
import pyarrow.parquet as pq
import pytest
import typer
from checkpoints import make_records, save_checkpoint, write_jsonl

from eaptk.errors import EaptkError
from eaptk.store import Run

N_SAMPLES = 100
KILLS = 24


@dataclass(frozen=True)
class Job:
    """A checkpoint, data, the command's options, and what a run that nothing disturbed gave."""

    model: Path
    data: Path
    undisturbed: Path

    def command(self, out: Path) -> list[str]:
        options = {"model": self.model, "data": self.data, "out": out, "loss": "self-nll"}
        options |= {"max-new-tokens": 3, "tokens-per-batch": 24}
        return ["score", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]

    def start(self, out: Path) -> processes.Process:
        return processes.start("processes:eaptk", *self.command(out), log=out.with_suffix(".log"))

    def run(self, out: Path) -> tuple[int, str]:
        return processes.run("processes:eaptk", *self.command(out), log=out.with_suffix(".log"))

    def assert_as_undisturbed(self, out: Path) -> None:
        expected, found = Run.open(self.undisturbed), Run.open(out)
        assert found.complete
        assert (out / "scores.npy").read_bytes() == (self.undisturbed / "scores.npy").read_bytes()
        assert found.loss.tobytes() == expected.loss.tobytes()
        assert pq.read_table(out / "samples.parquet").equals(
            pq.read_table(self.undisturbed / "samples.parquet")
        )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("faults")
    job = Job(
        save_checkpoint(folder / "model"),
        write_jsonl(folder / "data.jsonl", make_records(N_SAMPLES)),
        folder / "undisturbed",
    )
    code, log = job.run(job.undisturbed)
    assert code == 0, log
    return job


def stage(out: Path) -> str:
    """How far a run directory is."""
    if not (out / "done.npy").exists():
        return "starting"
    if n_done(out) < N_SAMPLES:
        return "scoring"
    return "finalising" if (out / "loss.npy").exists() else "complete"


def n_done(out: Path) -> int:
    """Rows on record."""
    return int(np.load(out / "done.npy").sum())


def wait_until(process: processes.Process, out: Path, *stages: str) -> None:
    deadline = time.monotonic() + 60
    while stage(out) not in stages:
        assert time.monotonic() < deadline, process.log.read_text()
        time.sleep(0.0005)


def assert_one_line(code: int, log: str, expected_code: int = 1) -> None:
    assert code == expected_code, log
    assert log.startswith("eaptk: ")
    assert log.count("\n") == 1, log


def test_killed_at_random_moments_a_run_ends_with_the_same_bytes(job: Job, tmp_path: Path) -> None:
    moments = random.Random(0)
    out = tmp_path / "probe"
    began = time.monotonic()
    process = job.start(out)
    wait_until(process, out, "scoring", "finalising", "complete")
    to_first_row = time.monotonic() - began
    process.wait()
    to_the_end = time.monotonic() - began

    kills, n_runs, stages, out = 0, 0, set(), tmp_path / "run-0"
    while kills < KILLS or stage(out) != "complete":
        process = job.start(out)
        if kills < KILLS:
            # The first kill comes at once and the second among rows, however busy the machine is.
            if kills == 1:
                wait_until(process, out, "scoring", "finalising", "complete")
            elif kills > 1:
                # From the first moment until some twelfth of the rows later: many kills share one run.
                time.sleep(moments.uniform(0, to_first_row + (to_the_end - to_first_row) / 6))
            process.kill()
        code = process.wait()
        if code == -signal.SIGKILL:
            kills += 1
            stages.add(stage(out))
        else:
            assert code == 0, process.log.read_text()
            job.assert_as_undisturbed(out)
            if kills < KILLS:
                n_runs += 1
                out = tmp_path / f"run-{n_runs}"
    job.assert_as_undisturbed(out)
    assert stages >= {"starting", "scoring"}


def test_killed_while_finalising_a_run_ends_with_the_same_bytes(job: Job, tmp_path: Path) -> None:
    for attempt in range(20):
        out = tmp_path / f"run-{attempt}"
        process = job.start(out)
        wait_until(process, out, "finalising", "complete")
        process.kill()
        process.wait()
        if stage(out) == "finalising":
            break
    assert stage(out) == "finalising", "no kill came in time"
    assert job.run(out)[0] == 0
    job.assert_as_undisturbed(out)


def test_interrupted_from_the_keyboard_a_run_keeps_its_rows_and_says_how_to_go_on(
    job: Job, tmp_path: Path
) -> None:
    out, process = stopped_while_scoring(job, tmp_path)
    process.kill(signal.SIGINT)
    process.kill(signal.SIGCONT)
    code = process.wait()
    assert_one_line(code, process.log.read_text(), expected_code=130)
    assert "the same command goes on from there" in process.log.read_text()
    assert stage(out) == "scoring"
    assert job.run(out)[0] == 0
    job.assert_as_undisturbed(out)


def stopped_while_scoring(job: Job, folder: Path) -> tuple[Path, processes.Process]:
    """A run that stands still with some rows on record and most missing; a busy machine may look too late."""
    for attempt in range(20):
        out = folder / f"run-{attempt}"
        process = job.start(out)
        wait_until(process, out, "scoring", "finalising", "complete")
        process.kill(signal.SIGSTOP)
        if n_done(out) < N_SAMPLES // 2:
            return out, process
        process.kill()
        process.wait()
    raise AssertionError("every run was stopped too late")


@pytest.mark.parametrize(
    ("end", "signal_number"),
    [
        ("interrupt", signal.SIGINT),
        ("interrupt", signal.SIGTERM),
        ("error", signal.SIGTERM),
        ("success", signal.SIGTERM),
    ],
)
def test_a_signal_on_the_way_out_ends_a_process_without_a_traceback(
    tmp_path: Path, end: str, signal_number: int
) -> None:
    """A launcher ends the others as soon as one has failed, and passes Ctrl-C on to those that had it already."""
    code, log = processes.run(
        "test_faults:told_to_end_on_the_way_out", end, signal_number, log=tmp_path / "log"
    )
    assert code == -signal_number
    assert "Traceback" not in log


def told_to_end_on_the_way_out(end: str, signal_number: int) -> None:
    """Target: a command that is over, one way or the other, and then gets a signal."""
    from eaptk.score_cli import _stoppable

    errors = {"interrupt": KeyboardInterrupt(), "error": EaptkError("no"), "success": None}
    with contextlib.suppress(EaptkError, typer.Exit), _stoppable(Path("run")):
        if (error := errors[end]) is not None:
            raise error
    os.kill(os.getpid(), signal_number)


def test_of_two_processes_writing_one_run_the_second_gives_up_and_the_first_goes_on(
    job: Job, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = job.start(out)
    wait_until(first, out, "scoring")
    first.kill(signal.SIGSTOP)  # it holds the run for as long as the second needs to find out
    code, log = processes.run("processes:eaptk", *job.command(out), log=tmp_path / "second.log")
    first.kill(signal.SIGCONT)
    assert_one_line(code, log)
    assert f"another process is writing run {out}" in log
    assert first.wait() == 0
    job.assert_as_undisturbed(out)


def test_the_run_of_another_model_is_refused_and_left_alone(job: Job, tmp_path: Path) -> None:
    out = shutil.copytree(job.undisturbed, tmp_path / "run")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    other = Job(save_checkpoint(tmp_path / "other", seed=1), job.data, job.undisturbed)
    code, log = other.run(out)
    assert_one_line(code, log)
    assert "model.weights is 'sha256:" in log
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_truncated_scores_are_refused_and_what_is_left_of_them_is_kept(job: Job, tmp_path: Path) -> None:
    out = shutil.copytree(job.undisturbed, tmp_path / "run")
    rows = (out / "scores.npy").read_bytes()[:-1000]
    (out / "scores.npy").write_bytes(rows)
    code, log = job.run(out)
    assert_one_line(code, log)
    assert f"{out / 'scores.npy'} is truncated" in log
    assert (out / "scores.npy").read_bytes() == rows


def test_a_file_that_may_not_grow_so_large_fails_at_the_start(job: Job, tmp_path: Path) -> None:
    code, log = processes.run(
        "test_faults:with_files_up_to", 4096, *job.command(tmp_path / "run"), log=tmp_path / "log"
    )
    assert_one_line(code, log)
    assert "cannot write run" in log
    assert "File too large" in log
    assert not list((tmp_path / "run").glob("[!.]*"))


def with_files_up_to(n_bytes: int, *arguments: str) -> None:
    """Target: the command line where no file may be larger."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    processes.eaptk(*arguments)
