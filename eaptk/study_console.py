"""What a study prints while it runs. Names are shown to the letter, whatever brackets or colons they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from eaptk.answers import Answers
from eaptk.experiment import Stage, StudyResults
from eaptk.metrics import METRICS
from eaptk.resampling import Difference


def funnel(title: str, stages: Sequence[Stage], notes: Sequence[str] = ()) -> Table:
    """How many questions each stage let through, and why the others left."""
    table = _table(title, notes)
    table.add_column("stage")
    for heading in ("in", "out"):
        table.add_column(heading, justify="right")
    table.add_column("why the others left")
    for stage in stages:
        table.add_row(Text(stage.name), f"{stage.n_in:,}", f"{stage.n_out:,}", Text(stage.why))
    return table


def answered(answers: Mapping[tuple[str, str], Answers]) -> Table:
    """How many answers of each model and data set, or of each file, are right, finished, and how long they are."""
    table = _table("answers", ())
    named = any(dataset for _, dataset in answers)
    for heading in ("model", "questions") if named else ("file",):
        table.add_column(heading)
    for heading in ("asked", "finished", "right", "mean tokens"):
        table.add_column(heading, justify="right")
    for (model, dataset), each in answers.items():
        right = each.right
        table.add_row(
            *map(Text, (model, dataset) if named else (model,)),
            f"{len(each):,}",
            f"{sum(each.table['finished'].to_pylist()):,}",
            f"{right.sum():,} ({right.mean():.0%})",
            f"{each.lengths.mean():.1f}",
        )
    return table


def verdicts(answers: Answers, n: int) -> Table:
    """The first `n` answers that are wrong, with the reason."""
    table = _table(f"wrong answers in {answers.path}", ())
    table.add_column("question")
    table.add_column("reason", overflow="fold")
    wrong = [row for row in answers.table.select(["id", "right", "reason"]).to_pylist() if not row["right"]]
    for row in wrong[:n]:
        table.add_row(Text(row["id"]), Text(row["reason"]))
    return table


def summary(results: StudyResults) -> Iterator[Table]:
    """For each family and data set, how every run differs from the baseline over real edges."""
    for (family, dataset), found in groupby(results.experiments, lambda e: (e.family, e.dataset)):
        experiments = list(found)
        first = experiments[0]
        which = "step" if first.steps is not None else "run" if len(first.names) > 2 else None
        table = _table(f"{family} on {dataset}, against {first.names[0]}", ())
        for heading in ("α", *([which] if which else []), "pairs", *METRICS, "loss"):
            table.add_column(heading, justify="left" if heading == "run" else "right")
        for experiment in experiments:
            for k, run in enumerate(experiment.names[1:], start=1):
                label = run if experiment.steps is None else f"{experiment.steps[k]:g}"
                differences = {d.metric: d for d in experiment.real.differences if d.run == run}
                table.add_row(
                    f"{experiment.alpha:g}",
                    *([Text(label)] if which else []),
                    f"{differences['loss'].n_pairs:,}",
                    *(_change(differences.get(metric)) for metric in (*METRICS, "loss")),
                )
        yield table


def _change(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    arrow = {"up": "↑", "down": "↓", "unresolved": "?"}[difference.direction]
    if difference.metric == "kurtosis" or difference.value_baseline <= 0:
        return f"{arrow} {difference.difference:+.3g}"
    return f"{arrow} {difference.difference / difference.value_baseline:+.0%}"


def _table(title: str, notes: Sequence[str]) -> Table:
    return Table(
        title=Text(title, "table.title"),
        title_justify="left",
        caption=Text("\n".join(f"note: {note}" for note in notes)) if notes else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
