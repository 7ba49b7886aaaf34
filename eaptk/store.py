"""The run directory: memory-mapped score rows that any tool reads, and that survive being killed.

    manifest.json     what was run: schema, model, tokenizer, dataset, graph, method, row dtype, versions
    edges.parquet     one row an edge: column, source, destination, source_layer, destination_layer
    samples.parquet   one row a sample: id, group, token counts and ids, user columns; `loss` once complete
    scores.npy        [n_samples, n_edges] float32 or float16, C order
    done.npy          [n_samples] uint8: 1 where the row is complete and on disk

A run with mean ablation keeps its means.safetensors. While a run is going there are also ``loss.npy``
[n_samples] float64 (folded into samples.parquet at the end) and, for answers of the model's own,
``answers.jsonl``. An empty ``.lock`` stays: the process that writes the run holds it.

What makes every moment a safe one to be killed in:

- a file appears under its name only when it is whole (temporary file, fsync, rename);
- ``done.npy`` appears last of all, so a directory without it holds nothing worth keeping but answers;
- the space of all rows is reserved before anything else is written, so a disk too small fails at the start;
- a row and its loss are written and synced before the row is marked done, and rows are written with
  pwrite: a full disk is then an error, where a write through a memory map would be a fatal signal;
- samples.parquet with the losses replaces the one without before loss.npy goes; doing that twice is harmless.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eaptk.errors import EaptkError
from eaptk.files import (
    DAMAGED,
    check_array,
    explained,
    map_array,
    pwrite,
    read_table,
    reserve_array,
    whole_file,
    write_table,
)
from eaptk.graph import Graph

SCHEMA = 1

#: Keys of the manifest that say who ran it, not what was run: a resume may differ in them.
_UNMATCHED = ("provenance", "model.id")

#: Keys that say nothing of the model's own answers: while no row is done these may change and answers are kept.
_NO_MATTER_TO_ANSWERS = ("tokens_per_batch", "graph", "ablation", "row_dtype")

#: Syncing to disk may take this share of a run's time; rows wait in the page cache until a commit is due.
_COMMIT_SHARE = 0.05


@dataclass(frozen=True)
class Run:
    """A run directory, opened for reading. It may still be growing: `done` says which rows to use.

    Args:
        path: the directory.
        manifest: the content of manifest.json.
        graph: the graph the columns of `scores` belong to.
    """

    path: Path
    manifest: dict[str, Any]
    graph: Graph

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open a run directory.

        Raises:
            EaptkError: `path` is not a run, has another schema version, has no row yet, or a file of it is
                missing or truncated.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        if manifest is None:
            raise EaptkError(
                f"{path} is not a run (no manifest.json); `eaptk score … --out {path}` makes one"
            )
        if not (path / "done.npy").exists():
            raise EaptkError(f"run {path} has no row yet; repeat the score command that made it")
        run = cls(path, manifest, Graph.from_dict(manifest["graph"]))
        # A broken file is refused here, not in the middle of an analysis.
        _ = run.scores, run.done, run.samples
        return run

    @property
    def n_samples(self) -> int:
        return int(self.manifest["dataset"]["samples"])

    @property
    def complete(self) -> bool:
        """Whether every row is done."""
        return bool(self.done.all())

    @cached_property
    def scores(self) -> npt.NDArray[Any]:
        """[n_samples, n_edges], memory-mapped and read-only; rows that are not `done` are meaningless."""
        shape = (self.n_samples, self.graph.n_edges)
        return map_array(self.path / "scores.npy", shape, np.dtype(self.manifest["row_dtype"]))

    @property
    def done(self) -> npt.NDArray[np.uint8]:
        """[n_samples]: 1 where the row is complete, as of now."""
        return np.array(map_array(self.path / "done.npy", (self.n_samples,), np.dtype(np.uint8)))

    @property
    def samples(self) -> pa.Table:
        """The table of samples, one row for each row of `scores`."""
        path = self.path / "samples.parquet"
        table = read_table(path)
        if len(table) != self.n_samples:
            raise EaptkError(f"{path} has {len(table)} rows, {self.n_samples} expected; {DAMAGED}")
        return table

    @property
    def loss(self) -> npt.NDArray[np.float64]:
        """[n_samples]: the loss whose edges were scored; NaN where the row is not done."""
        done = self.done
        if (self.path / "loss.npy").exists():
            loss = np.array(map_array(self.path / "loss.npy", (self.n_samples,), np.dtype(np.float64)))
        else:
            samples = self.samples
            if "loss" not in samples.column_names:
                raise EaptkError(f"{self.path / 'loss.npy'} is missing; {DAMAGED}")
            loss = samples["loss"].to_numpy()
        return np.where(done == 1, loss, np.nan)


class RunWriter:
    """A run directory, opened for writing by this process alone.

        with RunWriter(path, manifest) as writer:
            if not writer.begun:
                writer.begin(samples)
            writer.write(rows, scores, loss)        # any order, any number of times
            writer.finish()

    Leaving the context commits what was written, after an error too.

    Args:
        path: the directory; made if it is not there.
        manifest: what is to be run, without ``schema``. Keys the store reads: ``graph``, ``row_dtype`` and
            ``dataset.samples``.

    Raises:
        EaptkError: another process is writing the run; the directory holds finished rows of a run with
            another manifest, generated answers that another manifest would not give, or files that are no
            run; the disk is too small or read-only; a file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.manifest = {"schema": SCHEMA, **manifest}
        self.graph, self.n_samples, self._dtype = _layout(self.manifest)
        self._open_files = contextlib.ExitStack()
        self._pending: list[int] = []
        self._commit_due = 0.0

    def __enter__(self) -> RunWriter:
        try:
            with explained(self.path):
                self._refuse_foreign_files()
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock()
            stored = _read_manifest(self.path)
            differences = {} if stored is None else _differences(stored, self.manifest)
            if stored is not None and differences:
                self._refuse_to_lose(stored, differences)
            if stored is None or differences or not self.begun:
                self._create()
            if self.begun:
                self._open_arrays()
        except BaseException:
            self._open_files.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            # After a failed write a commit may fail as well; the first error is the one to report.
            with contextlib.suppress(EaptkError) if kind else contextlib.nullcontext():
                self.commit()
        finally:
            self._open_files.close()

    @property
    def begun(self) -> bool:
        """Whether the samples are fixed and rows may be written."""
        return (self.path / "done.npy").exists()

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """[n_samples]: rows that are committed."""
        done: npt.NDArray[np.bool_] = (
            map_array(self.path / "done.npy", (self.n_samples,), np.dtype(np.uint8)) == 1
        )
        return done

    def answers(self) -> dict[int, list[int]]:
        """Answers kept so far by `keep_answers`: row to token ids."""
        path = self.path / "answers.jsonl"
        if not path.exists():
            return {}
        whole = path.read_bytes().rpartition(b"\n")[0]  # the last line may be torn
        try:
            return dict(json.loads(line) for line in whole.splitlines())
        except (TypeError, ValueError) as error:
            raise EaptkError(
                f"{path} is damaged ({error}); delete it, and its prompts are answered again"
            ) from error

    def keep_answers(self, answers: Mapping[int, Sequence[int]]) -> None:
        """Make generated answers durable before the run begins, so that a resume need not repeat them."""
        path = self.path / "answers.jsonl"
        with explained(self.path), open(path, "ab") as file:
            # What a kill tore off must not run into the next line.
            kept = path.read_bytes().rpartition(b"\n")
            file.truncate(len(kept[0]) + len(kept[1]))
            for row, tokens in answers.items():
                file.write(json.dumps([row, list(tokens)]).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def begin(self, samples: pa.Table) -> None:
        """Fix the samples; from here on rows may be written."""
        with explained(self.path):
            write_table(self.path / "samples.parquet", samples)
            with whole_file(self.path / "done.npy") as temporary:
                reserve_array(temporary, (self.n_samples,), np.dtype(np.uint8))
        self._open_arrays()

    def write(self, rows: Sequence[int], scores: npt.NDArray[Any], loss: npt.NDArray[np.float64]) -> None:
        """Write finished rows; they count as done from the next commit on.

        Args:
            rows: [B] row numbers.
            scores: [B, n_edges], of the run's row dtype.
            loss: [B].
        """
        expected = (len(rows), self.graph.n_edges)
        if scores.shape != expected or scores.dtype != self._dtype or len(loss) != len(rows):
            found = f"scores are {scores.dtype} {scores.shape}, losses {loss.shape}"
            raise ValueError(f"{found}; expected {self._dtype} {expected}")
        with explained(self.path):
            for row, values, value in zip(rows, np.ascontiguousarray(scores), loss, strict=True):
                pwrite(self._scores, values.tobytes(), self._scores_at + row * values.nbytes)
                pwrite(self._loss, np.float64(value).tobytes(), self._loss_at + row * 8)
        self._pending += rows
        if time.monotonic() >= self._commit_due:
            self.commit()

    def commit(self) -> None:
        """Sync what was written to disk, then mark it done."""
        if not self._pending:
            return
        started = time.monotonic()
        with explained(self.path):
            os.fdatasync(self._scores)
            os.fdatasync(self._loss)
            for row in self._pending:
                pwrite(self._done, b"\1", self._done_at + row)
            os.fdatasync(self._done)
        self._pending.clear()
        finished = time.monotonic()
        self._commit_due = finished + (finished - started) / _COMMIT_SHARE

    def finish(self) -> None:
        """Commit, and fold the losses into samples.parquet. Every row must have been written."""
        self.commit()
        if not self.done.all():
            raise ValueError(f"{(~self.done).sum()} rows of {self.path} were never written")
        (self.path / "answers.jsonl").unlink(missing_ok=True)
        losses = self.path / "loss.npy"
        if losses.exists():
            loss = np.array(map_array(losses, (self.n_samples,), np.dtype(np.float64)))
            table = read_table(self.path / "samples.parquet")
            if "loss" in table.column_names:
                table = table.drop_columns(["loss"])
            with explained(self.path):
                write_table(self.path / "samples.parquet", table.append_column("loss", pa.array(loss)))
                losses.unlink()

    def _lock(self) -> None:
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        self._open_files.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EaptkError(
                f"another process is writing run {self.path}; wait for it, or choose another folder"
            ) from None

    def _refuse_foreign_files(self) -> None:
        if not self.path.is_dir():
            return
        foreign = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        # In this order: another process may be starting a run here, and its manifest is the first to appear.
        if foreign and not (self.path / "manifest.json").exists():
            raise EaptkError(
                f"{self.path} is no run (no manifest.json) but holds {foreign[0]!r}; choose another folder"
            )

    def _refuse_to_lose(self, stored: Mapping[str, Any], differences: Mapping[str, str]) -> None:
        """Rows and answers take hours: another command may not replace them."""
        if _has_finished_rows(self.path, stored):
            held, unlike = "finished rows", list(differences.values())
        else:
            held = "generated answers"
            unlike = [text for key, text in differences.items() if not key.startswith(_NO_MATTER_TO_ANSWERS)]
            unlike = unlike if self.answers() else []
        if unlike:
            raise EaptkError(
                f"{self.path} holds {held} of another run: {'; '.join(unlike)}; "
                f"repeat the command that made it, or choose another folder"
            )

    def _create(self) -> None:
        """Lay out a run with no rows. What is there holds no finished row, so all but answers may go."""
        shape = (self.n_samples, self.graph.n_edges)
        with explained(self.path):
            for name in ("done.npy", "scores.npy", "loss.npy", "means.safetensors", "samples.parquet"):
                (self.path / name).unlink(missing_ok=True)
            with whole_file(self.path / "scores.npy") as temporary:
                reserve_array(temporary, shape, self._dtype)
                with whole_file(self.path / "manifest.json") as manifest:
                    manifest.write_text(json.dumps(self.manifest, indent=2) + "\n")
            with whole_file(self.path / "loss.npy") as temporary:
                reserve_array(temporary, (self.n_samples,), np.dtype(np.float64))
            edges = pa.Table.from_pandas(self.graph.to_frame(), preserve_index=False)
            write_table(self.path / "edges.parquet", edges.replace_schema_metadata(None))

    def _open_arrays(self) -> None:
        n = self.n_samples
        self._scores, self._scores_at = self._open("scores.npy", (n, self.graph.n_edges), self._dtype)
        self._done, self._done_at = self._open("done.npy", (n,), np.dtype(np.uint8))
        if not self.done.all():
            self._loss, self._loss_at = self._open("loss.npy", (n,), np.dtype(np.float64))

    def _open(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int]:
        """File descriptor and the byte at which the array's data starts."""
        path = self.path / name
        offset = check_array(path, shape, dtype)
        with explained(self.path):
            descriptor = os.open(path, os.O_RDWR)
        self._open_files.callback(os.close, descriptor)
        return descriptor, offset


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a run directory, None if there is none."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise EaptkError(f"{file} cannot be read ({error}); {DAMAGED}") from error
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise EaptkError(f"{file} is no manifest of a run: it has no schema version")
    if manifest["schema"] != SCHEMA:
        raise EaptkError(
            f"run {path} has schema version {manifest['schema']!r}, this eaptk knows {SCHEMA}; "
            f"use the eaptk that wrote it, or score again into another folder"
        )
    try:
        _layout(manifest)
    except KeyError as error:
        raise EaptkError(f"{file} is damaged: it has no {error}; {DAMAGED}") from error
    except (TypeError, ValueError, EaptkError) as error:
        raise EaptkError(f"{file} is damaged ({error}); {DAMAGED}") from error
    return manifest


def _layout(manifest: Mapping[str, Any]) -> tuple[Graph, int, np.dtype[Any]]:
    """What the sizes of a run's files follow from: its graph, number of samples and row dtype."""
    return (
        Graph.from_dict(manifest["graph"]),
        int(manifest["dataset"]["samples"]),
        np.dtype(manifest["row_dtype"]),
    )


def _has_finished_rows(path: Path, manifest: Mapping[str, Any]) -> bool:
    done, n_samples = path / "done.npy", int(manifest["dataset"]["samples"])
    return done.exists() and bool(map_array(done, (n_samples,), np.dtype(np.uint8)).any())


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """What tells two manifests apart: by key, a text with both values."""
    ours, theirs = _flat(wanted), _flat(stored)
    return {
        key: f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in {**theirs, **ours}
        if theirs.get(key) != ours.get(key)
    }


def _flat(manifest: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in manifest.items():
        if prefix + key in _UNMATCHED:
            continue
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
