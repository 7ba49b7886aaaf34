"""A whole dataset through `attribute` into a run directory."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

import eaptk
from eaptk.attribution import ABLATIONS, Ablation, attribute, source_means
from eaptk.batch import Sample, collate
from eaptk.dataset import plan_batches, read_samples, samples_table
from eaptk.errors import EaptkError
from eaptk.files import explained, read_table, whole_file
from eaptk.generate import greedy_answers
from eaptk.graph import Granularity, Graph, Qkv
from eaptk.loading import (
    config_fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    refuse_unsupported,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from eaptk.losses import LOSSES, LossFunction, LossName
from eaptk.progress import progress_bar
from eaptk.statistics import DEFAULT_BINS, Histogram, summarise
from eaptk.store import Run, RunWriter

#: What a run can score: the losses of `attribute`, and the model's own answers.
RunLoss = LossName | Literal["self_nll"] | LossFunction
RUN_LOSSES = (*LOSSES, "self_nll")
RowDtype = Literal["float32", "float16"]


def score(
    model: str | os.PathLike[str] | nn.Module,
    dataset: Any,
    out: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    granularity: Granularity = "block",
    qkv: Qkv = "split",
    ablation: Ablation = "zero",
    loss: RunLoss = "nll",
    given_answers: bool = False,
    cut: int | None = None,
    max_new_tokens: int = 256,
    tokens_per_batch: int = 2048,
    row_dtype: RowDtype = "float32",
    metrics_only: bool = False,
    bins: int | None = None,
    upper: float | None = None,
    limit: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    progress: bool = True,
) -> Run:
    """Score every edge for every sample; the same call again resumes a run that was stopped.

    A resumed run ends with the bytes of one that was never stopped, given the same machine and number of
    threads: batches are planned from the whole dataset, and one that is not wholly done is computed again.

    Args:
        model: a folder, a name on the hub, or a loaded Hugging Face causal LM (left exactly as found).
        dataset: what `read_samples` reads.
        out: the run directory.
        tokenizer: for text; None: the one beside the model, if `model` is a folder or a name.
        granularity, qkv: of the graph; see `Graph`.
        ablation: see `attribute`. ``"patching"`` needs a corrupt prompt in every sample; ``"mean"`` takes the
            means of the whole dataset in a first pass.
        loss: a loss of `attribute` on the given answers, or ``"self_nll"``: on the model's own greedy
            answers, fixed before scoring starts. A callable must be a function of a module: a resume knows it
            by its name and its bytecode, not by what it calls.
        given_answers: for ``"self_nll"``: the answers of the dataset are the model's own, given before; none
            is generated.
        cut: score at most this many tokens of each answer.
        max_new_tokens: of the model's own answers.
        tokens_per_batch: padding included; the dial between memory and speed. A resume must repeat it
            once a row is done; until then it may change, and answers that are there are kept.
        row_dtype: of scores.npy.
        metrics_only: keep no rows, only what `eaptk.measure` and `eaptk.compare` need of them
            (see `eaptk.statistics`): some hundred bytes a sample, whatever the number of edges.
        bins, upper: for `metrics_only`: equal bins of |W| on [0, upper], as nothing can be counted anew later.
            `bins` is 100 by default; `upper` must be given, the same for all runs that are to be compared. The
            histogram range that `eaptk metrics` shows for a few dozen samples scored with rows is a guide;
            what lies above is counted.
        limit: use only this many records of the dataset.
        dtype, device, attention: as for `load_model`, for a model that is loaded here.
        progress: show a bar on standard error, if that is a terminal.

    Returns:
        The complete run.

    Raises:
        EaptkError: anything the user can put right, before the first row where it can be known by then.
    """
    _check_options(ablation, loss, row_dtype, tokens_per_batch, max_new_tokens, cut)
    if given_answers and loss != "self_nll":
        raise EaptkError(
            f"given answers are the model's own with loss 'self_nll' only, not {_loss_name(loss)!r}"
        )
    histogram = _histogram(metrics_only, bins, upper, row_dtype)
    if isinstance(model, nn.Module) and (dtype or device or attention):
        raise EaptkError(
            "dtype, device and attention are for a model given by name; this one is loaded already"
        )
    config: Any = model.config if isinstance(model, nn.Module) else load_config(model)
    refuse_unsupported(config, "the model")
    graph = Graph.from_config(config, granularity, qkv)
    if not isinstance(model, nn.Module):
        tokenizer = tokenizer or load_tokenizer(model)
    n_new = None
    if loss == "self_nll" and not given_answers:
        n_new = max_new_tokens if cut is None else min(max_new_tokens, cut)
    samples = read_samples(
        dataset,
        tokenizer,
        context=getattr(config, "max_position_embeddings", None),
        vocabulary=config.vocab_size,
        cut=cut,
        own_answers=n_new,
        limit=limit,
    )
    _check_samples(samples, ablation, loss)
    # The weights come last: they take the longest, and by now the rest is known to be right.
    loaded = model if isinstance(model, nn.Module) else load_model(model, dtype, device, attention)
    manifest = {
        "model": model_facts(loaded),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dataset": {"fingerprint": _fingerprint(samples), "samples": len(samples)},
        "graph": graph.to_dict(),
        "ablation": ablation,
        "loss": _loss_name(loss),
        "cut": cut,
        "max_new_tokens": n_new,
        "tokens_per_batch": tokens_per_batch,
        "row_dtype": row_dtype,
        "metrics_only": None if histogram is None else asdict(histogram),
        "versions": {"eaptk": eaptk.__version__, "torch": torch.__version__, "transformers": _transformers()},
        "provenance": provenance(dataset),
    }
    with RunWriter(out, manifest) as writer:
        if n_new is not None:
            samples = _answered(loaded, samples, writer, n_new, tokens_per_batch, progress)
        elif not writer.begun:
            writer.begin(samples_table(samples))
        _score_rows(loaded, samples, graph, writer, ablation, loss, tokens_per_batch, histogram, progress)
        writer.finish()
    return Run.open(out)


def _score_rows(
    model: Any,
    samples: Sequence[Sample],
    graph: Graph,
    writer: RunWriter,
    ablation: Ablation,
    loss: RunLoss,
    tokens_per_batch: int,
    histogram: Histogram | None,
    progress: bool,
) -> None:
    lengths = [sample.n_tokens for sample in samples]
    plan = plan_batches(lengths, tokens_per_batch)
    done = writer.done
    left = [batch for batch in plan if not done[batch].all()]
    if not left:
        return
    means = _means(model, samples, plan, graph, writer.path, progress) if ablation == "mean" else None
    row_dtype = getattr(torch, writer.manifest["row_dtype"])
    started = sum(lengths) - sum(lengths[row] for batch in left for row in batch)
    with progress_bar("scoring", sum(lengths), started, progress) as advance:
        for number, rows in enumerate(plan):
            if done[rows].all():
                continue
            batch = collate([samples[row] for row in rows])
            try:
                found = attribute(
                    model,
                    batch,
                    graph,
                    ablation=ablation,
                    loss="nll" if loss == "self_nll" else loss,
                    means=means,
                    on_device=histogram is not None,
                )
                scores = found.rows.to(row_dtype)
                _check_range(scores, batch.names, graph)
                kept = scores.numpy() if histogram is None else summarise(scores, graph, histogram)
            except torch.OutOfMemoryError as error:
                raise EaptkError(
                    f"out of memory in a batch of {len(rows)} samples × {batch.ids.shape[1]} tokens; "
                    f"lower tokens_per_batch (now {tokens_per_batch})"
                ) from error
            writer.write(rows, kept, found.loss.double().numpy())
            writer.close_stretch(number)
            advance(sum(lengths[row] for row in rows))


def _answered(
    model: Any,
    samples: Sequence[Sample],
    writer: RunWriter,
    n_new: int,
    tokens_per_batch: int,
    progress: bool,
) -> list[Sample]:
    """Samples with the model's own answers; the run has begun when they are all there."""
    if writer.begun:
        stored = read_table(writer.path / "samples.parquet")["answer_ids"].to_pylist()
        answers = dict(enumerate(stored))
    else:
        answers = answer_rest(
            model, samples, writer.answers(), writer.keep_answers, n_new, tokens_per_batch, progress=progress
        )
    answered = [replace(sample, answer_ids=tuple(answers[row])) for row, sample in enumerate(samples)]
    if not writer.begun:
        writer.begin(samples_table(answered))
    return answered


