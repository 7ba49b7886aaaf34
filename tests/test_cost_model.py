"""The cost model: its queue loses and makes no work, its bytes are those on disk, the docs say what it computes."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from accounting import peak_bytes
from checkpoints import make_model
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCABULARY, tiny_model

from benchmarks import calibration, claims, record
from benchmarks.claims import BACKLOG, Batch, queue_of, simulate
from benchmarks.cost_tables import DOCS, TOLERANCE, docs_tables, place
from benchmarks.forecast import WAYS, Law, Machine, Replica, keeping, run_arrays, sample_bytes, work_of
from benchmarks.outlook import DATASETS, LEVELS, Forecast, Pace, forecast, pace
from eaptk import Batch as Tokens
from eaptk import Graph, attribute, score
from eaptk.cli import app
from eaptk.pipeline import Behind
from eaptk.plan import MARGIN, Plan, Work
from eaptk.scoring import stretches
from eaptk.sites import Sites

RECORD = json.loads((record.RESULTS / "cost_model.json").read_text())

queues = st.lists(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), min_size=1, max_size=30)


def batches(queue: list[list[float]], write: float = 0.0) -> list[list[Batch]]:
    return [[Batch(seconds, write) for seconds in stretch] for stretch in queue]


@given(queues, st.integers(1, 40))
def test_every_batch_is_computed_once_however_many_processes_there_are(
    queue: list[list[float]], processes: int
) -> None:
    found = simulate(batches(queue), processes)
    assert sum(found.busy) == pytest.approx(sum(map(sum, queue)))
    assert len(found.busy) == processes


@given(queues, st.integers(1, 40))
def test_time_lies_between_what_no_queue_can_beat_and_one_stretch_more(
    queue: list[list[float]], processes: int
) -> None:
    total, longest = sum(map(sum, queue)), max(map(sum, queue))
    seconds = simulate(batches(queue), processes).seconds
    assert max(longest, total / processes) <= seconds * (1 + 1e-9)
    assert seconds <= (total / processes + longest) * (1 + 1e-9)


@given(queues)
def test_without_end_of_cards_the_time_is_that_of_the_longest_stretch(queue: list[list[float]]) -> None:
    assert simulate(batches(queue), 10_000).seconds == pytest.approx(max(map(sum, queue)))


@given(queues, st.integers(1, 40), st.floats(0.01, 5))
def test_no_run_ends_before_its_disk_and_no_row_is_lost_to_it(
    queue: list[list[float]], processes: int, write: float
) -> None:
    free, found = simulate(batches(queue), processes), simulate(batches(queue, write), processes)
    writing = write * sum(map(len, queue))
    assert found.seconds >= max(writing, free.seconds) * (1 - 1e-9)
    assert found.seconds <= (free.seconds + writing) * (1 + 1e-9)
    assert sum(found.busy) == pytest.approx(sum(free.busy))


def test_a_process_computes_until_its_backlog_is_full() -> None:
    found = simulate(batches([[1.0] * 8], write=10.0), 1)
    # The first row is at the disk from 1 to 11, so the fifth, made at 5, waits for it until then; 8 rows take 80 s.
    assert found.seconds == 81.0
    assert found.waited == (6.0 + 9.0 + 9.0 + 9.0,)
    assert inspect.signature(Behind).parameters["depth"].default == BACKLOG


def test_a_late_process_delays_nobody() -> None:
    queue = batches([[1.0]] * 20)
    assert simulate(queue, 2, ready=[0.0, 100.0]).busy == (20.0, 0.0)
    assert simulate(queue, 2, ready=[0.0, 10.0]).seconds == 15.0


def test_the_queue_is_the_plan_that_runs_follow() -> None:
    lengths = claims.lengths_of(3000, 200)
    queue = queue_of(lengths, 1024)
    assert sum(n for stretch in queue for n, _ in stretch) == len(lengths)
    assert all(n * tokens <= 1024 or n == 1 for stretch in queue for n, tokens in stretch)
    sizes = [len(stretch) for stretch in queue]
    assert sizes == [len(part) for part in stretches([[0]] * sum(sizes))]


KEPT: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"row_dtype": "float16"},
    "top 1000": {"top": 1000},
    "layer pairs": {"layer_pairs": True},
    "metrics only": {"metrics_only": True, "upper": 1.0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_samples", [3, 7])
def test_arrays_on_disk_are_predicted_to_the_byte(way: str, n_samples: int, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8)
    records = [{"prompt_ids": [1, 2, 3], "answer_ids": [4, 5][: 1 + i % 2]} for i in range(n_samples)]
    run = score(model, records, tmp_path / "run", granularity="head", progress=False, **KEPT[way])
    found = {path.name: path.stat().st_size for path in run.path.glob("*.npy")}
    assert found == run_arrays(keeping(run.graph, way), n_samples)


def test_a_sample_adds_what_its_row_takes() -> None:
    graph = Graph(28, 28, 4, granularity="head")
    assert sample_bytes(keeping(graph, "float32")) == 4 * graph.n_edges + 4 + 1


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("granularity", LEVELS)
def test_bytes_of_a_card_are_those_counted_and_several_hold_no_less_together(
    granularity: Any, checkpoint: bool
) -> None:
    model = tiny_model(
        "llama",
        torch.float32,
        num_hidden_layers=6,
        hidden_size=192,
        intermediate_size=512,
        max_position_embeddings=256,
    )
    ids = torch.randint(0, VOCABULARY, (1, 256), generator=torch.Generator().manual_seed(0))
    batch = Tokens.from_mapping({"input_ids": ids})
    graph = Graph.from_model(model, granularity)
    work = Work.of(model, Sites(model, graph), 1, 256, n_loss=255)
    plan = Plan(work, 0, 6, checkpoint, 0)
    counted = peak_bytes(lambda: attribute(model, batch, graph, flush_layers=6, checkpoint=checkpoint))
    assert 1 / MARGIN < Replica().peak(plan) / counted < MARGIN
    for how in ("device map", "tensor parallel"):
        spread = Replica(3, how)  # type: ignore[arg-type]
        assert spread.peak(plan) <= Replica().peak(plan)
        assert 3 * spread.peak(plan) * MARGIN > counted


@pytest.mark.parametrize("granularity", LEVELS)
def test_a_batch_takes_what_its_law_says(granularity: Any) -> None:
    machine, one = Machine(1e14, 1e14, 1e12), Replica()

    def seconds(n_samples: int, n_tokens: int) -> float:
        plan = Plan(work_of("Qwen2.5-7B", granularity, n_samples, n_tokens), 0, 28, True, 0)
        return sum(one.seconds(plan, machine).values())

    law = Law.of(lambda n_tokens: seconds(1, n_tokens), 0.0, 4096, 16384)
    for shape in ((1, 8192), (4, 2048), (2, 32768)):
        assert law.of_batch(*shape) == pytest.approx(seconds(*shape), rel=1e-3)


def test_tensor_parallel_cards_are_faster_and_those_of_a_device_map_are_not() -> None:
    plan = Plan(work_of("Llama-3-70B", "block", 2, 512), 0, 80, False, 0)
    machine = Machine(5e14, 6e14, 2.7e12)
    alone, mapped, parallel = (
        sum(replica.seconds(plan, machine).values())
        for replica in (Replica(), Replica(4), Replica(4, "tensor parallel"))
    )
    assert mapped == alone
    assert alone / 4 < parallel < alone / 2


def test_constants_are_found_again_from_what_they_predict() -> None:
    truth = Machine(7e10, 7e10, 4e9)
    measured = []
    for case in calibration.CASES[:3]:
        for level in calibration.LEVELS:
            each = calibration.Measured(replace(case, fitted=True), level, (1.0,), case.plan(level))
            measured.append(replace(each, seconds=(each.predicted(truth), 99.0)))
    found = calibration.fit(measured)
    assert (found.rate, found.bandwidth) == pytest.approx((truth.rate, truth.bandwidth))


def test_held_out_cases_are_predicted_within_the_tolerance() -> None:
    machine = Machine(RECORD["measured"]["rate"], RECORD["measured"]["rate"], RECORD["measured"]["bandwidth"])
    cases = {
        (json.dumps(asdict(case)), level): case for case in calibration.CASES for level in calibration.LEVELS
    }
    held_out = 0
    for kept in RECORD["measured"]["cases"]:
        fields = {name: kept[name] for name in calibration.Case.__dataclass_fields__}
        case = cases.pop((json.dumps(fields), kept["level"]))
        measured = calibration.Measured(case, kept["level"], tuple(kept["seconds"]), case.plan(kept["level"]))
        held_out += not case.fitted
        assert case.fitted or abs(measured.predicted(machine) / measured.fastest - 1) < TOLERANCE
    assert not cases
    assert held_out > len(calibration.CASES)


def test_the_tables_of_the_docs_are_those_on_record() -> None:
    predicted = RECORD["predicted"]
    tables = docs_tables(
        [Forecast(**row) for row in predicted["table"]], [Pace(**row) for row in predicted["pace"]]
    )
    text = DOCS.read_text()
    for name, table in tables.items():
        found = place(name).search(text)
        assert found is not None
        assert found[0] == table, "run python -m benchmarks.cost_model --predict"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", ["Qwen2.5-7B", "Llama-3-70B"])
def test_the_record_is_what_the_code_predicts(shape: str, level: Any) -> None:
    hashing = RECORD["measured"]["hashing_bytes_per_second"]
    rows = [row for row in RECORD["predicted"]["table"] if (row["shape"], row["level"]) == (shape, level)]
    assert [(row["n_samples"], row["tokens"]) for row in rows] == list(DATASETS)
    for kept in (row for row in rows if row["n_samples"] < 10**5):
        found = asdict(forecast(shape, level, kept["n_samples"], kept["tokens"], hashing))
        assert found == pytest.approx(kept), "run python -m benchmarks.cost_model --predict"
    (kept,) = (row for row in RECORD["predicted"]["pace"] if (row["shape"], row["level"]) == (shape, level))
    assert asdict(pace(shape, level)) == pytest.approx(kept)


def commands() -> list[list[str]]:
    """Arguments of every `eaptk` in the blocks of docs/scale.md."""
    blocks = re.findall(r"^```sh\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.split("eaptk ", 1)[1]) for line in lines if re.search(r"(^|-m )eaptk ", line)]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_of_the_docs_is_one(arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    assert command.make_context(command.name, arguments).params
