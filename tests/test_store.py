"""A run directory: what is in it, what it refuses, and that it survives being killed at any system call."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eaptk.content import SampleArray
from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.store import SCHEMA, Run, RunWriter

N = 4
GRAPH = Graph(n_layers=1, n_heads=2, n_kv_heads=1)
SCORES = np.random.default_rng(0).normal(size=(N, GRAPH.n_edges)).astype(np.float32)
LOSS = np.array([0.5, 1.5, 2.5, 3.5])
SAMPLES = pa.table({"id": [f"q{i}" for i in range(N)], "level": [3, 1, 2, 1]})


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"id": "m", "weights": "sha256:aa"},
        "dataset": {"samples": N},
        "graph": GRAPH.to_dict(),
        "loss": "nll",
        "row_dtype": "float32",
        "provenance": {"command": "eaptk score"},
        **changes,
    }


def write_run(path: Path | str) -> None:
    """What `score` does: answers first, then rows, batch by batch, those that are not wholly done."""
    batches = [[2, 0], [3, 1]]
    with RunWriter(path, manifest()) as writer:
        if not writer.begun:
            for batch in batches:
                if not all(row in writer.answers() for row in batch):
                    writer.keep_answers({row: [row, 7] for row in batch})
            answers = writer.answers()
            writer.begin(SAMPLES.append_column("answer_ids", pa.array([answers[row] for row in range(N)])))
        for rows in batches:
            if not writer.done[rows].all():
                writer.write(rows, SCORES[rows], LOSS[rows])
                writer.commit()
        writer.finish()


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def refused(path: Path, **changes: Any) -> str:
    with pytest.raises(EaptkError) as caught, RunWriter(path, manifest(**changes)):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_complete_run_is_six_files_that_need_no_eaptk(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    names = ["checksums.npy", "done.npy", "edges.parquet", "manifest.json", "samples.parquet", "scores.npy"]
    assert sorted(file.name for file in (tmp_path / "run").glob("[!.]*")) == names
    assert np.array_equal(np.load(tmp_path / "run/scores.npy", mmap_mode="r"), SCORES)
    assert np.array_equal(np.load(tmp_path / "run/done.npy"), np.ones(N, dtype=np.uint8))
    assert json.loads((tmp_path / "run/manifest.json").read_text()) == {"schema": SCHEMA, **manifest()}
    samples = pq.read_table(tmp_path / "run/samples.parquet").to_pydict()
    assert samples["id"] == ["q0", "q1", "q2", "q3"]
    assert samples["level"] == [3, 1, 2, 1]
    assert samples["loss"] == LOSS.tolist()
    edges = pq.read_table(tmp_path / "run/edges.parquet").to_pylist()
    assert edges[GRAPH.column("a0", "m0")] == {
        "column": GRAPH.column("a0", "m0"),
        "source": "a0",
        "destination": "m0",
        "source_layer": 0,
        "destination_layer": 0,
    }


def test_a_run_reads_back_what_was_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.complete
    assert run.graph == GRAPH
    assert np.array_equal(run.scores, SCORES)
    assert np.array_equal(run.loss, LOSS)


def test_a_run_may_end_while_its_losses_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunWriter(tmp_path / "run", manifest()) as writer:
        writer.begin(SAMPLES)
        writer.write(range(N), SCORES, LOSS)
        writer.commit()
        run = Run.open(tmp_path / "run")
        look = SampleArray.map

        def ended_before(array: SampleArray) -> Any:
            if array.path.name == "loss.npy":
                monkeypatch.undo()
                writer.finish()
            return look(array)

        monkeypatch.setattr(SampleArray, "map", ended_before)
        assert np.array_equal(run.loss, LOSS)
    assert not (tmp_path / "run/loss.npy").exists()


def test_rows_cannot_be_changed_through_an_opened_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="read-only"):
        Run.open(tmp_path / "run").scores[0, 0] = 1.0


def test_a_growing_run_says_which_rows_to_use(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", manifest()) as writer:
        writer.begin(SAMPLES)
        writer.write([2], SCORES[[2]], LOSS[[2]])
        writer.commit()
        run = Run.open(tmp_path / "run")
        assert run.done.tolist() == [0, 0, 1, 0]
        assert not run.complete
        assert np.array_equal(run.loss, [np.nan, np.nan, 2.5, np.nan], equal_nan=True)
        assert np.array_equal(run.scores[2], SCORES[2])


def test_rows_written_before_an_error_are_kept(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RunWriter(tmp_path / "run", manifest()) as writer:
            writer.begin(SAMPLES)
            for row in range(3):
                writer.write([row], SCORES[[row]], LOSS[[row]])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Run.open(tmp_path / "run").done.tolist() == [1, 1, 1, 0]


def test_a_row_is_on_disk_before_it_is_marked_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut needs, and a kill does not show."""
    calls: list[str] = []

    def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(descriptor: int, *arguments: Any) -> Any:
            calls.append(f"{name} {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
            return call(descriptor, *arguments)

        return wrapper

    with RunWriter(tmp_path / "run", manifest()) as writer:
        writer.begin(SAMPLES)
        for name in ("pwrite", "fdatasync"):
            monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
        writer.write([1, 2], SCORES[[1, 2]], LOSS[[1, 2]])
        writer.commit()
    assert calls == [
        *["pwrite scores.npy"] * 2,
        *["pwrite checksums.npy"] * 2,
        *["pwrite loss.npy"] * 2,
        *["fdatasync loss.npy", "fdatasync scores.npy", "fdatasync checksums.npy"],
        *["pwrite done.npy"] * 2,
        "fdatasync done.npy",
    ]


def test_files_are_locked_while_rows_are_written_into_them(tmp_path: Path) -> None:
    """NFS would write whole pages otherwise, and take back what other machines wrote into them."""
    with RunWriter(tmp_path / "run", manifest()) as writer:
        writer.begin(SAMPLES)
        for name in ("scores", "checksums", "loss", "done"):
            with open(tmp_path / f"run/{name}.npy", "rb") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_killed_at_any_system_call_a_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path / "whole")
    whole, done_rows = content(tmp_path / "whole"), []
    for call in range(1000):
        path = tmp_path / f"killed-{call}"
        code, log = processes.run(
            "processes:killed_at_call", call, "test_store:write_run", path, log=tmp_path / "log"
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL, log
        if (path / "done.npy").exists():
            run = Run.open(path)
            rows = np.flatnonzero(run.done)
            assert np.array_equal(run.scores[rows], SCORES[rows]), (
                f"a row marked done is not whole: call {call}"
            )
            assert np.array_equal(run.loss[rows], LOSS[rows]), f"a loss marked done is not whole: call {call}"
            done_rows.append(len(rows))
        write_run(path)
        assert content(path) == whole, f"killed in call {call}"
        shutil.rmtree(path)
    assert set(done_rows) == {0, 1, 2, 3, 4}, "some stage of the run was never killed"


def test_killed_again_and_again_a_run_still_ends_with_the_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path / "whole")
    path = tmp_path / "killed"
    for call in (1, 3, 7, 11, 15, 3, 6, 9, 2, 5, 4):
        processes.run("processes:killed_at_call", call, "test_store:write_run", path, log=tmp_path / "log")
    write_run(path)
    assert content(path) == content(tmp_path / "whole")