def answer_rest(
    model: Any,
    samples: Sequence[Sample],
    answers: dict[int, list[int]],
    keep: Callable[[dict[int, list[int]]], None],
    n_new: int,
    tokens_per_batch: int,
    stop: Sequence[int] = (),
    unit: str = "prompts",
    progress: bool = True,
) -> dict[int, list[int]]:
    """The model's own answers to all prompts, row to token ids.

    Batches are planned from all prompts, and one that is not wholly answered is answered again.

    Args:
        answers: those there are.
        keep: told the answers of each batch.
        n_new: tokens of the longest.
        stop: see `greedy_answers`.
        unit: what the bar counts.
    """
    plan = plan_batches([len(sample.prompt_ids) + n_new for sample in samples], tokens_per_batch)
    left = [batch for batch in plan if not all(row in answers for row in batch)]
    n_kept = len(samples) - sum(map(len, left))
    with progress_bar("answering", len(samples), n_kept, progress, unit=unit) as advance:
        for found in greedy_answers(model, samples, left, n_new, stop):
            keep(found)
            answers = answers | found
            advance(len(found))
    return answers


def _means(
    model: Any,
    samples: Sequence[Sample],
    plan: Sequence[Sequence[int]],
    graph: Graph,
    path: Path,
    progress: bool,
) -> dict[str, Tensor]:
    """Means over the whole dataset, taken once a run."""
    from safetensors.torch import load_file, save_file

    file = path / "means.safetensors"
    if not file.exists():
        lengths = [sample.n_tokens for sample in samples]
        with progress_bar("taking means", sum(lengths), 0, progress) as advance:

            def batches() -> Iterator[Any]:
                for rows in plan:
                    yield collate([samples[row] for row in rows])
                    advance(sum(lengths[row] for row in rows))

            means = source_means(model, batches(), graph)
        with explained(path), whole_file(file) as temporary:
            save_file({name: mean.cpu().contiguous() for name, mean in means.items()}, temporary)
    return {name: mean.to(model.device) for name, mean in load_file(file).items()}


