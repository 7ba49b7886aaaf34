"""The cost model's results as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks import record
from benchmarks.cost_tables import TOLERANCE
from benchmarks.forecast import SHAPES, WRITING, Machine, Replica, work_of
from benchmarks.outlook import LEVELS, N_SCALING, Scaling
from eaptk.cards import CARDS
from eaptk.graph import Granularity
from eaptk.plan import Plan

COLORS = {"bare": "tab:gray", "block": "tab:blue", "head": "tab:orange"}


def plot(measured: dict[str, Any], curves: Sequence[Scaling]) -> Path:
    """Measured batches against predicted ones, both on one curve with large shapes, and samples a second by cards."""
    figure = Figure(figsize=(17, 5.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _plot_errors(left, measured)
    _plot_batches(middle, measured)
    _plot_scaling(right, curves)
    path = record.RESULTS / "cost_model.png"
    figure.savefig(path, dpi=130)
    return path


def _plot_errors(axes: Any, measured: dict[str, Any]) -> None:
    _scatter(axes, measured, "predicted")
    ends = [0.2, 2.5]
    axes.plot(ends, ends, color="0.5", lw=1)
    for factor in (1 - TOLERANCE, 1 + TOLERANCE):
        axes.plot(ends, [end / factor for end in ends], ":", color="0.5", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="seconds predicted", ylabel="seconds measured")
    for axis in (axes.xaxis, axes.yaxis):
        # Less than a decade or two: plain numbers, and few enough to stand side by side.
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set_title(f"One core, two constants; dotted: errors of {TOLERANCE:.0%}", fontsize=10)
    axes.legend(fontsize=7)


def _scatter(axes: Any, measured: dict[str, Any], by: str) -> None:
    for level, color in COLORS.items():
        for fitted, face in ((True, color), (False, "none")):
            cases = [c for c in measured["cases"] if c["level"] == level and c["fitted"] is fitted]
            axes.scatter(
                [case[by] for case in cases],
                [min(case["seconds"]) for case in cases],
                s=28,
                edgecolors=color,
                facecolors=face,
                label=f"{level}, measured, {'fitted' if fitted else 'held out'}",
            )


def _plot_batches(axes: Any, measured: dict[str, Any]) -> None:
    core = Machine(measured["rate"], measured["rate"], measured["bandwidth"])
    _scatter(axes, measured, "bare_flops")
    for level in LEVELS:
        for machine, on_gpu, style in ((core, False, "-"), (Machine.of(CARDS["H100"]), True, "--")):
            points = sorted(_predicted(level, machine, on_gpu, measured))
            label = f"{level}, predicted, {'an H100 by spec sheet' if on_gpu else 'this core'}"
            axes.plot(*zip(*points, strict=True), style, color=COLORS[level], lw=1, marker=".", label=label)
    for shape in SHAPES:
        flops = work_of(shape, "block", 1, 1024).bare_flops
        where = axes.get_xaxis_transform()
        # At a height between the points of the card and those of the core.
        text = axes.text(flops, 0.42, shape, transform=where, rotation=90, fontsize=7, color="0.4")
        text.set(ha="right", va="bottom")
        axes.axvline(flops, color="0.85", lw=0.7, zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs of the bare passes of a batch", ylabel="seconds")
    axes.set_title("The same formula for small batches and 1,024 tokens of large models", fontsize=10)
    axes.legend(fontsize=7)


def _predicted(
    level: Granularity, machine: Machine, on_gpu: bool, measured: dict[str, Any]
) -> list[tuple[float, float]]:
    """FLOPs and seconds: of one sample of 1,024 tokens of each shape and, on this core, of what was measured."""
    points = []
    for shape in SHAPES:
        work = work_of(shape, level, 1, 1024, on_gpu)
        plan = Plan(work, 0, work.graph.n_layers, False, 0)
        points.append((float(work.bare_flops), sum(Replica().seconds(plan, machine).values())))
    if not on_gpu:
        own = [case for case in measured["cases"] if case["level"] == level and not case["checkpoint"]]
        points += [(float(case["bare_flops"]), case["predicted"]) for case in own]
    return points


def _plot_scaling(axes: Any, curves: Sequence[Scaling]) -> None:
    colors = dict(zip(SHAPES, ("tab:green", "tab:blue", "tab:red"), strict=True))
    for each in curves:
        cards = sorted(each.outcomes)
        style = "-" if each.level == "block" else "--"
        rate = [N_SCALING / each.outcomes[n][1].seconds for n in cards]
        axes.plot(
            cards, rate, style, color=colors[each.shape], marker=".", label=f"{each.shape}, {each.level}"
        )
        dense = [N_SCALING / each.outcomes[n][0].seconds for n in cards]
        axes.plot(cards, dense, ":", color=colors[each.shape], lw=1)
    axes.set(xscale="log", yscale="log", xlabel="cards", ylabel="samples of 512 tokens a second")
    axes.set_xscale("log", base=2)
    axes.set_xticks(cards := [2**i for i in range(10)], [str(n) for n in cards])
    axes.set_title(
        f"Predicted: {N_SCALING:,} samples; dotted: all rows kept, on a disk of {WRITING / 1e9:g} GB/s",
        fontsize=10,
    )
    axes.legend(fontsize=7)
