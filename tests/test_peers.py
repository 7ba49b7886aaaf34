"""The benchmark against peers: conventions are converted, and a peer that fails is reported."""

from __future__ import annotations

import io
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from benchmarks import record
from benchmarks.peers import __main__ as command
from benchmarks.peers.catalogue import HEAD, PEERS, Peer
from benchmarks.peers.client import Tool, ToolError, environment, packages
from benchmarks.peers.comparison import largest, peaks, summary
from benchmarks.peers.conventions import numbered, relative_errors, share_compared
from benchmarks.peers.names import block_nodes, head_nodes
from benchmarks.peers.workload import SHAPES, Shape
from eaptk import Graph
from eaptk.errors import EaptkError

GROUPED = Graph(n_layers=2, n_heads=4, n_kv_heads=2, granularity="head")


def random_matrix(graph: Graph) -> np.ndarray:
    return graph.matrix(np.random.default_rng(0).standard_normal(graph.n_edges))


def names(graph: Graph) -> tuple[list[str], list[str]]:
    return [node.name for node in graph.sources], [node.name for node in graph.destinations]


def test_head_nodes_are_those_of_the_graph() -> None:
    assert head_nodes(2, 4, 2) == names(GROUPED)


@pytest.mark.parametrize("qkv", ["split", "merged"])
def test_block_nodes_are_those_of_the_graph(qkv: str) -> None:
    assert block_nodes(3, qkv) == names(Graph(3, 4, 2, granularity="block", qkv=qkv))


def test_nodes_in_another_order_are_put_in_eaptks() -> None:
    scores = random_matrix(GROUPED)
    sources, destinations = names(GROUPED)
    found = numbered(scores[::-1, ::-1], sources[::-1], destinations[::-1], GROUPED)
    assert relative_errors(found, scores, GROUPED)["all"] == 0


def test_key_and_value_heads_repeated_to_query_heads_are_added_up() -> None:
    scores = random_matrix(GROUPED)
    sources, ungrouped = head_nodes(2, 4, 4)
    _, grouped = names(GROUPED)
    parts = []
    for name in ungrouped:
        stem, _, branch = name.partition("<")
        if branch in ("k>", "v>"):
            layer, head = stem.split(".h")
            whole = scores[:, grouped.index(f"{layer}.h{int(head) // 2}<{branch}")]
            parts.append(whole * (0.25 if int(head) % 2 else 0.75))
        else:
            parts.append(scores[:, grouped.index(name)])
    found = numbered(np.stack(parts, 1), sources, ungrouped, GROUPED)
    assert relative_errors(found, scores, GROUPED)["all"] < 1e-15


def test_edges_that_a_tool_lacks_are_not_compared() -> None:
    scores = random_matrix(GROUPED)
    sources, destinations = names(GROUPED)
    found = numbered(scores[1:], sources[1:], destinations, GROUPED)
    assert np.isnan(found[0]).all()
    assert relative_errors(found, scores, GROUPED)["all"] == 0


def test_an_error_of_small_scores_alone_is_seen() -> None:
    exact = random_matrix(GROUPED)
    queries = [node.branch == "q" for node in GROUPED.destinations]
    exact[:, queries] *= 1e-8
    wrong = np.where(queries, 2 * exact, exact)
    errors = relative_errors(wrong, exact, GROUPED)
    assert errors["all"] < 1e-6
    assert errors["q"] == pytest.approx(1)
    assert errors["v"] == 0


@pytest.mark.parametrize(
    ("sources", "destinations", "says"),
    [
        (["input", "a0.h9"], ["logits"], "a0.h9"),
        (["input"], ["a7"], "a7"),
        (["input"], ["logits", "m0"], "1 sources and 2 destinations"),
    ],
)
def test_scores_of_another_graph_are_refused(sources: list[str], destinations: list[str], says: str) -> None:
    with pytest.raises(EaptkError, match=says):
        numbered(np.ones((len(sources), 1)), sources, destinations, GROUPED)


def test_a_comparison_over_no_edges_is_refused() -> None:
    nothing = np.full((GROUPED.n_sources, GROUPED.n_destinations), np.nan)
    with pytest.raises(EaptkError, match="nothing can be compared"):
        relative_errors(nothing, random_matrix(GROUPED), GROUPED)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("head", [0, 1])
def test_scores_that_are_not_finite_are_refused_and_not_taken_for_edges_that_are_not_there(
    value: float, head: int
) -> None:
    sources, ungrouped = head_nodes(2, 4, 4)
    scores = np.ones((len(sources), len(ungrouped)))
    scores[0, ungrouped.index(f"a1.h{head}<k>")] = value
    with pytest.raises(EaptkError, match="not finite"):
        numbered(scores, sources, ungrouped, GROUPED)


