"""What was found, as tables for a terminal."""

from __future__ import annotations

from typing import Any, Literal

from rich.table import Table

from benchmarks.floor.passes import LEVELS

#: Of a run.
PARTS = ("passes", "yardstick", "storing", "sweeping", "starting")
#: Of ratios.
COLOURS = {"kept": "default", "missed": "red", "undecided": "yellow", None: "default"}
#: In which a fault of a case is shown, in place of figures.
FAULT = "[red]{}[/]"


def passes_table(result: dict[str, Any]) -> Table:
    """A row for each case and level."""
    settings = result["settings"]
    table = Table(
        title="Attribution beside the bare forward and backward pass, "
        f"{settings['device']}, {settings['threads']} threads",
        caption="Ratio: median over rounds, and between which two rounds the median lies (95 %; of too few the "
        "least and the most). Red: over its target; yellow: "
        "it lies within the interval, or there is none. FLOPs: "
        "what the ratio would be if all of them took the same time, here and at the published depth. Contraction: "
        "milliseconds, and its rate as a share of copying memory (block) or of a matrix product (head).",
    )
    table.add_column("case")
    for heading in ("bare ms", "level", "ratio", "interval", "target", "by FLOPs", "full depth", "MB above"):
        table.add_column(heading, justify="right")
    table.add_column("contraction", justify="right")
    for case in result["cases"]:
        if fault := fault_of(case):
            table.add_row(case["name"], FAULT.format(fault), end_section=True)
            continue
        for level in LEVELS:
            found, first = case[level], level == LEVELS[0]
            target = found["target"]
            table.add_row(
                case["name"] if first else "",
                f"{case['bare']['seconds']['median'] * 1e3:.0f}" if first else "",
                level,
                f"[{COLOURS[verdict(found)]}]{found['ratio']['median']:.3f}[/]",
                interval_text(found["ratio"]),
                "" if target is None else f"≤ {target:.2f}",
                f"{found['flop_ratio']:.3f}",
                f"{found['flop_ratio_full_depth']:.3f}",
                f"{found['bytes_above_bare'] / 1e6:.1f}",
                f"{found['contraction']['seconds']['median'] * 1e3:.1f}, "
                f"{found['contraction']['share']['median']:.0%} of a {found['contraction']['of']}",
                end_section=not first,
            )
    return table


def verdict(found: dict[str, Any]) -> Literal["kept", "missed", "undecided"] | None:
    """Of a level's ratio, by its interval; None without a target."""
    if not found["target"]:
        return None
    if found["ratio"]["interval"] is None:
        return "undecided"
    low, high = found["ratio"]["interval"]
    if high <= found["target"]:
        return "kept"
    return "missed" if low > found["target"] else "undecided"


def bounds(found: dict[str, Any]) -> tuple[float, float]:
    """Of a summary: the median's interval, or the least and the most if rounds are too few for one."""
    low, high = found["interval"] or (min(found["each"]), max(found["each"]))
    return low, high


def fault_of(part: dict[str, Any]) -> str | None:
    """Why nothing may be shown of a part of a record, in a line; None if it may."""
    if "error" in part:
        return str(part["error"])
    gate = part.get("gate")
    if gate is None or gate["passed"]:
        return None
    if "errors" not in gate:
        return "results are wrong: nothing is shown"
    alone = max(gate["alone_errors"].values(), default=0.0)
    return (
        f"scores are {max(gate['errors'].values()):.1e} from float64, {alone:.1e} from "
        f"those of the sample alone (limit {gate['limit']:g}), the contraction "
        f"{max(gate['contraction_errors'].values()):.1e} ({gate['contraction_limit']:g}): nothing is timed"
    )


def interval_text(found: dict[str, Any], digits: int = 3) -> str:
    """Of a summary; if rounds were too few for one, the least and the most of them, and how many there were."""
    low, high = bounds(found)
    rounds = len(found["each"])
    few = f" of {rounds}" if found["interval"] is None else ""
    return f"{low:.{digits}f}–{high:.{digits}f}{few}" if rounds > 1 else "of one"


def host_table(result: dict[str, Any]) -> Table:
    """The disk, the sweep and starting up."""
    table = Table(title="Rows and processes, CPU")
    for heading in ("what", "measured", "beside"):
        table.add_column(heading)
    for line in host_lines(result):
        table.add_row(*line)
    return table


def host_lines(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What, how much, and beside what."""
    lines = []
    if storing := result.get("storing"):
        what = f"rows stored, {storing['bytes'] / 1e6:.0f} MB"
        if fault := fault_of(storing):
            lines.append((what, fault, ""))
        else:
            rates = {name: storing["bytes"] / s["median"] / 1e9 for name, s in storing["seconds"].items()}
            ratio = storing["ratio"]
            lines.append(
                (
                    what,
                    f"{rates['store']:.2f} GB/s, synced",
                    f"{rates['sequential']:.2f} GB/s of plain writes: {ratio['median']:.2f}× their time "
                    f"({interval_text(ratio, 2)})",
                )
            )
    if sweeping := result.get("sweeping"):
        what = f"metrics of rows, {sweeping['gigabytes']:.1f} GB"
        speed = sweeping["gigabytes_per_second"]
        lines.append(
            (what, fault, "")
            if (fault := fault_of(sweeping))
            else (
                what,
                f"{speed['sweep']:.1f} GB/s",
                f"{speed['read and sum']:.1f} GB/s of reading and summing; numpy takes "
                f"{sweeping['times_the_twin']:.0f}× its time",
            )
        )
    if yardstick := result.get("yardstick"):
        ratio = yardstick["ratio"]
        lines.append(
            (
                "the bare pass as one writes it by hand, softmax in the model's dtype",
                f"{ratio['median']:.2f}× the time of the one here ({interval_text(ratio, 2)}), to which ratios are",
                yardstick["case"],
            )
        )
    starting = result.get("starting", {})
    lines += [(f"start: {name}", f"{seconds['median']:.2f} s", "") for name, seconds in starting.items()]
    return lines
