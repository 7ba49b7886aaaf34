"""A second device where there is none: tensors that say they are elsewhere, and refuse to meet those that are here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

#: A device type that PyTorch knows, has no kernels for, and whose backward passes run in the caller's thread.
ELSEWHERE = torch.device("lazy", 0)
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor on `ELSEWHERE`; its content is on the CPU."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> Elsewhere:
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            content.shape,
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            device=ELSEWHERE,
        )
        found.content = content
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Moves(TorchDispatchMode):
    """Sees tensors made elsewhere, or brought there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Inside, tensors can be moved to the device that is given, and to and fro."""
    with _Moves():
        yield ELSEWHERE


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    away = [x for x in leaves if isinstance(x, Elsewhere)]
    here = [x for x in leaves if not isinstance(x, Elsewhere) and x.dim()]
    if away and here and func not in _MOVES:
        raise RuntimeError(f"{func} of tensors on two devices")
    target = kwargs.get("device")
    goes_away = bool(away) if target is None else torch.device(target).type == ELSEWHERE.type
    if func is torch.ops.aten.copy_.default:
        goes_away = isinstance(args[0], Elsewhere)
    if target is not None and torch.device(target).type == ELSEWHERE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    known = {id(x.content): x for x in away}

    def content(x: Any) -> Any:
        return x.content if isinstance(x, Elsewhere) else x

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, Elsewhere):
            return x
        return known.get(id(x)) if id(x) in known else Elsewhere(x) if goes_away else x

    found = func(*tree_map(content, args), **tree_map(content, kwargs))
    return tree_map(wrapped, found)
