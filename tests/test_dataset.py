"""Reading samples: what a record may hold, and one clear line for every way it can be wrong."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from checkpoints import make_records, make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from eaptk.batch import Sample
from eaptk.dataset import plan_batches, read_samples, samples_table
from eaptk.errors import EaptkError
from eaptk.files import read_table, write_table

TEXT = {"id": "a", "prompt": "w0 w1", "answer": "w2 w3"}
TOKENS = {"id": "a", "prompt_ids": [0, 3, 4], "answer_ids": [5, 6]}


def refused(source: Any, **options: Any) -> str:
    with pytest.raises(EaptkError) as caught:
        read_samples(source, make_tokenizer(), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_prompt_gets_the_tokenizers_special_tokens_and_an_answer_none() -> None:
    (sample,) = read_samples([TEXT], make_tokenizer())
    assert sample == Sample("a", prompt_ids=(0, 3, 4), answer_ids=(5, 6))


def test_text_and_tokens_of_the_same_record_are_the_same_sample() -> None:
    assert read_samples([TEXT], make_tokenizer()) == read_samples([TOKENS])


def test_every_field_of_a_record_has_its_place() -> None:
    record = {**TEXT, "group": 7, "corrupt": "w4 w5", "foil": "w6 w7", "level": 3, "source": "MATH"}
    (sample,) = read_samples([record], make_tokenizer())
    assert sample.group == "7"
    assert sample.corrupt_ids == (0, 7, 8)
    assert sample.foil_ids == (9, 10)
    assert sample.extra == {"level": 3, "source": "MATH"}


def test_a_file_a_dataset_and_records_give_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = [{**TEXT, "id": f"q{i}", "level": i} for i in range(3)]
    file = write_jsonl(tmp_path / "data.jsonl", records)
    dataset = datasets.Dataset.from_list(records)
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder/train.jsonl", records)
    expected = read_samples(records, make_tokenizer())
    for source in (
        file,
        str(file),
        dataset,
        tmp_path / "saved",
        tmp_path / "folder",
        iter(records),
        expected,
    ):
        assert read_samples(source, make_tokenizer()) == expected


def one_at_a_time(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    """A tokenizer that is not fast, and that takes one text."""
    assert isinstance(text, str)
    return {"input_ids": make_tokenizer()(text, add_special_tokens=add_special_tokens)["input_ids"]}


def test_texts_tokenised_together_have_the_tokens_they_have_alone() -> None:
    records = [*make_records(50), {**TEXT, "id": "ß", "prompt": "w1 ß 💡 w2\n", "answer": "<s> w3 </s>"}]
    assert read_samples(records, make_tokenizer()) == read_samples(records, one_at_a_time)


def test_records_of_many_blocks_are_as_of_one() -> None:
    records = [{**TEXT, "id": i, "prompt": f"w{i % 29} w{i % 7}"} for i in range(20_000)]
    read = read_samples(iter(records), make_tokenizer())
    assert [s.id for s in read] == [str(i) for i in range(20_000)]
    assert [s.prompt_ids for s in read] == [(0, 3 + i % 29, 3 + i % 7) for i in range(20_000)]


def test_a_process_forked_after_tokenising_reads_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    records = make_records(50)
    expected = read_samples(records, make_tokenizer())
    if not (child := os.fork()):
        os._exit(read_samples(records, make_tokenizer()) != expected)
    assert os.waitpid(child, 0) == (child, 0)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert read_samples(records, make_tokenizer()) == expected


def test_equal_tokens_are_held_once(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", [{**TOKENS, "id": i, "answer_ids": [9000]} for i in range(9)])
    assert len({id(token) for sample in read_samples(file) for token in sample.answer_ids}) == 1


def test_a_split_is_named_after_the_dataset(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list([{**TEXT, "id": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    (sample,) = read_samples(f"{tmp_path}/saved:test", make_tokenizer())
    assert sample.id == "test"
    assert "has splits train, test; name one of them" in refused(f"{tmp_path}/saved")


def test_a_missing_id_is_the_number_of_the_line(tmp_path: Path) -> None:
    record = {k: v for k, v in TEXT.items() if k != "id"}
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(record)}\n\n{json.dumps(record)}\n")
    assert [s.id for s in read_samples(tmp_path / "data.jsonl", make_tokenizer())] == ["1", "3"]


def test_a_limit_reads_only_the_first_records(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(TEXT) + "\nnot read\n")
    assert len(read_samples(tmp_path / "data.jsonl", make_tokenizer(), limit=1)) == 1


@pytest.mark.parametrize(("cut", "left"), [(1, (5,)), (2, (5, 6)), (9, (5, 6)), (None, (5, 6))])
def test_a_cut_leaves_at_most_that_many_tokens(cut: int | None, left: tuple[int, ...]) -> None:
    (sample,) = read_samples([{**TOKENS, "foil_ids": [5, 6]}], cut=cut)
    assert sample.answer_ids == sample.foil_ids == left


@pytest.mark.parametrize("option", ["cut", "limit"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_cut_or_limit_that_leaves_nothing_is_refused(option: str, value: int) -> None:
    assert refused([TOKENS], **{option: value}) == f"{option} is {value}; it must be at least 1"


def test_records_for_a_model_that_answers_need_no_answer_and_carry_a_given_one_along() -> None:
    first, second, third = read_samples(
        [
            {"id": "a", "prompt_ids": [3]},
            {"id": "b", "prompt_ids": [3], "answer": "42"},
            {"id": "c", "prompt_ids": [3], "answer_ids": [4]},
        ],
        own_answers=5,
    )
    assert first.answer_ids == second.answer_ids == third.answer_ids == ()
    assert second.extra == {"answer": "42"}
    assert third.extra == {"given_answer_ids": [4]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "line 2 is not valid JSON (Expecting value at column 12); write one object a line"),
        ("[1, 2]", "line 2 is not an object"),
        ('{"answer": "w1"}', "line 2: it has no 'prompt' (nor 'prompt_ids')"),
        (
            '{"prompt": "w1", "anwser": "w2"}',
            "line 2: it has no 'answer' (nor 'answer_ids'); did you mean 'anwser'?",
        ),
        (
            '{"prompt": "w1", "answer": ""}',
            "line 2: its answer is empty; every answer needs at least one token",
        ),
        ('{"prompt": "w1", "answer_ids": []}', "line 2: its answer is empty"),
        ('{"prompt_ids": [], "answer_ids": [1]}', "line 2: its prompt is empty"),
        ('{"prompt": 3, "answer": "w2"}', "line 2: 'prompt' is int, not text"),
        ('{"prompt_ids": [1, 2.5], "answer": "w2"}', "line 2: 'prompt_ids' is not a list of whole numbers"),
        (
            '{"prompt": "w1", "prompt_ids": [4], "answer": "w2"}',
            "line 2: it has both 'prompt' and 'prompt_ids'",
        ),
        (
            '{"prompt": "w1", "answer_ids": [32]}',
            "line 2: token 32 of answer_ids is not in the model's vocabulary of 32",
        ),
        (
            '{"prompt_ids": [-1], "answer": "w1"}',
            "line 2: token -1 of prompt_ids is not in the model's vocabulary",
        ),
        ('{"id": "a", "prompt": "w1", "answer": "w2"}', "line 2: id 'a' is already that of"),
        (
            '{"prompt": "w1 w2 w3 w4", "answer": "w1 w2 w3 w4 w5"}',
            "line 2: 9 tokens of prompt and answer are longer",
        ),
        (
            '{"prompt": "w1", "answer": "w2", "corrupt": "w3 w4"}',
            "line 2: the corrupt prompt has 3 tokens, the prompt 2",
        ),
        ('{"prompt": "w1", "answer": "w2", "foil": "w3 w4"}', "line 2: the foil has 2 tokens, the answer 1"),
        (
            '{"prompt": "w1", "answer": "w2", "loss": 1}',
            "line 2: 'loss' is a column that eaptk fills itself; rename it",
        ),
        (
            '{"prompt": "w1", "answer": null}',
            "line 2: its 'answer' is null; give text, or token ids as 'answer_ids'",
        ),
        ('{"prompt": "w1 \\ud800", "answer": "w2"}', "line 2: 'prompt' holds half a surrogate pair"),
        ('{"prompt": "w1", "answer": "\\udfff"}', "line 2: 'answer' holds half a surrogate pair"),
        ('{"id": "\\ud800", "prompt": "w1", "answer": "w2"}', "line 2: 'id' holds half a surrogate pair"),
        (
            '{"group": "\\ud800", "prompt": "w1", "answer": "w2"}',
            "line 2: 'group' holds half a surrogate pair",
        ),
        (
            '{"prompt": "w1", "answer": "w2", "note": {"by": ["\\ud800"]}}',
            "line 2: 'note' holds half a surrogate pair, which is no character; remove it",
        ),
        (
            '{"prompt": "w1", "answer": "w2", "\\ud800": 1}',
            "line 2: '\\ud800' holds half a surrogate pair",
        ),
        (
            '{"prompt": "w1", "answer": "w2", "note": ' + "[" * 5000 + "]" * 5000 + "}",
            "line 2 is nested too deeply; flatten it",
        ),
    ],
    ids=lambda value: value[:60],
)
def test_a_bad_line_is_named_with_its_remedy(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(TEXT) + "\n" + line + "\n")
    assert f"{file} {message}" in refused(file, context=8, vocabulary=32)


@pytest.mark.parametrize(
    ("second", "third", "message"),
    [
        ('{"prompt": "w1", "answer": ""}', "no JSON", "line 2: its answer is empty"),
        ('{"prompt": "w1", "answer": ""}', '{"prompt": "w1"}', "line 2: its answer is empty"),
        ('{"prompt": "w1"}', '{"prompt": "w1", "answer": ""}', "line 2: it has no 'answer'"),
        ('{"prompt": "w1", "answer": "w2"}', "no JSON", "line 3 is not valid JSON"),
    ],
)
def test_of_several_bad_lines_the_first_is_named(
    tmp_path: Path, second: str, third: str, message: str
) -> None:
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(TEXT)}\n{second}\n{third}\n")
    assert f"{tmp_path / 'data.jsonl'} {message}" in refused(tmp_path / "data.jsonl")


def test_the_longest_sequence_that_fits_is_taken() -> None:
    record = {"prompt_ids": [3, 4], "answer_ids": [5, 6, 7]}
    assert len(read_samples([record], context=4)) == 1
    assert "longer than the model's context of 3" in refused([record], context=3)


def test_a_cut_answer_only_has_to_fit_as_cut() -> None:
    record = {"prompt_ids": [3, 4], "answer_ids": [5] * 100}
    assert len(read_samples([record], context=4, cut=3)) == 1


def test_room_is_kept_for_the_models_own_answer() -> None:
    assert refused([{"prompt_ids": [3, 4]}], context=4, own_answers=4) == (
        "the dataset row 0: 2 tokens of prompt and up to 4 of the model's own answer are longer than the "
        "model's context of 4; lower max_new_tokens (--max-new-tokens), or shorten the prompt"
    )


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(EaptkError, match="'prompt' is text, but there is no tokenizer"):
        read_samples([TEXT])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "data.jsonl") == (
        f"no such file: {tmp_path / 'data.jsonl'}; give a JSONL file or a Hugging Face dataset"
    )


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    assert f"{tmp_path / 'data.jsonl'} is empty" in refused(tmp_path / "data.jsonl")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    assert f"{tmp_path / 'data.jsonl'} is not UTF-8 text" in refused(tmp_path / "data.jsonl")


@pytest.mark.parametrize("source", [[], [3], 3, {"train": [TEXT]}])
def test_records_that_are_none_are_refused(source: Any) -> None:
    assert "dataset" in refused(source)


def test_user_columns_of_mixed_types_are_kept_as_json() -> None:
    records = [
        {**TOKENS, "id": str(i), "note": note} for i, note in enumerate([1, "two", None, {"three": 3}])
    ]
    assert samples_table(read_samples(records))["note"].to_pylist() == ["1", '"two"', None, '{"three": 3}']


@pytest.mark.parametrize(
    ("value", "kept"),
    [({}, "{}"), ([{}], "[{}]"), ({"by": {}}, '{"by": {}}'), ([[[[]]]], [[[[]]]]), ({"by": 1}, {"by": 1})],
    ids=str,
)
def test_a_user_column_that_parquet_does_not_know_is_kept_as_json(
    tmp_path: Path, value: Any, kept: Any
) -> None:
    write_table(tmp_path / "samples.parquet", samples_table(read_samples([{**TOKENS, "note": value}])))
    assert read_table(tmp_path / "samples.parquet")["note"].to_pylist() == [kept]


@pytest.mark.parametrize("depth", [60, 400])
def test_a_user_column_nested_more_deeply_than_readers_go_is_kept_as_json(tmp_path: Path, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    samples = read_samples([{**TOKENS, "note": json.loads(nested)}])
    write_table(tmp_path / "samples.parquet", samples_table(samples))
    assert read_table(tmp_path / "samples.parquet")["note"].to_pylist() == [nested]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({3: "x"}, "row 0: the field name 3 is int, not text; rename it"),
        ({"note": {(1, 2): "x"}}, "row 0: 'note' cannot be kept (keys must be str"),
    ],
)
def test_fields_that_no_table_holds_are_refused(extra: dict[Any, Any], message: str) -> None:
    assert message in refused([{**TOKENS, **extra}])


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(TEXT), encoding="utf-8-sig")
    assert read_samples(tmp_path / "data.jsonl", make_tokenizer()) == read_samples([TEXT], make_tokenizer())


def test_a_name_beside_local_folders_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refused("data/nope").startswith("no such file: data/nope; give a JSONL file")


LENGTHS = st.lists(st.integers(1, 40), max_size=60) | st.lists(st.integers(1, 5000), max_size=60)
BUDGETS = st.integers(1, 100) | st.integers(1, 100_000)


def tokens(lengths: list[int], plan: list[list[int]]) -> int:
    """Padding included."""
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in plan)


def fewest_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """By budget alone, whatever the padding."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@given(LENGTHS, BUDGETS)
def test_batches_hold_every_sample_once_within_the_budget_longest_first(
    lengths: list[int], budget: int
) -> None:
    plan = plan_batches(lengths, budget)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in plan)
    order = [lengths[index] for batch in plan for index in batch]
    assert order == sorted(order, reverse=True)


