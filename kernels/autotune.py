"""Tile sizes found by timing them on the operands at hand, where a user asks for it; kept on disk for the next time.

Other tile sizes add the same products in another order, so scores found with a cache are the same to the bit only
with that cache: every process that is to agree needs the same file, or none. Each candidate's scores are held to
those of the table's own choice before it may win.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from .block import contract_block
from .head import contract_head
from .operands import Destination, Source
from .tables import operand_dtype
from .target import current
from .trial import Contract, card
from .tuning import (
    BLOCK_CANDIDATES,
    EXPAND_CANDIDATES,
    HEAD_CANDIDATES,
    BlockConfig,
    ExpandConfig,
    HeadConfig,
    block_config,
    expand_config,
    head_config,
    number,
    shape_class,
)

#: ‖candidate − table's‖ / ‖table's‖ that the order of float32 sums, and what it rounds to in scratch, may make.
TOLERANCE = 1e-3
ROUNDS = 5
#: What is kept of each kernel.
KINDS = {"block": BlockConfig, "head": HeadConfig, "expand": ExpandConfig}
#: What this process has found or read, by key.
KNOWN: dict[str, Any] = {}

Config = TypeVar("Config", BlockConfig, HeadConfig, ExpandConfig)


def tuned(
    name: str, sources: Sequence[Source], destinations: Sequence[Destination], lengths: Sequence[int]
) -> Contract:
    """The contraction ``"block"`` or ``"head"`` with the fastest tile sizes for such operands on their device."""
    dtype, target = operand_dtype(sources, destinations), current()
    patched = sources[0].replacement is not None
    normed = any(d.norm is not None for d in destinations)
    rows = [triton.next_power_of_2(sum(o.rows for o in side)) for side in (destinations, sources)]
    width = sources[0].value.shape[-1] if sources[0].weight is None else sources[0].weight.shape[-1]
    where = f"{card(sources[0].value.device)} | triton {triton.__version__}"
    shape = (
        f"{str(dtype).removeprefix('torch.')} {shape_class(normed, patched)} {rows[0]}x{rows[1]} of {width}"
    )

    def scores(contract: Contract) -> Callable[[], Tensor]:
        return lambda: contract(sources, destinations, lengths)

    if name == "block":
        block = _fastest(
            f"{where} | block | {shape}",
            [block_config(dtype, normed, patched, target), *BLOCK_CANDIDATES[number(dtype)]],
            lambda config: scores(partial(contract_block, config=config)),
        )
        return partial(contract_block, config=block)
    head = _fastest(
        f"{where} | head | {shape}",
        [head_config(dtype, target), *HEAD_CANDIDATES[number(dtype)]],
        lambda config: scores(partial(contract_head, config=config)),
    )
    expansion = _fastest(
        f"{where} | expand | {shape}",
        [expand_config(dtype, patched, target), *EXPAND_CANDIDATES[number(dtype)]],
        lambda config: scores(partial(contract_head, config=head, expansion=config)),
    )
    return partial(contract_head, config=head, expansion=expansion)


def seconds(work: Callable[[], Tensor]) -> float:
    """Median time of `work`, which has run before."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()[0, 0].item()  # waits for the device
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def cache_path() -> Path:
    """Where choices are kept: the platform's folder for caches."""
    if sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "eaptk" / "autotune.json"


def _fastest(
    key: str, candidates: Sequence[Config], scores: Callable[[Config], Callable[[], Tensor]]
) -> Config:
    """Of `candidates`, the table's choice first: what is known, else what is timed now and kept."""
    kind = type(candidates[0])
    if key not in KNOWN:
        config = _kept(kind, key)
        if config is None:
            config = _time(candidates, scores)
            _keep(key, config)
        KNOWN[key] = config
    found: Config = KNOWN[key]
    return found


def _time(candidates: Sequence[Config], scores: Callable[[Config], Callable[[], Tensor]]) -> Config:
    expected = scores(candidates[0])()
    times = [seconds(scores(candidates[0]))]
    for candidate in candidates[1:]:
        work, taken = scores(candidate), float("inf")
        try:
            if (work() - expected).norm() <= TOLERANCE * expected.norm():
                taken = seconds(work)
        # Not every card has room for every candidate, and compilers say so each in a way of their own.
        except Exception as failure:
            if isinstance(failure, torch.AcceleratorError):
                raise
        times.append(taken)
    return candidates[times.index(min(times))]


def _kept(kind: type[Config], key: str) -> Config | None:
    kept = _read().get(key)
    if kept is None:
        return None
    sizes: dict[str, Any] = {n: tuple(size) if isinstance(size, list) else size for n, size in kept.items()}
    return kind(**sizes)


def _read() -> dict[str, dict[str, Any]]:
    """The cache; nothing of it if any of it is not as `_keep` writes it."""
    path = cache_path()
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text())
        for key, config in found.items():
            kind = KINDS[key.split(" | ")[2]]
            sizes = [n for size in config.values() for n in (size if isinstance(size, list) else [size])]
            if config.keys() != {f.name for f in fields(kind)} or not all(type(n) is int for n in sizes):
                raise ValueError(key)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, AttributeError, LookupError) as error:
        message = f"{path}: no tile sizes of eaptk's ({error}); it is ignored, and they are timed again"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return {}
    return found


def _keep(key: str, config: Config) -> None:
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_read(), key: asdict(config)}, file, indent=2)
        Path(file.name).replace(path)
    except OSError as error:
        warnings.warn(f"{path}: tile sizes are not kept: {error}", RuntimeWarning, stacklevel=2)
