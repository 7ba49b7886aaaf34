"""One peer beside eaptk on one shape: first whether both compute the same, then what each takes."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from benchmarks.peers.catalogue import Peer
from benchmarks.peers.client import ROOT, Form, Tool, ToolError
from benchmarks.peers.conventions import Matrix, numbered, relative_errors, share_compared
from benchmarks.timing import in_turns, ratios
from eaptk import Graph
from eaptk.errors import EaptkError

#: Largest relative error to float64, of the edges into any kind of destination, at which float32 scores are the same.
SAME = 1e-4
HALVES = ("bfloat16", "float16")
DTYPES = ("float32", *HALVES)
#: Few: PyTorch's products in float16 on a CPU are 50 times slower than in float32 where the weights lie as GPT-2's do.
ACCURACY_TOKENS = 16
#: Rounds before the clock counts.
WARM_UP = 3
MOST_ROUNDS = 11
#: Share of the shorter run's memory that the longer one must add for a line through both to say anything.
LEAST_GROWTH = 0.25
OWN_PATH = (ROOT,)


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        tokens: of the one sample.
        seconds: that the repetitions of one comparison may take.
        limit: seconds for one answer of a tool.
        threads: of each tool.
        folder: for scores and logs.
        halves: dtypes that accuracy is measured in besides float32.
    """

    tokens: int
    seconds: float
    limit: float
    threads: int
    folder: Path
    halves: tuple[str, ...] = HALVES


class Bench:
    """eaptk, the bare pass and what has been found about them, for all comparisons of a run."""

    def __init__(self, settings: Settings, tools: ExitStack) -> None:
        self.settings = settings
        python = Path(sys.executable)

        def own(name: str, measured: bool = False) -> Tool:
            return tools.enter_context(self.tool(name, python, measured, OWN_PATH))

        self.eaptk, self.eaptk_measured = own("eaptk_attribute"), own("eaptk_attribute", measured=True)
        self.bare, self.bare_measured = own("bare_pass"), own("bare_pass", measured=True)
        self._found: dict[Any, Any] = {}

    def tool(self, name: str, python: Path, measured: bool = False, path: tuple[Path, ...] = ()) -> Tool:
        log = self.settings.folder / "logs" / f"{name}{'-memory' if measured else ''}.log"
        return Tool(
            f"tools.{name}",
            python,
            threads=self.settings.threads,
            limit=self.settings.limit,
            log=log,
            path=path,
            measured=measured,
        )

    def scores(self, tool: Tool, folder: Path, dtype: str, form: Form, tokens: int) -> Matrix:
        """Scores of a tool as eaptk numbers them; see `numbered`.

        Raises:
            ToolError: it fails, or its scores are no finite ones of this graph.
        """
        path = self.settings.folder / "scores.npz"
        tool.load(folder, dtype, form)
        tool.score(tokens, save=path)
        with np.load(path) as saved:
            scores, sources, destinations = (saved[part] for part in ("scores", "sources", "destinations"))
        try:
            return numbered(scores, sources.tolist(), destinations.tolist(), _graph(folder, form))
        except EaptkError as error:
            raise ToolError(f"{tool.name}: {error}") from error

    def exact(self, folder: Path, form: Form, tokens: int) -> Matrix:
        """eaptk's scores in float64."""
        key = ("exact", folder, _key(form), tokens)
        if key not in self._found:
            self._found[key] = self.scores(self.eaptk, folder, "float64", form, tokens)
        return self._found[key]

    def own_check(self, folder: Path, form: Form) -> dict[str, float]:
        """Relative errors of eaptk's float32 scores, by kind of destination, at the timed length."""
        key = ("check", folder, _key(form))
        if key not in self._found:
            exact = self.exact(folder, form, self.settings.tokens)
            scores = self.scores(self.eaptk, folder, "float32", form, self.settings.tokens)
            self._found[key] = relative_errors(scores, exact, _graph(folder, form))
        return self._found[key]

    def own_errors(self, folder: Path, form: Form) -> dict[str, float | str]:
        """eaptk's `accuracy`."""
        key = ("errors", folder, _key(form))
        if key not in self._found:
            self._found[key] = accuracy(self, self.eaptk, folder, form, self.own_check(folder, form))
        return self._found[key]

    def own_memory(self, folder: Path, form: Form) -> dict[str, list[int]]:
        """Peak bytes of eaptk, as it is and with its memory dials turned down, and of the bare pass."""
        key = ("memory", folder, _key(form))
        if key not in self._found:
            least = {**form, "least_memory": True}
            self._found[key] = {
                "eaptk": peaks(self.eaptk_measured, folder, form, self.settings.tokens),
                "eaptk, least memory": peaks(self.eaptk_measured, folder, least, self.settings.tokens),
                "bare": peaks(self.bare_measured, folder, form, self.settings.tokens),
            }
        return self._found[key]


