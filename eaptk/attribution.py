"""One batch in, the score of every edge of every sample out.

    I(s→d) = Σ_t ⟨∇_{H_d} L[t], O'_s[t] − O_s[t]⟩

predicts, to first order, how the loss L changes when the edge alone carries O'_s in place of O_s. O' is zero
(ablation ``"zero"``; arXiv 2509.21044), what the source writes on a corrupted prompt (``"patching"``; Syed et al.,
arXiv 2310.10348), or the source's mean (``"mean"``). One forward and one backward pass give all edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from eaptk import losses
from eaptk.batch import NO_TARGET, Batch
from eaptk.capture import Capture, frozen
from eaptk.contraction import Contraction, operands
from eaptk.division import flush_limit
from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.losses import LOSSES, LossFunction, LossName, Targets
from eaptk.passes import Halves, loss_scale, of_callable
from eaptk.plan import Plan, Work, free_memory
from eaptk.request import ABLATIONS as ABLATIONS
from eaptk.request import Ablation as Ablation
from eaptk.request import Request, as_batch, check_request, check_tokens, prepare
from eaptk.segments import by_segments, check_segment
from eaptk.sites import Sites
from eaptk.weights import bare, device_of, dtype_of, is_offloaded

if TYPE_CHECKING:
    import networkx
    import pandas


@dataclass(frozen=True, repr=False)
class EdgeScores:
    """Scores of one batch.

    Args:
        rows: [B, n_edges] float32 (float64 for a float64 model), on the CPU unless `attribute` was asked to leave
            them on the model's device; columns as `graph` numbers them.
        loss: [B] each sample's loss.
        graph: the graph the columns belong to.
    """

    rows: Tensor
    loss: Tensor
    graph: Graph

    def __repr__(self) -> str:
        n_samples, n_edges = self.rows.shape
        return f"EdgeScores({n_samples:,} samples × {n_edges:,} edges, {self.graph})"

    def matrix(self) -> npt.NDArray[Any]:
        """[B, n_sources, n_destinations], 0 where there is no edge."""
        return self.graph.matrix(self.rows.numpy())

    def top(self, k: int = 20) -> list[tuple[str, float]]:
        """The `k` edges of largest mean |score| over the batch, as (``source→destination``, mean score)."""
        strength = self.rows.abs().mean(0)
        columns = torch.topk(strength, min(k, len(strength))).indices.tolist()
        mean = self.rows.mean(0)
        return [(self.graph.edge_name(column), mean[column].item()) for column in columns]

    def to_frame(self) -> pandas.DataFrame:
        """The graph's edge table with one score column a sample, ``0`` … ``B−1``."""
        import pandas

        scores = pandas.DataFrame(self.rows.numpy().T)
        return pandas.concat([self.graph.to_frame(), scores], axis=1)

    def to_networkx(self) -> networkx.DiGraph:
        """The graph with each edge's mean score over the batch as ``score``."""
        return self.graph.to_networkx(self.rows.mean(0).numpy())


