"""`score` keeps of a model's rows what it is asked to keep, and nothing else of the run changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_model, make_records, make_tokenizer, save_checkpoint, write_jsonl

import eaptk
from eaptk import EaptkError, Run
from eaptk.cli import main
from eaptk.keep import layer_pair

RECORDS = make_records(6)
PATTERN = "*->m*,input->*"


def score(out: Path, **options: Any) -> Run:
    given = {"tokens_per_batch": 40, "tokenizer": make_tokenizer(), "progress": False} | options
    return eaptk.score(make_model(), RECORDS, out, granularity="head", **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return score(tmp_path_factory.mktemp("whole") / "run")


def test_some_edges_have_the_bytes_of_whole_rows(whole: Run, tmp_path: Path) -> None:
    run = score(tmp_path / "run", edges=PATTERN)
    source = np.array([node.name for node in run.graph.sources])[run.graph.edge_source]
    destination = np.array([node.name for node in run.graph.destinations])[run.graph.edge_destination]
    expected = np.flatnonzero((source == "input") | np.char.startswith(destination, "m"))
    np.testing.assert_array_equal(run.columns, expected)
    np.testing.assert_array_equal(run.scores, whole.scores[:, expected])
    np.testing.assert_array_equal(run.loss, whole.loss)


def test_a_second_run_of_a_pilots_strongest_edges(whole: Run, tmp_path: Path) -> None:
    columns = eaptk.strongest(whole, 9)
    for number, edges in enumerate((columns, f"{whole.path}:9")):
        run = score(tmp_path / str(number), edges=edges)
        np.testing.assert_array_equal(run.scores, whole.scores[:, columns])
        np.testing.assert_allclose(
            eaptk.measure(run).intensity, eaptk.measure(whole, columns=columns).intensity
        )


def test_the_strongest_edges_of_each_sample(whole: Run, tmp_path: Path) -> None:
    run = score(tmp_path / "run", top=6)
    expected = np.argsort(-np.abs(whole.scores), axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(run.top_columns, expected)
    np.testing.assert_array_equal(run.scores, np.take_along_axis(np.array(whole.scores), expected, 1))


def test_sums_over_pairs_of_layers(whole: Run, tmp_path: Path) -> None:
    run = score(tmp_path / "run", layer_pairs=True)
    pair, rows = layer_pair(whole.graph), whole.scores.astype(np.float64)
    for found, values in ((run, rows), (run.absolute(), np.abs(rows))):
        sums = [np.bincount(pair, row, minlength=run.graph.n_edges) for row in values]
        np.testing.assert_allclose(found.scores, sums, rtol=1e-6, atol=1e-9)


def test_statistics_of_some_edges(whole: Run, tmp_path: Path) -> None:
    run = score(tmp_path / "run", edges=PATTERN, metrics_only=True, upper=1.0)
    found = eaptk.measure(run)
    expected = eaptk.measure(whole, columns=run.columns, bins=100, upper=1.0)
    for metric in ("intensity", "complexity", "kurtosis", "diversity", "output_entropy"):
        assert getattr(found, metric) == pytest.approx(getattr(expected, metric), rel=1e-9), metric


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edges": "m0->*", "top": 6}, "edges.count is None there"),
        ({"top": 7}, "top is 6 there, 7 here"),
        ({}, "top is 6 there, None here"),
    ],
    ids=["edges", "top", "all"],
)
def test_a_resume_that_keeps_something_else_is_refused_with_both(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    score(tmp_path / "run", top=6)
    with pytest.raises(EaptkError, match=message):
        score(tmp_path / "run", **options)


def test_edges_that_do_not_exist_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(EaptkError, match="no edge is called"):
        score(tmp_path / "run", edges="m9->m0")
    assert not (tmp_path / "run").exists()


def command(*arguments: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--edges", "*->m*", "--row-dtype", "float16"], "float16 of"),
        (["--top", "4", "--edges", "*->m*"], "the 4 strongest of"),
        (["--layer-pairs"], "pairs of layers, float32"),
    ],
    ids=["edges", "top", "pairs"],
)
def test_the_commands_from_score_to_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], kept: str
) -> None:
    model = save_checkpoint(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    out = tmp_path / "run"
    command("score", "--model", model, "--data", data, "--out", out, *options)
    assert kept in capsys.readouterr().out
    command("inspect", out)
    assert kept in " ".join(capsys.readouterr().out.split())
    command("metrics", out, "--json", tmp_path / "metrics.json", "--picture", tmp_path / "strength")
    assert json.loads((tmp_path / "metrics.json").read_text())["real"]["n_samples"] == len(RECORDS)
    assert (tmp_path / "strength.png").exists()
