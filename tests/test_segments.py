"""Long sequences by segments: the scores of the whole, in memory that hardly grows with the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accounting import peak_bytes
from oracle import relative_error
from test_memory_dials import deep
from tiny import NAMES, tiny_batch, tiny_model

from eaptk import Batch, EaptkError, Graph, attribute, source_means

GRANULARITIES = ["block", "head"]


@pytest.mark.parametrize("segment", [1, 5, 100])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_segments_score_as_the_whole(name: str, granularity: str, segment: int) -> None:
    model, batch = tiny_model(name), tiny_batch()
    graph = Graph.from_model(model, granularity)
    whole = attribute(model, batch, graph)
    found = attribute(model, batch, graph, segment=segment)
    assert relative_error(found.rows, whole.rows) < 1e-12
    assert relative_error(found.loss, whole.loss) < 1e-12


@pytest.mark.parametrize("method", ["nll", "logit_diff", "kl", "mean"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_so_they_do_under_every_method(name: str, method: str) -> None:
    model, batch = tiny_model(name), tiny_batch()
    graph = Graph.from_model(model, "head")
    options: dict[str, Any] = {"ablation": "patching", "loss": method}
    if method == "mean":
        options = {"ablation": "mean", "means": source_means(model, [batch], graph)}
    whole = attribute(model, batch, graph, **options)
    assert relative_error(attribute(model, batch, graph, segment=4, **options).rows, whole.rows) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_so_they_do_in_other_dtypes(dtype: torch.dtype) -> None:
    model, batch = tiny_model("llama", dtype), tiny_batch()
    graph = Graph.from_model(model)
    whole = attribute(model, batch, graph)
    within = 1e-5 if dtype == torch.float32 else 0.02
    assert relative_error(attribute(model, batch, graph, segment=3).rows, whole.rows) < within


def test_what_a_token_takes_is_a_fraction_of_its_checkpointed_layers() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": 512}
    model = deep("llama", **shape, num_attention_heads=8, num_key_value_heads=2)
    graph = Graph.from_model(model)
    ids = torch.randint(0, 61, (1, 512), generator=torch.Generator().manual_seed(0))

    def growth(**dials: Any) -> int:
        peaks = [
            peak_bytes(
                lambda n=n: attribute(model, Batch.from_mapping({"input_ids": ids[:, :n]}), graph, **dials)
            )
            for n in (256, 512)
        ]
        return peaks[1] - peaks[0]

    assert growth(segment=64) < 0.4 * growth(checkpoint=True, flush_layers=1)


@pytest.mark.parametrize("dials", [{"segment": 0}, {"segment": 4, "flush_layers": 0}], ids=str)
def test_segments_of_no_tokens_and_groups_of_no_layers_are_refused(dials: dict[str, int]) -> None:
    model = tiny_model("llama")
    with pytest.raises(EaptkError, match=r"(segment|flush_layers) is 0; it must be at least 1"):
        attribute(model, tiny_batch(), Graph.from_model(model), **dials)


def test_a_loss_of_ones_own_is_not_taken_by_segments() -> None:
    model = tiny_model("llama")
    with pytest.raises(EaptkError, match="by segments a loss is a named one"):
        attribute(
            model, tiny_batch(), Graph.from_model(model), segment=4, loss=lambda logits, batch: logits.sum()
        )
