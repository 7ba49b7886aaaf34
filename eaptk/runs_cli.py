"""The commands on run directories: runs list, verify and merge. Loads as lightly as `eaptk.cli`, which adds them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from eaptk.runs import Found

runs = typer.Typer(
    name="runs",
    help="List runs, verify them, make one of several.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

#: Damaged samples that are named.
_NAMED = 20


@runs.command("list")
def list_runs(
    folders: Annotated[list[Path], typer.Argument(help="Where to look, at any depth.", metavar="FOLDER")],
) -> None:
    """List the runs in folders: what was scored, what is kept, and how far they are.

    Examples:

      eaptk runs list runs

      eaptk runs list /scratch/me studies/arithmetic
    """
    from rich.console import Console

    from eaptk.runs import find

    found = find(folders)
    if not found:
        print(f"no runs in {', '.join(map(str, folders))}")
        return
    Console().print(_table(found))


@runs.command()
def verify(
    run: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN")],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Mark damaged rows not done: the score command computes them again."),
    ] = False,
) -> None:
    """Hold every row that is done against its checksum. Ends with exit code 1 if any is damaged, repaired or not.

    Sums over samples (--metrics-only) are held against theirs; they cannot be
    repaired in part.

    Examples:

      eaptk runs verify runs/sft runs/rl

      eaptk runs verify runs/rl --repair
    """
    from eaptk.runs import verify as verify_run

    intact = True
    for path in run:
        found = verify_run(path, repair=repair)
        intact &= found.intact
        rate = found.n_bytes / 1e6 / max(found.seconds, 1e-9)
        size = f"{found.n_checked:,} rows, {found.n_bytes / 1e6:,.1f} MB at {rate:,.1f} MB/s"
        if found.intact:
            print(f"{path}: intact ({size})")
            continue
        if found.ids:
            more = f" and {len(found.ids) - _NAMED:,} more" if len(found.ids) > _NAMED else ""
            print(f"{path}: {len(found.ids):,} damaged ({size}): {', '.join(found.ids[:_NAMED])}{more}")
        if found.sums:
            print(f"{path}: {found.sums.partition(';')[0]}")
        print(f"{path}: {found.remedy}")
    if not intact:
        raise typer.Exit(1)


@runs.command()
def merge(
    run: Annotated[list[Path], typer.Argument(help="Complete runs, in the order of rows.", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="Run directory to make.")],
) -> None:
    """Make one run of several: the same model, graph, method and way of keeping, of different samples.

    Every row is held against its checksum on the way.

    Examples:

      eaptk runs merge runs/part-0 runs/part-1 --out runs/all
    """
    from eaptk.runs import merge as merge_runs

    merged = merge_runs(run, out)
    print(f"{out}: {merged.n_samples:,} samples of {len(run)} runs")


def _table(found: list[Found]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # Narrow enough for a terminal of 80 columns: what must break are paths and names.
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("run", "model", "graph", "method", "kept"):
        table.add_column(heading, overflow="fold")
    for heading in ("done", "MB", "started"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in found:
        size = f"{each.n_bytes / 1e6:,.1f}"
        if each.manifest is None:
            cells = [str(each.path), each.problem, "", "", "", "", size, ""]
        else:
            facts, provenance = each.manifest, each.manifest.get("provenance", {})
            # A loss of one's own has its fingerprint behind its name.
            method = f"{facts.get('ablation')}, {str(facts.get('loss')).partition(' ')[0]}"
            method += f", cut {facts['cut']}" if facts.get("cut") else ""
            done = f"{each.n_done:,}/{each.n_samples:,}"
            cells = [
                str(each.path),
                Path(str(facts["model"]["id"])).name,
                str(facts["graph"].get("granularity", "block")),
                method,
                each.kept,
                done,
                size,
                str(provenance.get("started", "")).partition("T")[0],
            ]
        table.add_row(*map(Text, cells))
    return table
