"""Tables the command line prints. Names are shown to the letter, whatever brackets or colons they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from eaptk.errors import EaptkError
from eaptk.files import DAMAGED
from eaptk.graph import Graph
from eaptk.identities import Check
from eaptk.store import Run


def run_facts(run: Run) -> Table:
    """What was run, and how far it is.

    Raises:
        EaptkError: the manifest lacks an entry.
    """

    def fact(*keys: str) -> Any:
        found: Any = run.manifest
        for key in keys:
            if not isinstance(found, dict) or key not in found:
                name = run.path / "manifest.json"
                raise EaptkError(f"{name} is damaged: it has no {'.'.join(keys)!r}; {DAMAGED}")
            found = found[key]
        return found

    graph, done, samples = run.graph, run.done == 1, run.samples
    n_prompt, n_answer = (int(sum(samples[f"n_{part}_tokens"].to_pylist())) for part in ("prompt", "answer"))
    cut = f", cut {fact('cut')}" if fact("cut") else ""
    kept = run.histogram
    stored = fact("row_dtype") if kept is None else f"metrics only: {kept.bins} bins on [0, {kept.upper:g}]"
    facts = {
        "model": f"{fact('model', 'id')} ({fact('model', 'type')}, {fact('model', 'dtype')})",
        "weights": fact("model", "weights"),
        "data": fact("provenance", "data"),
        "graph": f"{graph.granularity}, q/k/v {graph.qkv}",
        "edges": f"{graph.n_edges:,} ({graph.n_sources} sources, {graph.n_destinations} destinations)",
        "method": f"{fact('ablation')} ablation, loss {fact('loss')}{cut}",
        "rows": f"{done.sum():,} of {run.n_samples:,} done, {stored}",
        "tokens": f"{n_prompt:,} of prompts, {n_answer:,} of answers",
        **({"mean loss": f"{run.loss[done].mean():.6g}"} if done.any() else {}),
        "command": fact("provenance", "command"),
        "started": fact("provenance", "started"),
    }
    table = _table(str(run.path), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        _add(table, name, value)
    return table


def strongest_edges(run: Run, top: int) -> Table:
    """The `top` edges of the largest mean |W| over the rows that are done; there must be one."""
    strength, signed = run.edge_means()
    table = _table("strongest edges")
    table.add_column("edge")
    table.add_column("mean |W|", justify="right")
    table.add_column("mean W", justify="right")
    for column in np.argsort(-strength, kind="stable")[:top]:
        _add(table, run.graph.edge_name(int(column)), f"{strength[column]:.4e}", f"{signed[column]:+.4e}")
    return table


def graph_facts(name: str, config: Any, graphs: Sequence[Graph]) -> Table:
    """The sizes of a model's graphs."""
    first = graphs[0]
    kind = "parallel" if first.parallel else "serial"
    table = _table(
        f"{name}: {config.model_type}, {first.n_layers} {kind} layers, width {config.hidden_size}, "
        f"{first.n_heads} query and {first.n_kv_heads} key/value heads"
    )
    table.add_column("granularity")
    for heading in ("sources", "destinations", "edges", "bytes a row"):
        table.add_column(heading, justify="right")
    for graph in graphs:
        numbers = (graph.n_sources, graph.n_destinations, graph.n_edges, 4 * graph.n_edges)
        _add(table, graph.granularity, *(f"{number:,}" for number in numbers))
    return table


def identities(name: str, checks: Sequence[Check]) -> Table:
    """Which identities hold, how closely, and where least."""
    table = _table(f"{name}: identities")
    table.add_column("identity")
    table.add_column("relative error", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("")
    table.add_column("worst at")
    for check in checks:
        verdict = Text("pass", style="green") if check.passed else Text("FAIL", style="bold red")
        _add(table, check.name, f"{check.error:.1e}", f"{check.tolerance:.0e}", verdict, check.where)
    return table


def _table(title: str, show_header: bool = True) -> Table:
    return Table(title=Text(title, "table.title"), title_justify="left", show_header=show_header)


def _add(table: Table, *cells: RenderableType) -> None:
    # A plain string would be read as markup: brackets as styles, colons as emoji.
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
