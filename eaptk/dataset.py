"""Prompts and answers from a file, a Hugging Face dataset or Python, as checked token ids.

One record is one sample:

    {"id": "q17", "prompt": "2 + 2 =", "answer": " 4"}
    {"id": "q17", "prompt_ids": [17, 488, 17, 284], "answer_ids": [220, 19]}

optional: ``group`` (the question it belongs to), ``corrupt`` or ``corrupt_ids`` (a prompt of the same token
length, followed by the same answer), ``foil`` or ``foil_ids`` (as many tokens as the answer). Everything else
is carried along into samples.parquet.

A prompt's text gets the special tokens that the tokenizer adds by default (a beginning-of-sequence token,
say); an answer's and a foil's text gets none, as they continue a prompt.
"""

from __future__ import annotations

import difflib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from pathlib import Path
from sys import intern
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eaptk.batch import Sample
from eaptk.errors import EaptkError
from eaptk.records import TOO_DEEP, records

#: Most padding of all tokens of a plan.
PADDING = 0.05

_FIELDS = ("prompt", "answer", "corrupt", "foil")
#: Fields of a record that become the sample; all others are user columns.
_USED = {"id", "group", *_FIELDS, *(f"{field}_ids" for field in _FIELDS)}
#: Columns of samples.parquet that eaptk fills, and that user columns may therefore not be called.
_FILLED = {
    "id",
    "group",
    "n_prompt_tokens",
    "n_answer_tokens",
    "loss",
    *(f"{field}_ids" for field in _FIELDS),
}
#: Characters or token ids, and records, of a block that is tokenised together.
_BLOCK, _BLOCK_RECORDS = 1 << 20, 1 << 13
_NO_TEXT = "holds half a surrogate pair, which is no character; remove it, or write the whole character"


def read_samples(
    source: Any,
    tokenizer: Any = None,
    *,
    context: int | None = None,
    vocabulary: int | None = None,
    cut: int | None = None,
    own_answers: int | None = None,
    limit: int | None = None,
) -> list[Sample]:
    """Samples in the order of the source.

    Args:
        source: as for `records`, whose records may be `Sample` as well.
        tokenizer: turns text into tokens; records of token ids need none.
        context: tokens of the longest sequence that the model can be fed; None: no limit.
        vocabulary: token ids that the model has embeddings for; None: not checked.
        cut: keep at most this many tokens of each answer (and foil).
        own_answers: the model will answer, with up to this many tokens. Records then need no answer, and one
            that is there is carried along as a user column (``answer`` or ``given_answer_ids``).
        limit: read only this many records.

    Returns:
        Samples whose id is the record's ``id``, or where it has none, its number: the line of a JSONL file
        (from 1), the row of anything else (from 0).

    Raises:
        EaptkError: nothing to read, or a record that cannot be used; the message names file, line and remedy.
    """
    for option, value in (("cut", cut), ("limit", limit)):
        if value is not None and value < 1:
            raise EaptkError(f"{option} is {value}; it must be at least 1")
    texts = _Texts(tokenizer, own_answers is not None)
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for where, number, record in texts.encoded(islice(records(source), limit)):
        if isinstance(record, Sample):
            sample = record if own_answers is None else replace(record, answer_ids=(), foil_ids=None)
        else:
            sample = _Reader(where, record, texts).sample(str(number))
        _check_text(sample, where)
        if sample.id in seen:
            other = where.removesuffix(str(number)) + str(seen[sample.id])
            raise EaptkError(
                f"{where}: id {sample.id!r} is already that of {other}; ids must be unique, "
                f"use `group` to tie samples of one question together"
            )
        seen[sample.id] = number
        if clash := _FILLED.intersection(sample.extra):
            raise EaptkError(f"{where}: {min(clash)!r} is a column that eaptk fills itself; rename it")
        _check_tokens(sample, where, vocabulary, own_answers is not None)
        if cut is not None:
            sample = _cut(sample, cut)
        _check_length(sample, where, context, own_answers)
        samples.append(sample)
    if not samples:
        name = source if isinstance(source, (str, Path)) else "the dataset"
        raise EaptkError(f"{name} is empty: it needs at least one sample")
    return samples