@given(LENGTHS, BUDGETS)
@settings(max_examples=200)
def test_of_all_tokens_at_most_5_percent_are_padding(lengths: list[int], budget: int) -> None:
    padded = tokens(lengths, plan_batches(lengths, budget))
    assert padded - sum(lengths) <= 0.05 * padded


@given(LENGTHS, BUDGETS)
@settings(max_examples=200)
def test_batches_are_as_full_as_the_budget_allows_unless_that_pads_more(
    lengths: list[int], budget: int
) -> None:
    fewest = fewest_batches(lengths, budget)
    padded = tokens(lengths, fewest)
    assert (plan_batches(lengths, budget) == fewest) == (padded - sum(lengths) <= 0.05 * padded)


@given(LENGTHS, BUDGETS, st.randoms())
def test_the_plan_depends_on_the_lengths_alone(lengths: list[int], budget: int, random: Any) -> None:
    shuffled = random.sample(lengths, len(lengths))
    plans = [[[own[i] for i in batch] for batch in plan_batches(own, budget)] for own in (lengths, shuffled)]
    assert plans[0] == plans[1]
    assert plan_batches(np.array(lengths, dtype=np.int32), budget) == plan_batches(lengths, budget)


def fewest_within(lengths: list[int], budget: int, padding: float) -> int:
    """Of all plans: for each number of batches, the fewest padded tokens that take the `end` longest."""
    falling = sorted(lengths, reverse=True)
    padded = np.full((len(falling) + 1, len(falling) + 1), np.inf)
    padded[0, 0] = 0
    for first, longest in enumerate(falling):
        for end in range(first + 1, min(first + max(budget // longest, 1), len(falling)) + 1):
            more = padded[first, :-1] + longest * (end - first)
            padded[end, 1:] = np.minimum(padded[end, 1:], more)
    return int(np.argmax(sum(falling) >= (1 - padding) * padded[-1]))


@pytest.mark.parametrize("budget", [2048, 8192, 10**9])
@pytest.mark.parametrize("spread", [0.3, 0.8, 1.5])
def test_where_padding_is_the_limit_it_is_spent_where_it_saves_batches(spread: float, budget: int) -> None:
    lengths = (np.random.default_rng(0).lognormal(4.5, spread, 100).astype(int) + 1).tolist()
    assert len(plan_batches(lengths, budget)) <= 1.3 * fewest_within(lengths, budget, 0.05)


def test_a_million_samples_are_planned_in_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 1_000_000).astype(int) + 1
    started = time.process_time()
    plan = plan_batches(lengths, 2048)
    assert time.process_time() - started < 10
    assert len(plan) < 1.07 * lengths.sum() / 2048


def test_a_budget_beyond_all_tokens_is_one_batch() -> None:
    assert plan_batches([5, 5, 5], 10**20) == [[0, 1, 2]]
    assert plan_batches([5, 5, 1], 10**20) == plan_batches([5, 5, 1], 15)


def test_a_name_too_long_for_a_file_is_no_dataset() -> None:
    with pytest.raises(EaptkError, match="no such file: n"):
        read_samples("n" * 400 + ".jsonl", make_tokenizer())
