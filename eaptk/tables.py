"""Tables the command line prints. Names are shown to the letter, whatever brackets or colons they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from eaptk.cards import COPIES, PASSES, PRODUCTS, Card
from eaptk.errors import EaptkError
from eaptk.files import DAMAGED
from eaptk.graph import Graph
from eaptk.identities import Check
from eaptk.plan import MARGIN, Plan
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

    graph, done, samples = run.keep.graph, run.done == 1, run.samples
    n_prompt, n_answer = (int(sum(samples[f"n_{part}_tokens"].to_pylist())) for part in ("prompt", "answer"))
    cut = f", cut {fact('cut')}" if fact("cut") else ""
    facts = {
        "model": f"{fact('model', 'id')} ({fact('model', 'type')}, {fact('model', 'dtype')})",
        "weights": fact("model", "weights"),
        "data": fact("provenance", "data"),
        "graph": f"{graph.granularity}, q/k/v {graph.qkv}",
        "edges": f"{graph.n_edges:,} ({graph.n_sources} sources, {graph.n_destinations} destinations)",
        "method": f"{fact('ablation')} ablation, loss {fact('loss')}{cut}",
        "rows": f"{done.sum():,} of {run.n_samples:,} done, {run.keep.description}",
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
    """The `top` edges of the largest mean |W| over the rows that are done; there must be one.

    Where each sample kept its strongest, of the largest Σ|W| over those that kept the edge.
    """
    means = run.edge_means()
    layers, chosen = run.keep.layer_pairs, run.keep.top is not None
    sums = run.absolute().edge_means().absolute if layers else None
    weight = "ΣW" if layers else "W"
    table = _table("strongest pairs of layers" if layers else "strongest edges")
    table.add_column("pair" if layers else "edge")
    for heading in (
        *([f"samples of {int(run.done.sum()):,}"] if chosen else []),
        f"mean |{weight}|",
        f"mean {weight}",
        *(["mean Σ|W|"] if layers else []),
    ):
        table.add_column(heading, justify="right")
    if chosen:
        table.caption = "means over the samples that kept the edge; ordered by their sums"
        table.caption_justify = "left"
    order = np.argsort(-means.total, kind="stable")[:top]
    for place in order:
        _add(
            table,
            run.graph.edge_name(int(means.columns[place])),
            *([f"{means.n_samples[place]:,}"] if chosen else []),
            f"{means.absolute[place]:.4e}",
            f"{means.signed[place]:+.4e}",
            *([] if sums is None else [f"{sums[place]:.4e}"]),
        )
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


def plan_tables(name: str, plan: Plan, card: Card) -> list[Table]:
    """What scoring one sample will take: memory, work and time, and what was chosen."""
    work, layers = plan.work, plan.work.graph.n_layers
    group = (
        f"{plan.flush_layers} of {layers} layers" if plan.flush_layers < layers else f"all {layers} layers"
    )
    by_head = work.graph.granularity == "head"
    memory = _table(f"{name}, {work.n_tokens:,} tokens, {work.graph.granularity} level, {card.name}: memory")
    for heading, justify in (("part", "left"), ("GB", "right"), ("what", "left")):
        memory.add_column(heading, justify=justify)  # type: ignore[arg-type]
    kept = f"the inputs of {layers} layers; the rest is computed again" if plan.checkpoint else ""
    for part, size, what in (
        ("weights", work.weights, f"{work.itemsize} bytes each"),
        (
            "kept by autograd",
            layers * (work.stream if plan.checkpoint else work.kept),
            kept or f"of {layers} layers, as without attribution",
        ),
        *([("one layer again", work.kept, "while it is run again")] if plan.checkpoint else []),
        (
            "sources",
            work.sources,
            f"what {work.graph.n_sources:,} nodes wrote" + ", before projection" * by_head,
        ),
        ("gradients", plan.waiting, f"of {group} at a time, and the streams their norms read"),
        ("logits", work.logits, f"at {work.n_loss:,} positions with loss, and what the loss makes of them"),
        ("scratch", work.scratch(work.readers), "of the contraction, at most"),
        ("rows", work.rows, f"{work.graph.n_edges:,} edges"),
    ):
        _add(memory, part, f"{size / 1e9:.3f}", what)
    total, budget = work.weights + plan.peak, work.weights + plan.memory
    verdict = "fits" if plan.fits else f"does not fit with {MARGIN - 1:.0%} to spare for what is estimated"
    _add(
        memory,
        Text("peak", "bold"),
        Text(f"{total / 1e9:.3f}", "bold"),
        f"of {budget / 1e9:.1f} GB: {verdict}; not the sum, as parts come and go "
        f"(bare passes: {(work.weights + work.bare_peak(plan.checkpoint)) / 1e9:.3f})",
    )
    time = _table("work and time, predicted from the spec sheet, not measured")
    for heading, justify in (("part", "left"), ("TFLOP", "right"), ("ms", "right"), ("what", "left")):
        time.add_column(heading, justify=justify)  # type: ignore[arg-type]
    seconds = plan.seconds(card)
    for part, flops, what in (
        ("passes", work.bare_flops, "forward, and backward to activations: 4 FLOPs a weight and token"),
        ("recomputation", work.recompute_flops, "every layer forward once more"),
        ("expansion", work.expansion_flops(plan.flush_layers), "heads to the model's width"),
        ("contraction", work.contraction_flops(plan.flush_layers), f"in flush groups of {group}"),
    ):
        if seconds[part]:
            _add(time, part, f"{flops / 1e12:.4g}", f"{1e3 * seconds[part]:.4g}", what)
    _add(
        time,
        Text("overhead", "bold"),
        "",
        Text(f"{plan.overhead(card):.3f}×", "bold"),
        "the bare passes" + (", recomputation included" if plan.checkpoint else ""),
    )
    time.caption = Text(
        f"{card.source}: {card.rate(work.itemsize) / 1e12:g} TFLOP/s, {card.bandwidth / 1e12:g} TB/s. Assumed shares "
        f"of these: passes {PASSES:.0%}, contraction {PRODUCTS:.0%} of FLOPs and {COPIES:.0%} of bandwidth."
    )
    time.caption_justify = "left"
    return [memory, time]


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