def plan_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group samples of similar length; the plan depends on nothing else, so a resumed run has the same.

    A batch takes the next shorter samples until the budget is reached. Only where all batches together would
    so be padding by more than 5 % are some closed early: each whose padding would pass a limit, in tokens, and
    the limit is the highest that keeps the 5 %. (A limit in tokens, not a share: what a batch more saves in
    padding is then the same everywhere, which is where few batches do best.) It takes a small dataset, as
    budgets alone pad by tokens_per_batch · ln(longest / shortest) in all, about: some dozen batches at most.

    Args:
        lengths: [n] tokens of each sample.
        tokens_per_batch: most tokens of a batch, padding included; a longer sample is a batch alone.

    Returns:
        Batches of indices. The longest come first: if memory does not suffice, it fails at once.
    """
    if not len(lengths):
        return []
    order = np.argsort(-np.asarray(lengths), kind="stable")
    falling = np.asarray(lengths)[order].tolist()
    before = list(accumulate(falling, initial=0))

    def starts(most_padding: int) -> list[int]:
        """Where batches start, and where the last one ends."""
        found = [0]
        while (first := found[-1]) < len(falling):
            longest = max(falling[first], 1)
            fit = range(first + 1, min(first + max(tokens_per_batch // longest, 1), len(falling)) + 1)
            size = bisect_right(
                fit, most_padding, key=lambda end: (end - first) * longest - (before[end] - before[first])
            )
            found.append(first + size)
        return found

    def is_too_much(most_padding: int) -> bool:
        padded = sum(falling[first] * (end - first) for first, end in pairwise(starts(most_padding)))
        return padded - before[-1] > PADDING * padded

    limit = min(tokens_per_batch, falling[0] * len(falling))  # beyond that nothing is padded
    if is_too_much(limit):
        limit = bisect_left(range(1, limit), True, key=is_too_much)
    return [order[first:end].tolist() for first, end in pairwise(starts(limit))]


def samples_table(samples: Sequence[Sample]) -> pa.Table:
    """samples.parquet without losses: id, group, token counts and ids, user columns."""
    tokens = pa.list_(pa.int32())
    columns: dict[str, pa.Array] = {
        "id": pa.array([s.id for s in samples], pa.string()),
        "group": pa.array([s.group for s in samples], pa.string()),
        "n_prompt_tokens": pa.array([len(s.prompt_ids) for s in samples], pa.int32()),
        "n_answer_tokens": pa.array([len(s.answer_ids) for s in samples], pa.int32()),
        "prompt_ids": pa.array([s.prompt_ids for s in samples], tokens),
        "answer_ids": pa.array([s.answer_ids for s in samples], tokens),
    }
    for name in ("corrupt_ids", "foil_ids"):
        if any(getattr(s, name) is not None for s in samples):
            columns[name] = pa.array([getattr(s, name) for s in samples], tokens)
    for name in dict.fromkeys(name for s in samples for name in s.extra):
        columns[name] = _user_column([s.extra.get(name) for s in samples])
    return pa.table(columns)


def _user_column(values: list[Any]) -> pa.Array:
    try:
        column = pa.array(values)
    except (pa.ArrowException, TypeError, OverflowError):  # of mixed types
        column = None
    if column is None or not _parquet_holds(column):
        column = pa.array([None if v is None else json.dumps(v, default=str) for v in values], pa.string())
    return column


def _parquet_holds(column: pa.Array) -> bool:
    """Not what is an object without fields, or nested more deeply than readers go."""
    file = pa.BufferOutputStream()
    try:
        pq.write_table(pa.table({"column": column.slice(0, 0)}), file)
        pq.read_table(pa.BufferReader(file.getvalue()))
    except (OSError, pa.ArrowException):
        return False
    return True


class _Texts:
    """Token ids of the texts of records, a block of records at a time.

    A fast tokenizer takes the texts of a block together, and its own threads share them out. That is its affair:
    ``TOKENIZERS_PARALLELISM=false`` keeps it to one, as does a fork of a process that has tokenised before.

    Equal token ids of all samples are one object: a million samples would otherwise hold as many integers, of
    28 bytes each, as they have tokens.
    """

    def __init__(self, tokenizer: Any, own_answers: bool) -> None:
        self.tokenizer = tokenizer
        self.own_answers = own_answers
        self._encoded: dict[bool, dict[str, Sequence[int]]] = {}
        self._shared: dict[int, int] = {}

    def encoded(self, found: Iterable[tuple[str, int, Any]]) -> Iterator[tuple[str, int, Any]]:
        """The same records, their texts tokenised in advance."""
        for block in _blocks(found):
            if getattr(self.tokenizer, "is_fast", False):
                mappings = [record for _, _, record in block if isinstance(record, Mapping)]
                self._encode(mappings, ("prompt", "corrupt"), special=True)
                self._encode(mappings, () if self.own_answers else ("answer", "foil"), special=False)
            yield from block

    def _encode(self, mappings: Sequence[Mapping[str, Any]], fields: Sequence[str], special: bool) -> None:
        values = (record.get(field) for record in mappings for field in fields)
        texts = list(dict.fromkeys(v for v in values if isinstance(v, str) and _is_unicode(v)))
        ids = self.tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []
        self._encoded[special] = dict(zip(texts, ids, strict=True))

    def ids(self, text: str, special: bool) -> Sequence[int]:
        found = self._encoded.get(special, {}).get(text)
        if found is None:
            found = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return found

    def shared(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids, each as the object that came first."""
        return tuple(map(self._shared.setdefault, ids, ids))


