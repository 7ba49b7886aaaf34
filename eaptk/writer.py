"""Writing a run directory, so that every moment is a safe one to be killed in; see `eaptk.store` for its files."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eaptk.content import Summaries, clear
from eaptk.errors import EaptkError
from eaptk.files import differences_between, explained, read_table, see_afresh, whole_file, write_table
from eaptk.journal import append_journal, read_journal
from eaptk.keep import Entries, Keep
from eaptk.layout import SCHEMA, layout, losses, read_manifest
from eaptk.locks import Lock
from eaptk.sweep import Doubles

#: Keys of the manifest that say who ran it, not what was run: a resume may differ in them.
_UNMATCHED = ("provenance", "model.id")

#: Keys that say nothing of the model's own answers: while no row is done these may change and answers are kept.
_NO_MATTER_TO_ANSWERS = (
    *("tokens_per_batch", "segment", "graph", "ablation"),
    *("row_dtype", "metrics_only", "edges", "top", "layer_pairs"),
)

#: Answers of the model's own, before the run begins: those of each process in a file.
_ANSWERS = "answers{}.jsonl"

#: Syncing to disk may take this share of a run's time; rows wait in the page cache until a commit is due.
_COMMIT_SHARE = 0.05


class RunWriter:
    """A run directory, opened for writing by this process, alone or with others of the same job.

        with RunWriter(path, manifest) as writer:
            if not writer.begun:
                writer.begin(samples)
            for number, stretch in enumerate(stretches):
                for rows in stretch:
                    writer.write(rows, entries, loss)
                writer.close_stretch(number)
            writer.finish()

    Leaving the context commits what was written, after an error too.

    Of several processes one *leads*: it lays the run out, begins and finishes it. The others open it once the lead
    has (its ``with`` entered), and write when it has begun. Each writes other rows and closes other stretches, in
    any order and number; every file ends with the same bytes. They may run on several machines if the folder's file
    system keeps locks between them, and if what one process syncs another sees that opens the file anew: NFS from
    version 3 and Lustre mounted with ``flock`` do.

    Args:
        path: the directory; made if it is not there.
        manifest: what is to be run, without ``schema``. Keys the store reads: ``graph``, ``dataset.samples`` and
            those of `Keep.to_dict`.
        keep: what is kept, where not of all edges: a manifest does not hold their columns. None: what it says.
        lead: whether this process leads, as one alone does.
        rank: number of this process, which tells its answers from those of others.
        job: what tells the processes of this job from those of others; the same for all of it. Without it a process
            that does not lead may join a job started in between, of the same manifest.

    Raises:
        EaptkError: a process of another job is writing the run; the directory holds finished rows of a run with
            another manifest, generated answers that another manifest would not give, or files that are no
            run; the disk is too small or read-only; a file is damaged. A process that does not lead finds no
            run, or one of another manifest or job.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Mapping[str, Any],
        *,
        keep: Keep | None = None,
        lead: bool = True,
        rank: int = 0,
        job: str = "",
    ) -> None:
        self.path = Path(path)
        self.manifest = {"schema": SCHEMA, **manifest, **({} if keep is None else keep.to_dict())}
        self.lead, self._rank, self._job = lead, rank, job
        self._keep, self.n_samples, self._content = layout(self.path, self.manifest)
        self._keep = self._keep if keep is None else keep
        self._loss = losses(self.path, self.n_samples)
        self._lock = Lock(self.path)
        self._open_files = contextlib.ExitStack()
        self._is_open = self._written = False
        self._commit_due = 0.0

    def __enter__(self) -> RunWriter:
        try:
            if self.lead:
                self._prepare()
            else:
                self._join()
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
        return self._content.begun

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """[n_samples]: rows that are committed, by any process."""
        return self._content.done == 1

    @property
    def _complete(self) -> bool:
        """Whether nothing is left to write or to finish."""
        return self.begun and bool(self.done.all()) and not self._loss.path.exists()

    def answers(self) -> dict[int, list[int]]:
        """Answers kept so far by `keep_answers`, of any process: row to token ids."""
        with explained(self.path):
            see_afresh(self.path)
        return {
            row: tokens
            for path in sorted(self.path.glob(_ANSWERS.format("*")))
            for row, tokens in read_journal(path).items()
        }

    def keep_answers(self, answers: Mapping[int, Sequence[int]]) -> None:
        """Make generated answers durable before the run begins, so that a resume need not repeat them."""
        with explained(self.path):
            append_journal(self.path / _ANSWERS.format(f"-{self._rank}" if self._rank else ""), answers)

    def begin(self, samples: pa.Table) -> None:
        """Fix the samples; from here on rows may be written. For the lead."""
        with explained(self.path):
            write_table(self.path / "samples.parquet", samples)
            self._content.begin()
        self._open_arrays()

    def write(self, rows: Sequence[int], entries: Entries, loss: Doubles) -> None:
        """Write what is kept of finished rows. They count as done from the next commit on; where sums over samples
        are kept, from the commit that closes their stretch.

        Args:
            rows: [B] row numbers.
            entries: the rows' scores [B, n_columns], of the run's row dtype; several arrays by name, where a run
                keeps several; or a summary of the rows, where it keeps none.
            loss: [B].

        Raises:
            ValueError: `entries` or `loss` are not what is kept of so many samples.
        """
        if not self._is_open:
            self._open_arrays()
        self._loss.expect(rows, loss)
        with explained(self.path):
            self._content.write(rows, entries, loss)  # type: ignore[arg-type]
            self._loss.write(rows, loss)
        self._written = True
        if time.monotonic() >= self._commit_due:
            self.commit()

    def close_stretch(self, number: int) -> None:
        """All rows of this stretch, consecutive batches of the run's plan, have been written by this process.

        Sums over samples are taken a stretch at a time, so their bytes depend on how the plan is cut into stretches
        and on how these are numbered, from 0 without a gap, and on nothing else. A stretch that is not closed is
        not done, nor is any of its samples.

        Raises:
            ValueError: where sums are kept, the stretch or one of its samples is in them.
        """
        if isinstance(self._content, Summaries):
            self.commit()
            with explained(self.path):
                self._content.close_stretch(number)

    def drop_stretch(self) -> None:
        """A row of the stretch that was being written cannot be had: where sums are kept, none of its rows is done."""
        if isinstance(self._content, Summaries):
            self._content.drop_stretch()

    def commit(self) -> None:
        """Sync what was written to disk, then mark it done."""
        if not self._written:
            return
        started = time.monotonic()
        with explained(self.path):
            self._loss.sync()
            self._content.commit()
        self._written = False
        finished = time.monotonic()
        self._commit_due = finished + (finished - started) / _COMMIT_SHARE

    def finish(self) -> None:
        """Commit, and leave the files of a complete run. For the lead, when all rows are written and no other process
        writes any more.
        """
        self.commit()
        with explained(self.path):
            see_afresh(self.path)
        if not self.done.all():
            raise ValueError(f"{(~self.done).sum()} rows of {self.path} were never written")
        with explained(self.path):
            self._content.finish()
            for answers in self.path.glob(_ANSWERS.format("*")):
                answers.unlink(missing_ok=True)
        if self._loss.path.exists():
            loss = np.array(self._loss.map())
            table = read_table(self.path / "samples.parquet")
            if "loss" in table.column_names:
                table = table.drop_columns(["loss"])
            with explained(self.path):
                write_table(self.path / "samples.parquet", table.append_column("loss", pa.array(loss)))
                self._loss.path.unlink()
        if self._lock.job:
            self._lock.job = ""

    def _prepare(self) -> None:
        """Lay the run out, or see that it is the same one, while no other process may as much as open it."""
        with explained(self.path):
            self._refuse_foreign_files()
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._open_files.enter_context(self._lock)
            lock.hold(alone=True)
            see_afresh(self.path)
        stored = read_manifest(self.path)
        differences = {} if stored is None else differences_between(stored, self.manifest, _UNMATCHED)
        if stored is not None and differences:
            self._refuse_to_lose(stored, differences)
        if stored is None or differences or not self.begun:
            self._create()
        with explained(self.path):
            # A run that is complete is left as it is.
            if not self._complete and lock.job != self._job:
                lock.job = self._job
            lock.hold(alone=False)

    def _join(self) -> None:
        """See that the run is the one that the lead laid out."""
        if not self.path.is_dir():
            raise EaptkError(f"there is no run {self.path} to write rows of; the process that leads makes it")
        with explained(self.path):
            lock = self._open_files.enter_context(self._lock)
            lock.hold(alone=False)
            job = lock.job
        stored = read_manifest(self.path)
        if stored is None:
            raise EaptkError(f"there is no run {self.path} to write rows of; the process that leads makes it")
        differences = differences_between(stored, self.manifest, _UNMATCHED)
        if differences:
            raise EaptkError(
                f"this process would write other rows of run {self.path} than the one that leads: "
                f"{'; '.join(differences.values())}; give all processes the same model, data and options"
            )
        if job != self._job and not self._complete:
            raise lock.busy()

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
        with explained(self.path):
            clear(self.path)
            for name in ("loss.npy", "means.safetensors", "samples.parquet"):
                (self.path / name).unlink(missing_ok=True)
            with contextlib.ExitStack() as files:
                for array in (*self._content.arrays, self._loss):
                    array.reserve(files.enter_context(whole_file(array.path)))
                with whole_file(self.path / "manifest.json") as manifest:
                    manifest.write_text(json.dumps(self.manifest, indent=2) + "\n")
            write_table(self.path / "edges.parquet", self._keep.table())

    def _open_arrays(self) -> None:
        with explained(self.path):
            self._content.open(self._open_files)
            if self._loss.path.exists() or not self.done.all():
                self._loss.open(self._open_files)
        self._is_open = True


def _has_finished_rows(path: Path, manifest: Mapping[str, Any]) -> bool:
    content = layout(path, manifest)[2]
    return content.begun and bool(content.done.any())
