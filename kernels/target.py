"""The device a kernel is compiled for, as far as tile sizes depend on it."""

from __future__ import annotations

from typing import NamedTuple

import triton


class Target(NamedTuple):
    """`backend` as Triton names it, ``"cuda"`` or ``"hip"``; `capability`: 80, 90, 100 …; of no meaning for HIP."""

    backend: str
    capability: int


def current() -> Target:
    """The current device's; under the interpreter, which takes any tile, a Hopper card's."""
    if triton.knobs.runtime.interpret:
        return Target("cuda", 90)
    found = triton.runtime.driver.active.get_current_target()
    return Target(found.backend, found.arch if isinstance(found.arch, int) else 0)
