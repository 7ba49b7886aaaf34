"""What a study finds: plain records that the report is drawn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from eaptk.comparison import Comparison


@dataclass(frozen=True)
class Stage:
    """One line of a funnel: `n_out` of `n_in` questions went on; `why` says why the others left."""

    name: str
    n_in: int
    n_out: int
    why: str


@dataclass(frozen=True)
class Validation:
    """First-order scores of one model held against exact ablation of a random subset of its edges.

    Args:
        model: its name in the study.
        n_edges, n_samples: of the subset; there are n = n_samples · n_edges pairs, all edges of one sample first.
        pearson, spearman: correlations of `predicted` and `exact`.
        slope: of `exact` against `predicted`, least squares through the origin; 1 if first order is all.
        sign_agreement: share of pairs of one sign, in [0, 1].
        predicted: [n] scores I(s→d).
        exact: [n] change of the loss when that edge alone is ablated.
    """

    model: str
    n_edges: int
    n_samples: int
    pearson: float
    spearman: float
    slope: float
    sign_agreement: float
    predicted: tuple[float, ...] = field(repr=False)
    exact: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Sensitivity:
    """Information complexity of every model under one choice of histogram.

    Args:
        bins: of the histogram of |W|.
        upper: where it ends.
        values: [k] complexity of each model, in the order of the experiment's names.
    """

    bins: int
    upper: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Experiment:
    """One family on one dataset with answers cut to one share α of the reference length.

    Args:
        family: models that are compared with each other, e.g. ``"GRPO seed 0"``.
        method: what families are grouped by in tables, e.g. ``"GRPO"``; the family's own name by default.
        dataset: name of the questions.
        alpha: share of the reference length that is scored.
        cut: tokens each answer was cut to, max(⌊α·ref⌋, 1).
        names: [k] of the models, the baseline first; two, or more along a training run.
        steps: [k] position of each model along training, for a series; else None.
        funnel: how the questions were selected, from all to those scored.
        lengths: [k][m] tokens of each model's answers to the m questions that every model answered right,
            before the filters on length.
        accuracy: [k] share of all questions each model answered right, in [0, 1].
        real: comparison over real edges, with differences at equal loss.
        dense: the same with structural zeros counted, as the paper does.
        sensitivity: complexity under several bins and ranges.
        validation: first-order scores against exact ablation; empty where it was not asked for.
    """

    family: str
    method: str
    dataset: str
    alpha: float
    cut: int
    names: tuple[str, ...]
    steps: tuple[float, ...] | None
    funnel: tuple[Stage, ...]
    lengths: tuple[tuple[int, ...], ...] = field(repr=False)
    accuracy: tuple[float, ...]
    real: Comparison = field(repr=False)
    dense: Comparison = field(repr=False)
    sensitivity: tuple[Sensitivity, ...] = ()
    validation: tuple[Validation, ...] = ()

    def place(self, run: str) -> tuple[Literal["step", "position"], float]:
        """Where replicates look for a run: at its step in a series, else by its position among the names."""
        position = self.names.index(run)
        return ("position", position) if self.steps is None else ("step", self.steps[position])


@dataclass(frozen=True)
class StudyResults:
    """All experiments of a study, in the order of its families, datasets and α.

    Args:
        name: of the study.
        experiments: see `Experiment`.
        protocol: ``"paper-code"`` or ``"paper-text"``: how questions were selected.
        facts: JSON-ready provenance: versions, command, models, seeds, thresholds.
    """

    name: str
    experiments: tuple[Experiment, ...]
    protocol: str
    facts: dict[str, Any]
