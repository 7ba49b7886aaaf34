"""A tool's scores as eaptk numbers them, and how far two are apart.

What differs between tools: the order of nodes, key and value heads once a query head or once a group, and edges
that one of them lacks. A node is known by its name. Whether a tool patches or ablates, on which prompt it takes the
gradient and at which granularity is no matter of conversion: eaptk is asked for the same (`Form`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eaptk import Graph
from eaptk.errors import EaptkError

Matrix = npt.NDArray[np.float64]


def numbered(
    scores: npt.ArrayLike, sources: Sequence[str], destinations: Sequence[str], graph: Graph
) -> Matrix:
    """[n_sources, n_destinations] as `graph` has them; NaN where the tool has no such edge.

    Args:
        scores: [sources, destinations] by the tool, with the names of both. Where it has a key or value head for
            every query head, those of a group are added up: each read the same stream.

    Raises:
        EaptkError: a name or the shape is not of this graph.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(sources), len(destinations)):
        raise EaptkError(
            f"scores are {scores.shape}, for {len(sources)} sources and {len(destinations)} destinations"
        )
    row = {node.name: i for i, node in enumerate(graph.sources)}
    column = {node.name: i for i, node in enumerate(graph.destinations)}
    read = [_grouped(name, graph, ungrouped=_is_ungrouped(destinations, graph)) for name in destinations]
    unknown = [name for name in sources if name not in row] + [name for name in read if name not in column]
    if unknown:
        raise EaptkError(f"the tool scored {unknown[0]!r}, which is no node of the graph")
    matrix = np.full((graph.n_sources, graph.n_destinations), np.nan)
    rows = [row[name] for name in sources]
    reach = graph.reach[[column[name] for name in read]]
    if not np.isfinite(scores[np.array(rows)[:, None] < reach]).all():
        raise EaptkError("its scores are not finite")
    for name, values in zip(read, scores.T, strict=True):
        before = matrix[rows, column[name]]
        matrix[rows, column[name]] = np.where(np.isnan(before), values, before + values)
    matrix[np.arange(graph.n_sources)[:, None] >= graph.reach] = np.nan
    return matrix


def relative_errors(scores: Matrix, exact: Matrix, graph: Graph) -> dict[str, float]:
    """Relative Frobenius distance over the edges both have: of ``all``, and of those into each kind of destination.

    Queries and keys move the loss far less than values do: an error of theirs alone would not be seen in the whole.
    """
    kinds = np.array([node.branch or node.kind for node in graph.destinations])
    shared = ~np.isnan(scores) & ~np.isnan(exact)
    errors = {}
    for kind in ("all", *dict.fromkeys(kinds.tolist())):
        at = shared & (True if kind == "all" else kinds == kind)
        if not at.any():
            raise EaptkError(f"no edge into {kind} is in both, so nothing can be compared")
        errors[kind] = float(np.linalg.norm(scores[at] - exact[at]) / np.linalg.norm(exact[at]))
    return errors


def share_compared(scores: Matrix, exact: Matrix) -> float:
    """Of the edges that `exact` has, how many `scores` has too."""
    has = ~np.isnan(exact)
    return float((~np.isnan(scores) & has).sum() / has.sum())


def _is_ungrouped(destinations: Sequence[str], graph: Graph) -> bool:
    return f"a0.h{graph.n_kv_heads}<k>" in destinations


def _grouped(name: str, graph: Graph, ungrouped: bool) -> str:
    found = re.fullmatch(r"(a\d+)\.h(\d+)<([kv])>", name)
    if found is None or not ungrouped:
        return name
    layer, head, branch = found.groups()
    return f"{layer}.h{int(head) * graph.n_kv_heads // graph.n_heads}<{branch}>"
