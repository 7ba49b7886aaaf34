"""The loop of a run: batches that are left, through the model, onto the disk; by one process or by several.

Batches are planned from the whole dataset. Some that follow each other form a *stretch*: what a process claims at a
time, and what sums over samples are taken over. Plan and stretches follow from the samples alone, so what a run
holds at the end depends neither on how many processes made it nor on when they were killed.

While the model has a batch, one thread collates the next ones, and another writes what is kept of those before.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eaptk.attribution import Ablation, EdgeScores, attribute, attribute_cuts, means_of, source_sums
from eaptk.batch import Batch, Sample, collate
from eaptk.errors import EaptkError
from eaptk.files import explained, see_afresh, whole_file
from eaptk.graph import Graph
from eaptk.halving import in_halves
from eaptk.keep import Entries, Keep
from eaptk.pipeline import Behind, ahead
from eaptk.progress import progress_bar
from eaptk.store import RunWriter
from eaptk.sweep import Doubles
from eaptk.team import Team
from eaptk.weights import device_of

#: Batches of a stretch, and stretches a plan should have at the least, so that processes end at about one time.
_BATCHES, _STRETCHES = 8, 64
#: Parts of a plan that means are taken over: each has a file with what all sources wrote until the last is there.
_PARTS = 64

Plan = Sequence[Sequence[int]]


class Unfit(NamedTuple):
    """A sample that memory does not suffice for, even alone."""

    id: str
    n_tokens: int


class _Work(NamedTuple):
    """A batch that is left: its stretch, the runs that lack it, and whether it is the first or last left of that."""

    stretch: int
    batch: int
    runs: list[int]
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Scoring:
    """How each batch is attributed, and what is kept of it.

    Args:
        model, graph, ablation, loss: as for `attribute`; loss may be ``"self_nll"``.
        cuts: of the answers, one a run: all are scored in one forward pass. None: the answers are as they are.
        segment: as for `attribute`; with one cut alone.
        keep: see `eaptk.keep`.
    """

    model: Any
    graph: Graph
    ablation: Ablation
    loss: Any
    cuts: tuple[int | None, ...]
    segment: int | None
    keep: Keep

    def scores(self, batch: Batch, means: Mapping[str, Tensor] | None) -> list[EdgeScores]:
        """Scores at each cut, on the model's device."""
        loss = "nll" if self.loss == "self_nll" else self.loss
        options: dict[str, Any] = {"ablation": self.ablation, "loss": loss, "means": means, "on_device": True}
        if len(self.cuts) == 1:
            return [attribute(self.model, batch, self.graph, segment=self.segment, **options)]
        cuts = [cut for cut in self.cuts if cut is not None]
        return attribute_cuts(self.model, batch, self.graph, cuts, **options)


