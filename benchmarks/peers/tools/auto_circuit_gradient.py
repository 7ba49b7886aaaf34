"""auto-circuit: gradients of its edge masks at 0, its fast form of edge attribution patching.

Key and value heads are repeated to query heads, as its graph has one of each a query head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.types import PruneScores
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from names import head_nodes
from tools.hooked_transformer import from_folder
from torch import Tensor


def load(folder: Path, dtype: torch.dtype, form: dict[str, Any]) -> PatchableModel:
    model = from_folder(folder, dtype, ungroup=True)
    return patchable_model(model, factorized=True, separate_qkv=True)


def score(model: PatchableModel, ids: Tensor, other: Tensor) -> PruneScores:
    # Its mean over answers is over all that are given: position t's answer is the token at t + 1.
    answers = list(ids[:, 1:, None])
    dataset = PromptDataset(clean_prompts=ids, corrupt_prompts=other, answers=answers, wrong_answers=answers)
    return mask_gradient_prune_scores(
        model,
        PromptDataLoader(dataset, seq_len=None, diverge_idx=0, batch_size=1),
        official_edges=None,
        grad_function="logprob",
        answer_function="avg_val",
        mask_val=0.0,
    )


def edges(model: PatchableModel, scores: PruneScores) -> tuple[np.ndarray, list[str], list[str]]:
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    sources, destinations = head_nodes(n_layers, n_heads, n_heads)
    matrix = np.zeros((len(sources), len(destinations)))
    column = 0
    names = [
        f"blocks.{layer}.hook_{reader}"
        for layer in range(n_layers)
        for reader in ("q_input", "k_input", "v_input", "mlp_in")
    ]
    for name in [*names, f"blocks.{n_layers - 1}.hook_resid_post"]:
        found = scores[name].float().reshape(-1, scores[name].shape[-1]).T.numpy()
        matrix[: len(found), column : column + found.shape[1]] = found
        column += found.shape[1]
    return matrix, sources, destinations
