"""A run that is killed over and over, whose disk fills up, and that other numbers of processes go on with.

50,000 short samples through a tiny model by `torchrun`, twice into one file system of memory: undisturbed by two
processes, and disturbed: a random process is killed with -9 whenever so many rows are done as chance says, some also
before there are any more, the disk is filled once, and each start is by one, two or three processes. Then every row
must be there once, its checksum hold, and every byte be that of the undisturbed run.

What a kill costs is what the disturbed run took longer, by the number of kills. Most of it is the start of processes:
interpreter, torch, transformers, weights; the rest is rows that were not yet on record.

    python -m benchmarks.soak
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import record
from eaptk.runs import verify
from eaptk.store import Run

SEED = 0
VOCABULARY = 64
#: Bytes of the disk: what both runs take some times over, and soon filled.
DISK = 128 * 2**20


class Job(Protocol):
    """Processes that score together."""

    def pids(self) -> list[int]:
        """Those that live, without their launcher."""

    def has_ended(self) -> bool:
        """Whether all have."""

    def wait(self) -> int:
        """The exit code, once all have ended."""

    def log(self) -> str:
        """What they printed."""


#: Number of processes and words of the command to processes that run it.
Launch = Callable[[int, list[str]], Job]


@dataclass(frozen=True)
class Soak:
    """What came of it; times in seconds.

    Args:
        undisturbed, disturbed: from the first start to the complete run.
        start: from a start of the undisturbed run's processes to its first row on record.
        starts: number of processes of each start of the disturbed run.
        killed_at: rows on record when a process was killed.
        filled: whether the disk was filled, and the error was one line that says so.
    """

    n_samples: int
    n_edges: int
    undisturbed: float
    start: float
    disturbed: float
    starts: list[int]
    killed_at: list[int]
    filled: bool

    @property
    def rows_per_second(self) -> float:
        """Of the undisturbed run, once its processes have started."""
        return self.n_samples / (self.undisturbed - self.start)

    @property
    def lost_per_kill(self) -> float:
        return (self.disturbed - self.undisturbed) / len(self.killed_at)


def make_model(folder: Path) -> Path:
    """A random one-layer Qwen2, as `save_pretrained` leaves it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(SEED)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    Qwen2ForCausalLM(Qwen2Config(**shape, **heads, initializer_range=0.4)).save_pretrained(folder)
    return folder


def make_data(file: Path, n_samples: int) -> Path:
    """Prompts of 1 to 4 tokens, answers of 1 to 3."""
    chance = random.Random(SEED)

    def tokens(most: int) -> list[int]:
        return [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, most))]

    with open(file, "w") as lines:
        for _ in range(n_samples):
            lines.write(json.dumps({"prompt_ids": tokens(4), "answer_ids": tokens(3)}) + "\n")
    return file


