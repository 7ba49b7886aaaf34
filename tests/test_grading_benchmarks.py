"""The grader on public benchmarks: their own solutions are right, and no longer so once the reference is perturbed.

Exists only where copies of them lie beside the checkout.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from eaptk.grading import grade
from eaptk.questions import QuestionSet, read_questions

DATA = Path(__file__).parents[2] / "shared" / "data"

#: A file, the field of the whole solution, what puts it into a model's words, least agreement, every how many.
SETS = {
    "gsm8k_test": ("answer", "{}", 0.99, 1),
    "math500_test": ("solution", "{}", 0.97, 1),
    "college_math_test": ("answer", "It follows that \\boxed{{{}}}.", 0.95, 10),
}


def read(name: str) -> list[tuple[str, str]]:
    """Solutions and references."""
    field, words, _, step = SETS[name]
    path = DATA / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    questions = read_questions(QuestionSet(path, reference="answer"))
    pairs = [
        (words.format(line[field].strip("$")) if "boxed" in words else line[field], question.reference)
        for line, question in zip(lines, questions, strict=True)
    ]
    return pairs[::step]


@pytest.mark.parametrize("name", SETS)
def test_the_solutions_of_a_benchmark_are_right(name: str) -> None:
    verdicts = [grade(solution, reference) for solution, reference in read(name)]
    wrong = [verdict.reason for verdict in verdicts if not verdict.right]
    assert 1 - len(wrong) / len(verdicts) >= SETS[name][2], wrong


@pytest.mark.parametrize(("name", "least", "every"), [
    ("gsm8k_test", 1.0, 1),
    ("math500_test", 0.98, 3),
    ("college_math_test", 0.9, 12),
])  # fmt: skip
def test_a_changed_digit_in_the_reference_makes_them_wrong(name: str, least: float, every: int) -> None:
    rng = random.Random(0)
    accepted = []
    pairs = [pair for pair in read(name)[::every] if re.search(r"\d", pair[1])]
    for solution, reference in pairs:
        at = rng.choice([match.start() for match in re.finditer(r"\d", reference)])
        digit = rng.choice([d for d in "123456789" if d != reference[at]])
        perturbed = reference[:at] + digit + reference[at + 1 :]
        if grade(solution, perturbed).right:
            accepted.append((reference, perturbed))
    assert 1 - len(accepted) / len(pairs) >= least, accepted
