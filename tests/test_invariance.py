"""A sample's row is its own: neighbours, order, batch size and padding do not touch it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import NAMES, VOCABULARY, tiny_model, tiny_samples
from torch import Tensor, nn

from eaptk import Batch, Graph, Sample, attribute, collate

# One model of each kind of mask, position and norm.
MODELS = ["mistral-window", "qwen2", "gpt2", "gpt_neox", "gemma2"]
models_and_granularities = st.tuples(st.sampled_from(MODELS), st.sampled_from(["block", "head"]))
methods = st.sampled_from(
    [
        {"ablation": "zero"},
        {"ablation": "patching"},
        {"ablation": "zero", "loss": "logit_diff"},
        {"ablation": "patching", "loss": "kl"},
    ]
)
seeds = st.integers(0, 1000)

model_of: Callable[[str], nn.Module] = cache(lambda name: tiny_model(name, torch.float32))


def graph_of(name: str, granularity: str) -> Graph:
    return Graph.from_model(model_of(name), granularity)


def rows(name: str, granularity: str, batch: Batch | dict[str, Tensor], **options: str) -> Tensor:
    return attribute(model_of(name), batch, graph_of(name, granularity), **options).rows


def assert_same_rows(found: Tensor, expected: Tensor) -> None:
    distance = (found - expected).double().norm(dim=-1) / expected.double().norm(dim=-1)
    assert found.shape == expected.shape
    assert float(distance.max()) < 1e-5


@given(models_and_granularities, seeds, methods)
def test_a_row_is_the_same_alone_and_among_eight(
    which: tuple[str, str], seed: int, method: dict[str, str]
) -> None:
    samples = tiny_samples(8, seed, shortest=3)
    together = rows(*which, collate(samples), **method)
    alone = [rows(*which, collate([sample]), **method) for sample in samples]
    assert_same_rows(together, torch.cat(alone))


@given(models_and_granularities, seeds, st.permutations(range(5)))
def test_order_permutes_the_rows_and_nothing_else(
    which: tuple[str, str], seed: int, order: list[int]
) -> None:
    samples = tiny_samples(5, seed, shortest=3)
    expected = rows(*which, collate(samples))[order]
    assert_same_rows(rows(*which, collate([samples[i] for i in order])), expected)


@given(models_and_granularities, seeds, seeds, st.integers(0, 30))
def test_neighbours_and_how_far_they_stretch_the_batch_do_not_matter(
    which: tuple[str, str], seed: int, other_seed: int, stretch: int
) -> None:
    (sample,) = tiny_samples(1, seed)
    neighbours = tiny_samples(2, other_seed)
    longest = Sample("longest", prompt_ids=(1,) * (12 + stretch), answer_ids=(2, 3))
    batch = collate([_without_extras(s) for s in (neighbours[0], sample, neighbours[1], longest)])
    assert_same_rows(rows(*which, batch)[1:2], rows(*which, collate([sample])))


def _without_extras(sample: Sample) -> Sample:
    return Sample(sample.id, sample.prompt_ids, sample.answer_ids)


@st.composite
def tokenized(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Sequences of different lengths, and how much padding each gets beyond what the longest needs."""
    sequences = draw(
        st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=10), min_size=1, max_size=4)
    )
    return sequences, draw(st.integers(0, 5))


def padded(sequences: list[list[int]], extra: int, side: str, filler: int) -> dict[str, Tensor]:
    width = max(map(len, sequences)) + extra
    ids = torch.full((len(sequences), width), filler)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


@given(models_and_granularities, tokenized(), st.integers(0, VOCABULARY - 1))
def test_padding_on_either_side_and_of_any_token_scores_nothing(
    which: tuple[str, str], texts: tuple[list[list[int]], int], filler: int
) -> None:
    sequences, extra = texts
    alone = torch.cat([rows(*which, {"input_ids": torch.tensor([sequence])}) for sequence in sequences])
    for side in ("left", "right"):
        assert_same_rows(rows(*which, padded(sequences, extra, side, filler)), alone)


@given(models_and_granularities, seeds, methods)
def test_the_same_batch_twice_gives_the_same_bits(
    which: tuple[str, str], seed: int, method: dict[str, str]
) -> None:
    batch = collate(tiny_samples(4, seed))
    assert torch.equal(rows(*which, batch, **method), rows(*which, batch, **method))


@pytest.mark.parametrize("granularity", ["block", "head"])
@pytest.mark.parametrize("name", NAMES)
def test_one_token_is_a_sequence_too(name: str, granularity: str) -> None:
    shortest = Sample("shortest", prompt_ids=(5,), answer_ids=(7,))
    longer = Sample("longer", prompt_ids=(3, 4, 5, 6), answer_ids=(7, 8))
    batch = collate([shortest, longer])
    assert_same_rows(rows(name, granularity, batch)[:1], rows(name, granularity, collate([shortest])))