def attribute(
    model: nn.Module,
    batch: Batch | Mapping[str, Any],
    graph: Graph,
    *,
    ablation: Ablation = "zero",
    loss: LossName | LossFunction = "nll",
    means: Mapping[str, Tensor] | None = None,
    flush_layers: int | None = None,
    checkpoint: bool | None = None,
    segment: int | None = None,
    on_device: bool = False,
) -> EdgeScores:
    """Scores of every edge of every sample of a batch.

    Args:
        model: a Hugging Face causal LM, or one with PEFT adapters; it is left exactly as found. It may be spread over
            devices, partly offloaded, or sharded over processes; these all make the same calls then.
        batch: a `Batch`, or what a tokenizer returns (see `Batch.from_mapping`).
        graph: from `Graph.from_model(model, …)`.
        ablation: what takes the place of a source's output; see the module.
        loss: ``"nll"``: mean negative log-likelihood of the targets; ``"logit_diff"``: mean logit(foil) −
            logit(target); ``"kl"``: KL to the clean run (patching only; as KL and its gradient vanish on the clean
            run, the gradient is taken on the corrupted one); or a callable (logits [B, T, V], batch) → [B].
        means: from `source_means`, for ablation ``"mean"``.
        flush_layers: contract, and free, the gradients of about so many layers at a time while the backward pass
            goes on; memory against speed, the scores are the same to the bit (but for `EAPTK_AUTOTUNE`). None: what
            memory asks for (`Plan`).
        checkpoint: keep of each layer its input alone, and run it again in the backward pass: another forward pass
            for memory that grows by a tensor [B, T, D] a layer. None: what memory asks for.
        segment: for the longest sequences: take so many tokens at a time where a batch has more, so that of all
            tokens and layers only keys and values are held (`eaptk.segments`). Costs a third forward pass, and
            changes scores by rounding; layers are run again whatever `checkpoint` says.
        on_device: leave the rows on the model's device, for more work on them there.

    Raises:
        EaptkError: the graph is another model's; ablation and loss lack what they need; the loss or a score is
            NaN or infinite (the sample and the edge are named).
    """
    request = Request(ablation, loss, means, flush_layers, checkpoint)
    batch = as_batch(batch)
    if segment is not None:
        check_segment(segment, loss)
    if segment is None or batch.ids.shape[1] <= segment:
        scores = _attribute(bare(model), batch, graph, request)[0]
    else:
        scores = _checked(*by_segments(bare(model), batch, graph, request, segment), batch, graph)
    return scores if on_device else replace(scores, rows=scores.rows.cpu())


def attribute_cuts(
    model: nn.Module,
    batch: Batch | Mapping[str, Any],
    graph: Graph,
    cuts: Sequence[int],
    *,
    ablation: Ablation = "zero",
    loss: LossName = "nll",
    means: Mapping[str, Tensor] | None = None,
    flush_layers: int | None = None,
    checkpoint: bool | None = None,
    on_device: bool = False,
) -> list[EdgeScores]:
    """Scores of a batch as they are when only so many tokens of each answer count: one result a cut.

    The same as `attribute` on samples whose answers are cut, to rounding. As no position sees those after it, several
    cuts share one forward pass, with a backward pass each; `share_passes` says which do.

    Args:
        cuts: how many of a sample's positions with loss, from the first, have one; those of a shorter answer all do.
        model, batch, graph, ablation, loss, means, flush_layers, checkpoint, on_device: as for `attribute`.

    Returns:
        In the order of `cuts`.

    Raises:
        EaptkError: what `attribute` raises; no cuts, or one below 1; a loss that is a callable, as what it makes of
            an answer need not be a mean over its tokens.
    """
    if not cuts or min(cuts) < 1:
        raise EaptkError(f"cuts are {list(cuts)}; give one or more numbers of tokens, each at least 1")
    if callable(loss):
        raise EaptkError(f"answers are cut under a named loss alone: one of {', '.join(LOSSES)}")
    request = Request(ablation, loss, means, flush_layers, checkpoint)
    batch = as_batch(batch)
    check_request(batch, ablation, loss, means)
    most = int((batch.targets != NO_TARGET).sum(1).max())
    batches = {cut: cut_short(batch, cut) for cut in {min(cut, most) for cut in cuts}}
    found = {}
    for together in share_passes({cut: part.ids.shape[1] for cut, part in batches.items()}):
        longest = batches[together[-1]]
        for cut, scores in zip(
            together, _attribute(bare(model), longest, graph, request, together), strict=True
        ):
            found[cut] = scores if on_device else replace(scores, rows=scores.rows.cpu())
    return [found[min(cut, most)] for cut in cuts]


