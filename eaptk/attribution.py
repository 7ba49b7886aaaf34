"""One batch in, the score of every edge of every sample out.

    I(s→d) = Σ_t ⟨∇_{H_d} L[t], O'_s[t] − O_s[t]⟩

predicts, to first order, how the loss L changes when the edge alone carries O'_s in place of O_s. O' is zero
(ablation ``"zero"``; arXiv 2509.21044), what the source writes on a corrupted prompt (``"patching"``; Syed et al.,
arXiv 2310.10348), or the source's mean (``"mean"``). One forward and one backward pass give all edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor, nn

from eaptk import losses
from eaptk.batch import NO_TARGET, Batch
from eaptk.capture import Capture, frozen
from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.kernels import Source, contract
from eaptk.losses import LOSSES, LossFunction, LossName
from eaptk.plan import Plan, Work, flush_cuts, free_memory
from eaptk.sites import Sites

if TYPE_CHECKING:
    import networkx
    import pandas

Ablation = Literal["zero", "patching", "mean"]
ABLATIONS: tuple[Ablation, ...] = ("zero", "patching", "mean")
#: Float16 gradients of a mean loss fall below its smallest number; a power of two keeps them, exactly undone.
FLOAT16_LOSS_SCALE = 2.0**12


@dataclass(frozen=True)
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
    on_device: bool = False,
) -> EdgeScores:
    """Scores of every edge of every sample of a batch.

    Args:
        model: a Hugging Face causal LM; it is left exactly as found.
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
        on_device: leave the rows on the model's device, for more work on them there.

    Raises:
        EaptkError: the graph is another model's; ablation and loss lack what they need; the loss or a score is
            NaN or infinite (the sample and the edge are named).
    """
    batch = prepare(model, batch, ablation, loss, means)
    sites = Sites(model, graph)
    plan = _plan(model, sites, batch, ablation, loss, flush_layers, checkpoint)
    with frozen(model):
        other = clean_logits = None
        if loss == "kl":
            other, clean_logits = _values(model, sites, batch)
            batch = _corrupted(batch)
        elif ablation == "patching":
            other, _ = _values(model, sites, _corrupted(batch))
        with torch.enable_grad(), Capture(sites, gradients=True, recompute=plan.checkpoint) as run:
            sample_losses = _losses(model, sites, batch, loss, clean_logits)
            if means is not None:
                check_means(means, run)
            if loss == "kl":
                assert other is not None
                sources = [
                    replace(source, value=other[name], replacement=source.value)
                    for name, source in zip(other, run.sources(), strict=True)
                ]
            else:
                sources = run.sources(other if means is None else means)
            contraction = _Contraction(run, sources, batch.lengths.tolist(), plan.flush_layers)
            run.backward(sample_losses.sum() * _loss_scale(model), contraction.layer_left)
        rows = contraction.finish()
    rows = rows / _loss_scale(model)
    if not on_device:
        rows = rows.cpu()
    _check_finite(rows, batch, graph)
    return EdgeScores(rows, sample_losses.detach().cpu(), graph)


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
    sites = Sites(model, graph)
    batch = _as_batch(batch)
    _check_tokens(batch, model)
    with frozen(model):
        values, _ = _values(model, sites, batch.to(next(model.parameters()).device))
    sums = {}
    for name, value in values.items():
        rows = zip(value, batch.lengths.tolist(), strict=True)
        sums[name] = reduce(torch.add, (row[:length].sum(0, dtype=torch.float64) for row, length in rows))
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
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    return {name: (total / n_tokens).to(dtype) for name, total in totals.items()}


def prepare(
    model: nn.Module,
    batch: Batch | Mapping[str, Any],
    ablation: Ablation,
    loss: LossName | LossFunction,
    means: Mapping[str, Tensor] | None,
) -> Batch:
    """The batch on the model's device; refuses what `attribute` refuses before it runs the model."""
    batch = _as_batch(batch)
    _check_request(batch, ablation, loss, means)
    _check_tokens(batch, model)
    return batch.to(next(model.parameters()).device)


