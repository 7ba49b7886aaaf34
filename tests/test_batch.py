"""What may be handed over as a batch, and what is said of the rest."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from eaptk import EaptkError, Graph, Sample, attribute, collate
from eaptk.batch import NO_TARGET


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"input_ids": [[1, 2], [3]]}, "padding=True"),
        ({"input_ids": torch.rand(1, 3)}, "integers"),
        ({"input_ids": torch.zeros(0, 3)}, "integers"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64)}, "one sample or more"),
        ({"input_ids": [[1, 999]]}, "token 999 of its ids"),
        ({"input_ids": [[1, 2]], "labels": [[1, -1]]}, "token -1 of its targets"),
        ({"input_ids": None}, "needs 'input_ids'"),
        ({"input_ids": [[1, 2]], "corupt_ids": [[3, 4]]}, "has no 'corupt_ids'; did you mean 'corrupt_ids'"),
        ({"input_ids": [[1, 2, 3, 4]], "position_ids": [[0, 1, 0, 1]]}, "give each sample a row of its own"),
    ],
    ids=[
        "ragged",
        "float",
        "float-empty",
        "empty",
        "unknown-token",
        "unknown-label",
        "none",
        "typo",
        "packed",
    ],
)
def test_tokens_that_are_none_are_named(mapping: dict[str, object], message: str) -> None:
    model = tiny_model("qwen2")
    with pytest.raises(EaptkError, match=message):
        attribute(model, mapping, Graph.from_model(model))


def test_what_tokenizers_return_beside_tokens_changes_nothing() -> None:
    model = tiny_model("qwen2")
    graph = Graph.from_model(model)
    mapping = {"input_ids": [[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]], "attention_mask": [[0, 0, 1, 1, 1], [1] * 5]}
    more = {"position_ids": [[9, 9, 0, 1, 2], [*range(5)]], "token_type_ids": [[0] * 5] * 2, "labels": None}
    assert torch.equal(attribute(model, mapping, graph).rows, attribute(model, mapping | more, graph).rows)


def test_a_sample_beyond_learned_positions_is_named() -> None:
    model = tiny_model("gpt2")
    ids = torch.ones(2, model.config.n_positions + 1, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with pytest.raises(EaptkError, match=r"sample '1' has .* tokens, the model's positions end at"):
        attribute(model, {"input_ids": ids, "attention_mask": mask}, Graph.from_model(model))


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


def test_samples_lie_side_by_side_and_each_answer_token_is_the_target_of_the_position_before_it() -> None:
    batch = collate(
        [
            Sample("a", (1, 2, 3), (4, 5), corrupt_ids=(6, 7, 8), foil_ids=(9, 10)),
            Sample("b", (11,), (12,), corrupt_ids=(13,), foil_ids=(14,)),
        ]
    )
    no = NO_TARGET
    assert batch.names == ("a", "b")
    assert batch.lengths.tolist() == [4, 1]
    assert batch.ids.tolist() == [[1, 2, 3, 4], [11, 0, 0, 0]]
    assert batch.targets.tolist() == [[no, no, 4, 5], [12, no, no, no]]
    assert batch.corrupt_ids.tolist() == [[6, 7, 8, 4], [13, 0, 0, 0]]
    assert batch.foils.tolist() == [[no, no, 9, 10], [14, no, no, no]]


def test_samples_without_corrupt_prompts_or_foils_give_a_batch_without() -> None:
    batch = collate([Sample("a", (1,), (2,)), Sample("b", (3,), (4,))])
    assert batch.corrupt_ids is None
    assert batch.foils is None


@pytest.mark.parametrize("field", ["corrupt_ids", "foil_ids"])
def test_a_batch_of_which_only_some_have_a_field_names_one_that_lacks_it(field: str) -> None:
    with pytest.raises(EaptkError, match=f"sample 'b' has no {field} while others"):
        collate([Sample("a", (1,), (2,), **{field: (3,)}), Sample("b", (3,), (4,))])