def _check_options(
    ablation: str, loss: Any, row_dtype: str, tokens_per_batch: int, max_new_tokens: int, cut: int | None
) -> None:
    for name, value, allowed in (
        ("ablation", ablation, ABLATIONS),
        ("row_dtype", row_dtype, ("float32", "float16")),
        ("loss", None if callable(loss) else loss, (*RUN_LOSSES, None)),
    ):
        if value not in allowed:
            raise EaptkError(f"{name} is {value!r}; it must be one of {', '.join(filter(None, allowed))}")
    for name, number in (
        ("tokens_per_batch", tokens_per_batch),
        ("max_new_tokens", max_new_tokens),
        ("cut", cut),
    ):
        if number is not None and number < 1:
            raise EaptkError(f"{name} is {number}; it must be at least 1")
    _loss_name(loss)
    if loss == "kl" and ablation != "patching":
        raise EaptkError(
            f"loss 'kl' compares with a corrupted run; use it with ablation 'patching', not {ablation!r}"
        )


def _histogram(
    metrics_only: bool, bins: int | None, upper: float | None, row_dtype: RowDtype
) -> Histogram | None:
    if not metrics_only:
        if bins is not None or upper is not None:
            raise EaptkError(
                "bins and range are for a run of metrics only; one with rows is counted when it is measured"
            )
        return None
    if row_dtype != "float32":
        raise EaptkError(f"row_dtype {row_dtype!r} is for rows, and a run of metrics only stores none")
    if upper is None:
        raise EaptkError(
            "metrics only needs a range, as rows that are not kept cannot be counted anew: score some samples "
            "with rows (limit 64), see the histogram range that `eaptk metrics` finds, and give one with room "
            "to spare, the same for all runs to be compared"
        )
    return Histogram(DEFAULT_BINS if bins is None else int(bins), float(upper))


