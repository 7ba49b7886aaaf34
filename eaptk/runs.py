"""Run directories as such: which there are, whether they are as they were written, and several as one.

What is kept of a sample is read a block at a time, by as many threads as there are processors, and held against its
checksum; so runs may be larger than memory. A checksum is the CRC-32 of a sample's entries, one array after the other,
and of its loss as a float64; for a run with rows that is

    zlib.crc32(np.float64(loss[row]), zlib.crc32(np.load("scores.npy", mmap_mode="r")[row])) == checksums[row]
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from eaptk.content import Content, Rows, Summaries, checksums
from eaptk.errors import EaptkError
from eaptk.files import DAMAGED, differences_between, explained, whole_file, write_array, write_json
from eaptk.layout import command_line, layout, losses, read_manifest
from eaptk.locks import Lock
from eaptk.progress import progress_bar
from eaptk.store import Run
from eaptk.sweep import Doubles

T = TypeVar("T")
Paths = Sequence[str | os.PathLike[str]]

#: Bytes that a thread reads at a time, if a sample does not take more.
_BLOCK = 2**24

#: Keys of a manifest that may differ between runs that become one.
_MAY_DIFFER = ("provenance", "model.id", "dataset", "tokens_per_batch", "cuts", "merged")


@dataclass(frozen=True)
class Found:
    """A run directory that `find` came upon.

    Args:
        path: of the directory.
        manifest: its manifest; None if there is a `problem`.
        kept: what is kept of each sample, in words.
        n_done, n_samples: samples that are done, of how many.
        n_bytes: that the directory takes on the disk.
        problem: why the run cannot be opened.
    """

    path: Path
    n_bytes: int
    manifest: dict[str, Any] | None = None
    kept: str = ""
    n_done: int = 0
    n_samples: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Args:
        path: of the run.
        n_checked: samples held against their checksums: those that were done.
        n_bytes, seconds: what was read, and how long it took.
        rows, ids: the damaged ones: numbers and sample ids.
        sums: what is wrong with sums over samples; empty if nothing is, or there are none.
        repaired: whether the damaged rows were marked not done, which sums over samples and merged runs do not allow.
        remedy: what to do; empty if nothing is damaged.
    """

    path: Path
    n_checked: int
    n_bytes: int
    seconds: float
    rows: tuple[int, ...]
    ids: tuple[str, ...]
    sums: str
    repaired: bool
    remedy: str

    @property
    def intact(self) -> bool:
        return not self.rows and not self.sums


def find(folders: Paths) -> list[Found]:
    """All run directories in these folders, at any depth; a folder may be one itself.

    Raises:
        EaptkError: there is no such folder.
    """
    return [_found(Path(path)) for folder in folders for path in _directories(Path(folder))]


def verify(path: str | os.PathLike[str], *, repair: bool = False, progress: bool = True) -> Verification:
    """Hold every sample that is done against its checksum, and sums over samples against theirs.

    Args:
        path: a run directory.
        repair: mark damaged rows not done, so that the score command that made the run computes them again.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        EaptkError: the run cannot be opened; or with `repair`, another process is writing it.
    """
    with ExitStack() as files:
        if repair:
            with explained(Path(path)):
                Run.open(path)  # before a file appears in what may be no run
                files.enter_context(Lock(Path(path))).hold(alone=True)
        run = Run.open(path)
        content, done, loss = run.content, run.done == 1, run.loss
        for array in content.arrays:
            array.open(files, writable=False)
        started = time.monotonic()

        def damaged(first: int, end: int) -> list[int]:
            try:
                return [row for row in _unlike(content, loss, first, end)[1] if done[row]]
            except OSError:  # of the disk: which rows cannot be read?
                if end - first > 1:
                    return [row for each in range(first, end) for row in damaged(each, each + 1)]
                return [first] if done[first] else []

        rows = [row for found in _each_block(content, done, damaged, "verifying", progress) for row in found]
        sums = ""
        if isinstance(content, Summaries):
            try:
                content.pooled.read()
            except EaptkError as error:
                sums = str(error)
        seconds = time.monotonic() - started
        ids = run.samples["id"].take(rows).to_pylist() if rows else []
        repaired = repair and bool(rows) and _repairable(run)
        if repaired:
            _mark_undone(run, rows, files)
    return Verification(
        path=run.path,
        n_checked=int(done.sum()),
        n_bytes=int(done.sum()) * content.sample_bytes,
        seconds=seconds,
        rows=tuple(rows),
        ids=tuple(ids),
        sums=sums,
        repaired=repaired,
        remedy=_remedy(run, repaired) if rows or sums else "",
    )