def cut_short(batch: Batch, cut: int) -> Batch:
    """The batch with the first `cut` losses of each sample alone, and no position after the last of them."""
    carries = batch.targets != NO_TARGET
    targets = torch.where(carries.cumsum(1) <= cut, batch.targets, NO_TARGET)
    places = torch.arange(1, targets.shape[1] + 1, device=targets.device)
    lengths = ((targets != NO_TARGET) * places).amax(1).cpu()
    width = int(lengths.max())
    shorter = {
        name: value[:, :width]
        for name in ("ids", "corrupt_ids", "foils")
        if (value := getattr(batch, name)) is not None
    }
    return replace(batch, lengths=lengths, targets=targets[:, :width], **shorter)


def share_passes(lengths: Mapping[int, int]) -> list[list[int]]:
    """Which cuts share a forward pass, so that all passes together are over the fewest tokens.

    A backward pass is as long as the forward pass it goes back through. Short cuts of long answers are so better
    given a forward pass of their own, and all of long prompts share one.

    Args:
        lengths: by cut, how many tokens a forward pass for it has.

    Returns:
        Cuts in ascending order, by pass.
    """
    cuts = sorted(lengths)
    best: list[tuple[int, list[list[int]]]] = [(0, [])]
    for end in range(1, len(cuts) + 1):
        length = lengths[cuts[end - 1]]
        best.append(
            min(
                (best[start][0] + length * (1 + end - start), [*best[start][1], cuts[start:end]])
                for start in range(end)
            )
        )
    return best[-1][1]


def _attribute(
    model: nn.Module, batch: Batch, graph: Graph, request: Request, cuts: Sequence[int | None] = (None,)
) -> list[EdgeScores]:
    """Rows on the model's device, from one forward pass for each of the ascending cuts; None: of no cut.

    All that has to be known of the batch's content is read before the forward pass, and the losses' content after the
    last backward pass: between them nothing waits for the device.
    """
    loss, means = request.loss, request.means
    rows, losses_found = [], []
    with frozen(model):
        targets = Targets.of(batch)
        lengths = [(batch if cut is None else cut_short(batch, cut)).lengths.tolist() for cut in cuts]
        batch = prepare(model, batch, request.ablation, loss, means)
        targets = targets.to(batch.ids.device)
        sites = Sites(model, graph)
        plan = _plan(model, sites, batch, request, sum(targets.counts), len(cuts))
        halves, scale = Halves(model, sites), loss_scale(model)
        other = clean = None
        if batch.corrupt_ids is not None and loss == "kl":
            other, clean = _values(halves, sites, batch.ids, targets.index)
            batch = replace(batch, ids=batch.corrupt_ids)
        elif batch.corrupt_ids is not None and request.ablation == "patching":
            other, _ = _values(halves, sites, batch.corrupt_ids, targets.index[:1])
        with torch.enable_grad(), Capture(sites, gradients=True, recompute=plan.checkpoint) as run:
            if callable(loss):
                parts = [of_callable(model, batch, loss)]
                sources = operands(run, request, other)
            else:
                hidden = halves.hidden(batch.ids, targets.index)
                sources = operands(run, request, other)  # the other prompt's go before logits come
                values = losses.of_positions(loss, hidden, targets, halves, clean, scale)
                parts = [targets.means(values, cut) for cut in cuts]
                del hidden, values
            while parts:
                part, again = parts.pop(), bool(parts)
                contraction = Contraction(run, sources, lengths[len(parts)], plan.flush_layers, again)
                run.backward(part.sum() * scale, contraction.layer_left, again)
                rows.append(contraction.finish() / scale)
                losses_found.append(part.detach())
                del part
    return [_checked(*pair, batch, graph) for pair in zip(rows[::-1], losses_found[::-1], strict=True)]


def _checked(rows: Tensor, sample_losses: Tensor, batch: Batch, graph: Graph) -> EdgeScores:
    sample_losses = sample_losses.cpu()
    _check_losses(sample_losses, batch)
    _check_finite(rows, batch, graph)
    return EdgeScores(rows, sample_losses, graph)


