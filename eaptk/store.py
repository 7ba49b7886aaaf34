"""The run directory: memory-mapped arrays that any tool reads, and that survive being killed.

    manifest.json     what was run: schema, model, tokenizer, dataset, graph, method, row dtype, versions
    edges.parquet     one row an edge: column, source, destination, source_layer, destination_layer
    samples.parquet   one row a sample: id, group, token counts and ids, user columns; `loss` once complete
    scores.npy        [n_samples, n_columns] float32 or float16, C order (see `eaptk.keep` for other arrays)
    checksums.npy     [n_samples] uint32: CRC-32 of what is kept of the sample, and of its loss
    done.npy          [n_samples] uint8: 1 where the row is complete and on disk

or, in place of scores.npy and done.npy, what the metrics need of the rows (see `eaptk.statistics`):

    moments.npy       [n_samples, 7] float64: Σ|w|, Σw, m2, m3, m4, min, max of each sample's row
    histogram.npy     [n_samples, bins] uint32: |w| in equal bins; what is missing to n_edges lies above them
    pooled.npy        sums [4, n_edges] over the samples that are done, done [n_samples], and their checksum

A run with mean ablation keeps its means.safetensors. While a run is going there are also ``loss.npy``
[n_samples] float64 (folded into samples.parquet at the end), for answers of the model's own ``answers*.jsonl``, one
file a process, and for sums ``pooled-*.npy`` (see `eaptk.pooled`). The file ``.lock`` stays: the processes that write
the run hold it.

What makes every moment a safe one to be killed in:

- a file appears under its name only when it is whole (temporary file, fsync, rename);
- ``done.npy`` (or ``pooled.npy``) appears last of all: a directory without it holds nothing worth keeping but
  answers;
- the space of all rows is reserved before anything else is written, so a disk too small fails at the start;
- a row, its loss and its checksum are written and synced before the row is marked done, and rows are written with
  pwrite: a full disk is then an error, where a write through a memory map would be a fatal signal;
- sums and which samples they hold appear together, in one rename;
- samples.parquet with the losses replaces the one without before loss.npy goes; doing that twice is harmless.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eaptk.content import Rows, Summaries
from eaptk.errors import EaptkError
from eaptk.files import DAMAGED, read_table
from eaptk.graph import Graph
from eaptk.keep import Keep
from eaptk.kept import EdgeMeans, KeptScores
from eaptk.layout import SCHEMA, layout, losses, read_manifest
from eaptk.statistics import Histogram, Statistics
from eaptk.sweep import Integers, indices, weighted_column_sums
from eaptk.writer import RunWriter

T = TypeVar("T")

__all__ = ["SCHEMA", "Run", "RunWriter"]


def opened(run: T | str | os.PathLike[str]) -> T | Run:
    """A run, or the one in a directory."""
    return Run.open(run) if isinstance(run, (str, os.PathLike)) else run


@dataclass(frozen=True, repr=False)
class Run:
    """A run directory, opened for reading. It may still be growing: `done` says which rows to use.

    Args:
        path: the directory.
        manifest: the content of manifest.json.
        keep: what is kept of each sample.
        graph: the graph whose edges `columns` number: the one that was scored, or of its layers (`Graph.layers`).
    """

    path: Path
    manifest: dict[str, Any]
    keep: Keep
    #: Which array `scores` is.
    _array: str = "scores"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open a run directory.

        Raises:
            EaptkError: `path` is not a run, has another schema version, has no row yet, or a file of it is
                missing or truncated.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest is None:
            is_model = (path / "config.json").exists()
            remedy = f"--model {path} --out a/new/folder" if is_model else f"… --out {path}"
            raise EaptkError(f"{path} is not a run (no manifest.json); `eaptk score {remedy}` makes one")
        run = cls(path, manifest, layout(path, manifest)[0])
        if not run.content.begun:
            raise EaptkError(f"run {path} has no row yet; repeat the score command that made it")
        # A broken file is refused here, not in the middle of an analysis.
        run.content.check()
        _ = run.samples, run.columns
        return run

    def __repr__(self) -> str:
        edges = f"{self.n_samples:,} samples × {self.graph.n_edges:,} edges"
        return f"Run({str(self.path)!r}: {edges}, {self.keep.description})"

    @property
    def graph(self) -> Graph:
        return self.keep.kept_graph

    @property
    def n_samples(self) -> int:
        return int(self.manifest["dataset"]["samples"])

    @property
    def complete(self) -> bool:
        """Whether every row is done."""
        return bool(self.done.all())

    @cached_property
    def content(self) -> Rows | Summaries:
        """The files of what is kept of each sample."""
        return layout(self.path, self.manifest)[2]

    def _rows(self) -> Rows:
        if isinstance(self.content, Summaries):
            raise EaptkError(
                f"run {self.path} keeps no rows, only statistics for metrics; "
                f"score it again without metrics-only, into another folder"
            )
        return self.content

    @cached_property
    def scores(self) -> npt.NDArray[Any]:
        """[n_samples, m], memory-mapped and read-only; rows that are not `done` are meaningless.

        A column for each of `columns`; of each sample's strongest edges, the strongest first, for each of its
        `top_columns`; of sums over layer pairs ΣW.

        Raises:
            EaptkError: the run keeps no rows, as it was scored for metrics only.
        """
        return self._rows().read()[self._array]

    @cached_property
    def columns(self) -> Integers:
        """[m]: the edges of `graph` that are kept, ascending; where each sample keeps its strongest, all these are
        chosen from.
        """
        if self.keep.whole:
            return np.arange(self.graph.n_edges)
        path = self.path / "edges.parquet"
        columns: Integers = read_table(path)["column"].to_numpy().astype(np.int64)
        if not self.keep.is_of(columns):
            raise EaptkError(f"{path} lists other edges than the manifest says; {DAMAGED}")
        return columns

    @cached_property
    def top_columns(self) -> npt.NDArray[np.int32] | None:
        """[n_samples, k]: the edges of `scores` where each sample keeps its strongest, memory-mapped; else None."""
        return None if self.keep.top is None else self._rows().read()["columns"]

    def column(self, source: str, destination: str) -> int:
        """The column of `scores` that holds the edge `source`→`destination`, both by name.

        Raises:
            EaptkError: there is no such edge, or it was not kept of every sample.
        """
        edge = self.graph.column(source, destination)
        place = int(np.searchsorted(self.columns, edge))
        if self.top_columns is not None or place == len(self.columns) or self.columns[place] != edge:
            raise EaptkError(
                f"run {self.path} did not keep {source}→{destination} of every sample ({self.keep.description}); "
                f"score it again with edges that hold it"
            )
        return place

    def absolute(self) -> Run:
        """The same run, of sums over layer pairs, with Σ|W| in place of ΣW as its `scores`.

        Raises:
            EaptkError: the run keeps no such sums.
        """
        if not self.keep.layer_pairs:
            raise EaptkError(
                f"run {self.path} kept no sums over layer pairs; score it again with layer_pairs"
            )
        # Runs are compared by their manifests: sums of either kind do not compare with the other.
        return replace(self, manifest={**self.manifest, "sums": "absolute"}, _array="absolute")

    def kept(self, rows: npt.ArrayLike | None = None) -> KeptScores:
        """What was stored of some samples (None: of all that are done), with names, matrices, tables and graphs.

        Raises:
            EaptkError: there is no such sample, it is not done, or the run keeps no rows.
        """
        chosen = np.flatnonzero(self.done) if rows is None else indices(rows, self.n_samples, "sample")
        undone = chosen[self.done[chosen] != 1]
        if len(undone):
            raise EaptkError(
                f"sample {undone[0]} of run {self.path} is not done; score it first, or leave it out"
            )
        arrays = {name: array[chosen] for name, array in self._rows().read().items()}
        columns = arrays.get("columns", self.columns)
        return KeptScores(arrays["scores"], columns, self.graph, chosen, arrays.get("absolute"))

    @property
    def histogram(self) -> Histogram | None:
        """The bins a run without rows was counted in; None for one with rows, which any bins can count."""
        return self.keep.histogram

    @property
    def statistics(self) -> Statistics | None:
        """What a run without rows keeps, as of now; None for a run with rows."""
        if not isinstance(self.content, Summaries):
            return None
        return replace(self.content.read(), columns=None if self.keep.whole else self.columns)

    @property
    def done(self) -> npt.NDArray[np.uint8]:
        """[n_samples]: 1 where the row is complete, as of now."""
        return self.content.done

    def edge_means(self) -> EdgeMeans:
        """Mean |W| and mean W of each edge over the samples that are done, of which there must be one."""
        if self.top_columns is not None:
            return self.kept().means()
        rows = np.flatnonzero(self.done)
        n_samples = np.full(len(self.columns), len(rows))
        if (kept := self.statistics) is not None:
            return EdgeMeans(*kept.means(), self.columns, n_samples)
        uniform = np.full((1, len(rows)), 1 / len(rows))
        absolute = weighted_column_sums(self.scores, uniform, rows, absolute=True)[0]
        signed = weighted_column_sums(self.scores, uniform, rows)[0]
        return EdgeMeans(absolute, signed, self.columns, n_samples)

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
        growing = losses(self.path, self.n_samples)
        try:
            loss = np.array(growing.map())
        except EaptkError:
            # It goes when samples.parquet has the losses, maybe just now.
            samples = self.samples
            if growing.path.exists() or "loss" not in samples.column_names:
                raise
            loss = samples["loss"].to_numpy()
        return np.where(done == 1, loss, np.nan)
