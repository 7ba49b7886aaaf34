"""What was found, as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.peers.comparison import DTYPES

EAPTK, LEAST = "eaptk", "eaptk, least memory"


def costs(found: list[dict[str, Any]], tokens: int, gigabytes: float) -> Table:
    """Seconds and memory of every peer on one shape, each above eaptk asked for the same and the bare pass."""
    first = found[0]
    table = Table(
        title=f"{first['shape']}, {first['layers']} layers, one sample of {tokens} tokens, float32, CPU",
        caption="Above each rule: a peer; below it eaptk asked for the same, and the bare forward and backward pass, "
        "taken in turns with it. Error: of float32 scores, relative to float64; nothing is timed where it is too "
        "large. The bare pass is of one prompt: patching needs a forward pass of the other on top. MB: resident above "
        "the loaded model, at most. Fits: tokens, extrapolated on a straight line through this length and its double, "
        "an overestimate for every tool; – where memory hardly grew.",
    )
    table.add_column("tool")
    for heading in ("error", "s a sample", "× eaptk", "× bare", "MB", "× eaptk's", f"fits {gigabytes:g} GB"):
        table.add_column(heading, justify="right")
    for each in found:
        title = f"[bold]{each['peer']}[/] [dim]{each['what']}[/]"
        if each["error"]:
            table.add_row(f"{title}\n[red]{_plain(each['error'])}[/]", end_section=True)
            continue
        median = each["seconds"]["median"]
        peaks = {who: values[-1] for who, values in each["memory"]["bytes"].items()}
        error = f"{each['check']['errors']['all']:.0e}"
        for who, name in (
            ("peer", title),
            (EAPTK, "  eaptk"),
            (LEAST, "  eaptk, least memory"),
            ("bare", "  bare"),
        ):
            seconds = median.get(who)
            table.add_row(
                name,
                error if who == "peer" else "",
                "" if seconds is None else f"{seconds:.3f}",
                _ratio(each, "peer / eaptk") if who == "peer" else "",
                _ratio(each, f"{who} / bare") if who in ("peer", EAPTK) else "",
                f"{peaks[who] / 1e6:.0f}",
                f"{peaks['peer'] / max(peaks[EAPTK], 1):.1f}" if who == "peer" else "",
                _tokens(each["largest"][who]),
                end_section=who == "bare",
            )
    return table


def accuracies(found: list[dict[str, Any]]) -> Table:
    """Relative error to float64 of every peer's scores, and of eaptk's beside it, by dtype."""
    table = Table(title=f"{found[0]['shape']}: error of scores relative to float64, by dtype (peer | eaptk)")
    table.add_column("tool")
    for dtype in DTYPES:
        table.add_column(dtype, justify="right")
    for each in found:
        if "accuracy" in each:
            table.add_row(
                each["peer"],
                *(
                    f"{_error(each['accuracy']['peer'].get(dtype))} | {_error(each['accuracy']['eaptk'].get(dtype))}"
                    for dtype in DTYPES
                ),
            )
    return table


def _ratio(each: dict[str, Any], name: str) -> str:
    return f"{each['seconds']['ratio'][name]['median']:.2f}"


def _tokens(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"


def _error(value: float | str | None) -> str:
    if value is None:
        return "–"
    return _plain(value) if isinstance(value, str) else f"{value:.1e}"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
