"""Records from a file, a Hugging Face dataset or Python, each with where it stands."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eaptk.errors import EaptkError
from eaptk.files import is_meant_as_path

TOO_DEEP = "is nested too deeply; flatten it"


def records(source: Any, config: str | None = None) -> Iterator[tuple[str, int, Any]]:
    """Each record with where it stands, for messages, and its number: from 1 in a JSONL file, else from 0.

    What says where a record stands ends with its number.

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
        is_file = os.path.isfile(path)  # Path's own raises where a name is too long
        if is_file and path.suffix != ".parquet":
            yield from _json_lines(path)
            return
        name = str(source)
        found = _parquet(path) if is_file else _hugging_face(source, config)
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


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise EaptkError(f"{path} cannot be read as Parquet ({_line(error)}); write it again") from error
    return (row for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist())


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
        raise EaptkError(f"{where} {TOO_DEEP}") from None
    if not isinstance(record, dict):
        raise EaptkError(f'{where} is not an object; write {{"prompt": …, "answer": …}}')
    return record


def _hugging_face(source: str | Path, config: str | None) -> Any:
    """A dataset from a local folder or the hub."""
    name, _, split = str(source).partition(":")
    on_hub = not is_meant_as_path(name) and not name.endswith((".jsonl", ".json", ".parquet"))
    if not os.path.isdir(name) and not on_hub:
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


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
