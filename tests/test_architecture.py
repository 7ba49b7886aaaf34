"""Which models can be scored: built-in entries, entries of one's own, and projections that cannot be split by head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
import transformers
from oracle import relative_error
from tiny import tiny_batch, tiny_model
from torch import Tensor, nn

from eaptk import (
    Architecture,
    EaptkError,
    Graph,
    architecture,
    attribute,
    register_architecture,
)
from eaptk.graph import Granularity

GRANULARITIES = ["block", "head"]
EXACT = 1e-12  # relative Frobenius in float64


class Scaled(nn.Linear):
    """A projection that is more than its weight, as quantised and adapted ones are."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


class Bent(nn.Linear):
    """A projection that is no linear map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


@pytest.mark.parametrize("projection", ["q_proj", "o_proj"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_projection_is_the_linear_map_that_it_computes_not_its_weight(
    projection: str, granularity: Granularity
) -> None:
    model, batch = tiny_model("llama"), tiny_batch()
    for layer in model.model.layers:
        getattr(layer.self_attn, projection).__class__ = Scaled
    graph = Graph.from_model(model, granularity)
    assert (
        relative_error(attribute(model, batch, graph).matrix(), oracle.batch_scores(model, batch, graph))
        < EXACT
    )


@pytest.mark.parametrize("projection", ["q_proj", "o_proj"])
def test_a_projection_that_is_no_linear_map_is_never_split_by_head(projection: str) -> None:
    model, batch = tiny_model("llama"), tiny_batch()
    for layer in model.model.layers:
        getattr(layer.self_attn, projection).__class__ = Bent
    with pytest.raises(EaptkError, match=r"Bent is no linear map.*granularity='block'"):
        attribute(model, batch, Graph.from_model(model, "head"))
    graph = Graph.from_model(model, "block")
    assert (
        relative_error(attribute(model, batch, graph).matrix(), oracle.batch_scores(model, batch, graph))
        < EXACT
    )


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(architecture._REGISTRY)
    yield
    architecture._REGISTRY.clear()
    architecture._REGISTRY.update(before)


PHI = Architecture(
    "phi",
    final_norm="model.final_layernorm",
    mlp_norm="input_layernorm",
    attention_output="self_attn.dense",
    norm="layer",
    parallel=lambda config: True,
)
STABLELM = Architecture("stablelm", norm="layer")


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("qkv", ["split", "merged"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("entry", [PHI, STABLELM], ids=lambda entry: entry.model_type)
def test_a_registered_architecture_is_scored_like_a_built_in_one(
    entry: Architecture, granularity: str, qkv: str
) -> None:
    model, batch = tiny_model(entry.model_type), tiny_batch()
    register_architecture(entry)
    graph = Graph.from_model(model, granularity, qkv)
    for ablation in ("zero", "patching"):
        scores = attribute(model, batch, graph, ablation=ablation)
        assert relative_error(scores.matrix(), oracle.batch_scores(model, batch, graph, ablation)) < EXACT


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("path", ["mlp_norm", "query", "attention_output", "final_norm", "layers"])
def test_an_entry_with_a_wrong_path_is_refused_by_name(path: str) -> None:
    model = tiny_model("stablelm", torch.float32)
    register_architecture(Architecture("stablelm", norm="layer", **{path: "not.there"}))
    with pytest.raises(EaptkError, match=r"stablelm.*not\.there|not\.there.*stablelm"):
        attribute(model, tiny_batch(), Graph.from_model(model))


def _rope(kind: str, **settings: Any) -> transformers.LlamaConfig:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **settings}
    return transformers.LlamaConfig(rope_parameters=rope, original_max_position_embeddings=2048)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_positions_that_no_neighbour_changes_are_taken(kind: str) -> None:
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    config = _rope(kind, factor=2.0, original_max_position_embeddings=1024, **more)
    assert Graph.from_config(config).n_layers == config.num_hidden_layers


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.PhiConfig(), "model type 'phi' has no architecture entry.*register_architecture"),
        (transformers.BertConfig(), "model type 'bert' has no architecture entry.*encoder-only"),
        (transformers.T5Config(), "'t5' is an encoder-decoder"),
        (transformers.Qwen2Config(is_causal=False), "is_causal false.*no causal edges"),
        (_rope("dynamic", factor=2.0), "positions of type 'dynamic' follow the longest sample of a batch"),
        (
            _rope("longrope", factor=2.0, short_factor=[1.0] * 64, long_factor=[2.0] * 64),
            "positions of type 'longrope' follow the longest sample",
        ),
    ],
    ids=["phi", "bert", "t5", "both ways", "dynamic", "longrope"],
)
def test_an_unknown_model_type_is_named_with_the_remedy(config: Any, message: str) -> None:
    with pytest.raises(EaptkError, match=message):
        Graph.from_config(config)


def test_a_model_of_unknown_type_is_refused_whatever_the_graph() -> None:
    with pytest.raises(EaptkError, match=r"model type 'phi'.*register_architecture"):
        attribute(tiny_model("phi", torch.float32), tiny_batch(), Graph(2, 4, 2))
