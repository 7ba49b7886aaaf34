"""Figures of records, as SVG that is the same bytes for the same record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.floor.passes import LEVELS
from benchmarks.floor.tables import bounds
from benchmarks.report.floor import right
from benchmarks.report.peers import timed
from eaptk.figures import INK, STYLE

COLOURS = {"block": "#2166ac", "head": "#b2182b"}
OWN, OTHER = "#2166ac", "#85858f"
LABELS = {"peer": "peer", "eaptk": "eaptk, asked for the same"}


def floor_figure(cases: list[dict[str, Any]]) -> Figure:
    """Ratio to the bare passes with its interval, a row a case, a panel a level."""
    shown = right(cases)
    figure = Figure(figsize=(10, 1.4 + 0.3 * len(shown)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    places = range(len(shown))
    for axes, level in zip(panels, LEVELS, strict=True):
        found = [case[level] for case in shown]
        for place, each in zip(places, found, strict=True):
            style = "-" if each["ratio"]["interval"] else ":"
            axes.plot(bounds(each["ratio"]), [place, place], style, color=COLOURS[level], lw=2.5, alpha=0.45)
        medians = [each["ratio"]["median"] for each in found]
        axes.plot(
            medians,
            places,
            "o",
            color=COLOURS[level],
            ms=5,
            label="measured: median, interval (dotted: all of too few rounds)",
        )
        by_flops = [each["flop_ratio"] for each in found]
        axes.plot(by_flops, places, "|", color=INK, ms=9, label="by FLOPs alone")
        title = f"{level} level"
        for target in {each["target"] for each in found} - {None}:
            axes.axvline(target, color=INK, lw=0.8, ls="--")
            title += f"\nat most {target:.2f} wanted from 256 tokens on"
        axes.axvline(1, color="0.7", lw=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("times the bare forward and backward pass")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    panels[0].set_yticks(places, [case["name"] for case in shown], fontsize=7)
    panels[0].invert_yaxis()
    return figure


def peers_figure(found: list[dict[str, Any]], tokens: int) -> Figure:
    """Seconds beside the bare passes, and memory above the model, of each peer and of eaptk asked for the same."""
    shown = timed(found)
    figure = Figure(figsize=(10, 1.6 + 0.5 * len(shown)), layout="constrained")
    left, right_ = figure.subplots(1, 2, sharey=True)
    pairs = [
        {who: each["seconds"]["ratio"][f"{who} / bare"]["median"] for who in ("peer", "eaptk")}
        for each in shown
    ]
    _dots(left, pairs, [1.0] * len(shown), "times the bare forward and backward pass", "{:.2f}")
    memory = [
        {who: each["memory"]["bytes"][who][-1] / 1e6 for who in ("peer", "eaptk", "bare")} for each in shown
    ]
    bare = [each["bare"] for each in memory]
    _dots(right_, memory, bare, "MB resident above the model", "{:,.0f}")
    names = [f"{each['peer']} ({each['form']['granularity']})" for each in shown]
    left.set_yticks(range(len(shown)), names)
    left.set_ylim(len(shown) - 0.4, -0.6)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    first = shown[0]
    figure.suptitle(
        f"{first['shape']}, {first['layers']} layers, one sample of {tokens} tokens, CPU", fontsize=10
    )
    return figure


def _dots(axes: Axes, pairs: list[dict[str, float]], starts: list[float], label: str, text: str) -> None:
    """A dot a value, and a thin line to it from what the bare passes take: a logarithmic axis has no 0 for bars."""
    rows = range(len(pairs))
    bottoms, tops = [row - 0.4 for row in rows], [row + 0.4 for row in rows]
    axes.vlines(starts, bottoms, tops, color=INK, lw=1.2, label="bare passes", zorder=1)
    for shift, who, colour in ((-0.2, "peer", OTHER), (0.2, "eaptk", OWN)):
        values = [pair[who] for pair in pairs]
        places = [row + shift for row in rows]
        axes.hlines(places, starts, values, color=colour, lw=1.2, zorder=2)
        axes.plot(values, places, "o", color=colour, ms=6, label=LABELS[who], zorder=3)
        for value, start, place in zip(values, starts, places, strict=True):
            # On the side that the line does not come from.
            side = 1 if value >= start else -1
            axes.annotate(
                text.format(value),
                (value, place),
                xytext=(6 * side, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=7,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.2)
    axes.set_xlabel(label)


def save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