def _check_samples(samples: Sequence[Sample], ablation: str, loss: Any) -> None:
    for option, field, needed in (
        ("ablation 'patching'", "corrupt", ablation == "patching"),
        ("loss 'logit_diff'", "foil", loss == "logit_diff"),
    ):
        without = [sample.id for sample in samples if getattr(sample, f"{field}_ids") is None]
        if needed and without:
            raise EaptkError(
                f"{option} needs '{field}' or '{field}_ids' in every sample; {without[0]!r} has none"
            )


def _check_range(scores: Tensor, names: Sequence[str], graph: Graph) -> None:
    """Attribution has refused what is not finite; what the row dtype cannot hold is left."""
    if not scores.isfinite().all():
        row, column = (~scores.isfinite()).nonzero()[0].tolist()
        raise EaptkError(
            f"sample {names[row]!r}: the score of edge {graph.edge_name(column)} is beyond the range of "
            f"{str(scores.dtype).removeprefix('torch.')}; use row dtype float32"
        )


def model_facts(model: Any) -> dict[str, Any]:
    return {
        "id": str(getattr(model, "name_or_path", "") or type(model).__name__),
        "type": model.config.model_type,
        "weights": weights_fingerprint(model),
        "config": config_fingerprint(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "device": model.device.type,
    }


def _fingerprint(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for s in samples:
        fields = [s.id, s.group, s.prompt_ids, s.answer_ids, s.corrupt_ids, s.foil_ids, dict(s.extra)]
        digest.update(json.dumps(fields, default=str).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def _loss_name(loss: RunLoss) -> str:
    """The loss as the manifest records it: a function of one's own with a fingerprint of its code."""
    if not callable(loss):
        return loss
    # A lambda shares its name with others; a closure, a method or an object hides values its code does not show.
    if not isinstance(loss, FunctionType) or "<" in loss.__qualname__ or loss.__closure__:
        raise EaptkError(
            f"the loss {getattr(loss, '__qualname__', type(loss).__qualname__)} has no name and code of its own "
            f"that a resume could know it by; give a named function of a module"
        )
    code = _code_facts((loss.__code__, loss.__defaults__, tuple((loss.__kwdefaults__ or {}).items())))
    return f"{loss.__module__}.{loss.__qualname__} sha256:{hashlib.sha256(code.encode()).hexdigest()}"


def _code_facts(value: Any) -> str:
    """What a function computes, as text that is the same in every process."""
    if isinstance(value, CodeType):
        return _code_facts((value.co_code, value.co_names, value.co_consts))
    if isinstance(value, tuple):
        return f"({', '.join(map(_code_facts, value))})"
    if isinstance(value, frozenset):  # ordered by hashes, which vary
        return f"{{{', '.join(sorted(map(_code_facts, value)))}}}"
    plain = value is None or isinstance(value, (bool, int, float, complex, str, bytes, type(...)))
    return repr(value) if plain else type(value).__qualname__  # others show their address


def _transformers() -> str:
    import transformers

    return str(transformers.__version__)


def provenance(dataset: Any) -> dict[str, str]:
    """Who, when and where: recorded, but no matter to a resume."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "data": str(dataset) if isinstance(dataset, (str, Path)) else type(dataset).__name__,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