def _blocks(found: Iterable[tuple[str, int, Any]]) -> Iterator[list[tuple[str, int, Any]]]:
    """Records, some megabytes at a time; an error comes after the records before it, which may have their own."""
    block: list[tuple[str, int, Any]] = []
    size = 0
    try:
        for entry in found:
            block.append(entry)
            if isinstance(entry[2], Mapping):
                size += sum(len(value) for value in entry[2].values() if isinstance(value, (str, list)))
            if size >= _BLOCK or len(block) >= _BLOCK_RECORDS:
                yield block
                block, size = [], 0
    except Exception:
        yield block
        raise
    yield block


@dataclass(frozen=True)
class _Reader:
    """One record: where it stands, and how its text becomes tokens."""

    where: str
    record: Any
    texts: _Texts

    def sample(self, default_id: str) -> Sample:
        if not isinstance(self.record, Mapping):
            raise self._error(f"a record is a mapping, not {type(self.record).__name__}")
        own_answers = self.texts.own_answers
        prompt = self._tokens("prompt", required=True, special=True)
        answer = () if own_answers else self._tokens("answer", required=True)
        extra = {
            intern(name) if type(name) is str else name: value
            for name, value in self.record.items()
            if name not in _USED
        }
        if own_answers:
            given = {"answer": self.record.get("answer"), "given_answer_ids": self.record.get("answer_ids")}
            extra |= {name: value for name, value in given.items() if value is not None}
        identity, group = self.record.get("id"), self.record.get("group")
        return Sample(
            id=default_id if identity is None else str(identity),
            prompt_ids=prompt or (),
            answer_ids=answer or (),
            group=None if group is None else str(group),
            corrupt_ids=self._tokens("corrupt", special=True),
            foil_ids=None if own_answers else self._tokens("foil"),
            extra=extra,
        )

    def _tokens(self, field: str, required: bool = False, special: bool = False) -> tuple[int, ...] | None:
        """Token ids of ``field`` or ``field_ids``, None if neither is there."""
        text, ids = self.record.get(field), self.record.get(f"{field}_ids")
        if text is not None and ids is not None:
            raise self._error(f"it has both {field!r} and '{field}_ids'; give one of them")
        if text is not None:
            if not isinstance(text, str):
                raise self._error(f"{field!r} is {type(text).__name__}, not text")
            if self.texts.tokenizer is None:
                raise self._error(
                    f"{field!r} is text, but there is no tokenizer; give '{field}_ids', or a tokenizer"
                )
            if not _is_unicode(text):
                raise self._error(f"{field!r} {_NO_TEXT}")
            ids = self.texts.ids(text, special)
        elif ids is None:
            if required and not self.record.keys().isdisjoint((field, f"{field}_ids")):
                raise self._error(f"its {field!r} is null; give text, or token ids as '{field}_ids'")
            if required:
                raise self._error(f"it has no {field!r} (nor '{field}_ids'){self._guess(field)}")
            return None
        elif not isinstance(ids, Sequence) or not set(map(type, ids)) <= {int}:
            raise self._error(f"'{field}_ids' is not a list of whole numbers")
        if not ids:
            raise self._error(f"its {field} is empty; every {field} needs at least one token")
        return self.texts.shared(ids)

    def _guess(self, field: str) -> str:
        close = difflib.get_close_matches(field, map(str, self.record), n=1)
        found = ", ".join(map(repr, self.record)) or "no field at all"
        return f"; did you mean {close[0]!r}?" if close else f"; it has {found}"

    def _error(self, problem: str) -> EaptkError:
        return EaptkError(f"{self.where}: {problem}")


