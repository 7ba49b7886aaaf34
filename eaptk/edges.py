"""Which edges a run is to keep: from columns, names, patterns, a file, or an earlier run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eaptk.errors import EaptkError
from eaptk.files import differences_between
from eaptk.graph import Graph, Node
from eaptk.store import Run, opened
from eaptk.sweep import Integers, indices

if TYPE_CHECKING:
    import pandas

_ARROWS = ("→", "->")


def choose_edges(graph: Graph, given: Any) -> Integers:
    """The columns of some edges of a graph, in ascending order.

    Args:
        given: one of

            - columns, or a boolean mask [n_edges];
            - a pattern ``source->destination`` (or ``→``), where ``*`` and ``?`` stand for any characters and for
              one: ``"*->a1?.h3<q>"``; several separated by commas, or as a list;
            - a table (`pandas.DataFrame`) with the columns ``source`` and ``destination``, or ``column``;
            - a file: such a table as .parquet or .csv (`compare` and runs write them), columns or a mask as .npy, a
              pattern a line as .txt;
            - the folder of a run: the edges that it kept; with ``:n`` after it, or of an open `Run` by
              `strongest`, its n strongest.

    Raises:
        EaptkError: there is no such edge, file or run, or it is of another graph.
    """
    if isinstance(given, (str, os.PathLike)):
        return _named(graph, os.fspath(given))
    if hasattr(given, "columns") and hasattr(given, "iloc"):
        return _of_table(graph, given)
    given = list(given) if isinstance(given, Iterable) and not hasattr(given, "dtype") else given
    if isinstance(given, list) and given and all(isinstance(name, str) for name in given):
        return _matching(graph, given)
    columns = indices(given, graph.n_edges, "edge")
    chosen = np.unique(columns)
    if not len(chosen):
        raise EaptkError("no edge is selected; leave the selection out to keep all")
    if len(columns) == graph.n_edges > 2 and chosen[-1] <= 1 and np.asarray(given).dtype != bool:
        raise EaptkError(f"{graph.n_edges:,} numbers, all 0 or 1, are a mask; make them booleans")
    return chosen


def strongest(run: Run, n: int) -> Integers:
    """The columns of the `n` edges of largest mean |W| over a run's finished samples, in ascending order.

    Of a run that kept each sample's strongest edges alone, those of the largest Σ|W| where they were kept: the mean if
    all else were 0, and at most as far from it as the weakest that was kept.

    Raises:
        EaptkError: the run has no row yet, kept sums over layer pairs, or knows fewer edges.
    """
    run = opened(run)
    if run.keep.layer_pairs:
        raise EaptkError(f"run {run.path} kept sums over layer pairs, so which edges are strong is unknown")
    if not run.done.any():
        raise EaptkError(f"no row of {run.path} is done; score it first")
    means = run.edge_means()
    if not 1 <= n <= len(means.columns):
        raise EaptkError(f"run {run.path} kept {len(means.columns):,} edges; its {n:,} strongest are unknown")
    # A stable sort: of equal ones the first.
    return np.sort(means.columns[np.argsort(-means.total, kind="stable")[:n]])


def _named(graph: Graph, name: str) -> Integers:
    # Not Path.is_dir: it fails on what is too long for a path, as many names are.
    if os.path.isdir(name):
        return _of_run(graph, Path(name))
    folder, colon, number = name.rpartition(":")
    if colon and number.isdecimal() and os.path.exists(os.path.join(folder, "manifest.json")):
        return strongest(_same_graph(graph, Run.open(folder)), int(number))
    if os.path.isfile(name):
        return _of_file(graph, Path(name))
    if any(arrow in name for arrow in _ARROWS):
        return _matching(graph, name.split(","))
    raise EaptkError(
        f"edges {name!r} are neither a file nor a run, and no pattern like 'a*.h3->m*'; RUN:1000 stands for the "
        f"1,000 strongest of a run"
    )


def _of_run(graph: Graph, folder: Path) -> Integers:
    run = _same_graph(graph, Run.open(folder))
    if run.keep.top is not None:
        raise EaptkError(
            f"run {folder} kept other edges of each sample; {folder}:{run.keep.top} stands for its {run.keep.top:,} "
            f"strongest overall"
        )
    return run.columns


def _same_graph(graph: Graph, run: Run) -> Run:
    if run.keep.layer_pairs:
        raise EaptkError(f"run {run.path} kept sums over layer pairs, and no single edge")
    if differences := differences_between(run.graph.to_dict(), graph.to_dict()):
        raise EaptkError(f"run {run.path} has edges of another graph: {'; '.join(differences.values())}")
    return run


def _of_file(graph: Graph, path: Path) -> Integers:
    import pandas

    try:
        if path.suffix == ".npy":
            return choose_edges(graph, np.load(path))
        if path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8").splitlines()
            return choose_edges(graph, [line for line in lines if line.strip()])
        if path.suffix == ".csv":
            return _of_table(graph, pandas.read_csv(path))
        if path.suffix == ".parquet":
            return _of_table(graph, pandas.read_parquet(path))
    except (OSError, ValueError, EOFError) as error:
        raise EaptkError(f"{path} cannot be read as edges: {error}") from error
    except EaptkError as error:
        raise EaptkError(f"{path}: {error}") from error
    raise EaptkError(f"{path} is no file of edges; give .npy, .parquet, .csv or .txt")


def _of_table(graph: Graph, table: pandas.DataFrame) -> Integers:
    named = {"source", "destination"} <= set(table.columns)
    if not named and "column" not in table.columns:
        raise EaptkError("the table has neither 'source' and 'destination' nor 'column', so no edges")
    if not len(table):
        raise EaptkError("the table has no edge")
    if not named:
        return choose_edges(graph, table["column"].to_numpy())
    places = [
        _places(table[role].to_numpy(), nodes, role)
        for role, nodes in (("source", graph.sources), ("destination", graph.destinations))
    ]
    missing = np.flatnonzero(places[0] >= graph.reach[places[1]])
    if len(missing):
        edge = table.iloc[missing[0]]
        raise EaptkError(
            f"the table has {edge['source']}→{edge['destination']}, which is no edge of this graph"
        )
    return np.unique(graph.offset[places[1]] + places[0])


def _places(names: npt.NDArray[Any], nodes: Sequence[Node], role: str) -> Integers:
    """The number of each named node among `nodes`."""
    import pandas

    found = pandas.Index([node.name for node in nodes]).get_indexer(names)
    if (found < 0).any():
        raise EaptkError(f"the table has the {role} {names[found < 0][0]!r}, which this graph lacks")
    return np.asarray(found, dtype=np.int64)


def _matching(graph: Graph, patterns: Sequence[str]) -> Integers:
    chosen = np.zeros(graph.n_edges, dtype=bool)
    for pattern in patterns:
        arrow = next((arrow for arrow in _ARROWS if arrow in pattern), None)
        if arrow is None:
            raise EaptkError(f"{pattern!r} names no edge; write SOURCE->DESTINATION, as in 'a*.h3->m*'")
        ends = [end.strip() for end in pattern.split(arrow, 1)]
        source, destination = (
            np.array([fnmatchcase(node.name, end) for node in nodes])
            for nodes, end in zip((graph.sources, graph.destinations), ends, strict=True)
        )
        matches = source[graph.edge_source] & destination[graph.edge_destination]
        if not matches.any():
            raise EaptkError(
                f"no edge is called {pattern.strip()!r}; {_nearest(graph, ends, source, destination)}"
            )
        chosen |= matches
    return np.flatnonzero(chosen)


def _nearest(
    graph: Graph, ends: Sequence[str], source: npt.NDArray[np.bool_], destination: npt.NDArray[np.bool_]
) -> str:
    """Why a pattern matches nothing."""
    for role, end, found, nodes in (
        ("source", ends[0], source, graph.sources),
        ("destination", ends[1], destination, graph.destinations),
    ):
        if not found.any():
            some = dict.fromkeys(node.name for node in (*nodes[:3], nodes[-1]))
            return f"no {role} is {end!r}: they are called {', '.join(list(some))}, …"
    return f"every {ends[0]!r} is written after each {ends[1]!r} reads"
