"""Sums over samples that several processes add to in any order, and that end with the same bytes all the same.

Consecutive batches of a run's plan form *stretches*. One process computes a stretch as a whole and adds its sums as
one *part*: a file ``pooled-<first>-<end>.npy``, of the stretches first … end − 1, that holds the sums, which samples
are in them, and a checksum of both. Parts are added up where binary counting carries: two of 2^k stretches each, the
first beginning at a multiple of 2^(k+1), as soon as both are there. What is left at the end is added from the first
to the last, into ``pooled.npy``. So the order of all additions follows from the numbers of the stretches alone; some
log₂ of their number wait on the disk for others, however early one fails; and rounding errors grow no faster.

A part appears whole and replaces those it is the sum of: until they are gone, they are passed over. A sample is done
if a part holds it, so no kill makes one count twice, or be forgotten.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.files import map_array, require_space, write_array

_NAME = re.compile(r"pooled-(\d+)-(\d+)\.npy")

Record = npt.NDArray[Any]


@dataclass(frozen=True, order=True)
class _Part:
    """The sums of stretches `first` … `end` − 1."""

    first: int
    end: int

    @property
    def name(self) -> str:
        return f"pooled-{self.first}-{self.end}.npy"

    @property
    def next(self) -> _Part | None:
        """The part that is added to it; None if it is added to another."""
        size = self.end - self.first
        return _Part(self.end, self.end + size) if self.first % (2 * size) == 0 else None

    def holds(self, other: _Part) -> bool:
        return self.first <= other.first and other.end <= self.end


class Pooled:
    """The sums of one run.

    Args:
        folder: of the run.
        n_sums, n_edges: shape of the sums.
        n_samples: of the run.
    """

    def __init__(self, folder: Path, n_sums: int, n_edges: int, n_samples: int) -> None:
        self.path = folder / "pooled.npy"
        self._lock = folder / ".pooling"
        self._n_samples = n_samples
        self._dtype = np.dtype(
            [
                ("sums", np.float64, (n_sums, n_edges)),
                ("done", np.uint8, (n_samples,)),
                ("checksum", np.uint32),
            ]
        )

    @property
    def begun(self) -> bool:
        return self.path.exists()

    @property
    def done(self) -> npt.NDArray[np.uint8]:
        """[n_samples]: 1 where a sample is in the sums, as of now."""
        done = np.zeros(self._n_samples, np.uint8)
        for record in self._records():
            done |= record["done"][0]
        return done

    def begin(self) -> None:
        """Make the sums of no sample."""
        # A part of each size may wait, and a new one is there before those it is made of are gone.
        require_space(self.path.parent, (self._n_samples.bit_length() + 2) * self._dtype.itemsize)
        self.write(np.zeros(0, np.int64), np.zeros(self._dtype["sums"].shape))

    def check(self) -> None:
        """Raises EaptkError where a file is missing or has another size."""
        self._records()

    def add(self, stretch: int, rows: Sequence[int], sums: npt.NDArray[np.float64]) -> None:
        """Put the sums of one stretch on disk; its samples are done then.

        Raises:
            ValueError: the stretch is there, or one of the samples.
        """
        part = _Part(stretch, stretch + 1)
        with self._alone():
            if self.done[list(rows)].any() or any(other.holds(part) for other in self._parts()):
                raise ValueError(f"{self.path} cannot take stretch {stretch}: samples of {rows} are in it")
            write_array(self._file(part), self._record(rows, sums))
            self._carry()

    def fold(self) -> None:
        """Make ``pooled.npy`` of all parts. No process may be adding any."""
        if self._all_parts():
            with self._alone():
                if not self._map(self.path)["done"][0].any():
                    self._carry()
                    sums, done = self.read()
                    self.write(np.flatnonzero(done), sums)
                for part in self._all_parts():
                    self._file(part).unlink()
        self._lock.unlink(missing_ok=True)

    def read(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
        """[n_sums, n_edges], and the samples they hold, as `done` says.

        Raises:
            EaptkError: a file is missing or damaged.
        """
        sums = np.zeros(self._dtype["sums"].shape)
        done = np.zeros(self._n_samples, np.uint8)
        for number, record in enumerate(self._records()):
            self._verify(record)
            # Not 0 + the first: that would make a 0 of a −0.
            sums = np.array(record["sums"][0]) if number == 0 else np.add(sums, record["sums"][0], out=sums)
            done |= record["done"][0]
        return sums, done

    def write(self, rows: Sequence[int] | npt.NDArray[np.int64], sums: npt.NDArray[np.float64]) -> None:
        """Make ``pooled.npy``, the sums of these samples, whole or not at all."""
        write_array(self.path, self._record(rows, sums))

    def _carry(self) -> None:
        """Add up all parts that go together."""
        while True:
            parts = self._parts()
            for stale in set(self._all_parts()) - set(parts):
                self._file(stale).unlink()
            pairs = [(part, part.next) for part in parts if part.next in parts]
            if not pairs:
                return
            first, second = pairs[0]
            assert second is not None
            low, high = self._map(self._file(first)), self._map(self._file(second))
            self._verify(low)
            self._verify(high)
            rows = np.flatnonzero(low["done"][0] | high["done"][0])
            sums = low["sums"][0] + high["sums"][0]
            write_array(self._file(_Part(first.first, second.end)), self._record(rows, sums))

    def _records(self) -> list[Record]:
        """What counts: ``pooled.npy`` once it holds a sample, until then the parts and no sum of them twice."""
        while True:
            parts = self._parts()
            whole = self._map(self.path)  # after the parts, which go when it holds what they did
            if whole["done"][0].any():
                return [whole]
            try:
                return [self._map(self._file(part)) for part in parts] or [whole]
            except EaptkError:
                # Another process may have added parts up since.
                if all(self._file(part).exists() for part in parts):
                    raise

    def _parts(self) -> list[_Part]:
        """In order, without those whose sum with others is there."""
        parts = self._all_parts()
        return sorted(
            part for part in parts if not any(other != part and other.holds(part) for other in parts)
        )

    def _all_parts(self) -> list[_Part]:
        names = (_NAME.fullmatch(entry.name) for entry in self.path.parent.iterdir())
        return [_Part(int(name[1]), int(name[2])) for name in names if name]

    def _file(self, part: _Part) -> Path:
        return self.path.with_name(part.name)

    def _map(self, path: Path) -> Record:
        return map_array(path, (1,), self._dtype)

    def _record(self, rows: Sequence[int] | npt.NDArray[np.int64], sums: npt.NDArray[np.float64]) -> Record:
        record = np.zeros(1, self._dtype)
        record["sums"] = sums
        record["done"][0, list(rows)] = 1
        record["checksum"] = _checksum(record)
        return record

    def _verify(self, record: Record) -> None:
        if _checksum(record) != record["checksum"][0]:
            raise EaptkError(
                f"{record.filename} is damaged: its sums are not those that were written; delete it, "  # type: ignore[attr-defined]
                f"and the score command that made the run computes them again"
            )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process changes the parts."""
        lock = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _checksum(record: Record) -> int:
    """CRC-32 of all but the checksum."""
    return zlib.crc32(record.view(np.uint8)[: -np.dtype(np.uint32).itemsize].data)
