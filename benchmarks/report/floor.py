"""The page's part on the floor."""

from __future__ import annotations

from typing import Any

from benchmarks.floor.passes import LEAST_TOKENS, LEVELS
from benchmarks.floor.tables import PARTS, bounds, fault_of, host_lines, interval_text, verdict
from benchmarks.report.markdown import error, share, table, unfinished

COMMAND = "python -m benchmarks.floor"


def section(record: dict[str, Any], figure: str | None) -> str:
    """Markdown of one record, and of its figure if it has one."""
    settings = record["settings"]
    device, how = "", "each in a process that keeps its heap, all within the same seconds of a round"
    if settings["device"] != "CPU":
        device, how = f" on an {settings['device']}", "in turns, in one process"
    return "\n\n".join(
        [
            *_gaps(record),
            f"`{COMMAND}`. What a batch takes beside the forward pass and the backward pass to activations alone of "
            f"the same batch{device}, {settings['threads']} threads, {how}. A ratio is the median "
            "over rounds of ratios within a round, with the interval that holds it in 95 % of cases; of fewer "
            "than six rounds there is none, and the least and the most are shown with their number. A target is kept "
            "or missed if the whole interval keeps or misses it, else undecided. Weights are random, "
            "widths and heads those of the published models; the vocabulary is cut to 8,192, and the depth to what a "
            "machine does in seconds, as each case says. *By FLOPs* is what the ratio would be if all FLOPs "
            "took the same time: of the model as measured, and at its published depth, as head level's contraction "
            "grows with the square of the depth. Before anything was timed, scores of a sample's first tokens were "
            "held against those of the same weights in float64, the contraction of the whole batch against that of "
            "the same operands in float64, and the first sample's row against that of the sample alone.",
            *([f"![Ratio to the bare passes, by case and level, with targets]({figure})"] if figure else []),
            _ratios(record["cases"]),
            _verdict(record["cases"]),
            "### Where the time goes\n\nThe contraction by itself, on the same operands: at block level beside a copy "
            "in memory (it reads operands), at head level beside a square matrix product (it multiplies them). The "
            "rest above the bare passes is hooks, views and rows; – where it is less than the ratio's interval tells. "
            "Less than 0 above the bare passes is noise.",
            _contractions(record["cases"]),
            *_profiles(record["cases"]),
            "### Rows and processes\n\n" + _host(record),
        ]
    )


def _gaps(record: dict[str, Any]) -> list[str]:
    """What the record lacks, if it is not of a whole run."""
    settings = record["settings"]
    gaps = [] if record["complete"] else ["the run was cut off"]
    gaps += [f"only cases with {' and '.join(settings['only'])} were run"] if settings["only"] else []
    left = [part for part in PARTS if part not in settings["parts"]]
    gaps += [f"not run: {', '.join(left)}"] if left else []
    return unfinished(gaps)


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


def _marked(found: dict[str, Any]) -> str:
    said = verdict(found)
    return f"**{found['ratio']['median']:.2f}**" + (f" ({said})" if said not in (None, "kept") else "")


def _verdict(cases: list[dict[str, Any]]) -> str:
    lines = []
    for level in LEVELS:
        judged = [case for case in right(cases) if case[level]["target"]]
        if not judged:
            continue
        by_verdict: dict[str, list[str]] = {"kept": [], "undecided": [], "missed": []}
        for case in judged:
            by_verdict[verdict(case[level]) or ""].append(case["name"])
        medians = [case[level]["ratio"]["median"] for case in judged]
        line = f"- {level} level, at most {judged[0][level]['target']:.2f}× wanted: medians are {min(medians):.2f} to "
        line += (
            f"{max(medians):.2f}; by the whole interval {len(by_verdict['kept'])} of {len(judged)} cases of "
        )
        line += f"{LEAST_TOKENS} tokens or more keep it"
        for said in ("undecided", "missed"):
            line += f"; {said}: {' | '.join(by_verdict[said])}" if by_verdict[said] else ""
        shares = [
            case[level]["contraction"]["seconds"]["median"] / case["bare"]["seconds"]["median"]
            for case in judged
        ]
        line += f". The contraction by itself takes {min(shares):.1%} to {max(shares):.1%} of the bare passes' time"
        lines.append(line + ".")
    return "\n".join(lines)


def _contractions(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in right(cases):
        for level in LEVELS:
            found, contraction = case[level], case[level]["contraction"]
            bare, ratio = case["bare"]["seconds"]["median"], found["ratio"]
            above = (ratio["median"] - 1) * bare
            low, high = bounds(ratio)
            rest = above - contraction["seconds"]["median"]
            told = ratio["interval"] and abs(rest) > (high - low) / 2 * bare
            unit = "GB/s" if contraction["of"] == "copy" else "GFLOP/s"
            rows.append(
                [
                    f"{case['name']}: {level}",
                    f"{above * 1e3:.1f}",
                    f"{contraction['seconds']['median'] * 1e3:.1f}",
                    f"{rest * 1e3:.1f}" if told else "–",
                    f"{share(contraction['share']['median'])} of {contraction['best'] / 1e9:.0f} {unit}",
                    f"{found['bytes_above_bare'] / 1e6:.1f}",
                ]
            )
    return table(["case", "ms above bare", "contraction ms", "rest ms", "its rate", "MB above bare"], rows)


def _profiles(cases: list[dict[str, Any]]) -> list[str]:
    """One table for each median over its target."""
    found = []
    over = [(case, level) for case in right(cases) for level in LEVELS if "profile" in case[level]]
    for case, level in over:
        rows = [
            [f"`{line['operator']}`", f"{line['seconds'] * 1e6:,.0f}", f"{line['calls']:+,}"]
            for line in case[level]["profile"]
        ]
        found.append(
            f"**{case['name']}, {level} level**: the median is over the target. {_remedy(case, level)} "
            "Operators, by microseconds of one "
            "profiled pass above those of the bare passes (profiling itself slows down what has many calls):\n\n"
            + table(["operator", "µs above bare", "calls"], rows)
        )
    return found


def _remedy(case: dict[str, Any], level: str) -> str:
    """What a faster contraction would be worth."""
    found, contraction = case[level], case[level]["contraction"]
    share = contraction["share"]["median"]
    gain = (1 - share) * contraction["seconds"]["median"] / case["bare"]["seconds"]["median"]
    whole = "copies" if contraction["of"] == "copy" else "square products"
    return (
        f"Were its contraction as fast as {whole}, at {share:.0%} of whose rate it runs, the ratio would be "
        f"{found['ratio']['median'] - gain:.2f}; if all FLOPs took the same time, {found['flop_ratio']:.2f}."
    )


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
