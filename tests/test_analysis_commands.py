"""`eaptk metrics` and `eaptk compare` on runs that `eaptk score` wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from checkpoints import make_records, save_checkpoint, write_jsonl

from eaptk.cli import main
from eaptk.comparison import compare
from eaptk.metrics import METRICS, measure
from eaptk.run import score
from eaptk.store import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same ten samples on two random models, and the second one's at head level."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_jsonl(folder / "data.jsonl", make_records(10))
    paths = []
    for name, seed, granularity in (("base", 0, "block"), ("tuned", 1, "block"), ("heads", 1, "head")):
        checkpoint = save_checkpoint(folder / f"model-{name}", seed)
        score(str(checkpoint), str(data), folder / name, granularity=granularity, progress=False)
        paths.append(folder / name)
    return paths


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.mark.parametrize("which", [0, 2])
def test_metrics_prints_what_measure_finds_and_writes_it(
    runs: list[Path], which: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("metrics", runs[which], "--dense", "--bins", 20, "--json", tmp_path / "m.json") == 0
    printed = capfd.readouterr().out
    kept = json.loads((tmp_path / "m.json").read_text())
    for convention in ("real", "dense"):
        found = measure(Run.open(runs[which]), dense=convention == "dense", bins=20)
        assert kept[convention] == found.to_dict()
        for metric in METRICS:
            assert f"{getattr(found, metric):.6g}" in printed


def test_metrics_draws_the_run(runs: list[Path], tmp_path: Path) -> None:
    assert run("metrics", runs[0], "--range", "0.5", "--picture", tmp_path / "base") == 0
    assert (tmp_path / "base.png").stat().st_size > 10_000
    assert (tmp_path / "base.svg").read_text().startswith("<?xml")


def test_metrics_of_a_run_that_stopped_are_of_its_finished_rows(
    runs: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    for file in runs[0].iterdir():
        (stopped / file.name).write_bytes(file.read_bytes())
    done = np.load(stopped / "done.npy")
    done[[2, 7]] = 0
    np.save(stopped / "done.npy", done)
    assert run("metrics", stopped) == 0
    assert "8 samples (2 not done)" in " ".join(capfd.readouterr().out.split())


def test_compare_prints_and_writes_what_compare_finds(
    runs: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    assert run("compare", *runs[:2], "--out", out, "--resamples", 500, "--seed", 3) == 0
    printed = capfd.readouterr().out
    written = {path.name for path in out.iterdir()}
    assert written == {f"comparison.{kind}" for kind in ("csv", "json", "png", "svg")} | {"edges.parquet"}
    for name in written:
        assert name in printed.replace("\n", "")
    frame = pd.read_csv(out / "comparison.csv")
    assert frame["metric"].tolist() == [*METRICS, "loss"]
    mean_losses = [Run.open(path).loss.mean() for path in runs[:2]]
    np.testing.assert_allclose(frame[["value_baseline", "value"]].iloc[-1], mean_losses)
    assert json.loads((out / "comparison.json").read_text())["resampling"]["seed"] == 3


def test_compare_can_control_for_the_loss(runs: list[Path], tmp_path: Path) -> None:
    arguments = ("--out", tmp_path, "--resamples", 200, "--control-loss")
    assert run("compare", *runs[:2], *arguments) == 0
    metrics = pd.read_csv(tmp_path / "comparison.csv")["metric"].tolist()
    assert metrics[:2] == ["intensity", "intensity at equal loss"]


def test_a_run_is_called_what_its_folder_is_called(
    runs: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs[0], tmp_path / "[red]x")
    monkeypatch.chdir(tmp_path)
    assert run("metrics", "[red]x") == 0
    assert "[red]x: 10 samples" in capfd.readouterr().out


def test_two_datasets_that_only_share_line_numbers_are_not_compared(
    runs: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        records = [{"prompt": r["prompt"], "answer": r["answer"]} for r in make_records(4, seed)]
        data = write_jsonl(tmp_path / f"{name}.jsonl", records)
        score(str(runs[0].parent / "model-base"), str(data), tmp_path / name, progress=False)
    assert run("compare", tmp_path / "one", tmp_path / "two") == 1
    assert "sample '1' has one prompt in" in capfd.readouterr().err


def test_runs_pair_by_the_ids_of_their_samples(runs: list[Path]) -> None:
    found = compare([Run.open(path) for path in runs[:2]])
    assert found.sample_ids == tuple(Run.open(runs[0]).samples["id"].to_pylist())
    assert found.names == ("base", "tuned")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "{base}", "{heads}"], "runs differ in graph"),
        (["compare", "{base}"], "a comparison needs at least two runs; got 1"),
        (["compare", "{base}", "{base}"], "is given twice"),
        (["compare", "{base}", "{tuned}", "--confidence", "2"], "confidence is 2.0"),
        (["compare", "{base}", "nowhere"], "nowhere is not a run"),
        (["metrics", "{base}", "--range", "0"], "range ends at 0.0"),
        (["metrics", "{base}", "--json", "{base}/none/x.json"], "cannot write"),
        (["metrics", "{base}", "--picture", "{base}/done.npy/x"], "cannot write the picture"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(
    runs: list[Path], arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {path.name: path for path in runs}
    assert run(*(argument.format(**places) for argument in arguments)) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
