"""Whether an answer is right: its final answer against the reference, with the reason kept.

Final answers are compared as text first and then as mathematics by math-verify (LaTeX, numbers, fractions,
sets, intervals, equations): 1/2 equals 0.5 and \\frac{1}{2}.
"""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from eaptk.answers import Answers, with_columns
from eaptk.errors import EaptkError
from eaptk.progress import progress_bar
from eaptk.questions import marked_answer

#: Counts changes of what a text's final answer is and what it is compared with: files keep verdicts of their own rules.
RULES = 2

#: Seconds that reading or comparing one expression may take.
_TIMEOUT = 5

#: What an expression of numbers alone is written with.
_ARITHMETIC = re.compile(
    r"\\(?:[dt]?frac|sqrt|pi|times|cdot|left|right|[%,!$])|(?<=\d),(?=\d{3}(?!\d))|[\d\s{}()\[\]+\-*/^.$%]"
)


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right.

    Args:
        right: it is.
        reason: in words, with both sides.
        given: the final answer that was found in the text; None if there was none.
    """

    right: bool
    reason: str
    given: str | None


def grade(answer: str, reference: str) -> Verdict:
    r"""Grade a text by its final answer.

    That is what the text marks as such (`eaptk.questions.marked_answer`) or, where nothing is marked, what math-verify
    takes for it (an expression after "answer is", else the last one).

    Args:
        answer: the whole text.
        reference: the final answer alone; `eaptk.questions.reference_answer` finds it in a solution.

    Raises:
        EaptkError: math-verify is not installed.
    """
    marked = marked_answer(answer)
    text = answer.strip() if marked is None else marked
    if text and _plain(text) == _plain(reference):
        return Verdict(True, f"{text} is the reference", text)
    expected = _expressions(reference if _has_math(reference) else f"${reference}$")
    found = _expressions(answer if marked is None else rf"\boxed{{{marked}}}")
    given = _shown(found, marked)
    if given is None:
        return Verdict(False, "no final answer found", None)
    if not expected:
        return Verdict(False, f"{given} is not {reference}, which cannot be read as mathematics", given)
    if not _verify(expected, found):
        return Verdict(False, f"{given} is not {reference}", given)
    if not (_read_whole(reference, expected) or _numerals(given) == _numerals(reference)):
        return Verdict(
            False, f"{given} has not the numbers of {reference}, which is read in part only", given
        )
    if not _same_equation(expected[0], found[0]):
        return Verdict(False, f"{given} is another equation than {reference}", given)
    return Verdict(True, f"{given} equals {reference}", given)


def _shown(found: tuple[Any, ...], marked: str | None) -> str | None:
    texts = [value for value in found if isinstance(value, str)]
    return marked or (texts[0] if texts else str(found[0]) if found else None)


def _plain(text: str) -> str:
    """Text with what carries no meaning taken out: spaces, dollars, sizes of brackets, case."""
    text = " ".join(text.replace(r"\ ", " ").split())
    # A space between digits is meant ("3 1/2" is not 31/2), but in "10 000".
    text = re.sub(r"\\(?:left|right|[,;!:])|\$|(?<!\d)\s|\s(?!\d)|(?<=\d)\s(?=\d{3}(?!\d))", "", text)
    return text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").rstrip(".").casefold()


def _has_math(text: str) -> bool:
    return "$" in text.replace(r"\$", "") or r"\boxed" in text


@lru_cache(maxsize=4096)
def _expressions(text: str) -> tuple[Any, ...]:
    """What math-verify reads: an expression of sympy and its text, one of them, or nothing."""
    return tuple(_math_verify().parse(text, parsing_timeout=_timeout()))


def _verify(expected: tuple[Any, ...], found: tuple[Any, ...]) -> bool:
    return bool(_math_verify().verify(list(expected), list(found), timeout_seconds=_timeout()))


def _read_whole(text: str, expressions: tuple[Any, ...]) -> bool:
    """Whether every number of a text went into the expression that was read from it.

    Of "10 ft x 18 ft", or of two answers behind each other, math-verify reads one and is content with that.
    """
    numerals = _numerals(text)
    # Of a number alone, however it is written, nothing can have been left out.
    if len(numerals) <= 1 or not _ARITHMETIC.sub("", _without_units(text)):
        return True
    atoms = [atom for e in expressions for atom in getattr(e, "atoms", set)() if atom.is_number]
    fractions = [abs(part) for atom in atoms if atom.is_Rational for part in (atom.p, atom.q)]
    seen = [*fractions, *(abs(float(atom)) for atom in atoms if atom.is_Float)]
    return all(any(abs(n - value) <= 1e-9 * max(n, 1) for value in seen) for n in numerals)


def _numerals(text: str) -> list[float]:
    """The numbers in a text, sorted; those of units ("inches^2") are none."""
    text = _without_units(text)
    text = re.sub(r"(?<=\d)(?:,|\\[,!]|\{,\})+(?=\d{3}(?!\d))", "", text)
    return sorted(map(float, re.findall(r"\d+(?:\.\d+)?|\.\d+", text)))


def _without_units(text: str) -> str:
    return re.sub(r"\\(?:text|mbox|mathrm|textbf)\s*\{[^{}]*\}\s*(?:\^\s*(?:\{\s*\d+\s*\}|\d))?", " ", text)


def _same_equation(expected: Any, found: Any) -> bool:
    """Two equations hold for the same values if their sides differ by a factor.

    math-verify compares their solutions and takes some for equal that are not.
    """
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout
    from sympy import Eq, PolynomialError, cancel  # type: ignore[import-untyped]

    if not (isinstance(expected, Eq) and isinstance(found, Eq)):
        return True
    left, right = (each.lhs - each.rhs for each in (expected, found))
    if left == right or right == 0:
        return bool(left == right)
    try:
        return bool(timeout(_timeout())(cancel)(left / right).is_number)
    except (TimeoutException, PolynomialError):
        return False


def _timeout() -> int | None:
    """math-verify's clock is a signal, which only the main thread may set."""
    return _TIMEOUT if threading.current_thread() is threading.main_thread() else None


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise EaptkError("grading needs math-verify: pip install 'eaptk[study]'") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # what it could not read is in the verdict
    return math_verify


def grade_answers(answers: Answers, progress: bool = True) -> Answers:
    """Grade a file of answers and keep the verdicts in it: columns `right`, `reason` and `given`.

    Verdicts that this version of math-verify, and of the rules here, gave before are kept.

    Raises:
        EaptkError: as `grade`, or the file cannot be written.
    """
    _math_verify()
    judge = {"math-verify": version("math-verify"), "rules": RULES}
    if answers.facts.get("grading") == judge:
        return answers
    texts, references = (answers.table[c].to_pylist() for c in ("answer", "reference"))
    verdicts = []
    with progress_bar("grading", len(texts), 0, progress, unit="answers") as advance:
        for text, reference in zip(texts, references, strict=True):
            verdicts.append(grade(text, reference))
            advance(1)
    columns = {
        "right": pa.array([v.right for v in verdicts]),
        "reason": pa.array([v.reason for v in verdicts], pa.string()),
        "given": pa.array([v.given for v in verdicts], pa.string()),
    }
    return with_columns(answers, columns, grading=judge)
