"""`attribute_cuts`: one forward pass, and what samples with cut answers would have scored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accounting import peak_bytes
from oracle import relative_error
from test_memory_dials import deep
from tiny import NAMES, tiny_model, tiny_samples

from eaptk import Batch, EaptkError, Graph, Sample, attribute, attribute_cuts, collate, source_means
from eaptk.attribution import cut_short, share_passes
from eaptk.losses import LOSSES

GRANULARITIES = ["block", "head"]
CUTS = [2, 1, 4, 100]


def cut(samples: list[Sample], n: int) -> Batch:
    return collate(
        [
            replace(sample, answer_ids=sample.answer_ids[:n], foil_ids=(sample.foil_ids or ())[:n])
            for sample in samples
        ]
    )


def assert_as_if_cut(
    model: Any, samples: list[Sample], graph: Graph, within: float, cuts: list[int] = CUTS, **method: Any
) -> None:
    found = attribute_cuts(model, collate(samples), graph, cuts, **method)
    assert len(found) == len(cuts)
    for n, scores in zip(cuts, found, strict=True):
        expected = attribute(model, cut(samples, n), graph, **method)
        assert relative_error(scores.rows, expected.rows) < within
        assert relative_error(scores.loss, expected.loss) < within


@pytest.fixture(params=[False, True], ids=["own-passes", "one-pass"])
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lengths would say: a forward pass for each, or one for all."""
    monkeypatch.setattr(
        "eaptk.attribution.share_passes",
        lambda lengths: [sorted(lengths)] if request.param else [[cut] for cut in sorted(lengths)],
    )


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_each_cut_scores_as_samples_with_cut_answers(name: str, granularity: str) -> None:
    model = tiny_model(name)
    assert_as_if_cut(model, tiny_samples(4), Graph.from_model(model, granularity), 1e-12)


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_so_it_does_in_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny_model("qwen3", dtype)
    within = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    assert_as_if_cut(model, tiny_samples(4), Graph.from_model(model), within)


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_so_it_does_under_patching_with_any_loss(granularity: str, loss: str) -> None:
    model = tiny_model("gemma2")
    graph = Graph.from_model(model, granularity)
    assert_as_if_cut(model, tiny_samples(4), graph, 1e-12, ablation="patching", loss=loss)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_so_it_does_under_mean_ablation(granularity: str) -> None:
    model = tiny_model("gpt2")
    graph = Graph.from_model(model, granularity)
    means = source_means(model, [collate(tiny_samples(4))], graph)
    assert_as_if_cut(model, tiny_samples(4), graph, 1e-12, ablation="mean", means=means)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_memory_dials_do_not_change_a_bit(name: str, granularity: str, checkpoint: bool) -> None:
    model, batch = deep(name), collate(tiny_samples(4))
    graph = Graph.from_model(model, granularity)
    whole = attribute_cuts(model, batch, graph, CUTS, checkpoint=False)
    frugal = attribute_cuts(model, batch, graph, CUTS, checkpoint=checkpoint, flush_layers=2)
    for one, other in zip(whole, frugal, strict=True):
        assert torch.equal(one.rows, other.rows)


def test_one_cut_that_spares_all_is_the_batch_itself() -> None:
    model, batch = tiny_model("llama", torch.float32), collate(tiny_samples(4))
    graph = Graph.from_model(model, "head")
    (found,) = attribute_cuts(model, batch, graph, [100])
    assert torch.equal(found.rows, attribute(model, batch, graph).rows)


def test_passes_over_the_same_layers_again_keep_nothing_of_those_before() -> None:
    """Under checkpointing each backward pass runs layers anew; what it kept of them goes with it."""
    model = deep("llama", hidden_size=64, intermediate_size=160, max_position_embeddings=512)
    graph = Graph.from_model(model)
    batch = collate([Sample("long", (1,) * 400, (2,) * 8)])

    def peak(cuts: list[int]) -> int:
        return peak_bytes(lambda: attribute_cuts(model, batch, graph, cuts, checkpoint=True, flush_layers=1))

    once, often = peak([8]), peak([2, 3, 4, 5, 6, 7, 8])
    assert often < 1.35 * once


def test_passes_are_shared_where_that_makes_them_shorter_in_all() -> None:
    assert share_passes({3: 100, 10: 104, 30: 110}) == [[3, 10, 30]], "long prompts"
    assert share_passes({3: 13, 10: 110, 30: 410}) == [[3], [10], [30]], "long answers"
    assert share_passes({3: 500, 10: 505, 300: 1200}) == [[3, 10], [300]]


def test_a_batch_is_cut_as_its_samples_are() -> None:
    samples = tiny_samples(5)
    found, expected = cut_short(collate(samples), 2), cut(samples, 2)
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.targets, expected.targets)
    real = torch.arange(expected.ids.shape[1]) < expected.lengths[:, None]
    for name in ("ids", "corrupt_ids"):
        assert torch.equal(getattr(found, name)[real], getattr(expected, name)[real])


@pytest.mark.parametrize("cuts", [[], [0], [3, -1]], ids=str)
def test_cuts_that_are_none_are_refused(cuts: list[int]) -> None:
    model = tiny_model("llama")
    with pytest.raises(EaptkError, match=r"cuts are .*; give one or more numbers of tokens"):
        attribute_cuts(model, collate(tiny_samples(2)), Graph.from_model(model), cuts)


def test_a_loss_of_ones_own_is_not_cut() -> None:
    model = tiny_model("llama")
    with pytest.raises(EaptkError, match="under a named loss alone: one of nll, logit_diff, kl"):
        attribute_cuts(
            model,
            collate(tiny_samples(2)),
            Graph.from_model(model),
            [1],
            loss=lambda logits, batch: logits.sum((1, 2)),  # type: ignore[arg-type]
        )
