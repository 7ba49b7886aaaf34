"""The command line. Only standard modules, typer and rich load with it: torch and transformers take seconds."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from eaptk.errors import EaptkError
from eaptk.runs_cli import runs
from eaptk.score_cli import score
from eaptk.study_cli import COMMANDS

if TYPE_CHECKING:
    from rich.table import Table

    from eaptk.metrics import Metrics

app = typer.Typer(
    name="eaptk",
    help="Edge Attribution Patching: every edge of every sample of a Hugging Face language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"eaptk {version('eaptk')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", help="Say the version.", callback=_say_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (or EAPTK_DEBUG=1).")
    ] = False,
) -> None:
    """Edge Attribution Patching: every edge of every sample of a Hugging Face language model."""


app.command()(score)


@app.command()
def inspect(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(help="A run directory, or a model's folder or name.", metavar="RUN|MODEL")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many of a run's strongest edges to show.")] = 10,
    plan: Annotated[
        bool, typer.Option("--plan", help="Predict memory, FLOPs and time of scoring one sample of a model.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Of that sample.")] = 512,
    loss_tokens: Annotated[
        int, typer.Option(min=1, help="Of them, how many carry loss: logits take memory there.")
    ] = 256,
    granularity: Annotated[
        Literal["block", "head"], typer.Option(help="A node per block, or per head.")
    ] = "block",
    card: Annotated[
        str, typer.Option(help="A100-80GB, H100, H200, B200, MI300X or cpu, by spec sheet.")
    ] = "H100",
    budget: Annotated[
        str | None, typer.Option(help="Memory, weights included: 80GB, 64GiB; default: the card's.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights; default: what the config says."),
    ] = None,
) -> None:
    """Show a run and its strongest edges, a model's graph, or with --plan what scoring it will take.

    Of a run that is going on, the rows done by now; of a model, no weights
    are read.

    Examples:

      eaptk inspect runs/rl --top 20

      eaptk inspect Qwen/Qwen2.5-0.5B

      eaptk inspect --plan Qwen/Qwen2.5-7B --tokens 32768 --granularity head
    """
    from rich.console import Console

    console = Console()
    if plan:
        from eaptk.loading import quiet_transformers

        quiet_transformers()
        from eaptk.cards import find_card
        from eaptk.loading import DTYPES, load_config
        from eaptk.plan import foresee, parse_bytes
        from eaptk.tables import plan_tables

        found = find_card(card)
        foreseen = foresee(
            load_config(target),
            granularity,
            tokens,
            card=found,
            budget=None if budget is None else parse_bytes(budget),
            n_loss=loss_tokens,
            dtype=None if dtype is None else DTYPES[dtype],
        )
        for table in plan_tables(target, foreseen, found):
            console.print(table)
        return
    for option in ("tokens", "loss_tokens", "granularity", "card", "budget", "dtype"):
        given = context.get_parameter_source(option)
        if given is not None and given.name == "COMMANDLINE":
            raise EaptkError(f"--{option.replace('_', '-')} is for --plan alone; add that, or leave it out")
    if (Path(target) / "manifest.json").exists():
        from eaptk.store import Run
        from eaptk.tables import run_facts, strongest_edges

        run = Run.open(target)
        console.print(run_facts(run))
        if run.done.any():
            console.print(strongest_edges(run, top))
    else:
        from eaptk.loading import quiet_transformers

        quiet_transformers()
        from eaptk.graph import Graph
        from eaptk.loading import load_config
        from eaptk.tables import graph_facts

        if any(Path(target).glob("*/manifest.json")):
            raise EaptkError(
                f"{target} is no run, but a folder of some; `eaptk runs list {target}` shows them"
            )
        config = load_config(target)
        graphs = [Graph.from_config(config, granularity) for granularity in ("block", "head")]  # type: ignore[arg-type]
        console.print(graph_facts(target, config, graphs))


@app.command()
def metrics(
    run: Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")],
    dense: Annotated[
        bool,
        typer.Option(
            "--dense", help="Also count the zeros of pairs that are no edge, as the paper's numbers do."
        ),
    ] = False,
    bins: Annotated[
        int | None, typer.Option(min=1, help="Bins of the histogram of |W|; default: 100.")
    ] = None,
    upper: Annotated[
        float | None, typer.Option("--range", help="Where the histogram ends; default: the largest |W|.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw mean |W| of every edge to PICTURE.png and PICTURE.svg.")
    ] = None,
) -> None:
    """Measure a run: activation intensity, information complexity, kurtosis, diversity, output entropy.

    Entropies depend on bins and range: give the same ones to runs you want to
    hold side by side, or better, use compare. A run of metrics only has its
    own. Rows that are not done yet are left out and counted.

    Examples:

      eaptk metrics runs/rl

      eaptk metrics runs/rl --dense --bins 50 --range 0.01 --json rl.json
    """
    from rich.console import Console

    from eaptk.metrics import measure
    from eaptk.store import Run

    opened = Run.open(run)
    found = [
        measure(opened, dense=convention, bins=bins, upper=upper) for convention in (False, True)[: 1 + dense]
    ]
    kept = "" if opened.keep.whole and opened.keep.top is None else f" ({opened.keep.description})"
    layers, top = opened.keep.layer_pairs, opened.keep.top
    of = (
        "sums over layer pairs" if layers else "real edges" if top is None else f"the {top:,} strongest edges"
    )
    Console().print(_metrics_table(f"{run}{kept}", found, of))
    if json_file is not None:
        _write_json(json_file, {("dense" if m.dense else "real"): m.to_dict() for m in found})
    if picture is not None:
        from eaptk.figures import run_figure, save_figure

        print("wrote", *save_figure(run_figure(opened, found[0]), picture))


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories; the first is the baseline.", metavar="RUN")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for comparison.csv, .json, .png, .svg and edges.parquet.")
    ] = None,
    dense: Annotated[
        bool,
        typer.Option("--dense", help="Count the zeros of pairs that are no edge, as the paper's numbers do."),
    ] = False,
    bins: Annotated[
        int | None, typer.Option(min=1, help="Bins of the histogram of |W|; default: 100.")
    ] = None,
    upper: Annotated[
        float | None,
        typer.Option("--range", help="Where the histogram ends; default: the largest |W| of all runs."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    resamples: Annotated[int, typer.Option(help="Bootstrap draws, and permutations.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of both.")] = 0,
    control_loss: Annotated[
        bool,
        typer.Option(
            "--control-loss", help="Also how intensity and kurtosis differ between answers of equal loss."
        ),
    ] = False,
) -> None:
    """Compare runs on the samples they share, paired by id: values, differences, intervals, tests, effect sizes.

    Samples of one group are resampled together. p-values are corrected for the
    number of metrics and runs.

    Examples:

      eaptk compare runs/sft runs/rl

      eaptk compare runs/sft runs/rl runs/dpo --out comparison --dense
    """
    from rich.console import Console

    from eaptk.comparison import compare as compare_runs
    from eaptk.resampling import Resampling
    from eaptk.store import Run

    comparison = compare_runs(
        [Run.open(run) for run in runs],
        dense=dense,
        bins=bins,
        upper=upper,
        resampling=Resampling(confidence, resamples, seed),
        control_loss=control_loss,
    )
    Console().print(comparison.to_table())
    if out is not None:
        from eaptk.figures import comparison_figure, save_figure

        written = comparison.write(out) + save_figure(comparison_figure(comparison), out / "comparison")
        print("wrote", *written)


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="Folder of a checkpoint, or its name on the hub.", metavar="MODEL")
    ],
    edges: Annotated[
        int, typer.Option(min=1, help="Edges a granularity to perturb directly: a pass over the model each.")
    ] = 12,
    seed: Annotated[int, typer.Option(help="Of the random tokens and edges.")] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights; default: as saved."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda if there is one.")
    ] = None,
) -> None:
    """Check on a model of your own the identities that hold if its edges are attributed right.

    Sources must rebuild the residual stream, heads add up to their blocks,
    and a score equal the change of the loss when one source is scaled down
    where one destination reads it. Ends with exit code 1 if any fails.

    Examples:

      eaptk check Qwen/Qwen2.5-0.5B

      eaptk check checkpoints/rl --edges 50 --dtype float32
    """
    from eaptk.loading import quiet_transformers

    quiet_transformers()
    from rich.console import Console

    from eaptk.identities import check as check_identities
    from eaptk.loading import load_model
    from eaptk.tables import identities

    checks = check_identities(load_model(model, dtype=dtype, device=device), n_edges=edges, seed=seed)
    Console().print(identities(model, checks))
    failed = [found.name for found in checks if not found.passed]
    if failed:
        raise EaptkError(
            f"{model}: {', '.join(failed)} does not hold: its scores would be wrong; if you registered the "
            f"architecture, compare the entry with the model's code"
        )


def _metrics_table(name: str, found: list[Metrics], of: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    first = found[0]
    unfinished = f" ({first.n_unfinished:,} not done)" if first.n_unfinished else ""
    title = f"{escape(name)}: {first.n_samples:,} samples{unfinished}"
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for each in found:
        table.add_column("dense, zeros counted" if each.dense else of, justify="right")
    for metric in ("intensity", "complexity", "kurtosis", "diversity", "output_entropy"):
        values = [getattr(each, metric) for each in found]
        shown = ["undefined" if value is None else f"{value:.6g}" for value in values]
        table.add_row(metric.replace("_", " "), *shown)
    for label, fact in (
        ("entries a sample", "n_entries"),
        ("histogram bins", "bins"),
        ("histogram range", "upper"),
        ("entries above it", "n_above"),
        ("constant samples", "n_constant"),
    ):
        values = [getattr(each, fact) for each in found]
        table.add_row(label, *(f"{v:,}" if isinstance(v, int) else f"{v:.6g}" for v in values), style="dim")
    return table


def _write_json(path: Path, content: dict[str, Any]) -> None:
    import json

    try:
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise EaptkError(f"cannot write {path}: {error.strerror}") from error


for _command in COMMANDS:
    app.command()(_command)
app.add_typer(runs)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every error ends as one line and an exit code: 1, or 2 for wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments or os.environ.get("EAPTK_DEBUG", "0") not in ("", "0")
    try:
        app([argument for argument in arguments if argument != "--debug"], prog_name="eaptk")
    except EaptkError as error:
        _fail(str(error), debug)
    except Exception as error:
        _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", debug)


def _fail(message: str, debug: bool) -> None:
    if debug:
        raise
    print(f"eaptk: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
