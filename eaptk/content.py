"""What a run keeps of each sample: a row of scores, or some of it, or statistics of it. One class for each.

All lie in .npy files of one entry a sample, whose space is reserved before anything else is written and which are
written in place, with a checksum of what is kept of each sample; and a *record* of which samples are done. The record
appears last of all, and says that a sample is done only once its entries are on disk.

Rows are independent, so their record is ``done.npy``, one byte a sample. Sums over samples are not: which samples
they hold must be known at every moment, or a sample would count twice after a resume. So the record of statistics
holds both, see `eaptk.pooled`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.files import DAMAGED, check_array, map_array, pwrite, reserve_array, whole_file
from eaptk.graph import Graph
from eaptk.pooled import Pooled
from eaptk.statistics import MOMENTS, SUMS, Histogram, Statistics, Summary
from eaptk.sweep import Doubles

#: Names of arrays that any kind has, without ``.npy``.
_ARRAYS = ("checksums", "scores", "columns", "absolute", "moments", "histogram")


class SampleArray:
    """An .npy file of one entry a sample.

    Args:
        path: of the file.
        shape: [n_samples, …].
        dtype: of its elements.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self.entry_bytes = int(np.prod(shape[1:])) * self.dtype.itemsize
        self._descriptor = self._offset = -1

    def reserve(self, path: Path) -> None:
        """Make the file, of zeros, at `path`."""
        reserve_array(path, self.shape, self.dtype)

    def map(self) -> npt.NDArray[Any]:
        """Memory-mapped, read-only."""
        return map_array(self.path, self.shape, self.dtype)

    def open(self, files: contextlib.ExitStack, writable: bool = True) -> None:
        """Open the file until `files` closes."""
        self._offset = check_array(self.path, self.shape, self.dtype)
        self._descriptor = os.open(self.path, os.O_RDWR if writable else os.O_RDONLY)
        files.callback(os.close, self._descriptor)
        if writable:
            # Of a file that nobody has locked NFS writes whole pages, and with a row what it knows of its neighbours:
            # nothing, if another machine has written them since.
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def expect(self, rows: Sequence[int], entries: npt.NDArray[Any]) -> None:
        """Raises ValueError if there is not one entry of the array's shape and dtype for each row."""
        expected = (len(rows), *self.shape[1:])
        if entries.shape != expected or entries.dtype != self.dtype:
            found = f"{entries.dtype} {entries.shape}"
            raise ValueError(f"{self.path.name} takes {self.dtype} {expected}; got {found}")

    def write(self, rows: Sequence[int], entries: npt.NDArray[Any]) -> None:
        """Write the entries of some samples.

        Raises:
            ValueError: as `expect` does.
        """
        self.expect(rows, entries)
        for row, entry in zip(rows, np.ascontiguousarray(entries), strict=True):
            pwrite(self._descriptor, entry.tobytes(), self._offset + row * self.entry_bytes)

    def read(self, first: int, end: int) -> npt.NDArray[Any]:
        """Entries first … end − 1, read from the open file; memory for them alone is taken."""
        entries = np.empty((end - first, *self.shape[1:]), self.dtype)
        view = entries.reshape(-1).view(np.uint8).data
        offset = self._offset + first * self.entry_bytes
        while view:
            n = os.preadv(self._descriptor, [view], offset)
            if n == 0:
                raise EaptkError(f"{self.path} became shorter while it was read; {DAMAGED}")
            view, offset = view[n:], offset + n
        return entries

    def put(self, first: int, entries: npt.NDArray[Any]) -> None:
        """Write consecutive entries."""
        data = np.ascontiguousarray(entries).reshape(-1).view(np.uint8).data
        pwrite(self._descriptor, data, self._offset + first * self.entry_bytes)

    def sync(self) -> None:
        """Return once what was written is on disk."""
        os.fdatasync(self._descriptor)


