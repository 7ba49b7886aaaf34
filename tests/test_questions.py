"""Questions: where they come from, what of a solution is the final answer, and how they are put to a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import make_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from eaptk.errors import EaptkError
from eaptk.prompts import prompt_tokens, stop_tokens
from eaptk.questions import (
    READY_MADE,
    Question,
    QuestionSet,
    marked_answer,
    question_set,
    questions_fingerprint,
    read_questions,
    reference_answer,
)

RECORDS = [
    {"problem": "1 + 1?", "solution": "two: $\\boxed{2}$"},
    {"problem": "2 + 2?", "solution": "#### 4"},
]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("She has 3 * 6 = <<3*6=18>>18 left.\n#### 18", "18"),
        ("#### 1\nno, wait\n#### 1,234 ", "1,234"),
        (r"Thus $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"$\boxed{1}$ or rather $\boxed{\left\{ 2, 3 \right\}}$", r"\left\{ 2, 3 \right\}"),
        (r"so \fbox{7} it is", "7"),
        (r"hence $\boxed 9$.", "9"),
        (r"never closed: \boxed{1", r"never closed: \boxed{1"),
        (" 10-4 n ", "10-4 n"),
    ],
)
def test_the_final_answer_of_a_solution_is_what_it_marks_and_else_all_of_it(
    solution: str, answer: str
) -> None:
    assert reference_answer(solution) == answer


BALANCED = st.recursive(
    st.text("ab1 ,", max_size=4),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
)


@given(before=st.text("xyz .", max_size=9), inside=BALANCED, after=st.text("xyz .", max_size=9))
def test_a_box_holds_what_was_put_into_it_however_its_braces_nest(
    before: str, inside: str, after: str
) -> None:
    assert marked_answer(f"{before}\\boxed{{{inside}}}{after}") == (inside.strip() or None)


def test_a_file_of_lines_a_table_and_records_are_the_same_questions(tmp_path: Path) -> None:
    expected = [("2 + 2?", "4"), ("1 + 1?", "2")]
    lines = write_jsonl(tmp_path / "q.jsonl", RECORDS)
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "q.parquet")
    for source in (lines, tmp_path / "q.parquet", RECORDS):
        assert [(q.text, q.reference) for q in reversed(read_questions(source))] == expected


def test_fields_are_named_where_they_are_not_the_usual_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"task": "?", "gold": 7, "key": "a", "answer": "no"}])
    source = question_set(path, question="task", reference="gold", id="key")
    assert read_questions(source) == [Question("a", "?", "7")]


@pytest.mark.parametrize("name", sorted(READY_MADE))
def test_a_ready_made_set_is_known_by_its_name_and_may_be_limited(name: str) -> None:
    assert question_set(name, limit=3) == QuestionSet(**vars(READY_MADE[name]) | {"limit": 3})


@pytest.mark.parametrize(
    ("records", "fields", "message"),
    [
        ([], {}, "is empty: it needs at least one question"),
        ([{"quetsion": "?", "answer": "1"}], {}, "say which field is the question, 'quetsion' perhaps"),
        ([{"question": "?"}], {}, "it has no 'reference' or 'answer' or 'solution', but 'question'"),
        ([{"question": "?", "answer": " "}], {}, "its reference answer is empty"),
        ([{"id": 1, "question": "?", "answer": "1"}] * 2, {}, "id '1' is given twice"),
        ([{"question": "?", "answer": "1"}], {"id": "key"}, "it has no 'key'"),
        ([{"question": "?", "answer": "1"}], {"limit": 0}, "limit is 0; it must be at least 1"),
        ([3], {}, "a record is a mapping, not int"),
    ],
)
def test_records_that_make_no_question_are_refused_with_the_place(
    records: list[Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(EaptkError, match=message.replace("?", r"\?")):
        read_questions(QuestionSet(records, **fields))


def test_the_fingerprint_sees_every_part_of_a_question() -> None:
    base = Question("a", "b", "c")
    others = [Question("x", "b", "c"), Question("a", "x", "c"), Question("a", "b", "x")]
    assert len({questions_fingerprint([q]) for q in (base, *others)}) == 4


def test_a_template_takes_the_question_as_it_is_braces_and_all() -> None:
    tokenizer = make_tokenizer()
    plain = prompt_tokens("plain", ["w1 {w2}"], tokenizer)
    assert plain == [tuple(tokenizer("w1 {w2}")["input_ids"])]
    assert prompt_tokens("w3 {question} w4 {w5}", ["w1 {w2}"], tokenizer) == [
        tuple(tokenizer("w3 w1 {w2} w4 {w5}")["input_ids"])
    ]


def test_the_chat_template_is_the_tokenizers_own_with_its_special_tokens_once() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<s> w7 {{ messages[0].content }} w8"
    (tokens,) = prompt_tokens("chat", ["w1"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens) == ["<s>", "w7", "w1", "w8"]


def test_what_ends_an_answer_must_be_one_token() -> None:
    tokenizer = make_tokenizer()
    assert stop_tokens(["w2", "</s>"], tokenizer) == tokenizer.convert_tokens_to_ids(["w2", "</s>"])
    with pytest.raises(EaptkError, match="'w1 w2' is no single token"):
        stop_tokens(["w1 w2"], tokenizer)


def test_a_chat_template_that_fails_is_one_line() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(EaptkError, match="the tokenizer's chat template fails: system first"):
        prompt_tokens("chat", ["w1"], tokenizer)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("deepseek_math", "did you mean 'deepseek-math'"),
        ("nothing like it", "known are plain, .*chat"),
        ("chat", "needs a tokenizer with a chat template"),
    ],
)
def test_a_prompt_that_is_no_template_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(EaptkError, match=message):
        prompt_tokens(prompt, ["w1"], make_tokenizer())


def test_the_papers_families_are_asked_as_its_code_asks_them() -> None:
    class Text:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [*map(ord, text)]}

    def shown(name: str) -> str:
        return "".join(map(chr, prompt_tokens(name, ["1+1?"], Text())[0]))

    steps = "Please reason step by step, and put your final answer within \\boxed{}."
    assert shown("deepseek-math") == f"User: 1+1?\n{steps}\n\nAssistant:"
    assert shown("mistral") == "[INST] 1+1?[/INST]"
    assert json.dumps(shown("qwen25-math")).count("<|im_start|>") == 3