def merge(paths: Paths, out: str | os.PathLike[str], *, progress: bool = True) -> Run:
    """Make one run of several: the same model, graph, method and way of keeping, of different samples.

    Rows come in the order of `paths`, and all are held against their checksums on the way. The merged run appears
    under its name when it is whole; its manifest says under ``merged`` where it comes from.

    Args:
        paths: complete runs, at least two.
        out: the merged run; must not exist.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        EaptkError: the runs do not go together, a sample is in two of them, one is damaged or not complete, or the
            merged run cannot be written.
    """
    out = Path(out)
    if len(paths) < 2:
        raise EaptkError("one run alone cannot be merged; name at least two")
    runs = [Run.open(path) for path in paths]
    _refuse_unlike(runs)
    _refuse_shared_samples(runs)
    if out.exists():
        raise EaptkError(f"{out} is there already; choose another folder for the merged run")
    work = out.with_name(f".{out.name}.merging")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
        with Lock(work) as lock:
            lock.hold(alone=True)
            try:
                _write_merged(runs, work, progress)
                os.replace(work, out)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
        _sync_folder(out.parent)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise EaptkError(f"cannot write {out}: {reason}; the runs to be merged are as they were") from error
    return Run.open(out)


def _directories(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise EaptkError(f"there is no folder {folder}")
    for base, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if "manifest.json" in files:
            names.clear()
            yield Path(base)


def _found(path: Path) -> Found:
    n_bytes = 0
    for entry in os.scandir(path):
        with suppress(FileNotFoundError):  # of a run that is going on
            n_bytes += entry.stat().st_blocks * 512 if entry.is_file() else 0
    try:
        manifest = read_manifest(path)
        if manifest is None:
            return Found(path, n_bytes, problem="its manifest.json is a link to nothing")
        keep, n_samples, content = layout(path, manifest)
        n_done = int((content.done == 1).sum()) if content.begun else 0
    except EaptkError as error:
        return Found(path, n_bytes, problem=str(error))
    return Found(path, n_bytes, manifest, keep.description, n_done, n_samples)


def _each_block(
    content: Content, done: npt.NDArray[np.bool_], work: Callable[[int, int], T], what: str, progress: bool
) -> Iterator[T]:
    """The results of `work` on all blocks of rows first … end − 1 of which one is done, in order."""
    step = max(1, _BLOCK // content.sample_bytes)
    firsts = range(0, len(done), step)
    blocks = [(first, end) for first in firsts if done[first : (end := min(first + step, len(done)))].any()]
    threads = min(8, len(os.sched_getaffinity(0)))
    total = sum(end - first for first, end in blocks)
    with progress_bar(what, total, 0, progress, unit="rows") as advance, ThreadPoolExecutor(threads) as pool:
        try:
            for (first, end), found in zip(blocks, pool.map(lambda block: work(*block), blocks), strict=True):
                advance(end - first)
                yield found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _unlike(
    content: Content, loss: Doubles, first: int, end: int
) -> tuple[list[npt.NDArray[Any]], list[int]]:
    """What is kept of these samples, array by array, and which of them are not as their checksums say."""
    parts = [array.read(first, end) for array in content.arrays]
    found = checksums([*parts[:-1], loss[first:end]])
    return parts, (first + np.flatnonzero(found != parts[-1])).tolist()


def _repairable(run: Run) -> bool:
    return isinstance(run.content, Rows) and "merged" not in run.manifest


def _remedy(run: Run, repaired: bool) -> str:
    if "merged" in run.manifest:
        sources = ", ".join(source["path"] for source in run.manifest["merged"])
        return f"delete it, verify the runs it was merged from ({sources}), and merge them again"
    command = run.manifest.get("provenance", {}).get("command")
    again = "repeat the command that made it" + (f": {command}" if command else "")
    if isinstance(run.content, Summaries):
        return f"sums over samples cannot be computed again in part: delete the folder, and {again}"
    if repaired:
        return f"they are marked not done: {again}"
    return f"mark them not done with `eaptk runs verify --repair {run.path}`, then {again}"


def _mark_undone(run: Run, rows: Sequence[int], files: ExitStack) -> None:
    """In this order: a run with a row that is not done needs its losses in a file of their own."""
    content = run.content
    assert isinstance(content, Rows)
    with explained(run.path):
        kept = losses(run.path, run.n_samples)
        if not kept.path.exists():
            write_array(kept.path, run.loss)
        content.open(files)
        content.mark(rows, False)


def _refuse_unlike(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs:
        if not run.complete:
            n_done = int((run.done == 1).sum())
            raise EaptkError(
                f"run {run.path} is not complete ({n_done:,} of {run.n_samples:,} rows are done); repeat the "
                f"command that made it, then merge"
            )
        differences = differences_between(first.manifest, run.manifest, _MAY_DIFFER)
        if differences:
            ours = [text.replace(" there, ", f" in {first.path}, ") for text in differences.values()]
            shown = "; ".join(text.removesuffix(" here") + f" in {run.path}" for text in ours)
            raise EaptkError(f"these runs cannot be merged: {shown}")
        means = [each.path / "means.safetensors" for each in (first, run)]
        missing = [file for file in means if not file.exists()]
        if len(missing) == 1:
            raise EaptkError(f"{missing[0]} is missing; {DAMAGED}")
        if not missing and not filecmp.cmp(means[0], means[1], shallow=False):
            raise EaptkError(
                f"these runs cannot be merged: {first.path} and {run.path} ablate to means of different samples"
            )


def _refuse_shared_samples(runs: Sequence[Run]) -> None:
    of: dict[str, Path] = {}
    for run in runs:
        ids = pq.read_table(run.path / "samples.parquet", columns=["id"])["id"].to_pylist()
        for name in ids:
            if name in of:
                raise EaptkError(
                    f"these runs cannot be merged: sample {name!r} is in {of[name]} and in {run.path}"
                )
        of |= dict.fromkeys(ids, run.path)


def _write_merged(runs: Sequence[Run], work: Path, progress: bool) -> None:
    for left in work.iterdir():  # of a merge that was killed
        if left.name != ".lock":
            left.unlink()
    manifest = _merged_manifest(runs)
    content = layout(work, manifest)[2]
    for array in content.arrays:
        array.reserve(array.path)
    write_json(work / "manifest.json", manifest)
    _write_samples(runs, work / "samples.parquet")
    for name in ("edges.parquet", "means.safetensors"):
        if (runs[0].path / name).exists():
            with whole_file(work / name) as temporary:
                shutil.copyfile(runs[0].path / name, temporary)
    content.begin()
    with ExitStack() as files:
        content.open(files)
        start = 0
        for run in runs:
            _copy_rows(run, content, start, progress)
            start += run.n_samples
        for array in content.arrays:
            array.sync()
        if isinstance(content, Rows):
            content.mark(range(start), True)
        else:
            sums = [run.content.pooled.read()[0] for run in runs if isinstance(run.content, Summaries)]
            content.pooled.write(range(start), np.sum(sums, axis=0))


def _copy_rows(run: Run, into: Content, start: int, progress: bool) -> None:
    """Into rows `start` …"""
    loss = run.loss

    def copy(first: int, end: int) -> None:
        parts, damaged = _unlike(run.content, loss, first, end)
        if damaged:
            name = run.samples["id"][damaged[0]].as_py()
            raise EaptkError(
                f"run {run.path} is damaged: sample {name!r} is not as it was written; see "
                f"`eaptk runs verify {run.path}`"
            )
        for array, part in zip(into.arrays, parts, strict=True):
            array.put(start + first, part)

    with ExitStack() as files:
        for array in run.content.arrays:
            array.open(files, writable=False)
        for _ in _each_block(run.content, run.done == 1, copy, f"merging {run.path.name}", progress):
            pass


def _merged_manifest(runs: Sequence[Run]) -> dict[str, Any]:
    first = runs[0].manifest
    sources: list[dict[str, Any]] = []
    for run in runs:
        facts = {
            name: run.manifest.get(name) for name in ("model", "dataset", "tokens_per_batch", "provenance")
        }
        sources += run.manifest.get("merged", [{"path": str(run.path), **facts}])
    digest = hashlib.sha256("".join(str(run.manifest["dataset"]) for run in runs).encode()).hexdigest()
    tokens = {run.manifest.get("tokens_per_batch") for run in runs}
    return {
        **first,
        "dataset": {"fingerprint": f"sha256:{digest}", "samples": sum(run.n_samples for run in runs)},
        "tokens_per_batch": tokens.pop() if len(tokens) == 1 else None,
        "merged": sources,
        "provenance": {
            "command": command_line(),
            "data": ", ".join(str(run.path) for run in runs),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    }


def _write_samples(runs: Sequence[Run], path: Path) -> None:
    """The tables of all runs, one after the other, with their losses; a column that one lacks is null there."""
    try:
        tables = [pq.ParquetFile(run.path / "samples.parquet") for run in runs]
        schemas = [table.schema_arrow.remove_metadata() for table in tables]
        schema = pa.unify_schemas(
            [pa.schema([field for field in each if field.name != "loss"]) for each in schemas],
            promote_options="permissive",
        ).append(pa.field("loss", pa.float64()))
        with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for run, table in zip(runs, tables, strict=True):
                loss, start = run.loss, 0
                for batch in table.iter_batches():
                    there = dict(zip(batch.schema.names, batch.columns, strict=True))
                    there["loss"] = pa.array(loss[start : (start := start + len(batch))])
                    columns = [
                        there[field.name].cast(field.type)
                        if field.name in there
                        else pa.nulls(len(batch), field.type)
                        for field in schema
                    ]
                    writer.write_table(pa.table(columns, schema=schema))
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise EaptkError(
            f"the samples of these runs cannot be put into one table ({reason}); give fields of one name values of "
            f"one type, or if a file is broken, {DAMAGED}"
        ) from error


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
