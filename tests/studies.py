"""Results of studies made by hand, from runs made by hand: real comparisons, each answer's length invented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from runs import BLOCK, make_run

from eaptk.comparison import compare
from eaptk.experiment import Experiment, Sensitivity, Stage, StudyResults, Validation
from eaptk.graph import Graph
from eaptk.resampling import Resampling


def make_experiment(
    family: str = "GRPO seed 0",
    method: str = "GRPO",
    dataset: str = "arithmetic",
    alpha: float = 0.3,
    names: Sequence[str] = ("SFT", "GRPO"),
    steps: Sequence[float] | None = None,
    seed: int = 0,
    graph: Graph = BLOCK,
    n: int = 16,
    growth: float = 0.4,
    validated: bool = True,
    **options: Any,
) -> Experiment:
    """Later models are stronger by `growth`, each edge by its own factor; `options` go to `compare`."""
    rng = np.random.default_rng(seed)
    factor = rng.lognormal(growth, 0.4, graph.n_edges)
    start = make_run(n, seed, graph)
    start.scores *= np.exp(-0.25 * graph.edge_destination / graph.n_destinations)
    runs = []
    for k, name in enumerate(names):
        share = k / (len(names) - 1)
        scores = start.scores * factor**share * rng.lognormal(0, 0.1, (n, 1)) if k else start.scores
        loss = 0.3 - 0.1 * share + 0.05 * rng.standard_normal(n)
        runs.append(replace(start, scores=scores.astype(np.float32), path=Path(f"runs/{name}"), loss=loss))
    options = {"resampling": Resampling(n_resamples=200), "names": names, **options}
    real = compare(runs, control_loss=True, **options)
    top = real.metrics[0].upper
    checked = [
        (name, 1e-3 * rng.standard_t(3, 60), 1e-4 * rng.standard_normal(60))
        for name in (names[0], names[-1])
        if validated
    ]
    return Experiment(
        family=family,
        method=method,
        dataset=dataset,
        alpha=alpha,
        cut=max(int(alpha * 40), 1),
        names=tuple(names),
        steps=None if steps is None else tuple(steps),
        funnel=(
            Stage("right", 200, 140 + seed % 7, "an answer is wrong or missing"),
            Stage("prompt", 140 + seed % 7, 140 + seed % 7, "prompts of unequal token counts"),
            Stage("length", 140 + seed % 7, 90, "mean length outside 0.5 to 1.5 of the reference"),
            Stage("sampled", 90, n, "not drawn"),
        ),
        lengths=tuple(tuple(map(int, rng.normal(40 + 4 * k, 8, 140))) for k in range(len(names))),
        accuracy=tuple(0.7 + 0.05 * k for k in range(len(names))),
        real=real,
        dense=compare(runs, dense=True, **options),
        sensitivity=tuple(
            Sensitivity(
                bins, top * share, tuple(1 + 0.1 * k + 0.2 * rng.standard_normal() for k in range(len(names)))
            )
            for share in (0.1, 0.3, 1.0)
            for bins in (50, 100, 200, 400)
        ),
        validation=tuple(
            Validation(
                model=name,
                n_edges=20,
                n_samples=3,
                pearson=0.98,
                spearman=0.97,
                slope=1.02,
                sign_agreement=0.95,
                predicted=tuple(predicted.tolist()),
                exact=tuple((predicted + error).tolist()),
            )
            for name, predicted, error in checked
        ),
    )


def make_study(experiments: Sequence[Experiment], **facts: Any) -> StudyResults:
    return StudyResults(
        name="arithmetic",
        experiments=tuple(experiments),
        protocol="paper-code",
        facts={
            "versions": {"eaptk": "0.1.0", "torch": "2.13.0"},
            "command": "eaptk study study.yaml",
            **facts,
        },
    )
