"""The floor that edge attribution is measured against: the bare passes of the same batch, in time and in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from eaptk import Batch
from eaptk.capture import frozen, run_again
from eaptk.passes import sample_losses
from eaptk.sites import Sites

# Torch's profiler otherwise says on the terminal when it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

#: Most that attribution may take of it, by level.
TARGETS = {"block": 1.05, "head": 1.30}


def bare_pass(model: torch.nn.Module, sites: Sites, batch: Batch, checkpoint: bool = False) -> None:
    """The same forward, loss and gradient to the first layer's input, without a hook that reads.

    Args:
        checkpoint: run each layer again in the backward pass, in place of what autograd keeps of it.
    """
    root: list[torch.Tensor] = []

    def leaf(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        root.append(args[0].detach().requires_grad_())
        return (root[0], *args[1:])

    with ExitStack() as stack:
        for layer in sites.layers if checkpoint else ():
            stack.enter_context(run_again(layer.block))
        stack.callback(sites.layers[0].block.register_forward_pre_hook(leaf).remove)
        with frozen(model), torch.enable_grad():
            loss = sample_losses(model, sites, batch).sum()
            torch.autograd.grad(loss, root[0])


def peak_bytes(work: Callable[[], Any]) -> int:
    """Largest sum of live tensor bytes that `work` allocates, from the allocator's own record."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