class Content(ABC):
    """What a run keeps of each sample.

    Args:
        folder: of the run.
        n_samples: of the run.
        entries: the arrays of it.
    """

    def __init__(self, folder: Path, n_samples: int, entries: Sequence[SampleArray]) -> None:
        self.folder, self.n_samples, self.entries = folder, n_samples, entries
        self.checksums = SampleArray(folder / "checksums.npy", (n_samples,), np.uint32)

    @property
    def arrays(self) -> Sequence[SampleArray]:
        """All that are reserved beforehand: the entries, and their checksums."""
        return (*self.entries, self.checksums)

    @property
    def sample_bytes(self) -> int:
        """What is kept of a sample takes so many bytes."""
        return sum(array.entry_bytes for array in self.arrays)

    @property
    @abstractmethod
    def begun(self) -> bool:
        """Whether there is a record: samples are fixed and entries may be written."""

    @property
    @abstractmethod
    def done(self) -> npt.NDArray[np.uint8]:
        """[n_samples]: 1 where a sample is on disk, as of now."""

    @abstractmethod
    def begin(self) -> None:
        """Make the record of no sample."""

    def open(self, files: contextlib.ExitStack) -> None:
        """Open for writing until `files` closes."""
        for array in self.arrays:
            array.open(files)

    @abstractmethod
    def parts(self, kept: Any) -> Sequence[npt.NDArray[Any]]:
        """What goes into each array of `entries`."""

    def write(self, rows: Sequence[int], kept: Any, loss: Doubles) -> None:
        """Write what is kept of some samples.

        Args:
            rows: [B].
            kept: of them all, as `parts` takes it.
            loss: [B] float64, for the checksum.

        Raises:
            ValueError: `kept` is not what is kept of so many samples; nothing is written then.
        """
        parts = self.parts(kept)
        for array, part in zip(self.entries, parts, strict=True):
            array.expect(rows, part)
        for array, part in zip(self.arrays, (*parts, checksums((*parts, loss))), strict=True):
            array.write(rows, part)

    def commit(self) -> None:
        """Sync what was written to disk; then it is done, but for sums over samples."""
        for array in self.arrays:
            array.sync()

    @abstractmethod
    def finish(self) -> None:
        """All samples are done, and no process writes any more: leave the files of a complete run."""

    def check(self) -> None:
        """Raises EaptkError where a file is missing or damaged."""
        for array in self.arrays:
            array.map()