def compare(bench: Bench, peer: Peer, python: Path, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is found, part by part, as (name of the part, part); see `benchmarks.peers`.

    Raises:
        EaptkError: a tool fails, or scores are not the same; what was found before stands.
    """
    form, tokens = peer.form, bench.settings.tokens
    path = () if peer.environment else OWN_PATH
    with _pair(bench, peer.tool, python, path) as (theirs, measured):
        scores = bench.scores(theirs, folder, "float32", form, tokens)
        exact = bench.exact(folder, form, tokens)
        errors = relative_errors(scores, exact, _graph(folder, form))
        own = bench.own_check(folder, form)
        faults = [*_faults(theirs.name, errors), *_faults(bench.eaptk.name, own)]
        yield (
            "check",
            {
                "errors": errors,
                "eaptk": own,
                "share": share_compared(scores, exact),
                "limit": SAME,
                "passed": not faults,
            },
        )
        if faults:
            raise ToolError("; ".join(faults))
        yield "seconds", _seconds(bench, theirs, folder, form)
        memory = {"peer": peaks(measured, folder, form, tokens), **bench.own_memory(folder, form)}
        yield "memory", {"tokens": lengths(tokens), "bytes": memory}
        theirs_errors = accuracy(bench, theirs, folder, form, errors)
        yield "accuracy", {"peer": theirs_errors, "eaptk": bench.own_errors(folder, form)}


def accuracy(
    bench: Bench, tool: Tool, folder: Path, form: Form, checked: dict[str, float]
) -> dict[str, float | str]:
    """Relative error to float64 by dtype, or why the tool has no scores in it.

    Args:
        checked: errors in float32, of as many tokens as are timed.
    """
    found: dict[str, float | str] = {"float32": checked["all"]}
    exact = bench.exact(folder, form, ACCURACY_TOKENS)
    for dtype in bench.settings.halves:
        try:
            scores = bench.scores(tool, folder, dtype, form, ACCURACY_TOKENS)
            found[dtype] = relative_errors(scores, exact, _graph(folder, form))["all"]
        except EaptkError as error:
            found[dtype] = str(error)
    return found


def peaks(tool: Tool, folder: Path, form: Form, tokens: int) -> list[int]:
    """Peak bytes above the loaded model at each of `lengths`, after one run that is not looked at."""
    tool.load(folder, "float32", form)
    tool.score(tokens)
    longer, timed = lengths(tokens)
    at_timed = tool.peak(timed)  # first: the longer run may leave pools behind
    return [tool.peak(longer), at_timed]


def lengths(tokens: int) -> list[int]:
    """Lengths that memory is measured at: twice the timed one, and last the timed one itself."""
    return [2 * tokens, tokens]


def largest(lengths: list[int], peaks: list[int], memory: float) -> int | None:
    """Tokens at which `memory` bytes are reached on the straight line through two measured peaks.

    Too many, of any tool: attention that keeps [heads, T, T] grows faster than the line, and where a constant part
    covers the rest, what grows is not seen yet. None where so little grew that the line would say nothing.
    """
    (long, short), (high, low) = lengths, peaks
    if high - low <= LEAST_GROWTH * low:
        return None
    return int(short + (memory - low) * (long - short) / (high - low))


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Medians, and the peer and eaptk beside the others, by ratios round by round."""
    return {
        "median": {name: statistics.median(each) for name, each in seconds.items()},
        "ratio": {
            "peer / eaptk": ratios(seconds, "peer", "eaptk"),
            "peer / bare": ratios(seconds, "peer", "bare"),
            "eaptk / bare": ratios(seconds, "eaptk", "bare"),
        },
    }


def _seconds(bench: Bench, theirs: Tool, folder: Path, form: Form) -> dict[str, Any]:
    contenders = {"peer": theirs, "eaptk": bench.eaptk, "bare": bench.bare}
    tokens = bench.settings.tokens
    for tool in contenders.values():
        tool.load(folder, "float32", form)
    runs = {name: partial(tool.score, tokens) for name, tool in contenders.items()}
    # One that takes so long was warmed up by the check.
    warm_up = WARM_UP if theirs.last < bench.settings.seconds / 6 else 0
    seconds = in_turns(runs, bench.settings.seconds, warm_up=warm_up, most=MOST_ROUNDS)
    return {"each": seconds, **summary(seconds)}


def _faults(name: str, errors: dict[str, float]) -> list[str]:
    """The worst error that is not within `SAME`, in words, if there is one."""
    # An error may be NaN, where nothing but zeros was to be met: that is not the same either.
    far = {kind: error for kind, error in errors.items() if not error <= SAME}
    if not far:
        return []
    kind = max(far, key=far.__getitem__)
    return [f"{name}: scores of edges into {kind} are {far[kind]:.1e} from float64, over {SAME:g}"]


@contextmanager
def _pair(bench: Bench, name: str, python: Path, path: tuple[Path, ...]) -> Iterator[tuple[Tool, Tool]]:
    """The tool in a process that is timed, and in one whose memory is measured."""
    with bench.tool(name, python, path=path) as timed, bench.tool(name, python, True, path) as measured:
        yield timed, measured


def _graph(folder: Path, form: Form) -> Graph:
    return Graph.from_config(AutoConfig.from_pretrained(folder), form["granularity"], form["qkv"])


def _key(form: Form) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(form.items()))