def _as_batch(batch: Batch | Mapping[str, Any]) -> Batch:
    return batch if isinstance(batch, Batch) else Batch.from_mapping(batch)


def _values(model: nn.Module, sites: Sites, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Source values of a forward pass, and its logits [N, V] at the loss positions."""
    with torch.no_grad(), Capture(sites, gradients=False) as capture:
        logits = forward(model, sites, batch)
    return capture.values, logits


def _plan(
    model: nn.Module,
    sites: Sites,
    batch: Batch,
    ablation: Ablation,
    loss: LossName | LossFunction,
    flush_layers: int | None,
    checkpoint: bool | None,
) -> Plan:
    n_samples, n_tokens = batch.ids.shape
    work = Work.of(
        model,
        sites,
        n_samples,
        n_tokens,
        n_loss=batch.ids.numel() if callable(loss) else int((batch.targets != NO_TARGET).sum()),
        patched=ablation == "patching",
    )
    return Plan.within(free_memory(batch.ids.device), work, flush_layers, checkpoint)


def _losses(
    model: nn.Module,
    sites: Sites,
    batch: Batch,
    loss: LossName | LossFunction,
    clean_logits: Tensor | None,
) -> Tensor:
    """Losses [B] of a forward pass, finite."""
    logits = forward(model, sites, batch, every_position=callable(loss))
    sample_losses = losses.of_samples(loss, logits, batch, clean_logits)
    if callable(loss):
        _check_callable(sample_losses, batch)
    bad = (~sample_losses.detach().isfinite()).nonzero().flatten().tolist()
    if bad:
        value = sample_losses[bad[0]].item()
        raise EaptkError(
            f"sample {batch.names[bad[0]]!r}: the loss is {value}; its logits are not finite "
            f"(try a wider dtype, or check the weights)"
        )
    return sample_losses


class _Contraction:
    """The contraction of one batch: whole after the backward pass, or by flush groups on its way (`flush_cuts`)."""

    def __init__(
        self, run: Capture, sources: Sequence[Source], lengths: Sequence[int], flush_layers: int
    ) -> None:
        self._run = run
        self._sources = sources
        self._lengths = lengths
        self._cuts = flush_cuts(run.sites.readers, flush_layers)
        #: Readers not contracted yet: the first so many.
        self._left = len(run.sites.readers)
        self._parts: list[Tensor] = []

    def layer_left(self, layer: int) -> None:
        """The backward pass has left this layer."""
        if layer in self._cuts:
            self._flush(self._cuts[layer])

    def finish(self) -> Tensor:
        """[B, n_edges], once the backward pass has ended."""
        self._flush(0)
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts[::-1], 1)

    def _flush(self, first: int) -> None:
        readers = self._run.sites.readers[first : self._left]
        # Autocast would take the contraction's products in half precision.
        with torch.no_grad(), torch.autocast(self._sources[0].value.device.type, enabled=False):
            try:
                self._parts.append(contract(self._sources, self._run.destinations(readers), self._lengths))
            except ValueError as error:
                entry = self._run.sites.architecture.model_type
                hint = (
                    f" (architecture entry {entry!r} names a wrong module)"
                    if ": shape " in str(error)
                    else ""
                )
                raise EaptkError(f"{error}{hint}") from error
        self._run.release(readers)
        self._left = first


def forward(model: nn.Module, sites: Sites, batch: Batch, every_position: bool = False) -> Tensor:
    """Logits [N, V] at the positions that carry loss alone, or [B, T, V] at every one."""
    with _only_at(sites.unembedding, None if every_position else losses.loss_positions(batch)):
        logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits
    return logits if every_position else logits[0]


@contextmanager
def _only_at(unembedding: nn.Module, positions: Tensor | None) -> Iterator[None]:
    """The vocabulary is wide: unembed only `positions` of the flattened [B·T], as one row of a batch."""

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        return None if positions is None else (args[0].flatten(0, 1).index_select(0, positions)[None],)

    handle = unembedding.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _corrupted(batch: Batch) -> Batch:
    assert batch.corrupt_ids is not None
    return replace(batch, ids=batch.corrupt_ids)


def _loss_scale(model: nn.Module) -> float:
    return FLOAT16_LOSS_SCALE if next(model.parameters()).dtype == torch.float16 else 1.0


def _check_request(
    batch: Batch, ablation: str, loss: LossName | LossFunction, means: Mapping[str, Tensor] | None
) -> None:
    if ablation not in ABLATIONS:
        raise EaptkError(f"ablation is {ablation!r}; it must be one of {', '.join(ABLATIONS)}")
    if not callable(loss) and loss not in LOSSES:
        raise EaptkError(f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}, or a callable")
    if ablation == "patching" and batch.corrupt_ids is None:
        raise EaptkError(
            "ablation 'patching' needs a corrupted prompt: give every sample `corrupt` or `corrupt_ids`"
        )
    if (ablation == "mean") != (means is not None):
        raise EaptkError(
            "ablation 'mean' needs means=eaptk.source_means(model, batches, graph), and only it takes them"
        )
    if loss == "kl" and ablation != "patching":
        raise EaptkError(
            f"loss 'kl' has no gradient on the clean run that ablation {ablation!r} uses; use 'patching'"
        )
    without = (batch.targets == NO_TARGET).all(1).nonzero().flatten().tolist()
    if without and not callable(loss):
        raise EaptkError(
            f"sample {batch.names[without[0]]!r} has no target, so no loss {loss!r}; give it an answer or labels"
        )


def _check_tokens(batch: Batch, model: nn.Module) -> None:
    n_tokens = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    for name in ("ids", "corrupt_ids", "targets", "foils"):
        tokens = getattr(batch, name)
        if tokens is None:
            continue
        outside = (tokens < 0) | (tokens >= n_tokens)
        if name in ("targets", "foils"):
            outside &= tokens != NO_TARGET
        if bool(outside.any()):
            sample, position = outside.nonzero()[0].tolist()
            raise EaptkError(
                f"sample {batch.names[sample]!r}: token {int(tokens[sample, position])} of its {name} is outside the "
                f"vocabulary of {n_tokens}; was it tokenised for another model?"
            )


def _check_callable(sample_losses: Any, batch: Batch) -> None:
    is_tensor = isinstance(sample_losses, Tensor)
    if not is_tensor or sample_losses.shape != (len(batch),):
        found = f"shape {tuple(sample_losses.shape)}" if is_tensor else type(sample_losses).__name__
        raise EaptkError(f"the loss returned {found}; expected [{len(batch)}], one number a sample")
    if not sample_losses.requires_grad:
        raise EaptkError(
            "the loss does not depend on the logits; compute it from them without detach() or no_grad()"
        )


def check_means(means: Mapping[str, Tensor], run: Capture) -> None:
    """Raises EaptkError where means are not those of the sources that `run` captured."""
    for name, value in run.values.items():
        found = tuple(means[name].shape) if name in means else None
        if found != value.shape[2:]:
            raise EaptkError(
                f"means of {name!r} have shape {found}, the graph needs {tuple(value.shape[2:])}; "
                f"take them with eaptk.source_means for the same model and graph"
            )


def _check_finite(rows: Tensor, batch: Batch, graph: Graph) -> None:
    if bool(rows.isfinite().all()):
        return
    sample, column = (~rows.isfinite()).nonzero()[0].tolist()
    raise EaptkError(
        f"sample {batch.names[sample]!r}: the score of edge {graph.edge_name(column)} is "
        f"{rows[sample, column].item()} (try a wider dtype, or check the weights)"
    )