class Rows(Content):
    """Arrays of what is kept of each sample by itself; the record is ``done.npy`` [n_samples] uint8.

    Args:
        folder, n_samples: of the run.
        arrays: width and dtype of each array [n_samples, width], by its name.
    """

    def __init__(self, folder: Path, n_samples: int, arrays: Mapping[str, tuple[int, np.dtype[Any]]]) -> None:
        self._named = {
            name: SampleArray(folder / f"{name}.npy", (n_samples, width), dtype)
            for name, (width, dtype) in arrays.items()
        }
        super().__init__(folder, n_samples, list(self._named.values()))
        self._done = SampleArray(folder / "done.npy", (n_samples,), np.uint8)
        self._pending: list[int] = []

    @property
    def begun(self) -> bool:
        return self._done.path.exists()

    @property
    def done(self) -> npt.NDArray[np.uint8]:
        return np.array(self._done.map())

    def begin(self) -> None:
        with whole_file(self._done.path) as temporary:
            self._done.reserve(temporary)

    def open(self, files: contextlib.ExitStack) -> None:
        super().open(files)
        self._done.open(files)

    def parts(self, kept: npt.NDArray[Any] | Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        if not isinstance(kept, Mapping):
            return [kept]
        return [kept[name] for name in self._named]

    def write(self, rows: Sequence[int], kept: Any, loss: Doubles) -> None:
        super().write(rows, kept, loss)
        self._pending += rows

    def commit(self) -> None:
        if self._pending:
            super().commit()
            self.mark(self._pending, True)
            self._pending.clear()

    def mark(self, rows: Sequence[int], done: bool) -> None:
        """Put on record that samples are done, or that they are not; what is written of them must be on disk."""
        self._done.write(rows, np.full(len(rows), done, np.uint8))
        self._done.sync()

    def finish(self) -> None:
        """Nothing is left to do."""

    def check(self) -> None:
        super().check()
        self._done.map()

    def read(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name, memory-mapped and read-only."""
        return {name: array.map() for name, array in self._named.items()}


class Summaries(Content):
    """``moments.npy`` [n_samples, 7] float64, ``histogram.npy`` [n_samples, bins] uint32, and `Pooled` sums."""

    def __init__(
        self, folder: Path, n_samples: int, graph: Graph, histogram: Histogram, n_edges: int
    ) -> None:
        self._graph, self._histogram, self._n_edges = graph, histogram, n_edges
        self._moments = SampleArray(folder / "moments.npy", (n_samples, len(MOMENTS)), np.float64)
        self._counts = SampleArray(folder / "histogram.npy", (n_samples, histogram.bins), np.uint32)
        self.pooled = Pooled(folder, len(SUMS), n_edges, n_samples)
        super().__init__(folder, n_samples, [self._moments, self._counts])
        self._stretch: tuple[list[int], Doubles] | None = None

    @property
    def begun(self) -> bool:
        return self.pooled.begun

    @property
    def done(self) -> npt.NDArray[np.uint8]:
        return self.pooled.done

    def begin(self) -> None:
        self.pooled.begin()

    def parts(self, kept: Summary) -> Sequence[npt.NDArray[Any]]:
        return kept.moments, kept.counts

    def write(self, rows: Sequence[int], kept: Summary, loss: Doubles) -> None:
        held, sums = self._stretch or ([], None)
        if kept.sums.shape != (len(SUMS), self._n_edges) or set(rows) & set(held):
            raise ValueError(f"{self.pooled.path} cannot take sums {kept.sums.shape} of rows {rows}")
        super().write(rows, kept, loss)
        # One assignment: wherever an interrupt strikes, the stretch has both or neither.
        self._stretch = [*held, *rows], kept.sums if sums is None else sums + kept.sums

    def close_stretch(self, number: int) -> None:
        """Add the sums of what was written, and committed, since the last one: its samples are done then."""
        if self._stretch is not None:
            rows, sums = self._stretch
            self._stretch = None
            self.pooled.add(number, rows, sums)

    def drop_stretch(self) -> None:
        """Forget the sums of what was written since the last one: none of its samples is done."""
        self._stretch = None

    def finish(self) -> None:
        self.pooled.fold()

    def check(self) -> None:
        super().check()
        self.pooled.check()

    def read(self) -> Statistics:
        """What is known by now, of the samples that are done."""
        sums, done = self.pooled.read()
        return Statistics(
            graph=self._graph,
            histogram=self._histogram,
            done=done == 1,
            moments=self._moments.map(),
            counts=self._counts.map(),
            sums=sums,
        )


def clear(folder: Path) -> None:
    """Remove what a run of any kind keeps, its record first: without one it has not begun."""
    record = [folder / "done.npy", folder / "pooled.npy"]
    for path in (*record, *folder.glob("pooled-*-*.npy"), folder / ".pooling"):
        path.unlink(missing_ok=True)
    for name in _ARRAYS:
        (folder / f"{name}.npy").unlink(missing_ok=True)


def checksums(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uint32]:
    """[B]: the CRC-32 of each sample's entries, one array [B, …] after the other."""
    found = np.zeros(len(parts[0]), np.uint32)
    for part in map(np.ascontiguousarray, parts):
        for row in range(len(found)):
            found[row] = zlib.crc32(part[row : row + 1].view(np.uint8).data, int(found[row]))
    return found