def stretches(plan: Plan, batches: int = _BATCHES, at_least: int = _STRETCHES) -> list[range]:
    """The stretches of a plan, as ranges of its batches: `batches` each, or fewer where it has few."""
    size = min(batches, max(1, len(plan) // at_least))
    return [range(first, min(first + size, len(plan))) for first in range(0, len(plan), size)]


def score_rows(
    team: Team,
    scoring: Scoring,
    samples: Sequence[Sample],
    plan: Plan,
    writers: Sequence[RunWriter],
    path: Path,
    progress: bool,
) -> list[Unfit]:
    """Score what is left of a plan, into one run a cut.

    Args:
        samples: with answers of the longest cut.
        writers: of the runs, in the order of cuts; none in a process that is as one with others and does not lead.
        path: of the run that keeps the means, for ablation ``"mean"``.

    Returns:
        Samples that do not fit, of all processes; their rows are not done.
    """
    left = [[_Work(*work) for work in each] for each in team.share("left", lambda: _left(plan, writers))]
    lengths = [sample.n_tokens for sample in samples]
    waiting = sum(lengths[row] for stretch in left for work in stretch for row in plan[work.batch])
    means = None
    if left and scoring.ablation == "mean":
        means = take_means(team, scoring, samples, plan, path, progress)
    unfit: list[Unfit] = []
    with (
        progress_bar("scoring", sum(lengths), sum(lengths) - waiting, progress and team.leads) as advance,
        Behind() as behind,
        contextlib.closing(ahead(_collated(team, left, plan, samples))) as batches,
    ):
        n_tokens = n_unfit = 0
        for work, batch in batches:
            if work.is_first:
                n_unfit = len(unfit)
            rows = plan[work.batch]
            for part, found in in_halves(
                rows, partial(_scores, scoring, samples, means, rows, batch), not team.as_one
            ):
                if found is None:
                    unfit += [Unfit(samples[row].id, lengths[row]) for row in part]
                    continue
                for run in work.runs if writers else ():
                    kept = _leaving(scoring.keep, found[run], [samples[row].id for row in part])
                    behind.do(_write, writers[run], part, kept)
                before, n_tokens = n_tokens, team.add("scored", sum(lengths[row] for row in part))
                advance(n_tokens - before)
                del found
            for run in work.runs if writers and work.is_last else ():
                if len(unfit) == n_unfit:
                    behind.do(writers[run].close_stretch, work.stretch)
                else:
                    behind.do(writers[run].drop_stretch)
    for writer in writers:
        writer.commit()
    return [Unfit(*each) for found in team.gather("unfit", unfit) for each in found]


def _left(plan: Plan, writers: Sequence[RunWriter]) -> list[list[_Work]]:
    """What runs lack, by stretch. A batch not wholly done is done again whole: a smaller one could round otherwise."""
    done = [writer.done for writer in writers]
    lacking = [[run for run, rows in enumerate(done) if not rows[list(batch)].all()] for batch in plan]
    found = []
    for number, stretch in enumerate(stretches(plan)):
        if left := [batch for batch in stretch if lacking[batch]]:
            found.append(
                [_Work(number, batch, lacking[batch], batch == left[0], batch == left[-1]) for batch in left]
            )
    return found


def _collated(
    team: Team, left: Sequence[Sequence[_Work]], plan: Plan, samples: Sequence[Sample]
) -> Iterator[tuple[_Work, Batch]]:
    """The batches of stretches that this process claims."""
    for stretch in team.claim("stretches", len(left)):
        for work in left[stretch]:
            yield work, collate([samples[row] for row in plan[work.batch]])


def _scores(
    scoring: Scoring,
    samples: Sequence[Sample],
    means: Mapping[str, Tensor] | None,
    rows: Sequence[int],
    batch: Batch,
    part: Sequence[int],
) -> list[EdgeScores]:
    """Scores of a part of the rows, of which `batch` is the whole."""
    return scoring.scores(batch if part is rows else collate([samples[row] for row in part]), means)


def _leaving(keep: Keep, found: EdgeScores, names: Sequence[str]) -> Callable[[], tuple[Entries, Doubles]]:
    """Have what is kept of some rows copied to the host; the call that is returned waits until it is there.

    The model's device goes on with the next batch meanwhile, and the copies are into pinned memory, where it can
    write by itself.
    """
    loss = found.loss.double().numpy()
    rows = found.rows
    if not rows.is_cuda:
        return lambda: (keep.of(rows, names), loss)
    if keep.histogram is not None:
        ready = torch.cuda.current_stream(rows.device).record_event()

        def summarised() -> tuple[Entries, Doubles]:
            stream = torch.cuda.Stream(rows.device)
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                return keep.of(rows, names), loss

        return summarised
    parts = {
        name: torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
        for name, part in keep.reduce(rows).items()
    }
    copied = torch.cuda.current_stream(rows.device).record_event()

    def landed() -> tuple[Entries, Doubles]:
        copied.synchronize()
        return keep.entries(parts, names), loss

    return landed


def _write(writer: RunWriter, rows: Sequence[int], kept: Callable[[], tuple[Entries, Doubles]]) -> None:
    writer.write(list(rows), *kept())


def take_means(
    team: Team, scoring: Scoring, samples: Sequence[Sample], plan: Plan, path: Path, progress: bool
) -> dict[str, Tensor]:
    """Each source's mean over the whole dataset, taken once a run and kept in it."""
    from safetensors.torch import load_file, save_file

    file, folder = path / "means.safetensors", path / ".means"
    parts = stretches(plan, len(plan), _PARTS)
    files = [folder / f"{number}.safetensors" for number in range(len(parts))]

    def missing() -> list[int]:
        with explained(path):
            folder.mkdir(exist_ok=True)
        return [] if file.exists() else [k for k, each in enumerate(files) if not each.exists()]

    left = team.share("means left", missing)
    lengths = [sample.n_tokens for sample in samples]
    tokens = [sum(lengths[row] for batch in part for row in plan[batch]) for part in parts]
    with progress_bar(
        "taking means", sum(tokens), sum(tokens) - sum(tokens[k] for k in left), progress and team.leads
    ) as advance:
        n_tokens = 0
        for k in team.claim("means", len(left)):
            sums = _sums(team, scoring, samples, [plan[batch] for batch in parts[left[k]]])
            if team.writes:
                with explained(path), whole_file(files[left[k]]) as temporary:
                    save_file(sums, temporary)
            before, n_tokens = n_tokens, team.add("tokens of means", tokens[left[k]])
            advance(n_tokens - before)
    team.gather("means", True)

    def fold() -> None:
        if not file.exists():
            with explained(path):
                see_afresh(folder)
            means = means_of(map(_read_sums, files), scoring.model)
            with explained(path), whole_file(file) as temporary:
                save_file({name: mean.contiguous() for name, mean in means.items()}, temporary)
        shutil.rmtree(folder, ignore_errors=True)

    team.share("means folded", fold)
    return {name: mean.to(device_of(scoring.model)) for name, mean in load_file(file).items()}


def _sums(
    team: Team, scoring: Scoring, samples: Sequence[Sample], batches: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """What `means_of` takes of some batches, and the number of ``tokens``, as one table of tensors."""

    def of(part: Sequence[int]) -> tuple[dict[str, Tensor], int]:
        return source_sums(scoring.model, collate([samples[row] for row in part]), scoring.graph)

    totals: dict[str, Tensor] = {}
    for rows in batches:
        for part, found in in_halves(rows, of, not team.as_one):
            if found is None:
                sample = samples[part[0]]
                raise EaptkError(
                    f"sample {sample.id!r}: its {sample.n_tokens} tokens do not fit into memory even alone, and "
                    f"ablation 'mean' needs the mean over all samples; leave it out, or cut the answer"
                )
            sums, n = found
            sums = {"tokens": torch.tensor(n), **{name: value.cpu() for name, value in sums.items()}}
            totals = {name: totals[name] + value for name, value in sums.items()} if totals else sums
    return totals


def _read_sums(file: Path) -> tuple[dict[str, Tensor], int]:
    from safetensors.torch import load_file

    sums = load_file(file)
    return sums, int(sums.pop("tokens"))
