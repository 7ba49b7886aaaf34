"""One run by several processes: the same rows as by one, whatever happens to some of them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from checkpoints import make_records, save_checkpoint, write_jsonl

import eaptk.team
from eaptk.errors import EaptkError
from eaptk.store import Run

N_SAMPLES = 100
KILLS = 4

#: What is kept and done differs; how processes share it must not.
WAYS: dict[str, list[str]] = {
    "rows": [],
    "head": ["--granularity", "head", "--row-dtype", "float16", "--top", "9"],
    "own answers": ["--loss", "self-nll", "--max-new-tokens", "3"],
    "mean ablation": ["--ablation", "mean"],
    "metrics only": ["--metrics-only", "--range", "3"],
    "two cuts": ["--cut", "3", "--cut", "8"],
}

Command = Callable[[str, Path], list[str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("job")
    model = save_checkpoint(folder / "model")
    data = write_jsonl(folder / "data.jsonl", make_records(N_SAMPLES))
    common = ["score", "--model", str(model), "--data", str(data), "--tokens-per-batch", "24"]

    def words(way: str, out: Path) -> list[str]:
        return [*common, *WAYS[way], "--out", str(out)]

    return words


@pytest.fixture(scope="module")
def alone(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run that one process made, by way."""
    made: dict[str, Path] = {}

    def run(way: str) -> Path:
        if way not in made:
            out = tmp_path_factory.mktemp("alone") / "run"
            code, log = processes.run("processes:eaptk", *command(way, out), log=out.with_suffix(".log"))
            assert code == 0, log
            made[way] = out
        return made[way]

    return run


