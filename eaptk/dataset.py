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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eaptk.batch import Sample
from eaptk.errors import EaptkError
from eaptk.files import is_meant_as_path

#: Most padding of all tokens of a plan.
PADDING = 0.05

_FIELDS = ("prompt", "answer", "corrupt", "foil")
#: Columns of samples.parquet that eaptk fills, and that user columns may therefore not be called.
_FILLED = {
    "id",
    "group",
    "n_prompt_tokens",
    "n_answer_tokens",
    "loss",
    *(f"{field}_ids" for field in _FIELDS),
}
_NO_TEXT = "holds half a surrogate pair, which is no character; remove it, or write the whole character"
_TOO_DEEP = "is nested too deeply; flatten it"


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
    found = islice(records(source), limit)
    samples: list[Sample] = []
    seen: dict[str, str] = {}
    for where, number, record in found:
        if isinstance(record, Sample):
            sample = record if own_answers is None else replace(record, answer_ids=(), foil_ids=None)
        else:
            sample = _Reader(where, record, tokenizer, own_answers is not None).sample(str(number))
        _check_text(sample, where)
        if sample.id in seen:
            raise EaptkError(
                f"{where}: id {sample.id!r} is already that of {seen[sample.id]}; ids must be unique, "
                f"use `group` to tie samples of one question together"
            )
        seen[sample.id] = where
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

    limit = tokens_per_batch
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


def records(source: Any, config: str | None = None) -> Iterator[tuple[str, int, Any]]:
    """Each record with where it stands, for messages, and its number: from 1 in a JSONL file, else from 0.

    Args:
        source: the path of a JSONL or Parquet file; a Hugging Face dataset as an object, a folder that
            `save_to_disk` or `load_dataset` knows, or a name on the hub (``name`` or ``name:split``); or an
            iterable of records.
        config: of a dataset on the hub that has several.

    Raises:
        EaptkError: nothing to read, or a line that is no object.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_file() and path.suffix != ".parquet":
            yield from _json_lines(path)
            return
        name = str(source)
        found = _parquet(path) if path.is_file() else _hugging_face(source, config)
    else:
        name, found = "the dataset", source
        if isinstance(found, Mapping):
            raise EaptkError(f"the dataset has splits ({', '.join(map(str, found))}); pass one of them")
        if not isinstance(found, Iterable):
            raise EaptkError(
                f"a dataset is a path, a Hugging Face dataset or records, not {type(source).__name__}"
            )
    for row, record in enumerate(found):
        yield f"{name} row {row}", row, record


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise EaptkError(f"{path} cannot be read as Parquet ({_line(error)}); write it again") from error
    return rows


def _json_lines(path: Path) -> Iterator[tuple[str, int, Any]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                where = f"{path} line {number}"
                if line.strip():
                    yield where, number, _json_object(line.rstrip("\r\n"), where)
    except UnicodeDecodeError as error:
        raise EaptkError(
            f"{path} is not UTF-8 text ({error}); write it as JSONL, one object a line"
        ) from error
    except OSError as error:
        raise EaptkError(f"cannot read {path}: {error.strerror}") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        problem = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise EaptkError(f"{where} is not valid JSON ({problem}); write one object a line") from error
    except RecursionError:
        raise EaptkError(f"{where} {_TOO_DEEP}") from None
    if not isinstance(record, dict):
        raise EaptkError(f'{where} is not an object; write {{"prompt": …, "answer": …}}')
    return record


def _hugging_face(source: str | Path, config: str | None) -> Any:
    """A dataset from a local folder or the hub."""
    name, _, split = str(source).partition(":")
    on_hub = not is_meant_as_path(name) and not name.endswith((".jsonl", ".json", ".parquet"))
    if not Path(name).is_dir() and not on_hub:
        raise EaptkError(f"no such file: {source}; give a JSONL file or a Hugging Face dataset")
    try:
        import datasets
    except ImportError as error:
        raise EaptkError(
            f"{source} is no file, and reading it as a Hugging Face dataset needs: pip install datasets"
        ) from error
    try:
        if (Path(name) / "dataset_dict.json").exists() or (Path(name) / "state.json").exists():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config)
    except Exception as error:  # the library raises many kinds, all of them about the name or the network
        raise EaptkError(
            f"no file, and no Hugging Face dataset that can be read: {source} ({_line(error)})"
        ) from error
    if not isinstance(found, Mapping):
        return found
    if not split and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        raise EaptkError(
            f"{name} has splits {', '.join(found)}; name one of them, as in {name}:{next(iter(found))}"
        )
    return found[split]


@dataclass(frozen=True)
class _Reader:
    """One record: where it stands, and how its text becomes tokens."""

    where: str
    record: Any
    tokenizer: Any
    own_answers: bool

    def sample(self, default_id: str) -> Sample:
        if not isinstance(self.record, Mapping):
            raise self._error(f"a record is a mapping, not {type(self.record).__name__}")
        prompt = self._tokens("prompt", required=True, special=True)
        answer = () if self.own_answers else self._tokens("answer", required=True)
        used = {"id", "group"} | {f for field in _FIELDS for f in (field, f"{field}_ids")}
        extra = {name: value for name, value in self.record.items() if name not in used}
        if self.own_answers:
            given = {"answer": self.record.get("answer"), "given_answer_ids": self.record.get("answer_ids")}
            extra |= {name: value for name, value in given.items() if value is not None}
        identity, group = self.record.get("id"), self.record.get("group")
        return Sample(
            id=default_id if identity is None else str(identity),
            prompt_ids=prompt or (),
            answer_ids=answer or (),
            group=None if group is None else str(group),
            corrupt_ids=self._tokens("corrupt", special=True),
            foil_ids=None if self.own_answers else self._tokens("foil"),
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
            if self.tokenizer is None:
                raise self._error(
                    f"{field!r} is text, but there is no tokenizer; give '{field}_ids', or a tokenizer"
                )
            if not _is_unicode(text):
                raise self._error(f"{field!r} {_NO_TEXT}")
            ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        elif ids is None:
            if required and not self.record.keys().isdisjoint((field, f"{field}_ids")):
                raise self._error(f"its {field!r} is null; give text, or token ids as '{field}_ids'")
            if required:
                raise self._error(f"it has no {field!r} (nor '{field}_ids'){self._guess(field)}")
            return None
        elif not isinstance(ids, Sequence) or not all(type(token) is int for token in ids):
            raise self._error(f"'{field}_ids' is not a list of whole numbers")
        if not ids:
            raise self._error(f"its {field} is empty; every {field} needs at least one token")
        return tuple(ids)

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
            content = json.dumps([[name, value]], ensure_ascii=False, default=str)
        except RecursionError:
            raise EaptkError(f"{where}: {name!r} {_TOO_DEEP}") from None
        except (TypeError, ValueError) as error:  # keys that are no text, an object within itself
            raise EaptkError(f"{where}: {name!r} cannot be kept ({error}); leave it out") from error
        if not _is_unicode(content):
            raise EaptkError(f"{where}: {name!a} {_NO_TEXT}")


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
        bad = [token for token in getattr(sample, field) or () if not 0 <= token < vocabulary]
        if bad:
            raise EaptkError(
                f"{where}: token {bad[0]} of {field} is not in the model's vocabulary of {vocabulary}; "
                f"use the tokenizer that belongs to the model"
            )


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
