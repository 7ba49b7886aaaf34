"""How a batch is attributed within the memory there is, and what that takes, said before it is done.

Two dials trade time for memory, and neither changes a bit of the scores on a CPU: gradients may be
contracted by *flush groups* of layers while the backward pass goes on, and each layer may be run again there in
place of what autograd keeps of it (*checkpointing*). `Plan.within` takes the fastest setting that fits. What a
setting needs is found by going through the passes layer by layer (`Work.peak`) with the very cuts that attribution
makes (`flush_cuts`); sizes are estimates, and `tests/test_plan.py` holds them to what is measured.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eaptk.cards import COPIES, PASSES, PRODUCTS, Card
from eaptk.errors import EaptkError
from eaptk.graph import Granularity, Graph
from eaptk.kernels.reference import chunk_tokens, group_starts
from eaptk.kernels.tiles import cdiv
from eaptk.losses import chunk_positions
from eaptk.sites import LayerSites, Reader, Sites
from eaptk.weights import features, linear_maps

#: Estimates are within a fifth of what is measured: what is to fit must fit with as much to spare.
MARGIN = 1.25
#: Chunks and partial sums of the Triton kernels, about the most; those of the block kernel grow with the tokens, by a
#: hundredth or less of what the gradients do.
KERNEL_SCRATCH = 512 * 2**20
#: Activation functions that transformers spells out in single operations, each of which keeps its operand.
_SPELLED_OUT = ("gelu_new", "gelu_fast", "gelu_accurate", "quick_gelu")


def flush_cuts(readers: Sequence[Reader], flush_layers: int) -> dict[int, int]:
    """When gradients are contracted: after `flush_layers` layers or, as groups are not split, soon after.

    The logits' are never contracted alone: one row is not worth reading every source.

    Returns:
        By layer that the backward pass has left, the first reader of those contracted then. What remains is
        contracted at the pass's end.

    Raises:
        EaptkError: `flush_layers` is no number of layers.
    """
    if flush_layers < 1:
        raise EaptkError(f"flush_layers is {flush_layers}; it must be at least 1")
    n_layers = last_layer = readers[-1].layer
    if flush_layers >= n_layers:
        return {}
    starts = group_starts([(reader.group_key, reader.rows) for reader in readers])
    first = {reader.layer: i for i, reader in reversed(list(enumerate(readers)))}
    cuts, last = {}, len(readers)
    for layer in range(n_layers - 1, 0, -1):
        cut = next((start for start in starts if start >= first[layer]), last)
        if last_layer - layer >= flush_layers and cut < min(last, len(readers) - 1):
            cuts[layer] = last = cut
            last_layer = layer
    return cuts


@dataclass(frozen=True)
class Work:
    """Sizes of one batch's attribution: bytes of tensors, and FLOPs.

    Args:
        width, query_width, itemsize: D, heads × head width, bytes an element of activations.
        n_samples, n_tokens, n_loss: B, T (padded), and the positions that carry loss.
        weights: of the model.
        kept: what autograd keeps of one layer.
        backward: what the backward pass of one layer holds besides.
        n_together: positions whose logits are there at once.
        logits: of these, with what the loss makes of them, and hidden states at all positions that carry loss.
        parameters, unembedding: weights in matrix products of all layers, and in the last one.
        spared: of `parameters`, those that a layer run again stops before: nothing after them is kept.
        attention: FLOPs of all layers' products of queries, keys and values, forward.
        patched: there is another prompt, whose sources are held until the forward pass has ended.
        n_cuts: backward passes from one forward pass, each with rows of its own.
        on_gpu: the contraction's scratch is the kernels', not the reference's.
    """

    graph: Graph
    readers: tuple[Reader, ...]
    width: int
    query_width: int
    itemsize: int
    n_samples: int
    n_tokens: int
    n_loss: int
    n_together: int
    weights: int
    kept: int
    backward: int
    logits: int
    parameters: int
    spared: int
    unembedding: int
    attention: int
    patched: bool
    n_cuts: int
    on_gpu: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        sites: Sites,
        n_samples: int,
        n_tokens: int,
        *,
        n_loss: int,
        whole_logits: bool = False,
        patched: bool = False,
        n_cuts: int = 1,
        on_gpu: bool | None = None,
    ) -> Work:
        """Of a model, which may be without weights (`without_weights`).

        Args:
            whole_logits: the loss is a callable, which takes the logits of all positions at once.
        """
        config: Any = model.config
        graph, layer = sites.graph, sites.layers[0]
        size, tokens = sites.dtype.itemsize, n_samples * n_tokens
        width = len(sites.norm_facts(layer.attention_norm)[0])
        query_width, _ = features(layer.attention_output) or (width, width)
        kv_width = query_width * graph.n_kv_heads // graph.n_heads
        matrices = linear_maps(layer.mlp_read)
        inner = max(map(max, matrices), default=width)
        activation = getattr(config, "hidden_act", getattr(config, "activation_function", None))
        # A gate keeps its own input, its output, and what it multiplies.
        spread = 3 if len(matrices) > 2 else 4 if activation in _SPELLED_OUT else 1
        eager = getattr(config, "_attn_implementation", None) == "eager"
        square = n_samples * graph.n_heads * n_tokens**2
        on_gpu = sites.devices[0].type == "cuda" if on_gpu is None else on_gpu
        most_together = chunk_positions(sites.vocabulary, "cuda" if on_gpu else "cpu")
        n_together = tokens if whole_logits else cdiv(n_loss, max(1, cdiv(n_loss, most_together)))
        # Of a chunk there are logits and slope; a half-precision one's slope is wide, and a soft-cap keeps its operand.
        logit = 16 if whole_logits else 8 if size >= 4 else 12
        logit += 0 if whole_logits or getattr(config, "final_logit_softcapping", None) is None else 8
        return cls(
            graph=graph,
            readers=tuple(sites.readers),
            width=width,
            query_width=query_width,
            itemsize=size,
            n_samples=n_samples,
            n_tokens=n_tokens,
            n_loss=n_loss,
            weights=sum(p.numel() * p.itemsize for p in model.parameters()),
            kept=tokens * _norm_bytes(sites, layer, query_width, kv_width)
            + tokens * size * (2 * query_width + 2 * kv_width + spread * inner)
            + (square * (size + 4) if eager else 0),
            backward=tokens * size * 3 * inner,
            n_together=n_together,
            logits=n_together * sites.vocabulary * logit * max(1, size // 4)
            + n_loss * width * size * (0 if whole_logits else 3),
            parameters=sum(
                read * written for each in sites.layers for read, written in linear_maps(each.block)
            ),
            spared=graph.n_layers * width * inner if layer.mlp_write is layer.mlp_read else 0,
            unembedding=sites.vocabulary * width,
            attention=graph.n_layers * 4 * n_samples * n_tokens**2 * query_width // (1 if eager else 2),
            patched=patched,
            n_cuts=n_cuts,
            on_gpu=on_gpu,
        )

    @property
    def stream(self) -> int:
        """Bytes of one [B, T, D]."""
        return self.n_samples * self.n_tokens * self.width * self.itemsize

    @property
    def sources(self) -> int:
        """Bytes of what is kept of all sources: O − O', or both of two prompts in half precision."""
        return self._written * (1 + self._holds_both)

    @property
    def rows(self) -> int:
        """Bytes of the score rows, and of a sample's sums."""
        return self.graph.n_edges * (4 * self.n_samples * self.n_cuts + 8)

    def gradients(self, readers: Sequence[Reader]) -> int:
        """Bytes of these destinations' gradients, and of the streams their norms read."""
        found = sum(self._heads(r.rows) if r.branch else self.stream for r in readers)
        return found + self.stream * len({r.layer for r in readers if r.normed})

    def scratch(self, readers: Sequence[Reader]) -> int:
        """Bytes that contracting these destinations takes for itself."""
        if self.on_gpu:
            # Three numbers of each token and row behind a norm.
            normed = sum(r.rows for r in readers if r.normed)
            return KERNEL_SCRATCH + 12 * self.n_samples * self.n_tokens * normed
        n_sources, element = self.graph.n_sources, max(4, self.itemsize)
        tokens = min(self.n_samples * self.n_tokens, chunk_tokens(n_sources, self.width))
        rows = max(sum(r.rows for r in group) for group in _groups(readers))
        rows += max(sum(r.rows for r in same) for _, same in groupby(readers, lambda r: r.group_key))
        expanding = sum(r.rows for r in readers if r.branch)
        expanding += self.graph.n_heads * len(self._sources_read(readers))
        head_dim = self.query_width // self.graph.n_heads
        return element * self.width * ((n_sources + rows) * tokens + expanding * head_dim)

    def flushes(self, flush_layers: int) -> list[tuple[int, list[Reader]]]:
        """Layer after which, and destinations that, are contracted together, in order of time."""
        ends, found = len(self.readers), []
        for layer, first in (*flush_cuts(self.readers, flush_layers).items(), (0, 0)):
            found.append((layer, list(self.readers[first:ends])))
            ends = first
        return found

    def peak(self, flush_layers: int, checkpoint: bool) -> int:
        """Most bytes alive at one time, weights apart."""
        n_layers = self.graph.n_layers
        flushes = dict(self.flushes(flush_layers))
        always = self.sources + self.rows
        normed = any(r.normed for r in self.readers)
        # Where norms compute in the stream's own dtype, what autograd keeps of it is the stream itself.
        shared = checkpoint or self.itemsize >= 4 or not normed
        kept = (self.stream if checkpoint else self.kept) + (0 if shared else self.stream)
        inside = self.backward + (self.kept if checkpoint else 0)
        most = n_layers * kept + max(self.logits, self._written * (self.patched and not self._holds_both))
        # Further backward passes need all that the first went back through.
        below = n_layers if self.n_cuts > 1 else 0
        waiting = [self.readers[-1]]
        for layer in range(n_layers - 1, -1, -1):
            most = max(most, max(below, layer + 1) * kept + inside + self.gradients(waiting))
            waiting = [r for r in self.readers if r.layer == layer] + waiting
            if layer in flushes:
                now = flushes[layer]
                most = max(most, max(below, layer) * kept + self.gradients(waiting) + self.scratch(now))
                waiting = [r for r in waiting if r not in now]
        return always + most

    def bare_peak(self, checkpoint: bool = False) -> int:
        """The same of the model's own passes."""
        kept, inside = (self.stream, self.kept) if checkpoint else (self.kept, 0)
        n_layers = self.graph.n_layers
        return self.stream + n_layers * kept + max(self.logits, inside + self.backward)

    @property
    def bare_flops(self) -> int:
        """Forward, and backward to the activations alone."""
        tokens = self.n_samples * self.n_tokens
        # The backward pass has four products for the forward's two, and forms the scores again if they are not kept.
        return 4 * (self.parameters * tokens + self.unembedding * self.n_loss) + 3 * self.attention

    @property
    def recompute_flops(self) -> int:
        """Of all layers' second forward pass under checkpointing."""
        return 2 * (self.parameters - self.spared) * self.n_samples * self.n_tokens + self.attention

    def contraction_flops(self, flush_layers: int) -> int:
        """Of the products, those without an edge that a group costs included."""
        pairs = sum(
            sum(r.rows for r in group) * group[-1].reach
            for _, readers in self.flushes(flush_layers)
            for group in _groups(readers)
        )
        return 2 * self.n_samples * self.n_tokens * self.width * pairs

    def expansion_flops(self, flush_layers: int) -> int:
        """Of expanding heads: destinations once, sources once a flush group that reads them.

        The kernels multiply what destinations read with their weights once more, for the norms' statistics.
        """
        if self.graph.granularity == "block":
            return 0
        head_dim = self.query_width // self.graph.n_heads
        rows = sum(r.rows for r in self.readers if r.branch) * (1 + self.on_gpu)
        rows += self.graph.n_heads * sum(
            len(self._sources_read(now)) for _, now in self.flushes(flush_layers)
        )
        return 2 * self.n_samples * self.n_tokens * self.width * head_dim * rows

    def contraction_bytes(self, flush_layers: int) -> int:
        """Read from memory: gradients and streams once, sources once a flush group that reads them."""
        layers = self.graph.n_layers
        return sum(
            self.gradients(now) + self.sources * len(self._sources_read(now)) // layers
            for _, now in self.flushes(flush_layers)
        )

    @property
    def _holds_both(self) -> bool:
        """Whether sources of both prompts are there until they are contracted; see `eaptk.contraction.operands`."""
        return self.patched and self.itemsize < 4

    @property
    def _written(self) -> int:
        """Bytes of what all sources wrote of one prompt."""
        n_layers = self.graph.n_layers
        attention = self.stream if self.graph.granularity == "block" else self._heads(self.graph.n_heads)
        return self.stream * (n_layers + 1) + attention * n_layers

    def _heads(self, rows: int) -> int:
        return (
            self.n_samples * self.n_tokens * rows * (self.query_width // self.graph.n_heads) * self.itemsize
        )

    def _sources_read(self, readers: Sequence[Reader]) -> range:
        """Layers whose attention these destinations read."""
        a_layer = 2 if self.graph.granularity == "block" else self.graph.n_heads + 1
        return range(-(-(readers[-1].reach - 1) // a_layer))


@dataclass(frozen=True)
class Plan:
    """The dials for one batch.

    Args:
        memory: bytes there are beside the weights.
        peak: bytes it takes at its height, estimated; more than `memory` if nothing fits.
    """

    work: Work
    memory: int
    flush_layers: int
    checkpoint: bool
    peak: int

    @classmethod
    def within(
        cls,
        memory: int,
        work: Work,
        flush_layers: int | None = None,
        checkpoint: bool | None = None,
    ) -> Plan:
        """The fastest dials that fit into `memory` with `MARGIN`; the most frugal if none do. Given ones are kept.

        Raises:
            EaptkError: `flush_layers` is no number of layers.
        """
        plans = []
        for recompute in (False, True) if checkpoint is None else (checkpoint,):
            for layers in _halved(work.graph.n_layers) if flush_layers is None else [flush_layers]:
                plans.append(cls(work, memory, layers, recompute, work.peak(layers, recompute)))
                if plans[-1].fits:
                    return plans[-1]
        return min(plans, key=lambda plan: plan.peak)

    @property
    def fits(self) -> bool:
        return self.peak * MARGIN <= self.memory

    @property
    def waiting(self) -> int:
        """Most bytes of gradients, and of the streams their norms read, that wait to be contracted."""
        flushes = dict(self.work.flushes(self.flush_layers))
        most, readers = 0, [self.work.readers[-1]]
        for layer in range(self.work.graph.n_layers - 1, -1, -1):
            readers = [r for r in self.work.readers if r.layer == layer] + readers
            most = max(most, self.work.gradients(readers))
            readers = [r for r in readers if r not in flushes.get(layer, [])]
        return most

    def seconds(self, card: Card) -> dict[str, float]:
        """Predicted of each part, from the card's spec sheet and the shares of it in `eaptk.cards`; not measured."""
        work, rate = self.work, card.rate(self.work.itemsize)
        products = work.contraction_flops(self.flush_layers) / (rate * PRODUCTS)
        reading = work.contraction_bytes(self.flush_layers) / (card.bandwidth * COPIES)
        return {
            "passes": work.bare_flops / (rate * PASSES),
            "recomputation": work.recompute_flops / (rate * PASSES) if self.checkpoint else 0.0,
            "expansion": work.expansion_flops(self.flush_layers) / (rate * PRODUCTS),
            "contraction": max(products, reading),
        }

    def overhead(self, card: Card) -> float:
        """Predicted time over that of the bare passes under the same checkpointing."""
        parts = self.seconds(card)
        return sum(parts.values()) / (parts["passes"] + parts["recomputation"])


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors may take on a device; without limit where the system does not say.

    Of a machine's own memory each of the processes that torchrun started there may take its share.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        # What is free alone leaves out the pages of files, which give way.
        found = re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(found[1]) * 1024 // processes if found else 2**63 - 1


def foresee(
    config: Any,
    granularity: Granularity,
    n_tokens: int,
    *,
    card: Card,
    budget: int | None = None,
    n_loss: int | None = None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """The plan for one sample of a model that is not loaded.

    Args:
        config: the Hugging Face config.
        budget: bytes for all, weights included; None: the card's memory.
        n_loss: positions that carry loss; None: 256, or all if there are fewer.
        dtype: of the weights; None: what the config says.

    Raises:
        EaptkError: the weights alone exceed the budget, or the model cannot be scored.
    """
    model = without_weights(config, dtype)
    sites = Sites(model, Graph.from_config(config, granularity))
    n_loss = min(n_tokens, 256 if n_loss is None else n_loss)
    work = Work.of(model, sites, 1, n_tokens, n_loss=n_loss, on_gpu=card.name != "cpu")
    budget = card.memory if budget is None else budget
    if work.weights >= budget:
        raise EaptkError(
            f"the weights alone take {work.weights / 1e9:.1f} GB of a budget of {budget / 1e9:.1f} GB; "
            f"raise --budget, or spread the model over several cards"
        )
    return Plan.within(budget - work.weights, work)


def without_weights(config: Any, dtype: torch.dtype | None = None) -> Any:
    """A causal LM whose tensors have shapes but no content."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)


def parse_bytes(text: str) -> int:
    """A number of bytes as people write it: ``80GB`` (powers of 1000), ``64GiB`` (of 1024), ``8e9``.

    Raises:
        EaptkError: it is no such thing.
    """
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?(?:([kMGT])(i?))?B?", text.strip())
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or not number >= 1:
        raise EaptkError(f"{text!r} is no amount of memory; write 80GB, 64GiB or 500MB")
    power = " kMGT".index(found[2] or " ")
    return int(number * (1024 if found[3] else 1000) ** power)


def _halved(n: int) -> list[int]:
    found = [n]
    while n > 1:
        n = (n + 1) // 2
        found.append(n)
    return found


def _groups(readers: Sequence[Reader]) -> list[Sequence[Reader]]:
    starts = group_starts([(reader.group_key, reader.rows) for reader in readers])
    return [readers[a:b] for a, b in zip(starts, [*starts[1:], len(readers)], strict=True)]


def _norm_bytes(sites: Sites, layer: LayerSites, query_width: int, kv_width: int) -> int:
    """What autograd keeps of one token's norms: RMS norms compute, and keep their input, in float32 or wider."""
    gain, _, centred = sites.norm_facts(layer.attention_norm)
    widths = 0
    for module in layer.block.modules():
        own = getattr(module, "weight", None)
        if isinstance(own, Tensor) and own.dim() == 1:
            widths += len(gain) if len(own) == len(gain) else (query_width + kv_width) // 2
    size = gain.itemsize
    return widths * (size if centred else max(4, size))
