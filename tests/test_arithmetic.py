"""The example that trains what its study compares: its script at toy size, and what is committed of the real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import problems
import pytest
import torch
from math_verify import parse, verify
from safetensors.torch import load_file

from eaptk.loading import load_model, load_tokenizer
from eaptk.study_file import read_study

EXAMPLE = Path(__file__).parents[1] / "examples" / "arithmetic"
METHODS = ("sft", "sft-continued", "grpo", "rloo", "dpo")
TRAINED = [*METHODS, "grpo-steps/step-1"]
QUESTIONS = [json.loads(line) for line in (EXAMPLE / "questions.jsonl").read_text().splitlines()]


def train(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLE / "train.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    done = train("--quick", "--seeds", "0", "--out", folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_leaves_a_checkpoint_that_can_be_scored_with_its_diary(out: Path, name: str) -> None:
    folder = out / "checkpoints" / "seed0" / name
    assert load_model(folder).dtype == torch.bfloat16
    assert load_tokenizer(folder).get_vocab() == problems.make_tokenizer().get_vocab()
    *steps, last = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    assert 0 <= last["exam_accuracy"] <= 1
    assert all(row["loss"] == pytest.approx(row["loss"]) and row["step"] >= 1 for row in steps)
    assert f"seed0/{name},{last['exam_accuracy']:.4f}" in (out / "accuracy.csv").read_text().splitlines()


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "sft"])
def test_what_follows_sft_starts_from_its_weights_and_moves_them(out: Path, name: str) -> None:
    sft, after = (
        load_file(out / "checkpoints" / "seed0" / which / "model.safetensors") for which in ("sft", name)
    )
    apart = sum((after[k].float() - sft[k].float()).square().sum() for k in sft).sqrt()
    size = sum(weight.float().square().sum() for weight in sft.values()).sqrt()
    moved = name != "grpo-steps/step-1"  # one step may find no group with both right and wrong answers
    assert (apart > 0) >= moved
    assert apart < 0.2 * size


def test_finished_checkpoints_are_kept(out: Path) -> None:
    weights = sorted(out.rglob("model.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    done = train("--quick", "--seeds", "0", "--out", out)
    assert "5 of 5 checkpoints are there" in done.stdout
    assert [path.stat().st_mtime_ns for path in weights] == before


def test_checkpoints_of_other_settings_are_not_mixed_with(out: Path) -> None:
    done = train("--seeds", "0", "--out", out)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("train: error: the checkpoints of")


def test_the_exam_was_never_trained_on_and_its_answers_can_be_parsed() -> None:
    trained = {problem.question for problem in problems.training_problems(0, 5000)}
    assert len({question["question"] for question in QUESTIONS}) == len(QUESTIONS) == 400
    assert not trained & {question["question"] for question in QUESTIONS}
    for question in QUESTIONS[:40]:
        final = str(problems.final_result(" " + question["answer"]))
        assert verify(parse(final), parse(question["answer"]))


def test_the_study_names_checkpoints_that_are_there_and_small() -> None:
    study = read_study(EXAMPLE / "study.yaml")
    assert {family.method for family in study.families} >= {"GRPO", "DPO", "SFT continued"}
    for model in study.models.values():
        assert (Path(model.path) / "model.safetensors").stat().st_size < 8_000_000
