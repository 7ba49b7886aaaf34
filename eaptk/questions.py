"""Questions with a reference answer: from a file, from the hub, or one of the ready-made sets.

The ready-made sets are those of arXiv 2509.21044 and the usual sample of MATH:

    gsm8k          openai/gsm8k, test (1,319)
    math           DigitalLearningGmbH/MATH-lighteval, test (5,000)
    math500        HuggingFaceH4/MATH-500, test (500)
    college-math   di-zhang-fdu/College_Math_Test, test (2,818)
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from eaptk.errors import EaptkError
from eaptk.records import records

#: What the fields of a record may be called where nobody says so; the first that is there is taken.
_QUESTION_FIELDS = ("question", "problem", "prompt")
_REFERENCE_FIELDS = ("reference", "answer", "solution")
_ID_FIELDS = ("id", "unique_id")

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
#: How a line with an expression begins, and none like "2. Then" or "(b) Then".
_EXPRESSION = re.compile(r"(?!\(?\w{1,3}[.)]\s+[^\W\d])[-+−([{$\\.\d]")
#: What may stand before an answer on its line.
_LABEL = re.compile(r"^\W*(?:the\s+)?(?:final\s+)?answer(?![a-z])(?:\s+is\b)?[\s:*]*", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """A question and the final answer it is graded by.

    Args:
        id: names the question in every model's answers.
        text: as the dataset has it, without a prompt around it.
        reference: the final answer alone; see `reference_answer`.
    """

    id: str
    text: str
    reference: str


@dataclass(frozen=True)
class QuestionSet:
    """Where questions come from.

    Args:
        source: what `eaptk.records.records` reads.
        config: of a dataset on the hub that has several.
        question, reference, id: fields of a record; None: the usual names are tried, and the id is the
            record's number where there is none.
        limit: only the first so many.
    """

    source: Any
    config: str | None = None
    question: str | None = None
    reference: str | None = None
    id: str | None = None
    limit: int | None = None


READY_MADE = {
    "gsm8k": QuestionSet("openai/gsm8k:test", "main", "question", "answer"),
    "math": QuestionSet("DigitalLearningGmbH/MATH-lighteval:test", "default", "problem", "solution"),
    "math500": QuestionSet("HuggingFaceH4/MATH-500:test", None, "problem", "answer", "unique_id"),
    "college-math": QuestionSet("di-zhang-fdu/College_Math_Test:test", None, "question", "answer"),
}


def question_set(name: str | os.PathLike[str], **fields: Any) -> QuestionSet:
    """A ready-made set by its name, or any other source; `fields` replace those of the set."""
    known = READY_MADE.get(str(name), QuestionSet(name))
    return QuestionSet(**{**vars(known), **{k: v for k, v in fields.items() if v is not None}})


def read_questions(source: str | os.PathLike[str] | QuestionSet | Any) -> list[Question]:
    """Questions in the order of their source.

    Args:
        source: the name of a ready-made set, a `QuestionSet`, or what `eaptk.records.records` reads.

    Raises:
        EaptkError: nothing to read; a record without question or reference; an id given twice.
    """
    if not isinstance(source, QuestionSet):
        source = question_set(source)
    if source.limit is not None and source.limit < 1:
        raise EaptkError(f"limit is {source.limit}; it must be at least 1")
    name = _name(source.source)
    found: dict[str, Question] = {}
    for where, number, record in islice(records(source.source, source.config), source.limit):
        if not isinstance(record, Mapping):
            raise EaptkError(f"{where}: a record is a mapping, not {type(record).__name__}")
        identity = _field(record, where, "id", source.id, _ID_FIELDS, required=source.id is not None)
        question = Question(
            str(number) if identity is None else str(identity),
            str(_field(record, where, "question", source.question, _QUESTION_FIELDS)),
            reference_answer(str(_field(record, where, "reference", source.reference, _REFERENCE_FIELDS))),
        )
        if question.id in found:
            raise EaptkError(f"{where}: id {question.id!r} is given twice; ids must be unique in {name}")
        if not question.reference:
            raise EaptkError(f"{where}: its reference answer is empty, so no answer could be graded")
        found[question.id] = question
    if not found:
        raise EaptkError(f"{name} is empty: it needs at least one question")
    return list(found.values())


def reference_answer(text: str) -> str:
    r"""The final answer in a reference solution.

    What follows ``####`` (GSM8K) or what the last ``\boxed{}`` holds (MATH), else all of it.
    """
    return marked_answer(text) or text.strip()


def marked_answer(text: str) -> str | None:
    r"""What a text marks as its final answer: after its last ``####``, or in a ``\boxed{}`` behind that.

    ``####`` begins a heading in Markdown, too. It marks an answer where the text ends with its line, or where what
    follows begins as a number or an expression does.
    """
    last, found = -1, None
    for mark in re.finditer(r"(?<!#)####(?!#)\s*([^\n]+)", text):
        line = _LABEL.sub("", mark[1].strip()).strip("* ")
        if line and (_EXPRESSION.match(line) or not text[mark.end() :].strip()):
            last, found = mark.start(), line
    boxed = [start.start() for start in _BOXED.finditer(text)]
    return last_boxed(text) or found if boxed and boxed[-1] > last else found


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{}`` (or ``\fbox{}``, or ``\boxed x``) holds; None if there is none that ends."""
    starts = list(_BOXED.finditer(text))
    if not starts:
        return None
    rest = text[starts[-1].end() :]
    if not rest.startswith("{"):
        return re.split(r"[\s$]|[.,](?!\d)", rest, maxsplit=1)[0] or None
    depth = 0
    for position, (before, character) in enumerate(zip(" " + rest, rest, strict=False)):
        if before != "\\":  # an escaped brace is part of the answer
            depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:position].strip() or None
    return None


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """``sha256:…`` over ids, texts and references, in order."""
    content = json.dumps([[q.id, q.text, q.reference] for q in questions])
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "the dataset"


def _field(
    record: Mapping[str, Any],
    where: str,
    what: str,
    named: str | None,
    usual: Sequence[str],
    required: bool = True,
) -> Any:
    names = usual if named is None else (named,)
    for name in names:
        if record.get(name) is not None:
            return record[name]
    if not required:
        return None
    close = difflib.get_close_matches(names[0], map(str, record), n=1)
    raise EaptkError(
        f"{where}: it has no {' or '.join(map(repr, names))}, but {', '.join(map(repr, record)) or 'nothing'}; "
        f"say which field is the {what}" + (f", {close[0]!r} perhaps" if close else "")
    )