def source_means(
    model: nn.Module, batches: Iterable[Batch | Mapping[str, Any]], graph: Graph
) -> dict[str, Tensor]:
    """Each source's mean output over all real tokens of all batches, for ablation ``"mean"``.

    Returns:
        By source name: [D]; at head granularity ``a{l}``: [heads, head_dim] at the output projection's input.
        Summed in float64 in the order given, so the same batches give the same bytes.
    """
    return means_of((source_sums(model, batch, graph) for batch in batches), model)


def source_sums(
    model: nn.Module, batch: Batch | Mapping[str, Any], graph: Graph
) -> tuple[dict[str, Tensor], int]:
    """What `means_of` makes means of: each source's output summed over a batch's real tokens, and their number.

    Returns:
        By source name, shaped as `source_means` says: float64.
    """
    model = bare(model)
    sites = Sites(model, graph)
    batch = as_batch(batch)
    check_tokens(batch, model)
    with frozen(model):
        batch = batch.to(device_of(model))
        # One position with hidden states, as none are wanted.
        index = torch.zeros(1, dtype=torch.int64, device=batch.ids.device)
        values, _ = _values(Halves(model, sites), sites, batch.ids, index)
    sums = {}
    for name, value in values.items():
        rows = zip(value, batch.lengths.tolist(), strict=True)
        sums[name] = reduce(torch.add, (row[:length].sum(0, dtype=torch.float64) for row, length in rows))
        if sites.shards is not None and value.dim() == 4:
            sums[name] = sites.shards.gather(sums[name], 0)
    return sums, int(batch.lengths.sum())


def means_of(parts: Iterable[tuple[Mapping[str, Tensor], int]], model: nn.Module) -> dict[str, Tensor]:
    """Means over all tokens of what `source_sums` gave for parts of them, added up in the order given."""
    totals: dict[str, Tensor] = {}
    n_tokens = 0
    for sums, n in parts:
        totals = {name: totals[name] + sums[name] for name in totals} or dict(sums)
        n_tokens += n
    if not n_tokens:
        raise EaptkError("cannot take means over no batches")
    dtype = torch.float64 if dtype_of(model) == torch.float64 else torch.float32
    return {name: (total / n_tokens).to(dtype) for name, total in totals.items()}


def _values(halves: Halves, sites: Sites, ids: Tensor, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Source values of a forward pass, and its hidden states [N, D] at the given positions."""
    with torch.no_grad(), Capture(sites, gradients=False) as capture:
        hidden = halves.hidden(ids, index)
    return capture.values, hidden


def _plan(model: nn.Module, sites: Sites, batch: Batch, request: Request, n_loss: int, n_cuts: int) -> Plan:
    n_samples, n_tokens = batch.ids.shape
    work = Work.of(
        model,
        sites,
        n_samples,
        n_tokens,
        n_loss=n_loss,
        whole_logits=callable(request.loss),
        patched=request.ablation == "patching",
        n_cuts=n_cuts,
    )
    checkpoint = request.checkpoint
    if checkpoint is None and is_offloaded(model):
        # Whatever autograd keeps for the backward pass it keeps in place: it would hold every weight.
        checkpoint = True
    memory = min(map(free_memory, sites.devices))
    if sites.shards is not None:
        memory = sites.shards.smallest(memory, sites.devices[0])
    flush_layers = flush_limit(sites) if request.flush_layers is None else request.flush_layers
    return Plan.within(memory, work, flush_layers, checkpoint)


def _check_losses(sample_losses: Tensor, batch: Batch) -> None:
    bad = (~sample_losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise EaptkError(
            f"sample {batch.names[bad[0]]!r}: the loss is {sample_losses[bad[0]].item()}; its logits are not finite "
            f"(try a wider dtype, or check the weights)"
        )


def _check_finite(rows: Tensor, batch: Batch, graph: Graph) -> None:
    if bool(rows.isfinite().all()):
        return
    sample, column = (~rows.isfinite()).nonzero()[0].tolist()
    raise EaptkError(
        f"sample {batch.names[sample]!r}: the score of edge {graph.edge_name(column)} is "
        f"{rows[sample, column].item()} (try a wider dtype, or check the weights)"
    )