def test_what_a_tool_says_of_pairs_that_are_no_edges_does_not_matter() -> None:
    scores = random_matrix(GROUPED)
    no_edge = np.arange(GROUPED.n_sources)[:, None] >= GROUPED.reach
    found = numbered(np.where(no_edge, np.inf, scores), *names(GROUPED), GROUPED)
    assert relative_errors(found, scores, GROUPED)["all"] == 0


def test_edges_that_a_tool_has_are_counted() -> None:
    exact = numbered(random_matrix(GROUPED), *names(GROUPED), GROUPED)
    lacking = exact.copy()
    lacking[0] = np.nan
    assert share_compared(exact, exact) == 1
    assert share_compared(lacking, exact) == pytest.approx(1 - GROUPED.n_destinations / GROUPED.n_edges)


WORKING = """
import numpy as np, torch
def load(folder, dtype, form): return torch.ones(3, dtype=dtype)
def score(model, ids, other):
    print("tools print what they like")
    return (ids.sum().item(), other.sum().item())
def edges(model, result): return np.array([result]), ["input"], ["clean", "corrupt"]
"""
BROKEN = {
    "no_such_package": ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
    "load": ("def load(*_): raise ValueError('two\\nlines')\n", "ValueError: two"),
    "score": (WORKING + "def score(*_): raise RuntimeError('out of luck')\n", "RuntimeError: out of luck"),
    "killed": (WORKING + "def score(*_):\n    import os; os.kill(os.getpid(), 9)\n", "killed by signal 9"),
    "exit": (WORKING + "def score(*_):\n    import os; os._exit(3)\n", "ended with status 3"),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "tokens.json").write_text(json.dumps({"clean": [1] * 64, "corrupt": [2] * 64}))
    return tmp_path


def tool(tmp_path: Path, script: str, limit: float = 300) -> Tool:
    (tmp_path / "their_script.py").write_text(script)
    return Tool(
        "their_script", Path(sys.executable), threads=1, limit=limit, log=tmp_path / "log", path=[tmp_path]
    )


@pytest.mark.parametrize("order", ["clean", "corrupt"])
def test_a_tool_is_given_the_prompt_its_gradient_is_taken_on_first(checkpoint: Path, order: str) -> None:
    with tool(checkpoint, WORKING) as theirs:
        theirs.load(checkpoint, "float32", {**HEAD, "gradient_on": order})
        assert theirs.score(10, save=checkpoint / "scores.npz") > 0
        sums = np.load(checkpoint / "scores.npz")["scores"].tolist()
        assert sums == [[10, 20] if order == "clean" else [20, 10]]


def test_memory_is_counted_above_the_loaded_model(checkpoint: Path) -> None:
    script = WORKING.replace("torch.ones(3", "torch.ones(8_000_000") + (
        "def score(model, ids, other): return torch.ones(ids.shape[1] * 500_000).sum()\n"
    )
    with tool(checkpoint, script) as theirs:
        theirs.load(checkpoint, "float32", HEAD)
        assert theirs.peak(16) == pytest.approx(16 * 2e6, abs=4e6)


def test_a_tool_that_hangs_is_ended(checkpoint: Path) -> None:
    script = WORKING + "import time; time.sleep(60)\n"
    with tool(checkpoint, script, limit=1) as theirs, pytest.raises(ToolError, match="took longer than 1 s"):
        theirs.load(checkpoint, "float32", HEAD)


def test_a_tool_that_died_starts_again(checkpoint: Path) -> None:
    script = (
        WORKING
        + "once = score\ndef score(model, ids, other): return once(model, ids, other) if len(ids[0]) < 9 else 1 / 0\n"
    )
    with tool(checkpoint, script) as theirs:
        theirs.load(checkpoint, "float32", HEAD)
        with pytest.raises(ToolError, match="ZeroDivisionError"):
            theirs.score(10)
        theirs.load(checkpoint, "float32", HEAD)
        assert theirs.score(8) > 0


@pytest.mark.parametrize("fault", BROKEN)
def test_a_tool_that_fails_says_so_in_one_line(checkpoint: Path, fault: str) -> None:
    script, says = BROKEN[fault]
    with tool(checkpoint, script) as theirs, pytest.raises(ToolError) as failure:  # noqa: PT012
        theirs.load(checkpoint, "float32", HEAD)
        theirs.score(10)
    assert str(failure.value).startswith(f"their_script: {says}")
    assert "\n" not in str(failure.value)


def test_a_tool_that_ends_between_two_questions_is_reported(checkpoint: Path) -> None:
    script = WORKING + (
        "import os, threading\n"
        "def edges(model, result):\n"
        "    threading.Timer(0.5, os._exit, [4]).start()\n"
        "    return np.array([result]), ['input'], ['clean', 'corrupt']\n"
    )
    with tool(checkpoint, script) as theirs:
        theirs.load(checkpoint, "float32", HEAD)
        theirs.score(10, save=checkpoint / "scores.npz")
        time.sleep(2)
        with pytest.raises(ToolError, match="their_script: ended with status 4"):
            theirs.score(10)


