"""Which edges are meant: by column, name, pattern, table, file, or by an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from keeping import GRAPH, GRAPHS, SOME, make_rows, make_run

from eaptk import EaptkError, Run, strongest
from eaptk.edges import choose_edges

MASK = np.isin(np.arange(GRAPH.n_edges), SOME)
FRAME = GRAPH.to_frame()


def names(columns: np.ndarray) -> list[str]:
    return [GRAPH.edge_name(column) for column in columns]


@pytest.mark.parametrize(
    "given",
    [
        MASK,
        SOME,
        SOME[::-1].tolist(),
        names(SOME),
        ",".join(names(SOME)),
        [name.replace("→", " -> ") for name in names(SOME)],
        GRAPH.to_frame(SOME),
        GRAPH.to_frame(SOME)[["column"]],
        GRAPH.to_frame(SOME)[["destination", "source"]],
    ],
    ids=["mask", "columns", "backwards", "names", "one text", "arrows", "table", "numbers", "ends"],
)
def test_edges_may_be_given_in_many_ways(given: Any) -> None:
    np.testing.assert_array_equal(choose_edges(GRAPH, given), SOME)


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("*->*", FRAME.index >= 0),
        ("a*.h3->m*", FRAME.source.str.endswith("h3") & FRAME.destination.str.startswith("m")),
        ("*→a1.h?<q>", FRAME.destination.str.match(r"a1\.h\d<q>")),
        ("input->logits", (FRAME.source == "input") & (FRAME.destination == "logits")),
        ("m0->*, input->m1", (FRAME.source == "m0") | (FRAME.source + FRAME.destination == "inputm1")),
        ("*->a[1]*<k>", FRAME.destination.str.match("a1.*<k>")),
    ],
)
def test_a_pattern_stands_for_all_edges_it_matches(pattern: str, chosen: Any) -> None:
    np.testing.assert_array_equal(choose_edges(GRAPH, pattern), np.flatnonzero(chosen))


@pytest.mark.parametrize("name", ["e.npy", "mask.npy", "e.parquet", "e.csv", "e.txt"])
def test_edges_may_lie_in_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    frame = GRAPH.to_frame(SOME)
    {
        "e.npy": lambda: np.save(path, SOME),
        "mask.npy": lambda: np.save(path, MASK),
        "e.parquet": lambda: frame.to_parquet(path),
        "e.csv": lambda: frame.to_csv(path, index=False),
        "e.txt": lambda: path.write_text("\n".join(names(SOME)) + "\n\n"),
    }[name]()
    np.testing.assert_array_equal(choose_edges(GRAPH, path), SOME)
    np.testing.assert_array_equal(choose_edges(GRAPH, str(path)), SOME)


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("runs") / "pilot", make_rows())


def test_the_strongest_edges_of_a_pilot_are_those_of_largest_mean_size(pilot: Run) -> None:
    strength = np.abs(make_rows().astype(np.float64)).mean(0)
    expected = np.sort(np.argsort(-strength, kind="stable")[:20])
    np.testing.assert_array_equal(strongest(pilot, 20), expected)
    np.testing.assert_array_equal(choose_edges(GRAPH, f"{pilot.path}:20"), expected)


def test_a_run_stands_for_the_edges_it_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "masked", make_rows(), columns=SOME)
    np.testing.assert_array_equal(choose_edges(GRAPH, run.path), SOME)


def test_the_strongest_of_a_run_of_strongest_edges_have_the_largest_sums(tmp_path: Path) -> None:
    rows = make_rows()
    run = make_run(tmp_path / "top", rows, top=10)
    kept = np.zeros(rows.shape)
    for i, row in enumerate(np.abs(rows)):
        chosen = np.argsort(-row, kind="stable")[:10]
        kept[i, chosen] = row[chosen]
    expected = np.sort(np.argsort(-kept.sum(0), kind="stable")[:6])
    np.testing.assert_array_equal(strongest(run, 6), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("runs/nowhere", "neither a file nor a run, and no pattern"),
        ("a0.h9->m*", "no edge is called 'a0.h9->m\\*'; no source is 'a0.h9': they are called input, a0.h0"),
        ("input->b*", "no destination is 'b\\*': they are called a0.h0<q>"),
        ("m1->a0*", "every 'm1' is written after each 'a0\\*' reads"),
        (["input->m0", "m0"], "'m0' names no edge; write SOURCE->DESTINATION"),
        ([], "no edge is selected"),
        ([0, GRAPH.n_edges], f"there is no edge {GRAPH.n_edges}"),
        ([0.5], "edge indices must be a list of integers"),
        (np.zeros(GRAPH.n_edges, dtype=bool), "no edge is selected"),
        (
            pandas.DataFrame({"source": ["l0"], "destination": ["l1"]}),
            "has the source 'l0', which this graph",
        ),
        (
            pandas.DataFrame({"source": ["m1"], "destination": ["m0"]}),
            "m1→m0, which is no edge of this graph",
        ),
        (pandas.DataFrame({"edge": ["m0→m1"]}), "neither 'source' and 'destination' nor 'column'"),
        (FRAME[:0], "has no edge"),
    ],
)
def test_what_names_no_edge_is_refused_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(EaptkError, match=message) as error:
        choose_edges(GRAPH, given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.json", b"[]", "give .npy, .parquet, .csv or .txt"),
        ("e.npy", b"no array", "cannot be read as edges"),
        ("e.npy", b"", "cannot be read as edges"),
        ("e.parquet", b"no table", "cannot be read as edges"),
        ("e.csv", b"", "cannot be read as edges"),
        ("e.csv", b"column\n3\n\nmany\n", "edge indices must be a list of integers"),
        ("e.csv", b"source,destination\nm1,m0\n", "m1→m0, which is no edge of this graph"),
        ("e.txt", b"input->b*\n", "no destination is 'b\\*'"),
        ("e.txt", b"\n", "no edge is selected"),
    ],
)
def test_a_file_of_no_edges_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EaptkError, match=f"{name}.*{message}"):
        choose_edges(GRAPH, tmp_path / name)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(GRAPH.n_edges - 1, dtype=bool), f"the edge mask has shape .{GRAPH.n_edges - 1},."),
        # Taken for columns it would keep two edges.
        (np.arange(GRAPH.n_edges) % 2, "numbers, all 0 or 1, are a mask; make them booleans"),
        (np.zeros((2, 3), dtype=int), "must be a list of integers"),
        (np.array([-1]), "there is no edge -1"),
    ],
    ids=["too short", "of integers", "two dimensions", "negative"],
)
def test_a_mask_with_a_mistake_is_refused_by_name(tmp_path: Path, mask: np.ndarray, message: str) -> None:
    np.save(tmp_path / "mask.npy", mask)
    with pytest.raises(EaptkError, match=f"mask.npy: .*{message}"):
        choose_edges(GRAPH, tmp_path / "mask.npy")


def test_edges_of_a_run_of_another_graph_are_refused(pilot: Run) -> None:
    with pytest.raises(EaptkError, match="edges of another graph: n_layers is 2 there, 3 here"):
        choose_edges(GRAPHS["block"], pilot.path)


@pytest.mark.parametrize(
    ("how", "given", "message"),
    [
        ({"top": 5}, "{}", "kept other edges of each sample; .*:5 stands for its 5 strongest overall"),
        ({"top": 5}, "{}:1000", "its 1,000 strongest are unknown"),
        ({"layer_pairs": True}, "{}", "kept sums over layer pairs, and no single edge"),
        ({"layer_pairs": True}, "{}:3", "kept sums over layer pairs"),
        (
            {"columns": SOME},
            f"{{}}:{len(SOME) + 1}",
            f"kept {len(SOME)} edges; its {len(SOME) + 1} strongest",
        ),
    ],
)
def test_edges_that_a_run_does_not_know_are_refused(
    tmp_path: Path, how: dict[str, Any], given: str, message: str
) -> None:
    run = make_run(tmp_path / "run", make_rows(), **how)
    with pytest.raises(EaptkError, match=message):
        choose_edges(GRAPH, given.format(run.path))
