"""A whole dataset through `attribute` into a run directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from eaptk.answering import begin_runs, shortened
from eaptk.attribution import Ablation
from eaptk.batch import Sample
from eaptk.budget import tokens_that_fit
from eaptk.dataset import plan_batches, read_samples
from eaptk.errors import EaptkError
from eaptk.graph import Granularity, Graph, Qkv
from eaptk.keep import Keep, RowDtype
from eaptk.loading import load_config, load_model, load_tokenizer, refuse_unsupported, tokenizer_fingerprint
from eaptk.manifest import dataset_fingerprint, loss_name, model_facts, provenance, versions
from eaptk.options import Options, RunLoss
from eaptk.scoring import Scoring, score_rows
from eaptk.store import Run, RunWriter
from eaptk.team import Team, local_rank
from eaptk.weights import bare


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
    tokens_per_batch: int | None = None,
    segment: int | None = None,
    row_dtype: RowDtype = "float32",
    metrics_only: bool = False,
    bins: int | None = None,
    upper: float | None = None,
    edges: Any = None,
    top: int | None = None,
    layer_pairs: bool = False,
    limit: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    tensor_parallel: bool = False,
    progress: bool = True,
) -> Run:
    """Score every edge for every sample; the same call again resumes a run that was stopped.

    A resumed run ends with the bytes of one that was never stopped, given the same machine and number of
    threads: batches are planned from the whole dataset, and one that is not wholly done is computed again. So
    does a run that several processes score together (``torchrun … -m eaptk score``, or any program of your own
    that makes this call in each of them), however many and however often some are killed. Where memory does not
    suffice for a batch, it is done in halves, which may round otherwise.

    Args:
        model: a folder, a name on the hub, or a loaded Hugging Face causal LM (left exactly as found).
        dataset: what `read_samples` reads.
        out: the run directory; of all processes, if there are several.
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
        tokens_per_batch: padding included; the dial between memory and speed. None: what a run that is there was
            given, else what fits. A resume may change it until a row is done, and answers that are there are kept.
        segment: see `attribute`: for samples that fit no other way.
        row_dtype: of scores.npy.
        metrics_only: keep no rows, only what `eaptk.measure` and `eaptk.compare` need of them
            (see `eaptk.statistics`): some hundred bytes a sample, whatever the number of edges.
        bins, upper: for `metrics_only`: equal bins of |W| on [0, upper], as nothing can be counted anew later.
            `bins` is 100 by default; `upper` must be given, the same for all runs that are to be compared. The
            histogram range that `eaptk metrics` shows for a few dozen samples scored with rows is a guide;
            what lies above is counted.
        edges: keep these alone, as `eaptk.edges.choose_edges` takes them: patterns, columns, a file, a run's.
        top: keep of each sample only the so many strongest of them.
        layer_pairs: keep sums over the edges between each two layers. Of `metrics_only`, `top` and this give one.
        limit: use only this many records of the dataset.
        dtype, device, attention, device_map, offload_folder, tensor_parallel: as for `load_model`, for a model that
            is loaded here. Of several processes each takes a card of its own, unless these say otherwise; with
            `tensor_parallel` they have one model together, and score each batch together.
        progress: show a bar on standard error, if that is a terminal.

    Returns:
        The complete run.

    Raises:
        EaptkError: anything the user can put right, before the first row where it can be known by then; or samples
            for which memory does not suffice even one by one, once all others are done.
    """
    options = Options(
        granularity=granularity,
        qkv=qkv,
        ablation=ablation,
        loss=loss,
        given_answers=given_answers,
        max_new_tokens=max_new_tokens,
        tokens_per_batch=tokens_per_batch,
        segment=segment,
        row_dtype=row_dtype,
        metrics_only=metrics_only,
        bins=bins,
        upper=upper,
        edges=edges,
        top=top,
        layer_pairs=layer_pairs,
        limit=limit,
        dtype=dtype,
        device=device,
        attention=attention,
        device_map=device_map,
        offload_folder=offload_folder,
        tensor_parallel=tensor_parallel,
        progress=progress,
    )
    return _score(model, dataset, {cut: Path(out)}, tokenizer, options)[cut]


def score_cuts(
    model: str | os.PathLike[str] | nn.Module,
    dataset: Any,
    outs: Mapping[int, str | os.PathLike[str]],
    *,
    tokenizer: Any = None,
    **options: Any,
) -> dict[int, Run]:
    """Score the same answers cut to several lengths, one run each: `score` for each `cut`, but forward passes shared.

    Rows are those of `score`, to rounding: batches are planned for the longest cut. With ablation ``"mean"``, whose
    means differ by cut, with a loss of one's own and by segments nothing is shared. A resume must name the same cuts.

    Args:
        model, dataset, tokenizer: as for `score`.
        outs: run directories by tokens to keep of each answer.
        options: of `score`, but `cut`.

    Returns:
        The complete runs, by cut in ascending order.

    Raises:
        EaptkError: as `score`; no cuts, or two for one directory.
    """
    checked = Options(**options)
    paths = {cut: Path(outs[cut]) for cut in sorted(outs)}
    if not paths or len(set(paths.values())) < len(paths):
        raise EaptkError(
            f"{len(paths)} cuts go to {len(set(paths.values()))} directories; give each cut its own"
        )
    shared = checked.ablation != "mean" and not callable(checked.loss) and checked.segment is None
    groups = [list(paths)] if shared else [[cut] for cut in paths]
    found: dict[int, Run] = {}
    for cuts in groups:
        runs = _score(model, dataset, {cut: paths[cut] for cut in cuts}, tokenizer, checked)
        found |= {cut: runs[cut] for cut in cuts}
    return found


def _score(
    model: Any, dataset: Any, outs: Mapping[int | None, Path], tokenizer: Any, options: Options
) -> dict[int | None, Run]:
    """Score into one run a cut; the last cut is the longest."""
    is_loaded = isinstance(model, nn.Module)
    model = bare(model) if is_loaded else model
    if is_loaded and options.for_loading():
        raise EaptkError(
            f"{', '.join(options.for_loading())} is for a model given by name; this one is loaded already"
        )
    for cut in outs:
        if cut is not None and cut < 1:
            raise EaptkError(f"cut is {cut}; it must be at least 1")
    with ExitStack() as stack:
        team = stack.enter_context(Team.join(options.tensor_parallel))
        config: Any = model.config if is_loaded else load_config(model)
        refuse_unsupported(config, "the model")
        graph = Graph.from_config(config, options.granularity, options.qkv)
        keep = options.keep(graph)
        if not is_loaded:
            tokenizer = tokenizer or load_tokenizer(model)
        longest = list(outs)[-1]
        n_new = _at_most(options.max_new_tokens, longest) if options.answers_itself else None
        samples = read_samples(
            dataset,
            tokenizer,
            context=getattr(config, "max_position_embeddings", None),
            vocabulary=config.vocab_size,
            cut=longest,
            own_answers=n_new,
            limit=options.limit,
        )
        _check_samples(samples, options)
        # The weights come last: they take the longest, and by now the rest is known to be right.
        loaded = model if is_loaded else _load(model, options)
        scoring = Scoring(loaded, graph, options.ablation, options.loss, tuple(outs), options.segment, keep)

        def tokens_per_batch() -> int:
            if options.tokens_per_batch is not None:
                return options.tokens_per_batch
            lengths = [sample.n_tokens + (n_new or 0) for sample in samples]
            found = _recorded_tokens(outs[longest])
            return found or tokens_that_fit(loaded, graph, lengths, options.ablation == "patching")

        n_tokens = team.share("tokens_per_batch", tokens_per_batch)
        facts = {
            "model": model_facts(loaded),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "graph": graph.to_dict(),
            "ablation": options.ablation,
            "loss": loss_name(options.loss),
            "tokens_per_batch": n_tokens,
            "segment": options.segment,
            "versions": versions(),
            "provenance": provenance(dataset),
        }
        manifests = {
            cut: facts
            | {
                "dataset": {
                    "fingerprint": dataset_fingerprint([shortened(sample, cut) for sample in samples]),
                    "samples": len(samples),
                },
                "cut": cut,
                "max_new_tokens": None if n_new is None else _at_most(options.max_new_tokens, cut),
                # Batches are planned for the longest: with other cuts beside it, a row may round otherwise.
                **({"cuts": list(outs)} if len(outs) > 1 else {}),
            }
            for cut in outs
        }
        writers = _open(stack, team, outs, manifests, keep)
        samples = begin_runs(team, loaded, samples, writers, outs[longest], n_new, n_tokens, options.progress)
        plan = plan_batches([sample.n_tokens for sample in samples], n_tokens)
        unfit = score_rows(
            team, scoring, samples, plan, list(writers.values()), outs[longest], options.progress
        )
        if unfit:
            n_left = max((int((~writer.done).sum()) for writer in writers.values()), default=0)
            done = "the others are done"
            if n_left > len(unfit):  # sums over samples are taken a stretch at a time
                done += (
                    f", but for {n_left - len(unfit)} about as long in stretches with these (metrics only)"
                )
            raise EaptkError(
                f"{len(unfit)} of {len(samples)} samples do not fit into memory even one by one, {unfit[0].id!r} of "
                f"{unfit[0].n_tokens} tokens for one; {done}: cut or leave out these, or repeat the command where "
                f"there is more memory"
            )

        def finish() -> None:
            for writer in writers.values():
                writer.finish()

        team.share("finished", finish)
    return {cut: Run.open(path) for cut, path in outs.items()}


def _open(
    stack: ExitStack,
    team: Team,
    outs: Mapping[int | None, Path],
    manifests: Mapping[int | None, Mapping[str, Any]],
    keep: Keep,
) -> dict[int | None, RunWriter]:
    """Writers of all runs: the lead lays them out, then the others join; none for who writes nothing."""
    job = team.share("job", lambda: uuid4().hex if team.size > 1 else "")

    def opened() -> dict[int | None, RunWriter]:
        return {
            cut: stack.enter_context(
                RunWriter(path, manifests[cut], keep=keep, lead=team.leads, rank=team.rank, job=job)
            )
            for cut, path in outs.items()
        }

    writers = opened() if team.leads else {}
    team.share("laid out", lambda: True)
    return opened() if team.writes and not team.leads else writers


def _recorded_tokens(run: Path) -> int | None:
    """Tokens of a batch of the run that is there, if one is: what else it is, its writer looks at."""
    try:
        return int(json.loads((run / "manifest.json").read_bytes())["tokens_per_batch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load(model: Any, options: Options) -> Any:
    where = options.for_loading()
    rank = local_rank()
    if not where.keys() & {"device", "device_map", "tensor_parallel"} and rank is not None:
        where |= {"device": f"cuda:{rank}"} if torch.cuda.is_available() else {}
    return load_model(model, **where)


def _at_most(n: int, cut: int | None) -> int:
    return n if cut is None else min(n, cut)


def _check_samples(samples: Sequence[Sample], options: Options) -> None:
    for option, field, needed in (
        ("ablation 'patching'", "corrupt", options.ablation == "patching"),
        ("loss 'logit_diff'", "foil", options.loss == "logit_diff"),
    ):
        without = [sample.id for sample in samples if getattr(sample, f"{field}_ids") is None]
        if needed and without:
            raise EaptkError(
                f"{option} needs '{field}' or '{field}_ids' in every sample; {without[0]!r} has none"
            )
