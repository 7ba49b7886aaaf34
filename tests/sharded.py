"""Run under `torchrun`: what a model gives that is shared out over the processes, saved by each rank.

Usage: sharded.py OUT MODEL_FOLDER…
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_batch, tiny_samples

from eaptk import EaptkError, Graph, attribute, source_means
from eaptk.attribution import attribute_cuts
from eaptk.generate import greedy_answers
from eaptk.loading import load_model, weights_fingerprint

#: Ways to ask for scores, by name.
WAYS: dict[str, dict[str, Any]] = {
    "zero": {},
    "patched, logit difference": {"ablation": "patching", "loss": "logit_diff"},
    "patched, KL": {"ablation": "patching", "loss": "kl"},
    "mean": {"ablation": "mean"},
    "by layers, computed again": {"flush_layers": 1, "checkpoint": True},
    "by segments": {"segment": 4},
}


def results(model: Any) -> dict[str, Any]:
    """All that is compared of one model."""
    found: dict[str, Any] = {"weights": weights_fingerprint(model)}
    found["answers"] = list(greedy_answers(model, tiny_samples(3), [[0, 1, 2]], 4))
    for granularity in ("block", "head"):
        graph = Graph.from_model(model, granularity)
        for way, options in WAYS.items():
            means = source_means(model, [tiny_batch(seed=1)], graph) if way == "mean" else None
            found[granularity, way] = attribute(model, tiny_batch(), graph, means=means, **options).rows
        found[granularity, "cuts"] = torch.cat(
            [scores.rows for scores in attribute_cuts(model, tiny_batch(), graph, [1, 3])]
        )
    found["head", "merged"] = attribute(model, tiny_batch(), Graph.from_model(model, "head", "merged")).rows
    return found


def main(out: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    found = {}
    for folder in folders:
        try:
            found[folder.name] = results(load_model(folder, tensor_parallel=True))
        except EaptkError as error:
            found[folder.name] = str(error)
    torch.save(found, out / f"rank-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