def contents(run: Path) -> dict[str, bytes]:
    """All files but the manifest, which says who made them and when."""
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in sorted(run.rglob("[!.]*"))
        if file.is_file() and file.name != "manifest.json"
    }


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = contents(found), contents(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_the_bytes_of_one(
    command: Command, alone: Callable[[str], Path], tmp_path: Path, way: str, size: int
) -> None:
    out = tmp_path / "run"
    team = processes.start_team(size, "processes:eaptk", *command(way, out), log=tmp_path / "log")
    assert team.wait() == [0] * size, team.logs
    assert_same(out, alone(way))
    # What was found is said once.
    assert [bool(log) for log in team.logs] == [True] + [False] * (size - 1)


@pytest.mark.parametrize("way", ["own answers", "mean ablation", "metrics only", "two cuts"])
def test_killed_at_random_and_gone_on_with_by_other_numbers_of_processes(
    command: Command, alone: Callable[[str], Path], tmp_path: Path, way: str
) -> None:
    chance = random.Random(0)
    out = tmp_path / "run"
    kills, codes, n_done = 0, [1], -1
    while any(codes):
        size = chance.choice([2, 3]) if kills < KILLS else 1
        team = processes.start_team(size, "processes:eaptk", *command(way, out), log=tmp_path / "log")
        if kills < KILLS:
            # The first is killed before there is a row, each other when there are more than before.
            while progress(out) <= n_done and not any(member.has_ended() for member in team.members):
                time.sleep(0.002)
            team.members[chance.randrange(size)].kill()
        codes = team.wait()
        kills += -signal.SIGKILL in codes
        n_done = progress(out)
        for code, log in zip(codes, team.logs, strict=True):
            assert code in (0, 1, 130, -signal.SIGKILL, -signal.SIGTERM), log
            assert code != 1 or one_line(log), log
    assert kills
    assert_same(out, alone(way))


def test_started_anew_on_one_store_nothing_is_taken_for_what_the_first_ones_said(
    command: Command, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    """As by `torchrun --max-restarts`: its store stays, and each node counts its own failures alone."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out = tmp_path / "run"

    def start(counts: list[int]) -> processes.Team:
        words = [str(store.port), json.dumps(counts), *command("own answers", out)]
        return processes.start_team(2, "test_processes:under_an_agent", *words, log=tmp_path / "log")

    team = start([0, 0])
    while progress(out) < 1 and not any(member.has_ended() for member in team.members):
        time.sleep(0.002)
    team.members[1].kill()
    assert any(team.wait()), team.logs
    team = start([0, 1])
    assert team.wait() == [0, 0], team.logs
    assert_same(out, alone("own answers"))


def under_an_agent(port: str, counts: str, *arguments: str) -> None:
    """Target: the command line, with the store of an agent and what that of its node counts as restarts."""
    os.environ |= {
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(json.loads(counts)[int(os.environ["RANK"])]),
    }
    processes.eaptk(*arguments)


def test_a_process_that_never_comes_is_named(command: Command, tmp_path: Path) -> None:
    """And not waited for once all rows are there."""
    team = processes.start_team(
        1, "test_processes:of_two", *command("rows", tmp_path / "run"), log=tmp_path / "log"
    )
    assert team.wait() == [1]
    assert one_line(team.logs[0])
    assert "process 1 of 2 has not come within" in team.logs[0]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK is '', no number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_PORT": "29500"}, "RANK is 2, WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "99999"}, "MASTER_PORT 99999, which cannot be"),
    ],
    ids=["none", "too high", "no port"],
)
def test_variables_that_no_launcher_sets_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EaptkError, match=f"{message}.*; start the processes with torchrun"):
        eaptk.team.Team.join()


def of_two(*arguments: str) -> None:
    """Target: the command line, in the first of two processes, which does not wait long for the other."""
    os.environ["WORLD_SIZE"] = "2"
    eaptk.team._MEETING = 0.5
    processes.eaptk(*arguments)


def progress(out: Path) -> int:
    """Rows that are done, of all runs in a folder; −1 before there is a run."""
    # Not all folders in it: those of parts come and go.
    runs = [file.parent for each in (out, *out.glob("cut-*")) for file in each.glob("manifest.json")]
    done = 0
    for run in runs:
        with contextlib.suppress(EaptkError):  # which has no row yet
            done += int(Run.open(run).done.sum())
    return done if runs else -1


def one_line(log: str) -> bool:
    return log.startswith("eaptk: ") and log.count("\n") == 1


def test_under_torchrun_bad_input_is_one_line_a_process(command: Command, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "w1", "answer": ""}])
    words = [
        word if not word.endswith("data.jsonl") else str(data) for word in command("rows", tmp_path / "run")
    ]
    result = torchrun(2, *words)
    assert result.returncode != 0
    ours = [line for line in result.stderr.splitlines() if line.startswith("eaptk:")]
    assert 1 <= len(ours) <= 2, result.stderr  # torchrun ends the second when the first has ended
    assert all("its answer is empty" in line for line in ours)
    assert not (tmp_path / "run").exists()


def test_under_torchrun_several_processes_give_the_bytes_of_one(
    command: Command, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = torchrun(2, *command("rows", out))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("100 samples") == 1
    assert_same(out, alone("rows"))
    # To be repeated, by however many processes.
    assert Run.open(out).manifest["provenance"]["command"].startswith("eaptk score --model ")


def torchrun(size: int, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.run(
        [*launcher, "-m", "eaptk", *words], capture_output=True, text=True, check=False, timeout=120
    )


def test_an_error_that_one_process_meets_ends_all(command: Command, tmp_path: Path) -> None:
    """The longest sample, claimed first, has a loss that is not finite; others have nothing wrong with them."""
    team = processes.start_team(
        3, "test_processes:with_a_bad_token", *command("rows", tmp_path / "run"), log=tmp_path / "log"
    )
    assert 0 not in team.wait(), team.logs
    assert any(re.search(r"sample 'q\d+': the loss is nan", log) for log in team.logs)
    # Those that the launcher's signal has not ended before say whose error it was.
    for log in team.logs:
        assert log.startswith("eaptk: ") or not log, log


def with_a_bad_token(*arguments: str) -> None:
    """Target: the command line, with a model for which one token is no number."""
    import torch

    import eaptk.run
    from eaptk.loading import load_model

    def load(*args: Any, **options: Any) -> Any:
        model = load_model(*args, **options)
        model.get_input_embeddings().weight.data[7] = torch.nan
        return model

    eaptk.run.load_model = load  # type: ignore[assignment]
    processes.eaptk(*arguments)


def test_processes_with_other_weights_are_refused(command: Command, tmp_path: Path) -> None:
    team = processes.start_team(
        2, "test_processes:with_weights_of_its_own", *command("rows", tmp_path / "run"), log=tmp_path / "log"
    )
    assert 0 not in team.wait()
    assert any("model.weights is 'sha256:" in log for log in team.logs), team.logs


def with_weights_of_its_own(*arguments: str) -> None:
    """Target: the command line, with another model in each process."""
    words = list(arguments)
    where = words.index("--model") + 1
    words[where] = str(
        save_checkpoint(
            Path(words[words.index("--out") + 1]).parent / os.environ["RANK"], seed=int(os.environ["RANK"])
        )
    )
    processes.eaptk(*words)


def test_a_run_that_is_complete_is_left_alone_by_several(
    command: Command, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    out = shutil.copytree(alone("rows"), tmp_path / "run")
    changed = {file.name: file.stat().st_mtime_ns for file in out.glob("[!.]*")}
    team = processes.start_team(2, "processes:eaptk", *command("rows", out), log=tmp_path / "log")
    assert team.wait() == [0, 0], team.logs
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("[!.]*")} == changed


def test_rows_are_in_the_order_of_the_data(command: Command, alone: Callable[[str], Path]) -> None:
    run = Run.open(alone("rows"))
    assert run.samples["id"].to_pylist() == [record["id"] for record in make_records(N_SAMPLES)]
    assert np.isfinite(run.scores).all()