def _cut(sample: Sample, n: int) -> Sample:
    foil = None if sample.foil_ids is None else sample.foil_ids[:n]
    return replace(sample, answer_ids=sample.answer_ids[:n], foil_ids=foil)


def _check_text(sample: Sample, where: str) -> None:
    """What samples.parquet can hold: every name and every text in UTF-8."""
    for name, value in {"id": sample.id, "group": sample.group, **sample.extra}.items():
        if not isinstance(name, str):
            raise EaptkError(
                f"{where}: the field name {name!r} is {type(name).__name__}, not text; rename it"
            )
        try:
            # As deep as the lines by which a run knows its dataset.
            content = name + value if type(value) is str else _as_json([[name, value]])
        except RecursionError:
            raise EaptkError(f"{where}: {name!r} {TOO_DEEP}") from None
        except (TypeError, ValueError) as error:  # keys that are no text, an object within itself
            raise EaptkError(f"{where}: {name!r} cannot be kept ({error}); leave it out") from error
        if not _is_unicode(content):
            raise EaptkError(f"{where}: {name!a} {_NO_TEXT}")


#: One encoder for all: `json.dumps` makes one for every call.
_as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_length(sample: Sample, where: str, context: int | None, own_answers: int | None) -> None:
    n_prompt = len(sample.prompt_ids)
    n_tokens = n_prompt + (own_answers or len(sample.answer_ids)) - 1
    if context is None or n_tokens <= context:
        return
    if own_answers is None:
        raise EaptkError(
            f"{where}: {n_tokens} tokens of prompt and answer are longer than the model's context "
            f"of {context}; shorten the prompt, or cut the answer"
        )
    raise EaptkError(
        f"{where}: {n_prompt} tokens of prompt and up to {own_answers} of the model's own answer are longer "
        f"than the model's context of {context}; lower max_new_tokens (--max-new-tokens), or shorten the prompt"
    )


def _check_tokens(sample: Sample, where: str, vocabulary: int | None, own_answers: bool) -> None:
    """What must hold for any sample, however it was made."""
    for field, ids in (("prompt", sample.prompt_ids), ("answer", sample.answer_ids)):
        if not ids and not (own_answers and field == "answer"):
            raise EaptkError(f"{where}: its {field} is empty; every {field} needs at least one token")
    if sample.corrupt_ids is not None and len(sample.corrupt_ids) != len(sample.prompt_ids):
        raise EaptkError(
            f"{where}: the corrupt prompt has {len(sample.corrupt_ids)} tokens, the prompt "
            f"{len(sample.prompt_ids)}; they must have as many, each position is patched by its twin"
        )
    if sample.foil_ids is not None and len(sample.foil_ids) != len(sample.answer_ids):
        raise EaptkError(
            f"{where}: the foil has {len(sample.foil_ids)} tokens, the answer {len(sample.answer_ids)}; "
            f"they must have as many, they are contrasted token by token"
        )
    if vocabulary is None:
        return
    for field in ("prompt_ids", "answer_ids", "corrupt_ids", "foil_ids"):
        ids = getattr(sample, field)
        if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
            bad = next(token for token in ids if not 0 <= token < vocabulary)
            raise EaptkError(
                f"{where}: token {bad} of {field} is not in the model's vocabulary of {vocabulary}; "
                f"use the tokenizer that belongs to the model"
            )
