"""How good first order is on this model: scores held against exact ablation, on a random subset of edges.

*Which edges*: all are ranked by mean |score|, the ranking is cut into as many equal parts as edges are wanted, and
one is drawn from each. Every edge is as likely as any other (up to rounding), so the correlations estimate those
over all edges; but scores are heavy-tailed, and a plain draw of a few dozen often misses the strongest, on which a
correlation depends most. Here one of the strongest part is always in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from eaptk.attribution import Ablation, attribute
from eaptk.batch import Sample, collate
from eaptk.errors import EaptkError
from eaptk.experiment import Validation
from eaptk.graph import Graph
from eaptk.intervention import exact_effects
from eaptk.losses import LossFunction, LossName


def validate(
    model: nn.Module,
    samples: Sequence[Sample],
    graph: Graph,
    *,
    n_edges: int = 64,
    seed: int = 0,
    ablation: Ablation = "zero",
    loss: LossName | LossFunction = "nll",
    means: Mapping[str, Tensor] | None = None,
    batch_size: int = 8,
    name: str = "",
) -> Validation:
    """Predicted against exact effects of `n_edges` edges (all, if there are no more) on every sample.

    Args:
        model: in float32 or better.
        samples: one or more; n_edges + 2 passes of the model for each.
        graph, ablation, loss, means: as for `attribute`.
        seed: of the edges; the same call gives the same numbers.
        batch_size: samples side by side; no number depends on it.
        name: of the model, for the result.

    Raises:
        EaptkError: what `exact_effects` refuses; no samples; fewer than two edges are wanted; all predictions
            or all effects are equal, so that there is nothing to correlate.
    """
    if not samples:
        raise EaptkError("there are no samples to validate scores on; give at least one")
    if n_edges < 2:
        raise EaptkError(f"n_edges is {n_edges}; a correlation needs at least 2")
    batches = [collate(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]
    options: dict[str, Any] = {"ablation": ablation, "loss": loss, "means": means}
    rows = torch.cat([attribute(model, batch, graph, **options).rows for batch in batches]).double()
    columns = spread_edges(rows.abs().mean(0).numpy(), n_edges, seed)
    effects = torch.cat([exact_effects(model, batch, graph, columns, **options) for batch in batches])
    predicted, exact = rows[:, columns].flatten().numpy(), effects.flatten().numpy()
    for what, values in (("scores", predicted), ("exact effects", exact)):
        if values.min() == values.max():
            raise EaptkError(f"all {what} are {values[0]}; there is nothing to correlate")
    return Validation(
        model=name,
        n_edges=len(columns),
        n_samples=len(samples),
        pearson=_correlation(predicted, exact),
        spearman=_correlation(_ranks(predicted), _ranks(exact)),
        slope=float(predicted @ exact / (predicted @ predicted)),
        sign_agreement=float(np.mean(np.sign(predicted) == np.sign(exact))),
        predicted=tuple(predicted.tolist()),
        exact=tuple(exact.tolist()),
    )


def spread_edges(strength: npt.ArrayLike, n: int, seed: int) -> list[int]:
    """Up to `n` columns spread evenly over the ranking of `strength` [n_edges], in ascending order."""
    order = np.argsort(np.asarray(strength), kind="stable")
    parts = np.array_split(order, min(n, len(order)))
    random = np.random.default_rng(seed)
    return sorted(int(random.choice(part)) for part in parts)


def _correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks, equal values sharing their mean."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[where]
