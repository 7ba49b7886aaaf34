"""The page's part on the floor."""

from __future__ import annotations

from typing import Any

from benchmarks.floor.passes import LEVELS
from benchmarks.floor.tables import fault_of, host_lines, interval_text, is_over
from benchmarks.report.markdown import error, share, table

COMMAND = "python -m benchmarks.floor"


def section(record: dict[str, Any], figure: str) -> str:
    """Markdown of one record, whose figure is there."""
    settings = record["settings"]
    device = "" if settings["device"] == "CPU" else f" on an {settings['device']}"
    return "\n\n".join(
        [
            f"`{COMMAND}`. What a batch takes beside the forward pass and the backward pass to activations alone of "
            f"the same batch{device}, {settings['threads']} threads, in turns, in one process. A ratio is the median "
            "over rounds of ratios within a round, with the interval that holds it in 95 % of cases (–: too few "
            "rounds). Weights are random, widths and heads those of the published models; depth and vocabulary are cut "
            "to what this machine does in seconds. *By FLOPs* is what the ratio would be if all FLOPs took the same "
            "time: of the model as measured, and at its published depth, as head level's contraction grows with the "
            "square of the depth. Before anything was timed, scores were held against those of the same weights in "
            "float64.",
            f"![Ratio to the bare passes, by case and level, with targets]({figure})",
            _ratios(record["cases"]),
            _verdict(record["cases"]),
            "### Where the time goes\n\nThe contraction by itself, on the same operands: at block level beside a copy "
            "in memory (it reads operands), at head level beside a square matrix product in float32 (it multiplies "
            "them). The rest above the bare passes is hooks, views and rows.",
            _contractions(record["cases"]),
            *_profiles(record["cases"]),
            "### Rows and processes\n\n" + _host(record),
        ]
    )


def right(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that could be run and whose scores were right."""
    return [case for case in cases if fault_of(case) is None]


def _ratios(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        if fault := fault_of(case):
            rows.append([f"{case['name']}. {fault}", "failed", *[""] * 6])
            continue
        levels = [
            [
                _marked(case[level]),
                interval_text(case[level]["ratio"]),
                f"{case[level]['flop_ratio']:.2f} / {case[level]['flop_ratio_full_depth']:.2f}",
            ]
            for level in LEVELS
        ]
        bare = case["bare"]["seconds"]["median"]
        rows.append([case["name"], f"{bare:.3g}", *levels[0], *levels[1]])
    headings = ["case", "bare s", "**block**", "interval", "by FLOPs", "**head**", "interval", "by FLOPs"]
    return table(headings, rows)


def missed(cases: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Cases and levels whose median is over the target."""
    return [(case, level) for case in right(cases) for level in LEVELS if is_over(case[level])]


def _marked(found: dict[str, Any]) -> str:
    return f"**{found['ratio']['median']:.2f}**" + (" (over)" if is_over(found) else "")


def _verdict(cases: list[dict[str, Any]]) -> str:
    lines = []
    for level in LEVELS:
        judged = [case for case in right(cases) if case[level]["target"]]
        if not judged:
            continue
        target = judged[0][level]["target"]
        over = [case for case, of in missed(cases) if of == level]
        lines.append(
            f"- {level} level, at most {target:.2f}× wanted: {len(judged) - len(over)} of {len(judged)} cases of 256 "
            "tokens or more keep it"
            + (f"; over it: {'; '.join(case['name'] for case in over)}" if over else "")
            + "."
        )
    return "\n".join(lines)


def _contractions(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in right(cases):
        for level in LEVELS:
            found, contraction = case[level], case[level]["contraction"]
            above = found["seconds"]["median"] - case["bare"]["seconds"]["median"]
            rest = above - contraction["seconds"]["median"]
            unit = "GB/s" if contraction["of"] == "copy" else "GFLOP/s"
            rows.append(
                [
                    f"{case['name']}: {level}",
                    f"{above * 1e3:.1f}",
                    f"{contraction['seconds']['median'] * 1e3:.1f}",
                    f"{rest * 1e3:.1f}",
                    f"{share(contraction['share']['median'])} of {contraction['best'] / 1e9:.0f} {unit}",
                    f"{found['bytes_above_bare'] / 1e6:.1f}",
                ]
            )
    return table(["case", "ms above bare", "contraction ms", "rest ms", "its rate", "MB above bare"], rows)


def _profiles(cases: list[dict[str, Any]]) -> list[str]:
    """One table for each target that was missed."""
    found = []
    for case, level in missed(cases):
        rows = [
            [f"`{line['operator']}`", f"{line['seconds'] * 1e6:,.0f}", f"{line['calls']:+,}"]
            for line in case[level]["profile"]
        ]
        found.append(
            f"**{case['name']}, {level} level** is over its target. Operators, by microseconds of one profiled pass "
            "above those of the bare passes (profiling itself slows down what has many calls):\n\n"
            + table(["operator", "µs above bare", "calls"], rows)
        )
    return found


def exactness(record: dict[str, Any]) -> str:
    """Relative errors of scores, and of the contraction alone, of every case that could be run."""
    rows = [
        [
            case["name"],
            *(error(case["gate"]["errors"][level]) for level in LEVELS),
            *(error(case["gate"]["contraction_errors"][level]) for level in LEVELS),
        ]
        for case in record["cases"]
        if "gate" in case
    ]
    return table(["case", *LEVELS, *(f"contraction, {level}" for level in LEVELS)], rows)


def _host(record: dict[str, Any]) -> str:
    return table(["what", "measured", "beside"], host_lines(record))
