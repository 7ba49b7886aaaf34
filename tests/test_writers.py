"""Several processes write one run: disjoint rows, in any order, to the same bytes; and no others beside them."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from summaries import GRAPH, HISTOGRAM, make_scores, manifest, samples

from eaptk.errors import EaptkError
from eaptk.pooled import Pooled
from eaptk.statistics import summarise
from eaptk.store import Run, RunWriter

N = 13
SCORES = make_scores(N)
LOSS = np.arange(N) / 2
#: Stretches of batches of rows, as a plan has them.
STRETCHES = [[[12, 0], [3]], [[1, 11], [2]], [[5, 4]], [[7], [6]], [[8, 10]], [[9]]]
KINDS = {"rows": None, "statistics": HISTOGRAM}


def open_writer(path: Path | str, kind: str, **options: Any) -> RunWriter:
    return RunWriter(path, manifest(n=N, histogram=KINDS[kind]), **options)


def write_stretch(writer: RunWriter, number: int, kind: str) -> None:
    for rows in STRETCHES[number]:
        kept = SCORES[rows]
        if kind == "statistics":
            writer.write(rows, summarise(torch.from_numpy(kept), GRAPH, HISTOGRAM), LOSS[rows])
        else:
            writer.write(rows, kept, LOSS[rows])
    writer.close_stretch(number)


def left(writer: RunWriter) -> list[int]:
    done = writer.done
    return [n for n, stretch in enumerate(STRETCHES) if not all(done[rows].all() for rows in stretch)]


def write_run(path: Path | str, kind: str) -> Path:
    """As one process does, from where it was left."""
    with open_writer(path, kind) as writer:
        if not writer.begun:
            writer.begin(samples(N))
        for number in left(writer):
            write_stretch(writer, number, kind)
        writer.finish()
    return Path(path)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_whoever_wrote_which_stretch_and_when_the_bytes_are_those_of_one_process(
    tmp_path: Path, kind: str, seed: int
) -> None:
    expected = content(write_run(tmp_path / "alone", kind))
    order = random.Random(seed).sample(range(len(STRETCHES)), len(STRETCHES))
    path = tmp_path / "team"
    with open_writer(path, kind) as lead, open_writer(path, kind, lead=False, rank=1) as other:
        lead.begin(samples(N))
        for i, number in enumerate(order):
            write_stretch((lead, other)[i % 3 > 0], number, kind)
        other.commit()
        lead.finish()
    assert content(path) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_process_of_several_had_finished_when_all_were_killed_is_kept(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "run"
    with open_writer(path, kind) as lead, open_writer(path, kind, lead=False) as other:
        lead.begin(samples(N))
        for number in (1, 2, 4):
            write_stretch(other, number, kind)
        other.commit()
        write_stretch(lead, 0, kind)
        shutil.copytree(path, tmp_path / "killed")
    with open_writer(tmp_path / "killed", kind) as writer:
        assert {3, 5} <= set(left(writer)) <= {0, 3, 5}
    write_run(tmp_path / "killed", kind)
    assert content(tmp_path / "killed") == content(write_run(tmp_path / "alone", kind))


def test_sums_wait_for_others_in_few_files_though_an_early_stretch_is_missing(tmp_path: Path) -> None:
    pooled, rng, n = Pooled(tmp_path, 4, 3, 100), np.random.default_rng(0), 100
    sums = rng.normal(size=(n, 4, 3))
    pooled.begin()
    for number in range(1, n):
        pooled.add(number, [number], sums[number])
        assert len(list(tmp_path.glob("pooled-*"))) <= 12
    assert pooled.done.sum() == n - 1
    np.testing.assert_allclose(pooled.read()[0], sums[1:].sum(0), rtol=1e-12)
    pooled.add(0, [0], sums[0])
    pooled.fold()
    assert [file.name for file in tmp_path.iterdir()] == ["pooled.npy"]
    np.testing.assert_allclose(pooled.read()[0], sums.sum(0), rtol=1e-12)


@pytest.mark.parametrize("row", [3, 50], ids=["sample", "stretch"])
def test_a_stretch_or_sample_that_is_in_the_sums_is_refused(tmp_path: Path, row: int) -> None:
    pooled = Pooled(tmp_path, 4, 3, 100)
    pooled.begin()
    pooled.add(0, [3, 4], np.ones((4, 3)))
    pooled.add(1, [5], np.ones((4, 3)))
    with pytest.raises(ValueError, match="are in it"):
        pooled.add(0 if row == 50 else 2, [row], np.ones((4, 3)))
    assert pooled.done.sum() == 3


def add_stretches(folder: str) -> None:
    """Target: sums of five stretches, in an order that carries often, from where they were left."""
    pooled = Pooled(Path(folder), 4, 3, 5)
    if not pooled.begun:
        pooled.begin()
    for number in (1, 0, 3, 2, 4):
        if not pooled.done[number]:
            pooled.add(number, [number], np.full((4, 3), 0.1) * (number + 1) / 3)
    pooled.fold()


def test_killed_at_any_system_call_sums_hold_each_sample_once(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    add_stretches(str(tmp_path / "whole"))
    for call in range(1000):
        path = tmp_path / f"killed-{call}"
        path.mkdir()
        code, log = processes.run(
            "processes:killed_at_call", call, "test_writers:add_stretches", path, log=tmp_path / "log"
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL, log
        if (pooled := Pooled(path, 4, 3, 5)).begun:
            sums, done = pooled.read()
            expected = (np.flatnonzero(done) + 1).sum() * 0.1 / 3
            np.testing.assert_allclose(sums, expected, rtol=1e-12, err_msg=f"call {call}")
        add_stretches(str(path))
        assert content(path) == content(tmp_path / "whole"), f"killed in call {call}"
    assert call > 30


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(EaptkError) as caught, open_writer(path, "rows", **options):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_other_job_writes_while_any_process_of_this_one_lives(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with open_writer(path, "rows", lead=True) as lead:
        lead.begin(samples(N))
        other = open_writer(path, "rows", lead=False)
        other.__enter__()
    assert "another process is writing run" in refused(path)
    other.__exit__(None, None, None)
    write_run(path, "rows")


def test_a_process_left_over_from_a_job_cannot_join_the_next(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with open_writer(path, "rows", job="second"):
        assert "another process is writing run" in refused(path, lead=False, job="first")
        with open_writer(path, "rows", lead=False, job="second"):
            pass


def test_a_process_that_does_not_lead_is_refused_where_there_is_no_run(tmp_path: Path) -> None:
    assert "there is no run" in refused(tmp_path / "run", lead=False)
    assert not (tmp_path / "run").exists()


def test_a_process_with_another_manifest_is_refused_with_both_values(tmp_path: Path) -> None:
    other = {
        **manifest(n=N, histogram=None),
        "model": {"id": "m", "weights": "sha256:bb", "dtype": "float32"},
    }
    with (
        open_writer(tmp_path / "run", "rows") as lead,
        pytest.raises(EaptkError, match=r"model\.weights is 'sha256:aa' there, 'sha256:bb' here; give all"),
        RunWriter(tmp_path / "run", other, lead=False),
    ):
        pass
    assert lead.begun is False


def test_answers_of_all_processes_are_read_together_and_go_with_the_last_row(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with open_writer(path, "rows") as lead, open_writer(path, "rows", lead=False, rank=2) as other:
        lead.keep_answers({0: [1], 3: [4, 5]})
        other.keep_answers({1: [2]})
        assert lead.answers() == other.answers() == {0: [1], 1: [2], 3: [4, 5]}
    with open_writer(path, "rows") as writer:
        assert writer.answers() == {0: [1], 1: [2], 3: [4, 5]}
    write_run(path, "rows")
    assert not list(path.glob("answers*"))


def test_a_stretch_that_was_not_closed_is_not_done(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run", "statistics") as writer:
        writer.begin(samples(N))
        write_stretch(writer, 0, "statistics")
        rows = STRETCHES[1][0]
        writer.write(rows, summarise(torch.from_numpy(SCORES[rows]), GRAPH, HISTOGRAM), LOSS[rows])
    assert np.flatnonzero(Run.open(tmp_path / "run").done).tolist() == [0, 3, 12]


def test_arrays_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run", "rows") as writer:
        writer.begin(samples(N))
        before = content(tmp_path / "run")
        for kept, loss in ((SCORES[:1], LOSS[:2]), (SCORES[:2, 1:], LOSS[:2]), (SCORES[:2], LOSS[:1])):
            with pytest.raises(ValueError, match="takes"):
                writer.write([0, 1], kept, loss)
        assert content(tmp_path / "run") == before


def test_a_damaged_part_of_the_sums_is_named(tmp_path: Path) -> None:
    pooled = Pooled(tmp_path, 4, 3, 8)
    pooled.begin()
    pooled.add(0, [0], np.ones((4, 3)))
    data = bytearray((tmp_path / "pooled-0-1.npy").read_bytes())
    data[-40] ^= 1
    (tmp_path / "pooled-0-1.npy").write_bytes(data)
    with pytest.raises(
        EaptkError, match=r"pooled-0-1\.npy is damaged: its sums are not those that were written"
    ):
        pooled.read()
    with pytest.raises(EaptkError, match="damaged"):
        pooled.add(1, [1], np.ones((4, 3)))
