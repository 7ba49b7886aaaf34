"""The model's own answers to samples that have none yet, by one process or by several."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from eaptk.batch import Sample
from eaptk.dataset import plan_batches, samples_table
from eaptk.errors import EaptkError
from eaptk.files import read_table
from eaptk.generate import greedy_answers
from eaptk.halving import in_halves
from eaptk.progress import progress_bar
from eaptk.store import RunWriter
from eaptk.team import Team


def begin_runs(
    team: Team,
    model: Any,
    samples: Sequence[Sample],
    writers: Mapping[int | None, RunWriter],
    path: Path,
    n_new: int | None,
    tokens_per_batch: int,
    progress: bool,
) -> list[Sample]:
    """Fix the samples of runs that have not begun; where the model has to answer, it does so first.

    Args:
        writers: by cut of the answers, the longest last.
        path: of the last run, which also keeps the answers until they are all there.
        n_new: tokens of the longest answer of the model's own; None: the samples have theirs.

    Returns:
        The samples with their answers, of the longest cut.
    """
    begun = team.share("begun", lambda: [writer.begun for writer in writers.values()])
    keeper = list(writers.values())[-1] if writers else None
    if n_new is not None and not begun[-1]:
        known = {} if keeper is None else keeper.answers()
        keep = _nothing if keeper is None else keeper.keep_answers
        answer_rest(model, samples, known, keep, n_new, tokens_per_batch, progress=progress, team=team)
        team.gather("answered", True)

    def fix() -> None:
        assert keeper is not None
        answered = list(samples)
        if n_new is not None:
            answers = _stored(path) if begun[-1] else keeper.answers()
            answered = [replace(sample, answer_ids=tuple(answers[row])) for row, sample in enumerate(samples)]
        # The longest first: with it the answers are there for the others, whenever this is killed.
        for (cut, writer), has_begun in reversed(list(zip(writers.items(), begun, strict=True))):
            if not has_begun:
                shutil.rmtree(writer.path / ".means", ignore_errors=True)  # of another run, or other answers
                writer.begin(samples_table([shortened(sample, cut) for sample in answered]))

    team.share("began", fix)
    if n_new is None:
        return list(samples)
    answers = _stored(path)
    return [replace(sample, answer_ids=tuple(answers[row])) for row, sample in enumerate(samples)]


def shortened(sample: Sample, cut: int | None) -> Sample:
    """The sample with at most `cut` tokens of its answer, and of its foil."""
    foil = None if sample.foil_ids is None else sample.foil_ids[:cut]
    return replace(sample, answer_ids=sample.answer_ids[:cut], foil_ids=foil)


def answer_rest(
    model: Any,
    samples: Sequence[Sample],
    answers: Mapping[int, list[int]],
    keep: Callable[[dict[int, list[int]]], None],
    n_new: int,
    tokens_per_batch: int,
    stop: Sequence[int] = (),
    unit: str = "prompts",
    progress: bool = True,
    team: Team | None = None,
) -> dict[int, list[int]]:
    """The model's own answers to all prompts, row to token ids.

    Batches are planned from all prompts, and one that is not wholly answered is answered again.

    Args:
        answers: those there are; the lead's count.
        keep: told the answers of each batch.
        n_new: tokens of the longest.
        stop: see `greedy_answers`.
        unit: what the bar counts.
        team: the processes that share the batches; what others answer is only told to their own `keep`.

    Raises:
        EaptkError: a prompt does not fit into memory, even alone.
    """
    team = Team() if team is None else team
    plan = plan_batches([len(sample.prompt_ids) + n_new for sample in samples], tokens_per_batch)
    left = team.share(
        "left to answer",
        lambda: [k for k, batch in enumerate(plan) if not all(row in answers for row in batch)],
    )
    found = dict(answers)
    n_kept = len(samples) - sum(len(plan[k]) for k in left)
    with progress_bar("answering", len(samples), n_kept, progress and team.leads, unit=unit) as advance:
        n_all = 0
        for number in team.claim("answering", len(left)):
            for part, new in in_halves(
                plan[left[number]], partial(_answers, model, samples, n_new, stop), not team.as_one
            ):
                if new is None:
                    sample = samples[part[0]]
                    raise EaptkError(
                        f"out of memory while answering {sample.id!r} alone, {len(sample.prompt_ids)} tokens with "
                        f"up to {n_new} more; lower max_new_tokens, or leave it out"
                    )
                keep(new)
                found |= new
                before, n_all = n_all, team.add("answered so far", len(new))
                advance(n_all - before)
    return found


def _answers(
    model: Any, samples: Sequence[Sample], n_new: int, stop: Sequence[int], rows: Sequence[int]
) -> dict[int, list[int]]:
    (found,) = greedy_answers(model, samples, [rows], n_new, stop)
    return found


def _stored(run: Path) -> list[list[int]]:
    answers: list[list[int]] = read_table(run / "samples.parquet")["answer_ids"].to_pylist()
    return answers


def _nothing(answers: Mapping[int, Sequence[int]]) -> None:
    """What a process keeps whose answers the lead has too."""
