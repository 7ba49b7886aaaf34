"""What a run keeps of each sample: its row of scores, or statistics of the row. One class for each.

Either lies in .npy files of one entry a sample, whose space is reserved before anything else is written and which
are written in place, and a *record* of which samples are done. The record appears last of all, and says that a
sample is done only once its entries are on disk.

Rows are independent, so their record is ``done.npy``, one byte a sample. Sums over samples are not: which samples
they hold must be known at every moment, or a sample would count twice after a resume. So the record of statistics
is one file, ``pooled.npy``, that holds both, and each commit replaces it as a whole.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eaptk.files import (
    check_array,
    map_array,
    pwrite,
    require_space,
    reserve_array,
    whole_file,
    write_array,
)
from eaptk.graph import Graph
from eaptk.statistics import MOMENTS, SUMS, Histogram, Statistics, Summary

#: Every file of either kind, the records first: without its record a run has not begun.
FILES = ("done.npy", "pooled.npy", "scores.npy", "moments.npy", "histogram.npy")


class SampleArray:
    """An .npy file of one entry a sample.

    Args:
        path: of the file.
        shape: [n_samples, …].
        dtype: of its elements.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self._entry_bytes = int(np.prod(shape[1:])) * self.dtype.itemsize
        self._descriptor = self._offset = -1

    def reserve(self, path: Path) -> None:
        """Make the file, of zeros, at `path`."""
        reserve_array(path, self.shape, self.dtype)

    def map(self) -> npt.NDArray[Any]:
        """Memory-mapped, read-only."""
        return map_array(self.path, self.shape, self.dtype)

    def open(self, files: contextlib.ExitStack) -> None:
        """Open the file for writing until `files` closes."""
        self._offset = check_array(self.path, self.shape, self.dtype)
        self._descriptor = os.open(self.path, os.O_RDWR)
        files.callback(os.close, self._descriptor)

    def write(self, rows: Sequence[int], entries: npt.NDArray[Any]) -> None:
        """Write the entries of some samples.

        Raises:
            ValueError: there is not one entry of the array's shape and dtype for each row.
        """
        expected = (len(rows), *self.shape[1:])
        if entries.shape != expected or entries.dtype != self.dtype:
            found = f"{entries.dtype} {entries.shape}"
            raise ValueError(f"{self.path.name} takes {self.dtype} {expected}; got {found}")
        for row, entry in zip(rows, np.ascontiguousarray(entries), strict=True):
            pwrite(self._descriptor, entry.tobytes(), self._offset + row * self._entry_bytes)

    def sync(self) -> None:
        """Return once what was written is on disk."""
        os.fdatasync(self._descriptor)


class Content(ABC):
    """What a run keeps of each sample.

    Args:
        arrays: of one entry a sample, without the record.
        record: what says which samples are done.
    """

    def __init__(self, arrays: Sequence[SampleArray], record: SampleArray) -> None:
        self.arrays, self._record = arrays, record

    @property
    def begun(self) -> bool:
        """Whether there is a record: samples are fixed and entries may be written."""
        return self._record.path.exists()

    @property
    @abstractmethod
    def done(self) -> npt.NDArray[np.uint8]:
        """[n_samples]: 1 where a sample is on disk, as of now."""

    @property
    @abstractmethod
    def pending(self) -> bool:
        """Whether anything was written that is not committed."""

    @abstractmethod
    def begin(self) -> None:
        """Make the record of no sample."""

    def open(self, files: contextlib.ExitStack) -> None:
        """Open for writing until `files` closes."""
        for array in self.arrays:
            array.open(files)

    @abstractmethod
    def write(self, rows: Sequence[int], entries: Any) -> None:
        """Write the entries of some samples; they are done from the next commit on.

        Raises:
            ValueError: `entries` are not what is kept of so many samples; nothing is written then.
        """

    @abstractmethod
    def commit(self) -> None:
        """Sync what was written to disk, then put it on record."""

    def check(self) -> None:
        """Raises EaptkError where a file is missing or damaged."""
        for array in (*self.arrays, self._record):
            array.map()


