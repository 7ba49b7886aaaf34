"""The example that `make demo` runs: its problems, its tokenizer, and its way from checkpoints to a picture."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import demo
import problems
import pytest
import torch
from transformers import AutoTokenizer

import eaptk

EXAMPLES = Path(__file__).parents[1] / "examples"

some = pytest.mark.parametrize(
    "problem",
    [*problems.held_out_problems(1, 20), *problems.training_problems(2, 40)],
    ids=lambda problem: problem.expression,
)


def test_no_held_out_calculation_is_ever_trained_on() -> None:
    trained = {problem.expression for problem in problems.training_problems(0, 5000)}
    held_out = [problem.expression for problem in problems.held_out_problems(1, 500)]
    assert len(set(held_out)) == 500
    assert not trained & set(held_out)


@some
def test_a_worked_answer_is_right(problem: problems.Problem) -> None:
    steps = re.findall(r"(\d+ [-+*] \d+) = (\d+);", problem.answer)
    assert len(steps) in (2, 3)
    assert [eval(calculation) for calculation, _ in steps] == [int(result) for _, result in steps]
    # A product only ever comes first, so left to right is what Python's precedence says too.
    assert eval(problem.expression) == problems.final_result(problem.answer) == int(steps[-1][1])


@some
def test_a_question_names_the_numbers_of_its_calculation_in_order(problem: problems.Problem) -> None:
    assert re.findall(r"\d+", problem.question) == re.findall(r"\d+", problem.expression)


def test_the_same_seed_gives_the_same_problems_and_another_seed_others() -> None:
    assert problems.training_problems(5, 20) == problems.training_problems(5, 20)
    assert problems.training_problems(5, 20) != problems.training_problems(6, 20)


@pytest.mark.parametrize(
    ("answer", "result"),
    [(" 14 + 5 = 19; #### 19", 19), (" 14 + 5 = 19;", None), (" #### ", None), ("", None)],
)
def test_grading_looks_at_the_number_after_the_mark(answer: str, result: int | None) -> None:
    assert problems.final_result(answer) == result


@pytest.fixture(scope="module")
def reloaded_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    problems.make_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@some
def test_a_saved_tokenizer_gives_every_problem_back(
    problem: problems.Problem, reloaded_tokenizer: Any
) -> None:
    text = problem.question + problem.answer
    # A prompt and its answer are tokenized apart; together they must read as one text.
    apart = [*reloaded_tokenizer(problem.question).input_ids, *reloaded_tokenizer(problem.answer).input_ids]
    assert apart == reloaded_tokenizer(text).input_ids
    assert reloaded_tokenizer.decode(apart) == text


def test_two_checkpoints_become_runs_tables_and_a_picture(tmp_path: Path) -> None:
    tokenizer = problems.make_tokenizer()
    for seed, name in enumerate(("early", "late")):
        torch.manual_seed(seed)
        demo.make_model(tokenizer).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    questions = {f"q{i}": problem for i, problem in enumerate(problems.held_out_problems(1, 6))}
    demo.write_questions(tmp_path / "questions.jsonl", questions)

    comparison = demo.score_and_compare(tmp_path)

    assert comparison.names == ("early", "late")
    assert comparison.sample_ids == tuple(questions)
    late = eaptk.Run.open(tmp_path / "runs" / "late")
    assert late.samples["expression"].to_pylist() == [problem.expression for problem in questions.values()]
    assert late.done.all()
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "comparison.csv").read_text().startswith("metric,")


def test_training_too_short_to_compare_says_so_in_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        EXAMPLES / "demo.py",
        "--out",
        tmp_path / "out",
        "--steps",
        "2",
        "--questions",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("demo: error: both checkpoints were right on 0 questions")
    assert "Traceback" not in done.stderr


def test_a_folder_with_other_peoples_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="not empty and not this demo's"):
        demo.main(["--out", str(tmp_path), "--steps", "1"])
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_second_time_clears_what_the_demo_itself_left(tmp_path: Path) -> None:
    demo.fresh_folder(tmp_path / "out")
    (tmp_path / "out" / "stale").touch()
    demo.fresh_folder(tmp_path / "out")
    assert not (tmp_path / "out" / "stale").exists()
