"""What may be handed over as a batch, and what is said of the rest."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from eaptk import EaptkError, Graph, attribute


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"input_ids": [[1, 2], [3]]}, "padding=True"),
        ({"input_ids": torch.rand(1, 3)}, "integers"),
        ({"input_ids": torch.zeros(0, 3)}, "integers"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64)}, "one sample or more"),
        ({"input_ids": [[1, 999]]}, "token 999 of its ids"),
        ({"input_ids": [[1, 2]], "labels": [[1, -1]]}, "token -1 of its targets"),
    ],
    ids=["ragged", "float", "float-empty", "empty", "unknown-token", "unknown-label"],
)
def test_tokens_that_are_none_are_named(mapping: dict[str, object], message: str) -> None:
    model = tiny_model("qwen2")
    with pytest.raises(EaptkError, match=message):
        attribute(model, mapping, Graph.from_model(model))


def test_token_ids_may_be_of_any_integer_type() -> None:
    model = tiny_model("qwen2")
    graph = Graph.from_model(model)
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = attribute(model, {"input_ids": ids}, graph).rows
    assert torch.equal(attribute(model, {"input_ids": ids.int()}, graph).rows, expected)


def test_autocast_around_the_call_does_not_reach_the_contraction() -> None:
    model = tiny_model("qwen2", torch.bfloat16)
    graph = Graph.from_model(model, granularity="head")
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6]])}
    expected = attribute(model, batch, graph).rows
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attribute(model, batch, graph).rows
    assert (got - expected).norm() < 1e-3 * expected.norm()
