"""Dataclasses from what YAML holds: every value of the type that its field says, or an error that names it."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeVar, get_args, get_origin

from eaptk.errors import EaptkError

_T = TypeVar("_T")


def mapping(given: Any, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise EaptkError(f"{where} must be a mapping of options, not {given!r}")
    return dict(given)


def build(kind: type[_T], given: Any, where: str) -> _T:
    """A dataclass from a mapping of its fields, each of the type that it says."""
    content = mapping(given, where)
    known_keys(content, [f.name for f in fields(kind)], where)  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for name, value in content.items():
        content[name] = _typed(value, hints[name], f"{where}.{name}" if where != "the study" else name)
    try:
        return kind(**content)
    except TypeError as error:  # a field without a default is missing
        missing = [f.name for f in fields(kind) if f.name not in content]  # type: ignore[arg-type]
        raise EaptkError(f"{where} needs {' and '.join(missing[:1])}") from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A YAML value as the type of a field, or an error that says what it must be."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(value, next(choice for choice in choices if choice is not type(None)), where)
    if origin is Literal:
        if value not in choices:
            raise EaptkError(f"{where}: {guess(str(value), [str(choice) for choice in choices], 'value')}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise EaptkError(f"{where} must be a list, not {value!r}")
        return tuple(_typed(item, choices[0], where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is str and type(value) in (int, float):
        return str(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        kind = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
        raise EaptkError(f"{where} must be {kind}, not {value!r}")
    return value


def known_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise EaptkError(f"{where}: {guess(str(key), known, 'key')}")


def guess(name: str, known: Sequence[str], what: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    return f"{name!r} is no {what}: {hint}"