def test_an_interpreter_that_is_not_there_is_reported(checkpoint: Path) -> None:
    gone = Tool("gone", checkpoint / "python", threads=1, limit=9, log=checkpoint / "log")
    with gone, pytest.raises(ToolError, match="No such file"):
        gone.load(checkpoint, "float32", HEAD)
    with pytest.raises(ToolError, match="No such file"):
        packages(checkpoint / "python")


def test_requirements_that_cannot_be_had_are_one_line(tmp_path: Path) -> None:
    requirements = tmp_path / "peer.txt"
    requirements.write_text(f"peer @ file://{tmp_path}/no-such-package.whl\n")
    with pytest.raises(ToolError, match=r"^[^\n]*no-such-package\.whl[^\n]*$"):
        environment(requirements, tmp_path / "environments")


def test_the_length_that_fits_is_on_the_line_through_two_peaks() -> None:
    assert largest([256, 128], [164, 100], memory=1000) == 1928


@pytest.mark.parametrize("longer", [90, 100, 110])
def test_no_length_is_said_to_fit_where_memory_hardly_grew(longer: int) -> None:
    assert largest([256, 128], [longer, 100], memory=1000) is None


def test_what_only_a_first_run_takes_is_not_in_its_peak(checkpoint: Path) -> None:
    script = WORKING + (
        "pools = {}\n"
        "def score(model, ids, other):\n"
        "    if len(ids[0]) not in pools: pools[len(ids[0])] = torch.ones(len(ids[0]) * 500_000)\n"
    )
    with tool(checkpoint, script) as theirs:
        assert peaks(theirs, checkpoint, HEAD, 16)[-1] < 4e6


def test_ratios_are_of_the_same_round() -> None:
    found = summary({"peer": [2.0, 40.0, 6.0], "eaptk": [1.0, 10.0, 2.0], "bare": [1.0, 5.0, 2.0]})
    assert found["median"] == {"peer": 6.0, "eaptk": 2.0, "bare": 2.0}
    assert found["ratio"]["peer / eaptk"]["median"] == 3.0


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The record and the printed tables of a run with one tool that is right, one wrong and one missing."""
    folder = tmp_path_factory.mktemp("peers")
    shape = {"hidden_size": 32, "intermediate_size": 40, "vocab_size": 61, "max_position_embeddings": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(command, "FOLDER", folder)
        patch.setattr(record, "QUICK", folder)
        patch.setattr(record, "ROOT", folder)
        patch.setenv("COLUMNS", "200")
        patch.setitem(SHAPES, "tiny", Shape("Qwen2Config", shape | heads, n_layers=2, quick_layers=2))
        patch.setitem(PEERS, "right", Peer("eaptk_attribute", "eaptk itself", HEAD, None))
        patch.setitem(
            PEERS, "wrong", Peer("dense_einsum", "ablates to zero whatever it is asked", HEAD, None)
        )
        patch.setitem(PEERS, "missing", Peer("no_such_tool", "is not there", HEAD, None))
        arguments = ["--peers", "missing", "wrong", "right", "--shapes", "tiny"]
        command.main(["--quick", "--tokens", "16", "--threads", "1", *arguments])
    return json.loads((folder / "peers.json").read_text()), printed.getvalue()


def test_a_run_that_came_to_its_end_says_so(whole_run: tuple[dict, str]) -> None:
    assert whole_run[0]["complete"]
    assert whole_run[0]["settings"]["peers"] == ["missing", "wrong", "right"]


def test_a_peer_that_fails_is_reported_and_not_dropped(whole_run: tuple[dict, str]) -> None:
    (found,) = [each for each in whole_run[0]["comparisons"] if each["peer"] == "missing"]
    assert "No module named 'tools.no_such_tool'" in found["error"]
    assert "No module named 'tools.no_such_tool'" in whole_run[1]


def test_a_peer_with_other_scores_is_not_timed(whole_run: tuple[dict, str]) -> None:
    (found,) = [each for each in whole_run[0]["comparisons"] if each["peer"] == "wrong"]
    assert not found["check"]["passed"]
    assert "from float64" in found["error"]
    assert "seconds" not in found


def test_a_peer_with_the_same_scores_is_measured(whole_run: tuple[dict, str]) -> None:
    (found,) = [each for each in whole_run[0]["comparisons"] if each["peer"] == "right"]
    assert found["error"] is None
    assert max(found["check"]["errors"].values()) < 1e-5
    assert found["check"]["eaptk"] == found["check"]["errors"]
    assert found["check"]["share"] == 1
    assert 0.2 < found["seconds"]["ratio"]["peer / eaptk"]["median"] < 5
    assert found["accuracy"]["peer"] == found["accuracy"]["eaptk"]
    assert 1e-5 < found["accuracy"]["peer"]["bfloat16"] < 0.3
    assert set(found["largest"]) == {"peer", "eaptk", "eaptk, least memory", "bare"}
