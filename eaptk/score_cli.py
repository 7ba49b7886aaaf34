"""The command that scores. Loads as lightly as `eaptk.cli`, which adds it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def score(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or its name on the hub.")],
    data: Annotated[
        str, typer.Option(help="JSONL file, folder of a dataset, or its name on the hub (name:split).")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Run directory to write, or to resume; a folder of runs if there are several cuts."
        ),
    ],
    granularity: Annotated[
        Literal["block", "head"], typer.Option(help="A node per block, or per head.")
    ] = "block",
    qkv: Annotated[
        Literal["split", "merged"],
        typer.Option(help="Queries, keys and values as three destinations, or one."),
    ] = "split",
    ablation: Annotated[
        Literal["zero", "patching", "mean"],
        typer.Option(
            help="What takes the place of a source: nothing, a corrupt prompt's, or the dataset's mean."
        ),
    ] = "zero",
    loss: Annotated[
        Literal["nll", "self-nll", "logit-diff", "kl"],
        typer.Option(
            help="On the given answers, the model's own greedy ones, answer against foil, or KL to clean."
        ),
    ] = "nll",
    given_answers: Annotated[
        bool,
        typer.Option("--given-answers", help="With self-nll: the data has the model's own answers already."),
    ] = False,
    cut: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Score at most this many tokens of an answer; again for more cuts, each a run OUT/cut-N.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer of the model's own (self-nll).")
    ] = 256,
    tokens_per_batch: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a batch, padding included; default: what fits.")
    ] = None,
    segment: Annotated[
        int | None,
        typer.Option(min=1, help="Of longer samples take so many tokens at a time: slower, for less memory."),
    ] = None,
    row_dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="How scores are stored; float16 has few digits below 6e-5, and 0 below 3e-8."),
    ] = "float32",
    metrics_only: Annotated[
        bool,
        typer.Option("--metrics-only", help="Keep what metrics and compare need of each row, not the row."),
    ] = False,
    bins: Annotated[
        int | None, typer.Option(min=1, help="Bins of the histogram of |W| (metrics only); default: 100.")
    ] = None,
    upper: Annotated[
        float | None,
        typer.Option("--range", help="Where that histogram ends; what lies above is counted."),
    ] = None,
    edges: Annotated[
        str | None,
        typer.Option(
            help="Keep these alone: patterns a*.h3->m*, a file (.csv, .npy, .txt), or a RUN:n's strongest."
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Keep only so many of each sample, the strongest.")
    ] = None,
    layer_pairs: Annotated[
        bool, typer.Option("--layer-pairs", help="Keep sums over the edges between each two layers.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights; default: as saved."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda if there is one.")
    ] = None,
    attention: Annotated[
        Literal["sdpa", "eager"] | None, typer.Option(help="Attention implementation.")
    ] = None,
    device_map: Annotated[
        Literal["auto"] | None,
        typer.Option(help="Spread a model that is larger than a card over all cards, the CPU and the disk."),
    ] = None,
    offload_folder: Annotated[
        Path | None, typer.Option(help="Where weights wait that go to the disk and are no safetensors.")
    ] = None,
    tensor_parallel: Annotated[
        bool,
        typer.Option("--tensor-parallel", help="Share each layer out over all processes of torchrun."),
    ] = False,
) -> None:
    """Score every edge for every sample. The same command again resumes a run that was stopped.

    Records of the data have "prompt" and "answer" as text, or "prompt_ids"
    and "answer_ids" as tokens; optional "id", "group", "corrupt" (patching)
    and "foil" (logit-diff). Other fields are carried along.

    Several processes share the samples under torchrun; any number of them
    goes on with what others left.

    Examples:

      eaptk score --model Qwen/Qwen2.5-0.5B --data q.jsonl --out runs/base

      eaptk score --model ckpts/rl --data q.jsonl --out runs/rl --loss self-nll

      eaptk score --model gpt2 --data ioi.jsonl --out ioi --ablation patching

      eaptk score … --metrics-only --range 0.02

      torchrun --nproc-per-node 8 -m eaptk score …
    """
    started = time.monotonic()
    # That another process has gone is said in a line; torch's store would add its own stack.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with _stoppable(out):
        from eaptk.loading import quiet_transformers

        quiet_transformers()
        from eaptk.run import score as score_dataset
        from eaptk.run import score_cuts
        from eaptk.team import leads

        options: dict[str, Any] = {
            "granularity": granularity,
            "qkv": qkv,
            "ablation": ablation,
            "loss": loss.replace("-", "_"),
            "given_answers": given_answers,
            "max_new_tokens": max_new_tokens,
            "tokens_per_batch": tokens_per_batch,
            "segment": segment,
            "row_dtype": row_dtype,
            "metrics_only": metrics_only,
            "bins": bins,
            "upper": upper,
            "edges": edges,
            "top": top,
            "layer_pairs": layer_pairs,
            "limit": limit,
            "dtype": dtype,
            "device": device,
            "attention": attention,
            "device_map": device_map,
            "offload_folder": offload_folder,
            "tensor_parallel": tensor_parallel,
        }
        if cut is None or len(cut) == 1:
            runs = [score_dataset(model, data, out, cut=cut[0] if cut else None, **options)]
        else:
            outs = {each: out / f"cut-{each}" for each in cut}
            runs = list(score_cuts(model, data, outs, **options).values())
    for run in runs if leads() else []:
        print(
            f"{run.path}: {run.n_samples} samples × {run.keep.graph.n_edges} edges ({run.keep.description}), "
            f"mean loss {run.loss.mean():.4g}, {time.monotonic() - started:.1f} s"
        )
        if run.statistics is not None and (above := run.statistics.share_above) > 0.01:
            print(
                f"{run.path}: {above:.0%} of |W| lies above --range {run.statistics.histogram.upper:g}, so complexity "
                f"lacks it; a run with a larger range has it",
                file=sys.stderr,
            )


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM, by which launchers and schedulers end a process, let the block finish what it has computed.

    Either of them once more ends the process at once: nothing is left that would have to be finished.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(
            f"eaptk: stopped; finished rows are kept in {out}, the same command goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
