"""The page's part on the peers, and on accuracy."""

from __future__ import annotations

from typing import Any

from benchmarks.floor.tables import interval_text
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.comparison import DTYPES
from benchmarks.report.markdown import error, share, table, unfinished

COMMAND = "python -m benchmarks.peers"
#: By level: how many times faster than every peer, and most of its memory above the bare passes.
WANTED = {"head": (10.0, 0.25), "block": (2.0, None)}


def section(record: dict[str, Any], figures: dict[str, str]) -> str:
    """Markdown of one record; `figures` by shape."""
    settings = record["settings"]
    gaps = [] if record["complete"] else ["the run was cut off"]
    left = [peer for peer in PEERS if peer not in settings["peers"]]
    gaps += [f"not run: {', '.join(left)}"] if left else []
    parts = [
        *unfinished(gaps),
        f"`{COMMAND}`. One sample of {settings['tokens']} random tokens, float32, CPU, {settings['threads']} threads; "
        "the same weights, tokens and loss, each tool in a process of its own, in turns with eaptk asked for what the "
        "peer computes (granularity, patching) and with the bare passes. A peer's scores are first given eaptk's "
        "numbering and, like eaptk's own, held against float64, by kind of destination; nothing is timed where either "
        "are not the same. Ratios are medians over rounds of ratios within a round, seconds medians by themselves. "
        "Interval: of the ratio's median, 95 %; of fewer than six rounds the least and the most, and how many. "
        "The bare passes are of one prompt, forward and backward: patching needs a forward pass of the other prompt on "
        "top, which is not in them. MB: resident memory above the loaded model, at most, of a second run. Fits: tokens "
        f"of one sample in {settings['gigabytes']:g} GB, extrapolated on the straight line through this length and its "
        "double, an overestimate for every tool; – where memory hardly grew.",
    ]
    for shape in record["shapes"]:
        found = [each for each in record["comparisons"] if each["shape"] == shape]
        parts.append(f"### {shape}, {found[0]['layers']} layers")
        if shape in figures:
            parts.append(f"![Seconds and memory of each tool, {shape}]({figures[shape]})")
        parts.append(_costs(found))
        parts.append(_verdict(found))
    parts.append(_versions(record["environments"]))
    return "\n\n".join(parts)


def timed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons that nothing went wrong in."""
    return [each for each in found if each["error"] is None and each["check"]["passed"]]


def above_bare(each: dict[str, Any], who: str) -> int:
    """Bytes of a contender above the bare passes, of the whole sample."""
    peaks = each["memory"]["bytes"]
    return int(peaks[who][-1] - peaks["bare"][-1])


def _costs(found: list[dict[str, Any]]) -> str:
    rows = []
    for each in found:
        title = f"{each['peer']}: {each['what']}"
        if each not in timed(found):
            rows.append([f"{title}. {each['error']}", each["form"]["granularity"], "failed", *[""] * 8])
            continue
        median, ratio = each["seconds"]["median"], each["seconds"]["ratio"]
        memory = each["memory"]["bytes"]
        if (compared := each["check"]["share"]) < 1:
            title += f" ({share(compared)} of eaptk's edges, the others it does not have)"
        rows.append(
            [
                title,
                each["form"]["granularity"],
                error(each["check"]["errors"]["all"]),
                f"{median['peer']:.3f}",
                f"{median['eaptk']:.3f}",
                f"**{ratio['peer / eaptk']['median']:.1f}×**",
                interval_text(ratio["peer / eaptk"], 1),
                f"{ratio['eaptk / bare']['median']:.2f}",
                f"{memory['peer'][-1] / 1e6:.0f}",
                f"{memory['eaptk'][-1] / 1e6:.0f} / {memory['bare'][-1] / 1e6:.0f}",
                f"{_tokens(each['largest']['peer'])} / {_tokens(each['largest']['eaptk'])}",
            ]
        )
    headings = ["peer", "level", "error", "peer s", "eaptk s", "peer ÷ eaptk", "interval", "eaptk ÷ bare"]
    return table([*headings, "peer MB", "eaptk / bare MB", "fits: peer / eaptk"], rows)


def _verdict(found: list[dict[str, Any]]) -> str:
    lines = []
    for level, (faster, leaner) in WANTED.items():
        each = [one for one in timed(found) if one["form"]["granularity"] == level]
        if not each:
            continue
        quickest = min(each, key=lambda one: _ratio(one, "peer / eaptk"))
        line = f"- {level} level, {faster:g}× wanted: the quickest peer, {quickest['peer']}, takes "
        times = _ratio(quickest, "peer / eaptk")
        line += f"{times:.1f}× eaptk's time: {'kept' if times >= faster else 'missed'}"
        if (bare := _ratio(quickest, "peer / bare")) < faster:
            more = " plus the forward pass that patching adds" * (quickest["form"]["ablation"] == "patching")
            line += f". It takes {bare:.1f}× the bare passes', and no tool can be quicker than those{more}"
        if leaner is not None:
            shares = {one["peer"]: above_bare(one, "eaptk") / max(1, above_bare(one, "peer")) for one in each}
            worst = max(shares, key=shares.__getitem__)
            line += f". Beside the leanest, {worst}, eaptk takes {shares[worst]:.2f} of the memory above the bare "
            line += f"passes, at most {leaner:g} wanted: {'kept' if shares[worst] <= leaner else 'missed'}"
        lines.append(line + ".")
    return "\n".join(lines)


def _ratio(each: dict[str, Any], name: str) -> float:
    return float(each["seconds"]["ratio"][name]["median"])


def _versions(environments: dict[str, Any]) -> str:
    shown = []
    for name, each in environments.items():
        packages = each.get("packages", {})
        own = name.rpartition("-")[0] if name[-1].isdigit() else name
        version = packages.get(own, packages.get(own.replace("-", "_")))
        shown.append(f"{name}: {each['error']}" if "error" in each else f"{own} {version}")
    return f"Versions: {'; '.join(shown)}; torch is eaptk's own build in all. Pins: `benchmarks/peers/*.txt`."


def accuracy(record: dict[str, Any]) -> str:
    """Relative error to float64, by dtype, of every tool that has scores."""
    rows = [
        [
            f"{each['peer']}, {each['shape']}, {each['form']['granularity']}",
            *(f"{error(each['accuracy'][who].get(dtype))}" for dtype in DTYPES for who in ("peer", "eaptk")),
        ]
        for each in record["comparisons"]
        if "accuracy" in each
    ]
    headings = [f"{dtype}: {who}" for dtype in DTYPES for who in ("peer", "eaptk")]
    return table(["tool", *headings], rows)


def _tokens(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"
