"""The cost model's results as tables on the console and in docs/scale.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.forecast import NODE, WRITING
from benchmarks.outlook import N_SCALING, Forecast, Pace, Scaling

DOCS = Path(__file__).parents[1] / "docs" / "scale.md"
#: Error of a prediction that held-out cases are to stay within.
TOLERANCE = 0.25


def measured_table(measured: dict[str, Any]) -> Table:
    table = Table(
        title=f"measured on one core beside what two constants predict: {measured['rate'] / 1e9:.1f} GFLOP/s and "
        f"{measured['bandwidth'] / 1e9:.1f} GB/s"
    )
    for heading in (
        "model",
        "width × layers",
        "heads",
        "tokens",
        "dials",
        "level",
        "measured s",
        "predicted s",
    ):
        table.add_column(heading, justify="right")
    table.add_column("error", justify="right")
    for case in measured["cases"]:
        dials = "checkpoint" if case["checkpoint"] else ""
        dials += f"flush {case['flush_layers']}" if case["flush_layers"] else ""
        table.add_row(
            case["model"],
            f"{case['width']} × {case['layers']}",
            "/".join(map(str, case["heads"])),
            f"{case['n_samples']} × {case['n_tokens']}",
            dials,
            case["level"],
            f"{min(case['seconds']):.3f}",
            f"{case['predicted']:.3f}",
            f"{case['error']:+.1%}" + (" fitted" if case["fitted"] else " held out"),
        )
    worst = max(abs(case["error"]) for case in measured["cases"] if not case["fitted"])
    team = ", ".join(
        f"{n}: {seconds['measured']:.2f} s (predicted {seconds['predicted']:.2f} s)"
        for n, seconds in measured["team"]["by_processes"].items()
    )
    table.caption = (
        f"largest error of a held-out case: {worst:.1%}, to be within {TOLERANCE:.0%}; processes that shared "
        f"{measured['team']['stretches']} stretches: {team}"
    )
    return table


def predicted_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=f"{title}: predicted from spec sheets, not measured")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


HEADINGS = (
    "model",
    "level",
    "samples",
    "tokens",
    "a replica",
    "GB a card",
    "alone",
    "cards",
    "within",
    "busy",
    "all rows",
    "kept",
)


def cells(each: Forecast) -> list[str]:
    """A row of the table, as text."""
    first = [each.shape, each.level, f"{each.n_samples:,}", f"{each.tokens:,}"]
    if not each.cards:
        return [*first, f"no node of {NODE} holds it", "", "", "", "", "", size(each.rows), ""]
    return [
        *first,
        each.replica,
        f"{each.card_bytes / 1e9:.0f}",
        duration(each.alone),
        f"{each.cards}",
        duration(each.hours),
        f"{each.efficiency:.0%}",
        size(each.rows),
        "all" if each.kept == "all" else f"{each.kept}: {size(each.kept_bytes)}",
    ]


def duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.2g} min"
    return f"{hours:.2g} h" if hours < 99.5 else f"{hours:.0f} h"


def size(n_bytes: float) -> str:
    """In the unit that leaves one to three digits before the point."""
    power = next((i for i in (1, 2, 3) if n_bytes < 999.5 * 1000**i), 4)
    return f"{n_bytes / 1000**power:.3g} {' kMGT'[power]}B"


def scaling_table(curves: Sequence[Scaling]) -> Table:
    n_cards = sorted({cards for each in curves for cards in each.outcomes})
    table = Table(
        title=f"predicted: rows a second of {N_SCALING:,} samples of 512 tokens by cards; below, the share of their "
        f"time that they compute (with all rows kept, on one disk of {WRITING / 1e9:g} GB/s)"
    )
    table.add_column("model")
    for cards in n_cards:
        table.add_column(f"{cards}", justify="right")
    for each in curves:
        texts = []
        for cards in n_cards:
            if cards not in each.outcomes:
                texts.append("")
                continue
            dense, pairs = each.outcomes[cards]
            texts.append(f"{N_SCALING / pairs.seconds:.3g}\n{pairs.efficiency:.0%} ({dense.efficiency:.0%})")
        table.add_row(f"{each.shape}\n{each.level}", *texts)
    return table


PACE_HEADINGS = (
    "model",
    "level",
    "a replica",
    "time over the bare passes",
    "rows/s",
    "a row",
    "replicas that fill the disk",
    "longest sample",
)


def pace_cells(each: Pace) -> list[str]:
    full = each.until_full
    return [
        each.shape,
        each.level,
        each.replica,
        f"{each.overhead:.2f}×",
        f"{each.rate:.2g}",
        size(each.row_bytes),
        f"{full:,.0f}" if full >= 10 else f"{full:.2g}",
        f"{each.longest:,}",
    ]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def docs_tables(forecasts: Sequence[Forecast], paces: Sequence[Pace]) -> dict[str, str]:
    """The tables of docs/scale.md, by the name that stands before each."""
    return {
        "ask": markdown(HEADINGS, [cells(each) for each in forecasts]),
        "rows": markdown(PACE_HEADINGS, [pace_cells(each) for each in paces]),
    }


def place(name: str) -> re.Pattern[str]:
    """Where a table stands in docs/scale.md."""
    return re.compile(
        rf"(?<=<!-- {name}: benchmarks\.cost_model -->\n)(?:(?!<!--).)*(?=\n<!-- end -->)", re.DOTALL
    )


def write_docs(tables: Mapping[str, str]) -> None:
    text = DOCS.read_text()
    for name, table in tables.items():
        text = place(name).sub(lambda _, table=table: table, text)  # type: ignore[misc]
    DOCS.write_text(text)
