"""Runs are listed, verified, repaired and merged: damage is found wherever it is, and a merge is whole or not there."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pyarrow as pa
import pytest
import torch
from checkpoints import make_records, save_checkpoint, write_jsonl
from summaries import GRAPH, HISTOGRAM, make_scores, manifest, samples

from eaptk import runs
from eaptk.cli import main
from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.keep import Keep
from eaptk.metrics import measure
from eaptk.store import Run, RunWriter

KINDS: Mapping[str, Keep] = {
    "rows": Keep(GRAPH),
    "float16": Keep(GRAPH, "float16"),
    "some edges": Keep(GRAPH, columns=np.arange(3, 20)),
    "strongest": Keep(GRAPH, top=5),
    "layer pairs": Keep(GRAPH, layer_pairs=True),
    "statistics": Keep(GRAPH, histogram=HISTOGRAM),
}
N = 9
SCORES = make_scores(N)
LOSS = np.arange(N) / 2


def make_run(path: Path, kind: str = "rows", rows: Sequence[int] = range(N), **changes: Any) -> Path:
    """A complete run of these of the samples; written in another order than theirs."""
    keep, n = KINDS[kind], len(rows)
    facts = {**manifest(n=n, histogram=None), **changes}
    table = samples(N).take(list(rows)).append_column("level", pa.array(list(rows)))
    with RunWriter(path, facts, keep=keep) as writer:
        if not writer.begun:
            writer.begin(table)
        for number, batch in enumerate(np.array_split(np.arange(n)[::-1], 3)):
            if not writer.done[batch].all():
                which = np.asarray(rows)[batch]
                names = [f"q{row}" for row in which]
                kept = keep.of(torch.from_numpy(SCORES[which]), names)
                writer.write(batch.tolist(), kept, LOSS[which])
                writer.close_stretch(number)
        writer.finish()
    return Path(path)


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def damage(path: Path, name: str, row: int) -> None:
    """Change one bit of an array's entry of this row."""
    array = np.load(path / name, mmap_mode="r")
    entry = array[0].nbytes
    flip(path / name, (path / name).stat().st_size - array.nbytes + row * entry + entry // 2)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def verified(path: Path, **options: Any) -> runs.Verification:
    return runs.verify(path, progress=False, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_as_it_was_written_is_intact(tmp_path: Path, kind: str) -> None:
    found = verified(make_run(tmp_path / "run", kind))
    assert found.intact
    assert (found.n_checked, found.rows, found.sums, found.remedy) == (N, (), "", "")


def test_checksums_can_be_checked_without_eaptk(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    for row, stored in enumerate(np.load(path / "checksums.npy")):
        assert stored == zlib.crc32(LOSS[row : row + 1], zlib.crc32(np.load(path / "scores.npy")[row]))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("rows", "scores.npy"),
        ("rows", "checksums.npy"),
        ("float16", "scores.npy"),
        ("some edges", "scores.npy"),
        ("strongest", "scores.npy"),
        ("strongest", "columns.npy"),
        ("layer pairs", "absolute.npy"),
    ],
)
def test_one_bit_that_changed_is_found_and_computed_again(tmp_path: Path, kind: str, name: str) -> None:
    path = make_run(tmp_path / "run", kind)
    before = content(path)
    for row in (2, 7):
        damage(path, name, row)
    found = verified(path)
    assert (found.rows, found.ids, found.repaired) == ((2, 7), ("q2", "q7"), False)
    assert "eaptk runs verify --repair" in found.remedy
    assert Run.open(path).complete, "a look changes nothing"
    assert verified(path, repair=True).repaired
    assert np.flatnonzero(Run.open(path).done == 0).tolist() == [2, 7]
    assert np.isnan(Run.open(path).loss[[2, 7]]).all()
    with pytest.raises(EaptkError, match=r"sample 7 of run .* is not done"):
        Run.open(path).kept([6, 7])
    assert verified(path).intact, "what is not done is not verified"
    make_run(path, kind)
    assert content(path) == before


def test_a_manifest_that_is_a_link_to_nothing_is_a_problem_of_that_run_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/manifest.json").symlink_to("nowhere.json")
    gone, fine = runs.find([tmp_path])
    assert (gone.problem, fine.problem) == ("its manifest.json is a link to nothing", "")


def test_a_row_marked_done_that_was_never_written_is_found(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    expected = np.load(path / "scores.npy")
    for name in ("scores.npy", "checksums.npy"):
        array = np.load(path / name, mmap_mode="r+")
        array[4] = 0
        array.flush()
    assert verified(path, repair=True).ids == ("q4",)
    make_run(path)
    assert np.array_equal(np.load(path / "scores.npy"), expected)


@pytest.mark.parametrize("name", ["moments.npy", "histogram.npy", "checksums.npy"])
def test_statistics_of_a_sample_cannot_be_repaired_in_part_and_the_remedy_is_said(
    tmp_path: Path, name: str
) -> None:
    path = make_run(tmp_path / "run", "statistics", provenance={"command": "eaptk score --out it"})
    damage(path, name, 3)
    before = content(path)
    found = verified(path, repair=True)
    assert (found.ids, found.repaired) == (("q3",), False)
    assert "delete the folder, and repeat the command that made it: eaptk score --out it" in found.remedy
    assert {name: content(path)[name] for name in before} == before


@pytest.mark.parametrize("position", [300, -20, -2], ids=["sums", "done", "checksum"])
def test_sums_that_changed_are_found_and_never_measured(tmp_path: Path, position: int) -> None:
    path = make_run(tmp_path / "run", "statistics")
    flip(path / "pooled.npy", position % (path / "pooled.npy").stat().st_size)
    found = verified(path)
    assert not found.intact
    assert "pooled.npy is damaged: its sums are not those that were written" in found.sums
    with pytest.raises(EaptkError, match=r"pooled\.npy is damaged"):
        measure(Run.open(path))


def test_a_run_that_is_going_on_is_verified_as_far_as_it_is(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", manifest(n=N, histogram=None), keep=KINDS["rows"]) as writer:
        writer.begin(samples(N))
        writer.write([1, 2], SCORES[[1, 2]], LOSS[[1, 2]])
        writer.commit()
        assert verified(tmp_path / "run").n_checked == 2
        with pytest.raises(EaptkError, match="another process is writing run"):
            verified(tmp_path / "run", repair=True)


def repair(path: str) -> None:
    """Target."""
    runs.verify(path, repair=True, progress=False)


def test_killed_at_any_system_call_a_repair_leaves_a_run_that_goes_on_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    whole = content(make_run(tmp_path / "whole"))
    undone = set()
    for call in range(100):
        path = shutil.copytree(tmp_path / "whole", tmp_path / f"killed-{call}")
        damage(path, "scores.npy", 2)
        code, log = processes.run(
            "processes:killed_at_call", call, "test_runs:repair", path, log=tmp_path / "log"
        )
        assert code in (0, -signal.SIGKILL), log
        undone.add(int((Run.open(path).done == 0).sum()))
        repair(str(path))
        make_run(path)
        assert content(path) == whole, f"killed in call {call}"
        if code == 0:
            break
    assert undone == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_run_is_that_of_all_samples(tmp_path: Path, kind: str) -> None:
    """It opens, measures and verifies like any other, with rows in the order given."""
    order = [[4, 5, 6], [0, 1, 2, 3], [7, 8]]
    whole = Run.open(make_run(tmp_path / "whole", kind, [4, 5, 6, 0, 1, 2, 3, 7, 8]))
    parts = [make_run(tmp_path / f"part-{i}", kind, rows) for i, rows in enumerate(order)]
    merged = runs.merge(parts, tmp_path / "merged", progress=False)
    assert merged.complete
    for name in whole.content.arrays:
        assert (merged.path / name.path.name).read_bytes() == name.path.read_bytes()
    assert np.array_equal(merged.loss, whole.loss)
    assert merged.samples.equals(whole.samples.cast(merged.samples.schema))
    assert verified(merged.path).intact
    if kind == "strongest":
        return
    ours, theirs = (measure(run, bins=HISTOGRAM.bins, upper=HISTOGRAM.upper) for run in (merged, whole))
    assert ours.diversity == pytest.approx(theirs.diversity, rel=1e-12)
    np.testing.assert_allclose(ours.strength, theirs.strength, rtol=1e-12)
    assert np.array_equal(ours.sample_histogram, theirs.sample_histogram)


def test_a_merged_run_says_where_it_comes_from(tmp_path: Path) -> None:
    parts = [
        make_run(tmp_path / f"part-{i}", rows=[i], provenance={"command": f"score {i}", "started": "then"})
        for i in range(3)
    ]
    first = runs.merge(parts[:2], tmp_path / "first", progress=False).path
    merged = runs.merge([first, parts[2]], tmp_path / "merged", progress=False)
    sources = merged.manifest["merged"]
    assert [source["path"] for source in sources] == [str(part) for part in parts]
    assert [source["provenance"]["command"] for source in sources] == ["score 0", "score 1", "score 2"]
    assert merged.manifest["dataset"]["samples"] == 3
    damage(merged.path, "scores.npy", 1)
    found = verified(merged.path, repair=True)
    assert not found.repaired
    assert f"verify the runs it was merged from ({parts[0]}, {parts[1]}, {parts[2]})" in found.remedy


def test_fields_that_only_some_samples_have_are_null_for_others(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", rows=[0, 1]), make_run(tmp_path / "two", rows=[2])
    table = Run.open(two).samples.drop_columns(["level"]).append_column("topic", pa.array(["sums"]))
    pa.parquet.write_table(table, two / "samples.parquet")
    merged = runs.merge([one, two], tmp_path / "merged", progress=False).samples
    assert merged["level"].to_pylist() == [0, 1, None]
    assert merged["topic"].to_pylist() == [None, None, "sums"]
    assert merged["loss"].to_pylist() == [0.0, 0.5, 1.0]
    assert merged.column_names[-1] == "loss"


def unlike(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"rows": [0, 1]}, {"rows": [2, 3], **changes}


@pytest.mark.parametrize(
    ("two", "message"),
    [
        (
            unlike(model={"id": "m", "weights": "sha256:bb", "dtype": "float32"}),
            "model.weights is 'sha256:aa' in",
        ),
        (unlike(loss="kl"), "loss is 'nll' in .*one, 'kl' in .*two"),
        (unlike(kind="float16"), "row_dtype is 'float32' in"),
        (unlike(kind="some edges"), "edges"),
        (unlike(kind="strongest"), "top is None in"),
        (unlike(kind="statistics"), "metrics_only"),
        (({"rows": [0, 1]}, {"rows": [3, 1]}), "sample 'q1' is in .*one and in .*two"),
    ],
    ids=["weights", "loss", "row dtype", "edges", "top", "statistics", "samples"],
)
def test_runs_that_do_not_go_together_are_refused_in_one_line(
    tmp_path: Path, two: tuple[dict[str, Any], dict[str, Any]], message: str
) -> None:
    paths = [make_run(tmp_path / name, **options) for name, options in zip(("one", "two"), two, strict=True)]
    with pytest.raises(EaptkError, match=f"these runs cannot be merged: .*{message}") as caught:
        runs.merge(paths, tmp_path / "merged", progress=False)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_rows_of_different_means_are_not_merged(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / str(i), rows=[i]) for i in range(2)]
    for i, path in enumerate(paths):
        (path / "means.safetensors").write_bytes(bytes([i]))
    with pytest.raises(EaptkError, match="ablate to means of different samples"):
        runs.merge(paths, tmp_path / "merged", progress=False)
    for pair in (paths, paths[::-1]):
        (paths[0] / "means.safetensors").unlink(missing_ok=True)
        with pytest.raises(EaptkError, match=r"0/means\.safetensors is missing"):
            runs.merge(pair, tmp_path / "merged", progress=False)


def test_damage_is_not_merged(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "one", rows=[0, 1]), make_run(tmp_path / "two", rows=[2, 3])]
    damage(paths[1], "scores.npy", 1)
    with pytest.raises(
        EaptkError, match=r"two is damaged: sample 'q3' is not as it was written; see `eaptk runs"
    ):
        runs.merge(paths, tmp_path / "merged", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_what_is_not_complete_is_not_merged_and_nothing_is_written_over(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", rows=[0, 1]), make_run(tmp_path / "two", rows=[2, 3])
    with pytest.raises(EaptkError, match="one is there already; choose another folder"):
        runs.merge([one, two], one, progress=False)
    with pytest.raises(EaptkError, match="name at least two"):
        runs.merge([one], tmp_path / "merged", progress=False)
    with pytest.raises(EaptkError, match=r"sample 'q0' is in .*one and in .*one"):
        runs.merge([one, one], tmp_path / "merged", progress=False)
    damage(two, "scores.npy", 0)
    verified(two, repair=True)
    with pytest.raises(EaptkError, match=r"two is not complete \(1 of 2 rows are done\); repeat the command"):
        runs.merge([one, two], tmp_path / "merged", progress=False)


def merge(folder: str) -> None:
    """Target: what ``one`` and ``two`` in a folder make."""
    runs.merge([Path(folder) / "one", Path(folder) / "two"], Path(folder) / "merged", progress=False)


def test_killed_at_every_other_system_call_a_merge_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    make_run(tmp_path / "one", rows=[0, 1, 2])
    make_run(tmp_path / "two", rows=[3, 4])
    for call in range(0, 200, 2):
        code, log = processes.run(
            "processes:killed_at_call", call, "test_runs:merge", tmp_path, log=tmp_path / "log"
        )
        assert code in (0, -signal.SIGKILL), log
        found = {found.path.name for found in runs.find([tmp_path])}
        if (tmp_path / "merged").exists():
            assert verified(tmp_path / "merged").n_checked == 5, f"killed in call {call}"
            break
        assert found == {"one", "two"}
    assert call > 20
    assert not (tmp_path / ".merged.merging").exists()


def test_a_disk_that_is_full_ends_a_merge_in_one_line_and_takes_nothing(tmp_path: Path) -> None:
    assert shutil.which("unshare"), "this test mounts a disk of its own: install unshare (util-linux)"
    paths = [make_run(tmp_path / "one", rows=[0, 1, 2]), make_run(tmp_path / "two", rows=[3, 4])]
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=16k tmpfs "$1"; shift; "$@" || code=$?; ls -A "$0"; exit $code'
    disk = str(tmp_path / "disk")
    command = [sys.executable, "-m", "eaptk", "runs", "merge", *map(str, paths), "--out", f"{disk}/merged"]
    result = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-euc", script, disk, disk, *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("eaptk: error: ")
    assert "No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == "", "something is left on the disk"


def test_runs_are_found_at_any_depth_and_those_that_cannot_be_opened_say_why(tmp_path: Path) -> None:
    make_run(tmp_path / "a/run")
    make_run(
        tmp_path / "a/b/kept",
        "strongest",
        provenance={"command": "c", "started": "2026-01-02T03:04:05+00:00"},
    )
    old = make_run(tmp_path / "old")
    (old / "manifest.json").write_text(
        json.dumps({**json.loads((old / "manifest.json").read_text()), "schema": 1})
    )
    with RunWriter(tmp_path / "begun", manifest(n=N, histogram=None)):
        pass
    found = {each.path.relative_to(tmp_path).as_posix(): each for each in runs.find([tmp_path])}
    assert list(found) == ["a/b/kept", "a/run", "begun", "old"]
    assert (found["a/run"].n_done, found["a/run"].n_samples) == (N, N)
    assert "5 strongest" in found["a/b/kept"].kept
    assert "schema version 1, this eaptk knows 2" in found["old"].problem
    assert (found["begun"].n_done, found["begun"].n_samples) == (0, N)
    assert found["a/run"].n_bytes >= SCORES.nbytes
    with pytest.raises(EaptkError, match="there is no folder"):
        runs.find([tmp_path / "none"])


def test_runs_that_are_going_on_are_listed_whatever_files_come_and_go(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            for number in range(20):
                (tmp_path / f"run/.{number}.tmp").touch()
            for number in range(20):
                (tmp_path / f"run/.{number}.tmp").unlink()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(50):
            assert [each.n_done for each in runs.find([tmp_path])] == [N]
    finally:
        ended.set()
        thread.join()


def command(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_the_commands_list_verify_repair_and_merge(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of runs that `eaptk score` made; repaired, the same command ends with the same bytes."""
    monkeypatch.setenv("COLUMNS", "160")
    model, records = save_checkpoint(tmp_path / "model"), list(make_records(20))
    score = ["score", "--model", model, "--tokens-per-batch", "40"]
    paths = [tmp_path / "runs/one", tmp_path / "runs/two"]
    scores = []
    for path, part in zip(paths, (records[:12], records[12:]), strict=True):
        data = write_jsonl(tmp_path / f"{path.name}.jsonl", part)
        scores.append([*score, "--data", data, "--out", path])
        assert command(*scores[-1]) == 0
    capfd.readouterr()
    assert command("runs", "list", tmp_path / "runs") == 0
    shown = capfd.readouterr().out
    assert "12/12" in shown
    assert "8/8" in shown
    assert command("runs", "verify", *paths) == 0
    assert capfd.readouterr().out.count("intact") == 2
    before = content(paths[0])
    damage(paths[0], "scores.npy", 3)
    assert command("runs", "verify", *paths) == 1
    shown = capfd.readouterr().out
    assert "one: 1 damaged (12 rows" in shown
    assert records[3].get("id", "3") in shown
    assert "two: intact" in shown
    assert command("runs", "verify", "--repair", paths[0]) == 1
    assert "they are marked not done: repeat the command that made it" in capfd.readouterr().out
    assert command(*scores[0]) == 0
    assert content(paths[0]) == before
    assert command("runs", "merge", *paths, "--out", tmp_path / "all") == 0
    assert "20 samples of 2 runs" in capfd.readouterr().out
    assert command("runs", "verify", tmp_path / "all") == 0
    assert command("inspect", tmp_path / "all") == 0
    assert command("metrics", tmp_path / "all") == 0
    assert command("runs", "merge", *paths, "--out", tmp_path / "all") == 1
    assert "is there already" in capfd.readouterr().err


def measure_with_little_memory(path: str) -> None:
    """Target: all of a run is measured and verified by a process that may not take memory for a quarter of it."""
    run = Run.open(path)
    in_use = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limit = in_use + run.scores.nbytes // 4
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with pytest.raises(MemoryError):
        np.array(run.scores)
    found = measure(run, bins=10, upper=1.0)
    assert found.n_samples == run.n_samples
    assert np.isfinite(found.strength).all()
    assert len(run.edge_means().absolute) == run.graph.n_edges
    assert runs.verify(path, progress=False).n_checked == run.n_samples


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_larger_than_memory_is_measured_and_verified(tmp_path: Path, dtype: str) -> None:
    """Of 400 MB, most of which was never written: zeros that take no time."""
    graph = Graph(n_layers=32, n_heads=16, n_kv_heads=16, granularity="head")
    n = 400_000_000 // graph.n_edges // np.dtype(dtype).itemsize
    rows = np.random.default_rng(0).normal(size=(2, graph.n_edges)).astype(dtype)
    with RunWriter(tmp_path / "run", manifest(graph, n, None) | {"row_dtype": dtype}) as writer:
        writer.begin(samples(n))
        writer.write(range(2), rows, np.zeros(2))
        writer.commit()
        for name, value in (("done.npy", 1), ("checksums.npy", zlib.crc32(bytes(rows[0].nbytes + 8)))):
            array = np.load(tmp_path / "run" / name, mmap_mode="r+")
            array[2:] = value
            array.flush()
        writer.finish()
    code, log = processes.run("test_runs:measure_with_little_memory", tmp_path / "run", log=tmp_path / "log")
    assert code == 0, log
