"""Verdicts on answers, and why; files of answers with their verdicts."""

from __future__ import annotations

import threading

import pytest

from eaptk.grading import Verdict, grade


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("3 * 6 = 18. #### 18", "18"),
        ("so the answer is 18.", "18"),
        ("Therefore $\\boxed{18}$.", "18.0"),
        ("\\boxed{1/2}", "\\frac{1}{2}"),
        ("\\boxed{0.5}", "50\\%"),
        ("\\boxed{5/2}", "2\\frac{1}{2}"),
        ("\\boxed{1,234}", "1234"),
        ("\\boxed{\\$32{,}348}", "\\$32,\\!348"),
        ("\\boxed{864}", "864 \\mbox{ inches}^2"),
        ("\\boxed{ \\left( 3, \\dfrac{\\pi}{2} \\right) }", "(3,\\frac{\\pi}{2})"),
        ("\\boxed{3,4}", "4,3"),
        ("\\boxed{n-2n}", "$-n$"),
        ("\\boxed{2x^2-4x+20=0}", "$x^2-2 x+10=0$"),
        ("\\boxed{no solution}", "No solution."),
        ("all real numbers", "all real numbers"),
        ("#### 3 1/2", "$3\\ 1/2$"),
        ("#### 10 000", "10000"),
        ("#### Step 3: add\n\nThe answer is \\boxed{42}.", "42"),
        ("#### Final Answer\n\n\\boxed{42}", "42"),
        ("#### Final Answer: 42", "42"),
        ("#### 2. Add them\n\nSo the answer is 42.", "42"),
        ("#### **42**", "42"),
        ("#### 42\n\nQuestion: how many are left?", "42"),
        ("\\boxed{42}\n\n#### Check\n\n40 + 2 is it.", "42"),
        ("so $\\boxed 3.5$.", "3.5"),
        ("\\boxed{(B)}", "(b)"),
    ],
)
def test_an_answer_that_means_the_same_is_right(answer: str, reference: str) -> None:
    assert grade(answer, reference).right


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("#### 18 apples less 1 is 17\n#### 17", "18"),
        ("\\boxed{18} or \\boxed{17}", "18"),
        ("\\boxed{(3,4)}", "(4,3)"),
        ("\\boxed{6}", "5,6"),
        ("\\boxed{52_8}", "52_5"),
        ("\\boxed{10 ft x 18 ft}", "$10 \\mathrm{ft} x 48 \\mathrm{ft}$"),
        ("\\boxed{13}", "$13 \\mathrm{n}, 2 \\mathrm{~d}$"),
        ("\\boxed{x^2-2 x+10=0}", "$x^2-2 x+10=3$"),
        ("\\boxed{-1<x \\leq 1}", "$-4<x \\leq 1$"),
        ("\\boxed{yes}", "no"),
        ("#### 31/2", "3 1/2"),
        ("#### 1 2", "12"),
        ("#### Step 42", "42"),
    ],
)
def test_an_answer_that_means_something_else_is_wrong(answer: str, reference: str) -> None:
    assert not grade(answer, reference).right


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("#### 18", "18", Verdict(True, "18 is the reference", "18")),
        ("\\boxed{36/2}", "18", Verdict(True, "36/2 equals 18", "36/2")),
        ("#### 17", "18", Verdict(False, "17 is not 18", "17")),
        ("I do not know", "18", Verdict(False, "no final answer found", None)),
        ("", "18", Verdict(False, "no final answer found", None)),
        (
            "\\boxed{10}",
            "$10 \\mathrm{ft} x 18 \\mathrm{ft}$",
            Verdict(
                False,
                "10 has not the numbers of $10 \\mathrm{ft} x 18 \\mathrm{ft}$, which is read in part only",
                "10",
            ),
        ),
    ],
)
def test_a_verdict_says_what_was_found_and_why(answer: str, reference: str, verdict: Verdict) -> None:
    assert grade(answer, reference) == verdict


def test_grading_works_outside_the_main_thread_where_no_clock_can_be_set() -> None:
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.append(grade("\\boxed{1/2}", "0.5")))
    thread.start()
    thread.join()
    assert found[0].right
