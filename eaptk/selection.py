"""Which questions models are compared on, by how they answered them: filters that compose, and the paper's.

    answered = Answered.from_answers([sft, rl])
    kept, funnel = apply(answered, [all_right(), equal_prompts(), balanced(0.5), sample(100, seed=42)])

A filter says of every question whether it stays. Filters look at token counts and verdicts alone, of any number k
of models; for two they are those of arXiv 2509.21044. `select` is its whole protocol.

T_1 … T_k are the tokens of the models' answers to one question, T̄ their mean, ref the reference length.

    paper-code    ref = the smallest of the models' mean lengths;  ⌊0.5·ref⌋ ≤ T̄ ≤ ⌊1.5·ref⌋;
                  (max T − min T) / T̄ ≤ 0.5
    paper-text    ref = the mean of the models' mean lengths;  0.5·ref < T_i < 1.5·ref for every i;
                  (max T − min T) / T̄ < 0.5
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eaptk.answers import Answers
from eaptk.errors import EaptkError
from eaptk.experiment import Stage
from eaptk.pairing import PairedRun

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Answered:
    """k models' answers to the same n questions.

    Args:
        names: [k] of the models.
        ids: [n] of the questions.
        prompts: [k, n] tokens of the prompts.
        lengths: [k, n] tokens of the answers.
        right: [k, n] whether they are right.
    """

    names: tuple[str, ...]
    ids: tuple[str, ...]
    prompts: Integers = field(repr=False)
    lengths: Integers = field(repr=False)
    right: Mask = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def keep(self, mask: Mask) -> Answered:
        """Only the questions where `mask` [n] is true."""
        ids = tuple(name for name, kept in zip(self.ids, mask, strict=True) if kept)
        return Answered(self.names, ids, self.prompts[:, mask], self.lengths[:, mask], self.right[:, mask])

    @classmethod
    def from_answers(cls, answers: Sequence[Answers], names: Sequence[str] | None = None) -> Answered:
        """From graded files of answers to the same questions.

        Raises:
            EaptkError: none, questions differ, or a file is not graded.
        """
        if not answers:
            raise EaptkError("there are no answers to select from; give the file of one model or more")
        first = answers[0]
        for other in answers[1:]:
            ours, theirs = (a.facts["questions"]["fingerprint"] for a in (first, other))
            if ours != theirs:
                raise EaptkError(
                    f"{first.path} and {other.path} answer different questions; let both models answer the same"
                )
        return cls(
            tuple(names or (a.path.stem for a in answers)),
            first.ids,
            np.stack([a.prompt_lengths for a in answers]),
            np.stack([a.lengths for a in answers]),
            np.stack([a.right for a in answers]),
        )

    @classmethod
    def from_runs(cls, runs: Sequence[PairedRun], names: Sequence[str] | None = None) -> Answered:
        """From finished runs: the samples all of them hold, taken as right, with lengths as scored."""
        if not runs:
            raise EaptkError("there are no runs to select from; give at least one")
        counts = [
            {
                row["id"]: (row["n_prompt_tokens"], row["n_answer_tokens"])
                for row, done in zip(
                    run.samples.select(["id", "n_prompt_tokens", "n_answer_tokens"]).to_pylist(),
                    run.done,
                    strict=True,
                )
                if done
            }
            for run in runs
        ]
        ids = tuple(name for name in counts[0] if all(name in other for other in counts[1:]))
        tokens = np.array([[found[name] for name in ids] for found in counts]).reshape(len(runs), len(ids), 2)
        names = tuple(names or (run.path.name for run in runs))
        return cls(names, ids, tokens[..., 0], tokens[..., 1], np.ones((len(runs), len(ids)), dtype=bool))


@dataclass(frozen=True)
class Filter:
    """Which questions stay.

    Args:
        name: of the stage in a funnel.
        why: why those left that did not stay.
        stays: questions to [n].
    """

    name: str
    why: str
    stays: Callable[[Answered], Mask]


def all_right() -> Filter:
    """Answered right by every model."""
    return Filter("right", "not answered right by every model", lambda a: np.asarray(a.right.all(0)))


def equal_prompts() -> Filter:
    """As many prompt tokens in every model."""
    return Filter(
        "prompt",
        "prompts of unequal token counts",
        lambda a: np.asarray((a.prompts == a.prompts[:1]).all(0)),
    )


def within(low: float, high: float, of: Literal["mean", "each"] = "mean", strict: bool = False) -> Filter:
    """Answers of at least `low` and at most `high` tokens: their mean, or every one.

    Args:
        of: what is held to the bounds.
        strict: the bounds themselves are out.
    """

    def stays(answered: Answered) -> Mask:
        lengths = answered.lengths.mean(0, keepdims=True) if of == "mean" else answered.lengths
        inside = (low < lengths) & (lengths < high) if strict else (low <= lengths) & (lengths <= high)
        return np.asarray(inside.all(0))

    which = "mean answer length" if of == "mean" else "an answer's length"
    return Filter(
        "length", f"{which} not {'between' if strict else 'within'} {low:g} and {high:g} tokens", stays
    )


def balanced(limit: float, strict: bool = False) -> Filter:
    """(max T − min T) / T̄ at most `limit`; below it if `strict`. For two models |T_A − T_B| / T̄."""

    def stays(answered: Answered) -> Mask:
        spread = np.ptp(answered.lengths, axis=0) / answered.lengths.mean(0)
        return np.asarray(spread < limit if strict else spread <= limit)

    far = f"{limit:g} of their mean or more" if strict else f"more than {limit:g} of their mean"
    return Filter("balance", f"answer lengths differ by {far}", stays)


def reaching(cut: int) -> Filter:
    """Every answer has at least `cut` tokens, so that all are scored on as many."""
    return Filter(
        "cut",
        f"an answer is shorter than the cut of {cut} tokens",
        lambda a: np.asarray((a.lengths >= cut).all(0)),
    )


def sample(n: int, seed: int = 42) -> Filter:
    """`n` questions at random, all if there are no more; the draw of Python's `random.sample`, as the paper's."""
    if n < 1:
        raise EaptkError(f"samples is {n}; it must be at least 1")

    def stays(answered: Answered) -> Mask:
        mask = np.zeros(len(answered), dtype=bool)
        mask[random.Random(seed).sample(range(len(answered)), min(n, len(answered)))] = True
        return mask

    return Filter("sample", f"not among the {n} drawn (seed {seed})", stays)


def apply(answered: Answered, filters: Sequence[Filter]) -> tuple[Answered, tuple[Stage, ...]]:
    """Filters one after the other, and how many questions each let through."""
    funnel = []
    for each in filters:
        kept = answered.keep(each.stays(answered))
        funnel.append(Stage(each.name, len(answered), len(kept), each.why))
        answered = kept
    return answered, tuple(funnel)


@dataclass(frozen=True)
class Protocol:
    """How questions are selected; see the module for the two of the paper.

    Args:
        name: of it.
        reference: ref is the smallest of the models' mean lengths, or the mean of them.
        bounded: what is held to the bounds on length, T̄ or every T_i.
        strict: bounds and balance themselves are out.
        whole: bounds are rounded down to whole tokens.
        low, high: bounds, as shares of ref.
        balance: largest (max T − min T) / T̄.
        samples: questions drawn at the end.
        seed: of the draw.
    """

    name: str
    reference: Literal["min", "mean"]
    bounded: Literal["mean", "each"]
    strict: bool
    whole: bool
    low: float = 0.5
    high: float = 1.5
    balance: float = 0.5
    samples: int = 100
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high < math.inf:
            raise EaptkError(
                f"low is {self.low} and high {self.high}; bounds need 0 ≤ low < high, both finite"
            )
        if not 0 <= self.balance < math.inf:
            raise EaptkError(f"balance is {self.balance}; it must be at least 0, and finite")
        if self.samples < 1:
            raise EaptkError(f"samples is {self.samples}; it must be at least 1")


PROTOCOLS = {
    "paper-code": Protocol("paper-code", reference="min", bounded="mean", strict=False, whole=True),
    "paper-text": Protocol("paper-text", reference="mean", bounded="each", strict=True, whole=False),
}


@dataclass(frozen=True)
class Selection:
    """The questions models are compared on.

    Args:
        ids: [n] of the questions kept, in the order of the dataset.
        reference: ref, in tokens.
        funnel: how they were selected.
        names: [k] of the models.
        accuracy: [k] share of all questions each answered right.
        lengths: [k][m] tokens of the answers to the m questions all answered right, before the filters on
            length.
        kept_lengths: [k, n] tokens of the answers kept.
        notes: what a reader must know, a sentence each.
    """

    ids: tuple[str, ...]
    reference: float
    funnel: tuple[Stage, ...]
    names: tuple[str, ...]
    accuracy: tuple[float, ...]
    lengths: tuple[tuple[int, ...], ...] = field(repr=False)
    kept_lengths: Integers = field(repr=False)
    notes: tuple[str, ...] = ()

    def cut(self, alpha: float) -> int:
        """Tokens of each answer that are scored at α: max(⌊α·ref⌋, 1)."""
        return max(int(alpha * self.reference), 1)

    def at(self, alpha: float, drop_short: bool = False) -> tuple[tuple[str, ...], Stage]:
        """The questions that are scored at α, and the line of the funnel that says how the cut meets them.

        Args:
            alpha: share of ref that answers are cut to.
            drop_short: leave questions out that a model answered in fewer tokens; else those are scored whole,
                as in the paper.

        Raises:
            EaptkError: fewer than two are left.
        """
        cut, n = self.cut(alpha), len(self.ids)
        reached = np.asarray((self.kept_lengths >= cut).all(0))
        n_short = int((~reached).sum())
        if not drop_short or not n_short:
            why = f"cut to {cut} tokens" + (
                f"; scored whole as they are shorter: {n_short}" if n_short else ""
            )
            return self.ids, Stage("cut", n, n, why)
        ids = tuple(name for name, kept in zip(self.ids, reached, strict=True) if kept)
        if len(ids) < 2:
            raise EaptkError(
                f"at alpha {alpha:g}, {len(ids)} of {n} questions have answers of {cut} tokens in "
                f"{' and '.join(self.names)}; lower alpha, or keep shorter answers whole (drop_short: false)"
            )
        return ids, Stage("cut", n, len(ids), reaching(cut).why)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "models": list(self.names),
            "reference": self.reference,
            "funnel": [vars(stage) for stage in self.funnel],
            "accuracy": list(self.accuracy),
            "notes": list(self.notes),
            "lengths": [list(lengths) for lengths in self.lengths],
            "ids": list(self.ids),
        }


def select(answers: Sequence[Answers], protocol: Protocol, names: Sequence[str] | None = None) -> Selection:
    """The questions of graded answers on which models can be compared.

    Args:
        answers: [k] of the models, of the same questions.
        protocol: one of `PROTOCOLS`, or of your own (`dataclasses.replace`).
        names: of the models; default: those of the files.

    Raises:
        EaptkError: a model that is right nowhere; no question that all answered right; fewer than two left in
            the end; or as `Answered.from_answers`.
    """
    everything = Answered.from_answers(answers, names)
    for name, right in zip(everything.names, everything.right, strict=True):
        if not right.any():
            raise EaptkError(
                f"{name} answered none of {len(right)} questions right; see the column 'reason' of its answers "
                f"(the prompt may not be its own, or max_new_tokens too small)"
            )
    right, start = apply(everything, [all_right()])
    accuracy = tuple(everything.right.mean(1).tolist())
    if not len(right):
        each = ", ".join(f"{n} {a:.0%}" for n, a in zip(everything.names, accuracy, strict=True))
        raise EaptkError(f"no question was answered right by all of {len(accuracy)} models ({each})")
    means = right.lengths.mean(1)
    reference = float(means.min() if protocol.reference == "min" else means.mean())
    low, high = protocol.low * reference, protocol.high * reference
    if protocol.whole:
        low, high = int(low), int(high)
    kept, rest = apply(
        right,
        [
            equal_prompts(),
            within(low, high, protocol.bounded, protocol.strict),
            balanced(protocol.balance, protocol.strict),
            sample(protocol.samples, protocol.seed),
        ],
    )
    funnel = start + rest
    if len(kept) < 2:
        lost = max(funnel, key=lambda stage: stage.n_in - stage.n_out)
        hint = ""
        if lost.name == "prompt":
            hint = "; the models' tokenizers or prompts differ"
        raise EaptkError(
            f"{len(kept)} questions are left for {' and '.join(kept.names)}, two are needed; most were lost at "
            f"{lost.name!r} ({lost.n_in} to {lost.n_out}: {lost.why}){hint}"
        )
    return Selection(
        ids=kept.ids,
        reference=reference,
        funnel=funnel,
        names=everything.names,
        accuracy=accuracy,
        lengths=tuple(tuple(row) for row in right.lengths.tolist()),
        kept_lengths=kept.lengths,
        notes=_notes(answers, kept),
    )


def _notes(answers: Sequence[Answers], kept: Answered) -> tuple[str, ...]:
    notes = []
    first = answers[0]
    others = [
        name
        for name, other in zip(kept.names, answers, strict=True)
        if other.facts["tokenizer"] != first.facts["tokenizer"]
    ]
    if others:
        rows = [{s.id: s.prompt_ids for s in a.samples(kept.ids)} for a in answers]
        unequal = sum(len({row[name] for row in rows}) > 1 for name in kept.ids)
        notes.append(
            f"the tokenizer of {', '.join(others)} is not that of {kept.names[0]}; "
            f"{unequal} of {len(kept)} kept prompts have other tokens"
        )
    for name, each in zip(kept.names, answers, strict=True):
        cut_off = int(sum(not finished for finished in each.table["finished"].to_pylist()))
        if cut_off:
            notes.append(
                f"{cut_off} of {len(each)} answers of {name} were cut off at {each.facts['max_new_tokens']} tokens"
            )
    return tuple(notes)
