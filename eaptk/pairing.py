"""Which samples of which runs may be held against each other.

Samples are paired by id. An id that a dataset does not give is a line number, so equal ids alone do not make
equal samples: wherever the tokens of two runs can be compared, they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.metrics import ScoredRun
from eaptk.sweep import Doubles, Integers, indices

if TYPE_CHECKING:
    import pyarrow

#: What two runs must share to be comparable, as keys of the manifest.
_MUST_AGREE = ("ablation", "loss", "cut", "max_new_tokens", "sums")


class PairedRun(ScoredRun, Protocol):
    """What is compared of a run; `eaptk.Run` is one."""

    @property
    def manifest(self) -> dict[str, Any]: ...
    @property
    def samples(self) -> pyarrow.Table: ...
    @property
    def loss(self) -> Doubles: ...


@dataclass(frozen=True)
class Pairing:
    """The samples that are done in every one of k runs.

    Args:
        ids: [n] of the shared samples, in the baseline's order.
        rows: [k] of [n], their rows in each run.
        groups: [n], the same integer for samples of one group; a sample without a group is one of its own.
        n_dropped: [k], how many finished samples of each run, of those asked for, are not shared.
        notes: what could not be verified or differs without forbidding a comparison, a sentence each.
    """

    ids: tuple[str, ...]
    rows: tuple[Integers, ...]
    groups: Integers
    n_dropped: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def n_groups(self) -> int:
        return int(self.groups.max()) + 1


def run_names(runs: Sequence[PairedRun], names: Sequence[str] | None) -> tuple[str, ...]:
    """The names given, checked; without any, the runs' folders (their paths where folders are called alike).

    Raises:
        EaptkError: not one name a run, a name given twice, or a run given twice.
    """
    if names is not None:
        given = tuple(names)
        if len(given) != len(runs):
            raise EaptkError(f"there are {len(given)} names for {len(runs)} runs; give one each")
        if len(set(given)) < len(given):
            twice = max(given, key=given.count)
            raise EaptkError(f"the name {twice!r} is given twice; give each run one of its own")
        return given
    paths = [Path(run.path).resolve() for run in runs]
    if len(set(paths)) < len(paths):
        one = runs[paths.index(max(paths, key=paths.count))]
        raise EaptkError(f"run {one.path} is given twice; a run does not differ from itself")
    short = tuple(path.name for path in paths)
    return short if len(set(short)) == len(short) else tuple(str(run.path) for run in runs)


def pair(runs: Sequence[PairedRun], names: Sequence[str], ids: Collection[str] | None = None) -> Pairing:
    """Pair the samples of runs by id, and verify that equal ids mean equal samples.

    Args:
        runs, names: of k runs.
        ids: pair only these samples; None for all.

    With equal tokenizers the tokens of the prompts must be equal, and those of the answers unless each model
    gave its own (loss ``self_nll``). With different ones a note says that this could not be verified.

    Raises:
        EaptkError: runs differ in graph, ablation, loss, cut or longest own answer; fewer than two shared
            samples or groups; or a run has another prompt, answer or group for a sample than the baseline.
    """
    _check_comparable(runs)
    tables = [run.samples.select(["id", "group", "prompt_ids", "answer_ids"]) for run in runs]
    where = [
        {
            name: row
            for row, (name, done) in enumerate(zip(table["id"].to_pylist(), run.done, strict=True))
            if done
        }
        for run, table in zip(runs, tables, strict=True)
    ]
    if ids is not None:
        wanted = set(ids)
        where = [{name: row for name, row in rows.items() if name in wanted} for rows in where]
    shared = [name for name in where[0] if all(name in rows for rows in where[1:])]
    if len(shared) < 2:
        raise EaptkError(
            f"runs {' and '.join(str(run.path) for run in runs)} share {len(shared)} finished samples"
            f"{'' if ids is None else ' of those asked for'}; "
            f"a comparison needs two (samples are paired by id)"
        )
    n_dropped = tuple(len(rows) - len(shared) for rows in where)
    rows = tuple(np.array([rows[name] for name in shared]) for rows in where)
    tables = [table.take(index) for table, index in zip(tables, rows, strict=True)]
    for run, table in zip(runs[1:], tables[1:], strict=True):
        _check_same_samples(shared, (runs[0], run), (tables[0], table))

    labels = tables[0]["group"].to_pylist()
    keys = [
        ("id", name) if label is None else ("group", label)
        for name, label in zip(shared, labels, strict=True)
    ]
    number: dict[tuple[str, str], int] = {}
    groups = np.array([number.setdefault(key, len(number)) for key in keys])
    if len(number) < 2:
        raise EaptkError(
            f"all {len(shared)} shared samples belong to one group; an interval needs at least two"
        )
    return Pairing(tuple(shared), rows, groups, n_dropped, _notes(runs, names))


def shared_columns(
    runs: Sequence[PairedRun], columns: npt.ArrayLike | None
) -> tuple[Integers, tuple[str, ...]]:
    """The edges to compare, `columns` or all that every run kept, and a note if a run kept others as well.

    Raises:
        EaptkError: there are none.
    """
    if columns is not None:
        return np.unique(indices(columns, runs[0].graph.n_edges, "edge")), ()
    shared = runs[0].columns
    for run in runs[1:]:
        if not np.array_equal(shared, run.columns):
            if run.top_columns is not None:
                raise EaptkError(
                    f"the strongest edges of a sample were chosen from {len(shared):,} in {runs[0].path} and from "
                    f"others in {run.path}; score both alike to compare them"
                )
            shared = np.intersect1d(shared, run.columns, assume_unique=True)
    if not len(shared):
        raise EaptkError(
            f"runs {' and '.join(str(run.path) for run in runs)} kept no edge in common; score them with the same"
        )
    if all(len(run.columns) == len(shared) for run in runs):
        return shared, ()
    kept = ", ".join(f"{len(run.columns):,} ({run.path})" for run in runs)
    return shared, (f"compared on the {len(shared):,} edges that all runs kept; they kept {kept}",)


def _check_comparable(runs: Sequence[PairedRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for name, ours, theirs in [
            *((key, first.manifest.get(key), run.manifest.get(key)) for key in _MUST_AGREE),
            ("graph", first.graph.to_dict(), run.graph.to_dict()),
            ("strongest edges kept of a sample", _n_strongest(first), _n_strongest(run)),
        ]:
            if ours != theirs:
                raise EaptkError(
                    f"runs differ in {name}: {first.path} has {_changed(ours, theirs)}, "
                    f"{run.path} has {_changed(theirs, ours)}; score both alike to compare them"
                )


def _n_strongest(run: PairedRun) -> int | None:
    return None if run.top_columns is None else run.top_columns.shape[1]


def _changed(value: Any, other: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    return ", ".join(f"{key}={item!r}" for key, item in value.items() if other.get(key) != item)


def _check_same_samples(
    ids: Sequence[str], runs: tuple[PairedRun, PairedRun], tables: tuple[pyarrow.Table, pyarrow.Table]
) -> None:
    ours, theirs = runs
    if _same_tokenizer(ours, theirs):
        own_answers = ours.manifest["loss"] == "self_nll"
        for column, what in (("prompt_ids", "prompt"), ("answer_ids", "answer"))[: 1 if own_answers else 2]:
            row = _first_difference(tables, column)
            if row is not None:
                raise EaptkError(
                    f"sample {ids[row]!r} has one {what} in {ours.path} and another in {theirs.path}; samples "
                    f"are paired by id: give the records of both datasets an 'id' that names the question, "
                    f"and score again"
                )
    row = _first_difference(tables, "group")
    if row is not None:
        labels = [table["group"][row].as_py() for table in tables]
        raise EaptkError(
            f"sample {ids[row]!r} belongs to group {labels[0]!r} in {ours.path} and {labels[1]!r} in "
            f"{theirs.path}; give it one group in both datasets and score again"
        )


def _first_difference(tables: tuple[pyarrow.Table, pyarrow.Table], column: str) -> int | None:
    if tables[0][column].equals(tables[1][column]):
        return None
    both = zip(*(table[column].to_pylist() for table in tables), strict=True)
    return next((row for row, (ours, theirs) in enumerate(both) if ours != theirs), None)


def _same_tokenizer(run: PairedRun, other: PairedRun) -> bool:
    # Two runs without one were both given tokens, which compare as they are.
    return bool(run.manifest["tokenizer"] == other.manifest["tokenizer"])


def _notes(runs: Sequence[PairedRun], names: Sequence[str]) -> tuple[str, ...]:
    notes = []
    others = [name for run, name in zip(runs, names, strict=True) if not _same_tokenizer(runs[0], run)]
    if others:
        notes.append(
            f"tokenizers differ: that {', '.join(others)} had the prompts of {names[0]} could not be verified"
        )
    dtypes = [run.manifest["model"]["dtype"] for run in runs]
    if len(set(dtypes)) > 1:
        each = ", ".join(f"{dtype} ({name})" for dtype, name in zip(dtypes, names, strict=True))
        notes.append(f"model dtypes differ: {each}; part of a difference may be rounding")
    short = [n for run, n in zip(runs, names, strict=True) if run.manifest.get("row_dtype") == "float16"]
    if short:
        notes.append(
            f"scores of {', '.join(short)} were stored as float16: below 6e-5 with few digits, below 3e-8 as 0"
        )
    return tuple(notes)