def test_a_torn_answer_is_generated_again(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", manifest()) as writer:
        writer.keep_answers({0: [1, 2], 1: [3]})
    with open(tmp_path / "run/answers.jsonl", "ab") as file:
        file.write(b"[2, [4")
    with RunWriter(tmp_path / "run", manifest()) as writer:
        assert writer.answers() == {0: [1, 2], 1: [3]}
        writer.keep_answers({2: [4, 5], 3: [6]})
        assert writer.answers() == {0: [1, 2], 1: [3], 2: [4, 5], 3: [6]}


def test_another_manifest_is_refused_with_both_values(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    before = content(tmp_path / "run")
    message = refused(tmp_path / "run", model={"id": "m", "weights": "sha256:bb"}, loss="kl")
    assert "model.weights is 'sha256:aa' there, 'sha256:bb' here" in message
    assert "loss is 'nll' there, 'kl' here" in message
    assert content(tmp_path / "run") == before


def test_the_command_and_the_name_of_the_model_may_differ_in_a_resume(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    changes = {"model": {"id": "elsewhere/m", "weights": "sha256:aa"}, "provenance": {"command": "python"}}
    with RunWriter(tmp_path / "run", manifest(**changes)) as writer:
        assert writer.done.all()


def test_a_run_without_a_finished_row_gives_way_to_another(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", manifest()) as writer:
        writer.begin(SAMPLES)
    with RunWriter(tmp_path / "run", manifest(loss="kl")) as writer:
        assert not writer.begun
    assert json.loads((tmp_path / "run/manifest.json").read_text())["loss"] == "kl"


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    stored = json.loads((tmp_path / "run/manifest.json").read_text())
    (tmp_path / "run/manifest.json").write_text(json.dumps({**stored, "schema": 99}))
    assert f"schema version 99, this eaptk knows {SCHEMA}" in refused(tmp_path / "run")
    with pytest.raises(EaptkError, match="schema version 99"):
        Run.open(tmp_path / "run")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert "holds 'thesis.tex'; choose another folder" in refused(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_of_something_else_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    refused(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": None}, r"manifest.json is damaged: it has no 'graph'; restore it"),
        ({"dataset": None}, r"manifest.json is damaged: it has no 'dataset'; restore it"),
        ({"row_dtype": None}, r"manifest.json is damaged: it has no 'row_dtype'; restore it"),
        ({"dataset": {}}, r"manifest.json is damaged: it has no 'samples'; restore it"),
        ({"dataset": 3}, r"manifest.json is damaged \("),
        ({"dataset": {"samples": "many"}}, r"manifest.json is damaged \(.*'many'"),
        ({"row_dtype": "float99"}, r"manifest.json is damaged \(.*float99"),
        ({"graph": {**GRAPH.to_dict(), "colour": 3}}, r"manifest.json is damaged \(.*'colour'"),
        ({"graph": {"n_layers": 1}}, r"manifest.json is damaged \(.*n_heads"),
        ({"graph": {**GRAPH.to_dict(), "n_layers": 0}}, r"manifest.json is damaged \(.*at least one layer"),
    ],
    ids=str,
)
def test_a_damaged_manifest_is_named_by_readers_and_writers(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_run(tmp_path / "run")
    file = tmp_path / "run/manifest.json"
    stored = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))
    with pytest.raises(EaptkError, match=message):
        Run.open(tmp_path / "run")
    with pytest.raises(EaptkError, match=message), RunWriter(tmp_path / "run", manifest()):
        pass


def test_a_damaged_line_of_answers_is_named(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", manifest()) as writer:
        (tmp_path / "run/answers.jsonl").write_text("[0, [1]]\n[1, 2\n")
        with pytest.raises(EaptkError, match=r"answers\.jsonl is damaged .* delete it"):
            writer.answers()


def test_a_second_writer_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", manifest()):
        assert "another process is writing run" in refused(tmp_path / "run")
    with RunWriter(tmp_path / "run", manifest()):
        pass


@pytest.mark.parametrize("name", ["scores.npy", "done.npy"])
def test_a_truncated_array_is_refused_by_readers_and_writers(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "run")
    data = (tmp_path / "run" / name).read_bytes()
    (tmp_path / "run" / name).write_bytes(data[:-2])
    assert f"{name} is truncated: {len(data) - 2} bytes where {len(data)} are expected" in refused(
        tmp_path / "run"
    )
    with pytest.raises(EaptkError, match=f"{name} is truncated"):
        Run.open(tmp_path / "run")


@pytest.mark.parametrize("name", ["scores.npy", "samples.parquet"])
@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_damaged_file_is_named_when_a_run_is_opened(tmp_path: Path, name: str, damage: str) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    if damage == "garbage":
        (tmp_path / "run" / name).write_bytes(b"garbage" * 30)
    with pytest.raises(EaptkError, match=name):
        Run.open(tmp_path / "run")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EaptkError, match=r"is not a run \(no manifest.json\)"):
        Run.open(tmp_path)


def test_a_run_stopped_before_its_first_row_says_so(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", manifest()):
        pass
    with pytest.raises(EaptkError, match="has no row yet"):
        Run.open(tmp_path / "run")