def soak(
    folder: Path, launch: Launch, n_samples: int, n_kills: int, options: list[str], fill: bool = True
) -> Soak:
    """Score undisturbed and disturbed, and hold one against the other.

    Args:
        folder: on a disk that may be filled, for both runs.
        options: more words of the command.
        fill: fill the disk once.

    Raises:
        AssertionError: a row is missing or another, or a process ended as it should not.
    """
    model, data = make_model(folder / "model"), make_data(folder / "data.jsonl", n_samples)
    common = ["score", "--model", str(model), "--data", str(data), *options, "--out"]
    whole, out = folder / "undisturbed", folder / "disturbed"

    began = time.monotonic()
    job = launch(2, [*common, str(whole)])
    while not n_done(whole) and not job.has_ended():
        time.sleep(0.02)
    start = time.monotonic() - began
    assert job.wait() == 0, job.log()
    undisturbed = time.monotonic() - began

    chance = random.Random(SEED)
    # In the first half: a busy machine may be late to kill, and what is left must last until it does.
    moments = sorted(chance.randrange(n_samples // 2) for _ in range(n_kills))
    starts: list[int] = []
    killed_at: list[int] = []
    filled, code, began = not fill, 1, time.monotonic()
    while code:
        starts.append(chance.choice((1, 2, 3)))
        # With all kills behind it, the run meets a full disk when it is to be finished.
        filler = None if filled or len(killed_at) < n_kills else folder / "filler"
        if filler is not None:
            fill_up(filler)
        job = launch(starts[-1], [*common, str(out)])
        killed = False
        if len(killed_at) < n_kills:
            # One in three is killed while it starts, the others when there are so many rows.
            early = chance.uniform(0, start) if chance.random() < 1 / 3 else float("inf")
            if killed := kill_one(job, out, moments[len(killed_at)], early, chance):
                killed_at.append(n_done(out))
        code = job.wait()
        if filler is not None:
            filled = True
            filler.unlink()
            assert "No space left on device; free some space" in job.log(), job.log()
        elif not killed:
            assert code == 0, job.log()
    disturbed = time.monotonic() - began
    assert len(killed_at) == n_kills, (
        f"the run was killed {len(killed_at)} times and then ended: too few rows"
    )
    assert filled, "the disk was never filled"
    assert_same(out, whole)
    times = (round(seconds, 2) for seconds in (undisturbed, start, disturbed))
    return Soak(n_samples, Run.open(whole).graph.n_edges, *times, starts, killed_at, filled=fill)


def n_done(run: Path) -> int:
    """Rows on record."""
    try:
        return int(np.load(run / "done.npy").sum())
    except (OSError, ValueError):  # not there yet
        return 0


def kill_one(job: Job, run: Path, n_rows: int, seconds: float, chance: random.Random) -> bool:
    """Kill -9 a random process when so many rows are done or seconds have gone by; whether one was still there."""
    deadline = time.monotonic() + seconds
    while n_done(run) < n_rows and time.monotonic() < deadline and not job.has_ended():
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.05))
    while not job.has_ended():  # where the moment had come before, a launcher may have started none yet
        for pid in chance.sample(pids := job.pids(), len(pids)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
        time.sleep(0.01)
    return False


def fill_up(file: Path) -> None:
    """Leave the disk of a file no byte."""
    with open(file, "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(2**16))


def assert_same(disturbed: Path, undisturbed: Path) -> None:
    """Every row once, its checksum right, and every file but the manifest the same to the byte."""
    found = Run.open(disturbed)
    ids = found.samples["id"].to_pylist()
    assert found.complete
    assert len(set(ids)) == len(ids) == found.n_samples
    checked = verify(disturbed, progress=False)
    assert checked.n_checked == found.n_samples
    assert not checked.remedy, checked
    names = {file.name for file in undisturbed.glob("[!.]*")}
    assert {file.name for file in disturbed.glob("[!.]*")} == names
    for name in names - {"manifest.json"}:
        assert (disturbed / name).read_bytes() == (undisturbed / name).read_bytes(), name


class Torchrun:
    """Processes that torchrun starts; a single one without it."""

    def __init__(self, size: int, words: list[str]) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the processes
        self._process = subprocess.Popen(
            [sys.executable, *(launcher if size > 1 else []), "-m", "eaptk", *words],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self._is_launcher = size > 1

    def pids(self) -> list[int]:
        if not self._is_launcher:
            return [] if self.has_ended() else [self._process.pid]
        found = []
        for children in Path(f"/proc/{self._process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in children.read_text().split()]
        return sorted(found)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> int:
        return self._process.wait(timeout=300)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()


def table(found: Soak) -> Table:
    """The figures in a few lines."""
    rows = Table(show_header=False)
    for name, value in (
        ("samples × edges", f"{found.n_samples:,} × {found.n_edges}"),
        (
            "undisturbed, 2 processes",
            f"{found.undisturbed:.1f} s, of which {found.start:.1f} s to the first row",
        ),
        ("rows a second after that", f"{found.rows_per_second:,.0f}"),
        (
            "kills -9",
            f"{len(found.killed_at)}, at {min(found.killed_at):,} … {max(found.killed_at):,} rows done",
        ),
        ("starts", f"{len(found.starts)}, of 1, 2 or 3 processes"),
        ("disk filled", "once" if found.filled else "never"),
        ("disturbed", f"{found.disturbed:.1f} s"),
        ("lost per kill", f"{found.lost_per_kill:.1f} s"),
        ("bytes and checksums", "as undisturbed"),
    ):
        rows.add_row(name, value)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--kills", type=int, default=32)
    parser.add_argument("--no-record", action="store_true", help="Write no file of results.")
    parser.add_argument("--disk", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.disk is None:
        sys.exit(on_a_disk_of_its_own(sys.argv[1:]))
    found = soak(options.disk, Torchrun, options.samples, options.kills, ["--tokens-per-batch", "64"])
    figures = {"rows_per_second": found.rows_per_second, "lost_per_kill": found.lost_per_kill}
    result = {"soak": asdict(found) | {name: round(value, 2) for name, value in figures.items()}}
    if not options.no_record:
        print("wrote", record.write("soak", result))
    Console().print(table(found))


def on_a_disk_of_its_own(arguments: list[str]) -> int:
    """The same program in a namespace where a file system of memory is mounted that nobody else sees."""
    with tempfile.TemporaryDirectory() as folder:
        script = f'mount -t tmpfs -o size={DISK} tmpfs "$1"; disk=$1; shift; exec "$@" --disk "$disk"'
        program = [sys.executable, "-m", "benchmarks.soak", *arguments]
        return subprocess.call(
            ["unshare", "--map-root-user", "--mount", "sh", "-euc", script, "sh", folder, *program]
        )


if __name__ == "__main__":
    main()