class Rows(Content):
    """``scores.npy`` [n_samples, n_edges], and ``done.npy`` [n_samples] uint8."""

    def __init__(self, folder: Path, graph: Graph, n_samples: int, dtype: np.dtype[Any]) -> None:
        self._scores = SampleArray(folder / "scores.npy", (n_samples, graph.n_edges), dtype)
        super().__init__([self._scores], SampleArray(folder / "done.npy", (n_samples,), np.uint8))
        self._pending: list[int] = []

    @property
    def done(self) -> npt.NDArray[np.uint8]:
        return np.array(self._record.map())

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    def begin(self) -> None:
        with whole_file(self._record.path) as temporary:
            self._record.reserve(temporary)

    def open(self, files: contextlib.ExitStack) -> None:
        super().open(files)
        self._record.open(files)

    def write(self, rows: Sequence[int], entries: npt.NDArray[Any]) -> None:
        self._scores.write(rows, entries)
        self._pending += rows

    def commit(self) -> None:
        self._scores.sync()
        self._record.write(self._pending, np.ones(len(self._pending), np.uint8))
        self._record.sync()
        self._pending.clear()

    def read(self) -> npt.NDArray[Any]:
        """The rows, memory-mapped and read-only."""
        return self._scores.map()


class Summaries(Content):
    """``moments.npy`` [n_samples, 7] float64, ``histogram.npy`` [n_samples, bins] uint32, and ``pooled.npy``.

    The last is one element with the fields ``sums`` [4, n_edges] float64 and ``done`` [n_samples] uint8.
    Batches are added in the order they are written, so a run that is resumed in the same order ends with the
    same bytes.
    """

    def __init__(self, folder: Path, graph: Graph, n_samples: int, histogram: Histogram) -> None:
        self._graph, self._histogram = graph, histogram
        self._moments = SampleArray(folder / "moments.npy", (n_samples, len(MOMENTS)), np.float64)
        self._counts = SampleArray(folder / "histogram.npy", (n_samples, histogram.bins), np.uint32)
        pooled = [("sums", np.float64, (len(SUMS), graph.n_edges)), ("done", np.uint8, (n_samples,))]
        super().__init__([self._moments, self._counts], SampleArray(folder / "pooled.npy", (1,), pooled))
        self._written = False
        #: The record with all that was written, and room for the next one.
        self._pooled: tuple[npt.NDArray[Any], npt.NDArray[Any]]

    @property
    def done(self) -> npt.NDArray[np.uint8]:
        return np.array(self._record.map()[0]["done"])

    @property
    def pending(self) -> bool:
        return self._written

    def begin(self) -> None:
        # Each commit needs room for the new one beside the old.
        require_space(self._record.path.parent, 2 * self._record.dtype.itemsize)
        write_array(self._record.path, np.zeros(1, self._record.dtype))

    def open(self, files: contextlib.ExitStack) -> None:
        super().open(files)
        pooled = np.array(self._record.map())
        self._pooled = pooled, np.empty_like(pooled)

    def write(self, rows: Sequence[int], entries: Summary) -> None:
        old, new = self._pooled
        if entries.sums.shape != old["sums"].shape[1:] or old["done"][0, rows].any():
            raise ValueError(f"{self._record.path} cannot take sums {entries.sums.shape} of rows {rows}")
        self._moments.write(rows, entries.moments)
        self._counts.write(rows, entries.counts)
        np.add(old["sums"], entries.sums, out=new["sums"])
        new["done"] = old["done"]
        new["done"][0, rows] = 1
        self._written = True
        # One assignment: wherever an interrupt strikes, sums and record both have the batch or both lack it.
        self._pooled = new, old

    def commit(self) -> None:
        self._moments.sync()
        self._counts.sync()
        write_array(self._record.path, self._pooled[0])
        self._written = False

    def read(self) -> Statistics:
        """What is known by now, of the samples that are done."""
        pooled = self._record.map()[0]
        return Statistics(
            graph=self._graph,
            histogram=self._histogram,
            done=pooled["done"] == 1,
            moments=self._moments.map(),
            counts=self._counts.map(),
            sums=np.array(pooled["sums"]),
        )
