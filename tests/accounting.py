"""Bytes of live tensors and FLOPs, counted operation by operation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and _storage(x)._cdata not in given:
                storage = _storage(x)
                self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.known = {key: entry for key, entry in self.known.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return found


class _Flops(TorchDispatchMode):
    """torch's own formulas; its `FlopCounterMode` cannot follow a gradient to a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=found)
        return found


def flops(work: Callable[[], Any]) -> int:
    """Of the matrix products in `work`."""
    with _Flops() as count:
        work()
    return count.total


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes of tensors made by `work` that are alive at one time."""
    with _Count() as count:
        work()
    return count.peak


def bytes_left(work: Callable[[], Any]) -> int:
    """Bytes of tensors made by `work` that are alive after it, without the help of Python's collector."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with _Count() as count:
            work()
        return sum(size for reference, size in count.known.values() if not reference.expired())
    finally:
        if collecting:
            gc.enable()


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()
