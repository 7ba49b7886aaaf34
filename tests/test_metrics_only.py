"""Runs that keep statistics in place of rows: the same metrics, the same safety, and no answer where they have none."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import numpy as np
import processes
import pytest
import torch
from checkpoints import make_model, make_records, make_tokenizer, save_checkpoint, write_jsonl
from runs import FakeRun
from summaries import (
    BATCHES,
    GRAPH,
    HISTOGRAM,
    LOSS,
    SCORES,
    N,
    make_run,
    make_scores,
    manifest,
    samples,
    summary,
    write_run,
)

import eaptk
from eaptk.cli import main
from eaptk.content import Summaries
from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.metrics import Metrics, measure
from eaptk.pooled import Pooled
from eaptk.statistics import Histogram, summarise, summarise_in_torch
from eaptk.store import Run, RunWriter

GRAPHS = {
    "block": GRAPH,
    "head-merged": Graph(2, 4, 2, granularity="head", qkv="merged"),
    "parallel": Graph(3, 2, 2, parallel=True),
}


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def assert_measured_alike(found: Metrics, expected: Metrics) -> None:
    """Counts exactly and all else to 1e-9; the correlations of single samples are what only rows can give."""
    assert np.isnan(found.sample_correlation).all()
    for name in (field.name for field in fields(Metrics) if field.name != "sample_correlation"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if np.issubdtype(np.asarray(theirs).dtype, np.floating):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, err_msg=name)
        else:
            assert np.array_equal(ours, theirs), name


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("graph", GRAPHS)
def test_metrics_are_those_of_the_rows(tmp_path: Path, graph: str, dense: bool) -> None:
    """Constant samples and scores above the range included."""
    scores = make_scores(graph=GRAPHS[graph])
    expected = measure(
        FakeRun(scores, graph=GRAPHS[graph]), bins=HISTOGRAM.bins, upper=HISTOGRAM.upper, dense=dense
    )
    assert expected.n_constant == (1 if dense else 2)
    assert expected.n_above > 0
    assert_measured_alike(measure(make_run(tmp_path / "run", scores, GRAPHS[graph]), dense=dense), expected)


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "head"}, {"ablation": "patching", "loss": "kl"}], ids=str
)
def test_a_model_scored_with_and_without_rows_measures_alike(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"tokens_per_batch": 40, "tokenizer": make_tokenizer(), "progress": False} | options
    records = make_records(12)
    rows = eaptk.score(make_model(), records, tmp_path / "rows", **options)
    upper = float(np.abs(rows.scores).max()) * 0.7
    kept = eaptk.score(
        make_model(), records, tmp_path / "kept", metrics_only=True, bins=30, upper=upper, **options
    )
    assert np.array_equal(kept.loss, rows.loss)
    for dense in (False, True):
        assert_measured_alike(measure(kept, dense=dense), measure(rows, bins=30, upper=upper, dense=dense))
    for found, expected in zip(kept.edge_means(), rows.edge_means(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_device_summarises_rows_as_the_host_does(graph: str) -> None:
    scores = torch.from_numpy(make_scores(graph=GRAPHS[graph]))
    found = summarise_in_torch(scores, GRAPHS[graph], HISTOGRAM)
    expected = summarise(scores, GRAPHS[graph], HISTOGRAM)
    assert np.array_equal(found.counts, expected.counts)
    np.testing.assert_allclose(found.moments, expected.moments, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-9, atol=1e-15)


def test_a_kernel_that_was_named_and_cannot_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAPTK_BACKEND", "triton")
    monkeypatch.setattr("eaptk.kernels.trial.find_spec", lambda name: None)
    monkeypatch.setattr("eaptk.kernels.trial.VERDICTS", {})
    graph = GRAPHS[next(iter(GRAPHS))]
    with pytest.raises(EaptkError, match=r"triton is not installed .*; .* unset EAPTK_BACKEND"):
        summarise_in_torch(torch.from_numpy(make_scores(graph=graph)), graph, HISTOGRAM)


def test_the_files_need_no_eaptk(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", SCORES).path
    names = {
        "checksums.npy",
        "edges.parquet",
        "histogram.npy",
        "manifest.json",
        "moments.npy",
        "pooled.npy",
        "samples.parquet",
    }
    assert {file.name for file in path.glob("[!.]*")} == names
    w = SCORES.astype(np.float64)
    np.testing.assert_allclose(np.load(path / "moments.npy")[:, 0], np.abs(w).sum(1), rtol=1e-12)
    pooled = np.load(path / "pooled.npy")[0]
    np.testing.assert_allclose(pooled["sums"][0], np.abs(w).sum(0), rtol=1e-12)
    assert pooled["done"].tolist() == [1] * N
    counts = [np.histogram(np.abs(row), HISTOGRAM.bins, (0, HISTOGRAM.upper))[0] for row in w]
    assert np.array_equal(np.load(path / "histogram.npy"), counts)


def test_the_size_of_a_run_grows_by_the_same_for_any_graph(tmp_path: Path) -> None:
    def size(graph: Graph, n: int) -> int:
        path = make_run(tmp_path / f"{graph.n_edges}-{n}", make_scores(n, graph), graph).path
        return sum((path / f"{name}.npy").stat().st_size for name in ("moments", "histogram", "pooled"))

    growth = {size(graph, 4) - size(graph, 3) for graph in GRAPHS.values()}
    assert growth == {7 * 8 + 4 * HISTOGRAM.bins + 1}


def test_a_growing_run_is_measured_by_its_finished_samples(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", manifest()) as writer:
        writer.begin(samples())
        for number, rows in enumerate(BATCHES[:2]):
            writer.write(rows, summary(SCORES[rows]), LOSS[rows])
            writer.close_stretch(number)
        writer.write(BATCHES[2], summary(SCORES[BATCHES[2]]), LOSS[BATCHES[2]])
        found = measure(Run.open(tmp_path / "run"))
    assert found.n_unfinished == N - 4
    expected = measure(FakeRun(SCORES[:4], graph=GRAPH), bins=HISTOGRAM.bins, upper=HISTOGRAM.upper)
    np.testing.assert_allclose(found.strength, expected.strength, rtol=1e-9)
    assert found.diversity == pytest.approx(expected.diversity, rel=1e-9)
    assert np.array_equal(found.sample_histogram, expected.sample_histogram)


def test_sums_may_become_one_file_while_they_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunWriter(tmp_path / "run", manifest()) as writer:
        writer.begin(samples())
        for number, rows in enumerate(BATCHES):
            writer.write(rows, summary(SCORES[rows]), LOSS[rows])
            writer.close_stretch(number)
        run = Run.open(tmp_path / "run")
        look = Pooled._map

        def ended_after(pooled: Pooled, path: Path) -> Any:
            found = look(pooled, path)
            monkeypatch.undo()
            writer.finish()
            return found

        monkeypatch.setattr(Pooled, "_map", ended_after)
        assert run.done.all()


def assert_sums_are_those_of_finished_samples(path: Path) -> int:
    kept = Run.open(path).statistics
    assert kept is not None
    finished = [rows for rows in BATCHES if kept.done[rows].all()]
    assert kept.done.sum() == sum(map(len, finished)), "part of a batch is done"
    expected = sum((summary(SCORES[rows]).sums for rows in finished), np.zeros_like(kept.sums))
    assert np.array_equal(kept.sums, expected)
    for rows in finished:
        assert np.array_equal(kept.moments[rows], summary(SCORES[rows]).moments)
        assert np.array_equal(kept.counts[rows], summary(SCORES[rows]).counts)
        assert np.array_equal(Run.open(path).loss[rows], LOSS[rows])
    return len(finished)


def test_killed_at_any_system_call_no_sample_counts_twice_or_is_lost(tmp_path: Path) -> None:
    write_run(tmp_path / "whole")
    whole, stages = content(tmp_path / "whole"), set()
    for call in range(1000):
        path = tmp_path / f"killed-{call}"
        code, log = processes.run(
            "processes:killed_at_call", call, "summaries:write_run", path, log=tmp_path / "log"
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL, log
        if (path / "pooled.npy").exists():
            stages.add(assert_sums_are_those_of_finished_samples(path))
        write_run(path)
        assert content(path) == whole, f"killed in call {call}"
        shutil.rmtree(path)
    assert stages == {0, 1, 2, 3}, "some stage of the run was never killed"


def test_interrupted_at_any_line_no_sample_counts_twice_or_is_lost(tmp_path: Path) -> None:
    """Ctrl-C comes between any two lines; what was written by then is committed on the way out."""
    write_run(tmp_path / "whole")
    whole, stages = content(tmp_path / "whole"), set()
    for number in range(10_000):
        path = tmp_path / f"interrupted-{number}"
        if not interrupted(number, path):
            break
        if (path / "pooled.npy").exists():
            stages.add(assert_sums_are_those_of_finished_samples(path))
        write_run(path)
        assert content(path) == whole, f"interrupted at line {number}"
    assert stages == {0, 1, 2, 3}


def interrupted(number: int, path: Path) -> bool:
    """Whether writing a run came to the line of that number in `Summaries`, where it is interrupted."""
    left = number
    methods = [method.__code__ for method in vars(Summaries).values() if isinstance(method, FunctionType)]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code not in methods:
            return None
        if event == "line":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        write_run(path)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_a_full_disk_loses_no_finished_sample(tmp_path: Path) -> None:
    assert shutil.which("unshare"), "this test mounts a disk of its own: install unshare (util-linux)"
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=64k tmpfs "$1"; "$2" "$3" "$1/run"; cp -r "$1/run" "$4"'
    helper = Path(__file__).with_name("summaries.py")
    arguments = [tmp_path / "disk", sys.executable, helper, tmp_path / "run"]
    result = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-euc", script, "sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    error, done = result.stdout.splitlines()
    assert "No space left on device; free some space and repeat the command, finished rows are kept" in error
    assert int(done) == len(BATCHES[0])
    write_run(tmp_path / "whole")
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def test_the_command_killed_again_and_again_ends_with_the_same_bytes(
    checkpoint: Path, tmp_path: Path
) -> None:
    n_samples, out = 100, tmp_path / "run"
    data = write_jsonl(tmp_path / "data.jsonl", make_records(n_samples))

    def command(out: Path) -> list[str]:
        where = ["--model", str(checkpoint), "--data", str(data), "--out", str(out)]
        how = ["--loss", "self-nll", "--max-new-tokens", "3", "--tokens-per-batch", "24"]
        return ["score", *where, *how, "--metrics-only", "--range", "0.5", "--bins", "40"]

    def n_done() -> int:
        return int(Run.open(out).done.sum()) if (out / "pooled.npy").exists() else 0

    code, log = processes.run("processes:eaptk", *command(tmp_path / "whole"), log=tmp_path / "log")
    assert code == 0, log
    killed_after = []
    while n_done() < n_samples:
        before = n_done()
        process = processes.start("processes:eaptk", *command(out), log=tmp_path / "log")
        deadline = time.monotonic() + 300
        if len(killed_after) < 4:
            while n_done() == before:
                assert time.monotonic() < deadline, process.log.read_text()
                time.sleep(0.002)
            process.kill()
            killed_after.append(n_done())
        process.wait()
    assert len([n for n in killed_after if n < n_samples]) >= 2, "no kill came in time"
    assert processes.run("processes:eaptk", *command(out), log=tmp_path / "log")[0] == 0
    for name in ("moments.npy", "histogram.npy", "pooled.npy", "samples.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics_only": True}, "metrics only needs a range, as rows that are not kept"),
        ({"metrics_only": True, "upper": 0.0}, "the histogram's range ends at 0.0"),
        ({"metrics_only": True, "upper": float("nan")}, "the histogram's range ends at nan"),
        ({"metrics_only": True, "upper": 1.0, "bins": 0}, "bins is 0; it must lie between 1 and 65536"),
        ({"metrics_only": True, "upper": 1.0, "row_dtype": "float16"}, "row_dtype 'float16' is for rows"),
        ({"upper": 1.0}, "bins and range are for a run of metrics only"),
        ({"bins": 50}, "bins and range are for a run of metrics only"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EaptkError, match=message):
        eaptk.score(
            make_model(),
            make_records(3),
            tmp_path / "run",
            tokenizer=make_tokenizer(),
            progress=False,
            **options,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("histogram", "shown"),
    [
        (Histogram(30, HISTOGRAM.upper), "metrics_only.bins is 20 there, 30 here"),
        (Histogram(20, 7.0), f"metrics_only.upper is {HISTOGRAM.upper} there, 7.0 here"),
        (None, "metrics_only.bins is 20 there, None here"),
    ],
    ids=str,
)
def test_a_run_of_other_statistics_or_of_rows_is_refused_and_left_alone(
    tmp_path: Path, histogram: Histogram | None, shown: str
) -> None:
    path = make_run(tmp_path / "run", SCORES).path
    before = content(path)
    with pytest.raises(EaptkError, match="holds finished rows of another run") as caught:
        make_run(path, SCORES, histogram=histogram)
    assert shown in str(caught.value)
    assert content(path) == before


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        RunWriter(tmp_path / "run", manifest()),
        pytest.raises(EaptkError, match="another process is writing"),
    ):
        write_run(tmp_path / "run")


@pytest.mark.parametrize("name", ["moments.npy", "histogram.npy", "pooled.npy"])
def test_a_truncated_file_is_refused_by_readers_and_writers(tmp_path: Path, name: str) -> None:
    path = make_run(tmp_path / "run", SCORES).path
    (path / name).write_bytes((path / name).read_bytes()[:-2])
    for use in (Run.open, write_run):
        with pytest.raises(EaptkError, match=f"{name} is truncated"):
            use(path)


@pytest.mark.parametrize("rows", [[2, 0], [0]], ids=["a batch again", "one of its samples"])
def test_a_sample_cannot_be_added_twice(tmp_path: Path, rows: list[int]) -> None:
    with RunWriter(tmp_path / "run", manifest()) as writer:
        writer.begin(samples())
        writer.write([2, 0], summary(SCORES[[2, 0]]), LOSS[[2, 0]])
        with pytest.raises(ValueError, match="cannot take"):
            writer.write(rows, summary(SCORES[rows]), LOSS[rows])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 21}, "only counts in 20 bins on .* cannot become 21 on"),
        ({"upper": 9.0}, r"cannot become 20 on \[0, 9.0\]; score it again with those"),
        ({"columns": [1, 2]}, "keeps no rows, so no part of its edges can be measured"),
    ],
)
def test_what_statistics_cannot_answer_is_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    run = make_run(tmp_path / "run", SCORES)
    with pytest.raises(EaptkError, match=message):
        measure(run, **arguments)
    with pytest.raises(EaptkError, match="keeps no rows, only statistics for metrics"):
        _ = run.scores


def test_of_some_samples_only_what_each_has_alone_is_measured(tmp_path: Path) -> None:
    run, some = make_run(tmp_path / "run", SCORES), [1, 2, 4]
    found = measure(run, rows=some)
    expected = measure(FakeRun(SCORES, graph=GRAPH), rows=some, bins=HISTOGRAM.bins, upper=HISTOGRAM.upper)
    for name in ("intensity", "complexity", "kurtosis"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9)
    assert (found.diversity, found.output_entropy) == (None, None)
    assert np.isnan(found.strength).all()
    # Those left out here do not vary, and the diversity never counts them.
    varying = measure(run, rows=np.ptp(SCORES, axis=1) > 0)
    assert varying.diversity == pytest.approx(measure(run).diversity, rel=1e-12)
    assert np.isnan(varying.strength).all()


def run_command(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_every_command_takes_a_run_of_metrics_only(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    data = write_jsonl(tmp_path / "data.jsonl", make_records(10))
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        options = ["--metrics-only", "--range", "0.5", "--bins", "30"]
        assert run_command("score", "--model", checkpoint, "--data", data, "--out", path, *options) == 0
    assert json.loads((paths[0] / "manifest.json").read_text())["metrics_only"] == {"bins": 30, "upper": 0.5}
    assert run_command("inspect", paths[0], "--top", 2) == 0
    shown = capfd.readouterr().out
    assert "10 of 10 done, metrics only: 30 bins on [0, 0.5]" in shown
    strongest = int(np.argmax(Run.open(paths[0]).edge_means()[0]))
    assert Run.open(paths[0]).graph.edge_name(strongest) in shown
    assert run_command("metrics", paths[0], "--dense", "--picture", tmp_path / "picture") == 0
    shown = capfd.readouterr().out
    for dense in (False, True):
        assert f"{measure(Run.open(paths[0]), dense=dense).diversity:.6g}" in shown
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert run_command("compare", *paths, "--out", tmp_path / "comparison", "--resamples", 200) == 0
    assert "kept no rows: diversity has neither interval" in " ".join(capfd.readouterr().out.split())
    assert (tmp_path / "comparison/comparison.png").stat().st_size > 10_000
    assert run_command("metrics", paths[0], "--bins", 10) == 1
    error = capfd.readouterr().err
    assert "cannot become 10 on [0, 0.5]" in error
    assert error.count("\n") == 1
