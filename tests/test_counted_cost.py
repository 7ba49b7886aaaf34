"""What attribution takes beside the bare pass, counted and not timed: FLOPs, and bytes that operators read and write.

These are the ratios that `python -m benchmarks.floor` and `benchmarks.peers` measure in seconds, on a shape of theirs.
Bytes are those of every operator's operands and results, as if there were no cache: an upper bound of what moves, which
an einsum over copies cannot hide from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from accounting import flops, peak_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cost import TARGETS, bare_pass
from benchmarks.dense import dense_scores
from benchmarks.floor.shapes import Case
from eaptk import Graph, attribute
from eaptk.sites import Sites

CASE = Case("Qwen2, narrow", layers=6, n_samples=1, n_tokens=256)
MOST_BYTES = {"block": 1.25, "head": 1.85}


class _Moved(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            touched = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)]
            self.total += sum(x.numel() * x.element_size() for x in touched)
        return found


def moved_bytes(work: Callable[[], Any]) -> int:
    with _Moved() as count:
        work()
    return count.total


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    """FLOPs, bytes moved and bytes alive of the bare pass, of both levels, and of the usual scripts' way."""
    model, batch = CASE.model, CASE.batch()
    graphs = {level: Graph.from_model(model, level) for level in ("block", "head")}
    sites = Sites(model, graphs["block"])
    work: dict[str, Callable[[], Any]] = {
        "bare": lambda: bare_pass(model, sites, batch),
        "dense": lambda: dense_scores(model, batch, graphs["head"]),
    }
    for level, graph in graphs.items():
        work[level] = lambda graph=graph: attribute(model, batch, graph)
    counts = {"flops": flops, "moved": moved_bytes, "peak": peak_bytes}
    with pytest.MonkeyPatch.context() as patch:
        # Of compiled loops torch sees nothing; they have the reference's products and fewer bytes.
        patch.setenv("EAPTK_BACKEND", "reference")
        return {name: {what: count(run) for what, count in counts.items()} for name, run in work.items()}


@pytest.mark.parametrize("level", TARGETS)
def test_flops_leave_room_for_all_else_under_the_target(counted: Any, level: str) -> None:
    allowed = 1 + (TARGETS[level] - 1) / 2
    assert counted[level]["flops"] / counted["bare"]["flops"] < allowed


@pytest.mark.parametrize("level", MOST_BYTES)
def test_bytes_that_operators_touch_are_little_more_than_the_models_own(counted: Any, level: str) -> None:
    assert counted[level]["moved"] / counted["bare"]["moved"] < MOST_BYTES[level]


def test_the_usual_way_moves_four_times_as_much_above_the_bare_pass(counted: Any) -> None:
    above = {name: counted[name]["moved"] - counted["bare"]["moved"] for name in ("dense", "head")}
    assert above["dense"] > 4 * above["head"]


def test_the_usual_way_keeps_four_times_as_much_above_the_bare_pass(counted: Any) -> None:
    above = {name: counted[name]["peak"] - counted["bare"]["peak"] for name in ("dense", "head")}
    assert above["dense"] > 4 * above["head"]
