"""The compiled contraction: right on any shape, with any vectors, and the same bits whatever runs beside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import relative_error
from test_kernels import by_definition
from torch import Tensor

from eaptk import _native
from eaptk.kernels import Destination, Norm, Source, contract, native, reference

LANES = _native.lanes()


def operands(
    n_samples: int,
    n_tokens: int,
    width: int,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    centred: bool = True,
    patched: bool = True,
    layers: int = 2,
) -> tuple[list[Source], list[Destination]]:
    """Layers of q, k, v and an MLP behind norms, and the logits behind none; W_O by columns, as nn.Linear has it."""
    generator = torch.Generator().manual_seed(width + heads)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def lead(*tail: int) -> Tensor:
        return random(n_samples, n_tokens, *tail)

    sources = [Source(lead(width), replacement=random(width) if patched else None)]
    destinations: list[Destination] = []
    for _ in range(layers):
        reach = sum(source.rows for source in sources)
        norm = Norm(lead(width), random(width), 1e-5, centred)
        for rows in (heads, max(1, heads // 2), max(1, heads // 2)):
            weight = random(rows, head_dim, width)
            destinations.append(Destination(lead(rows, head_dim), reach, weight, norm))
        weight = random(width, heads * head_dim).T.unflatten(0, (heads, head_dim))
        replacement = lead(heads, head_dim) if patched else None
        sources.append(Source(lead(heads, head_dim), weight, replacement=replacement))
        norm = Norm(lead(width), random(width), 1e-5, centred)
        destinations.append(Destination(lead(width), reach + heads, norm=norm))
        sources.append(Source(lead(width), replacement=lead(width) if patched else None))
    destinations.append(Destination(lead(width), sum(source.rows for source in sources)))
    return sources, destinations


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("lanes", LANES)
@given(
    width=st.sampled_from([16, 80, 96, 160, 252, 507, 512]),
    heads=st.sampled_from([1, 2, 7, 12]),
    head_dim=st.sampled_from([5, 16, 64, 80]),
    n_tokens=st.sampled_from([1, 2, 4, 67, 130]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    centred=st.booleans(),
    patched=st.booleans(),
)
def test_scores_are_the_definition(
    lanes: int,
    width: int,
    heads: int,
    head_dim: int,
    n_tokens: int,
    dtype: torch.dtype,
    centred: bool,
    patched: bool,
) -> None:
    given = operands(2, n_tokens, width, heads, head_dim, dtype=dtype, centred=centred, patched=patched)
    lengths = [n_tokens, max(1, n_tokens - 3)]
    assert native.takes(*given)
    assert relative_error(native.contract(*given, lengths, lanes), by_definition(*given, lengths)) < 1e-6


@pytest.mark.parametrize("lanes", LANES)
def test_the_bits_are_the_same_for_any_threads_neighbours_and_groups(lanes: int) -> None:
    sources, destinations = operands(5, 70, 80, 6, 16, layers=6)
    lengths = [70, 3, 41, 70, 9]
    together = native.contract(sources, destinations, lengths, lanes)
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        assert torch.equal(native.contract(sources, destinations, lengths, lanes), together)
    half = [native.contract(sources, part, lengths, lanes) for part in (destinations[:7], destinations[7:])]
    assert torch.equal(torch.cat(half, 1), together)
    for i, length in enumerate(lengths):
        alone = [one(each, i) for each in sources], [one(each, i) for each in destinations]
        assert torch.equal(native.contract(*alone, [length], lanes), together[i : i + 1])


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("tokens", [4, 8, 64])
def test_the_bits_are_the_same_however_tokens_and_destinations_are_cut(
    lanes: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, lengths = operands(4, 70, 80, 6, 16, layers=3), [70, 5, 66, 1]
    whole = native.contract(*given, lengths, lanes)
    monkeypatch.setattr(reference, "SCRATCH", 0)
    monkeypatch.setattr(reference, "MIN_TOKENS", tokens)
    monkeypatch.setattr(reference, "GROUP_HEADS", tokens)
    assert torch.equal(native.contract(*given, lengths, lanes), whole)
    assert relative_error(whole, by_definition(*given, lengths)) < 1e-6


def test_the_default_dtype_and_device_do_not_matter() -> None:
    given = operands(1, 8, 32, 2, 16)
    before = native.contract(*given, [8])
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(native.contract(*given, [8]), before)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(1,), (), (31,)])
def test_a_gain_of_another_width_is_named(shape: tuple[int, ...]) -> None:
    sources, destinations = operands(1, 8, 32, 2, 16)
    norm = Norm(torch.randn(1, 8, 32), torch.randn(shape), 1e-5, True)
    with pytest.raises(ValueError, match="destination 0's gain"):
        native.contract(sources, [Destination(torch.randn(1, 8, 32), 1, norm=norm), *destinations], [8])


def test_vectors_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match="no vectors of 3"):
        native.contract(*operands(1, 8, 32, 2, 16), [8], lanes=3)


def test_what_lies_behind_a_sample_does_not_matter() -> None:
    sources, destinations = operands(2, 9, 32, 2, 16)
    before = native.contract(sources, destinations, [9, 5])
    for source in sources:
        source.value[1, 5:] = torch.nan
    for destination in destinations:
        destination.gradient[1, 5:] = torch.nan
        if destination.norm is not None:
            destination.norm.stream[1, 5:] = torch.inf
    assert torch.equal(native.contract(sources, destinations, [9, 5]), before)


def test_it_runs_unasked_and_for_what_it_cannot_take_the_reference_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = operands(1, 8, 32, 2, 16)
    assert torch.equal(contract(*given, [8]), native.contract(*given, [8]))
    assert not torch.equal(contract(*given, [8]), contract(*given, [8], backend="reference"))
    half = operands(1, 8, 32, 2, 16, dtype=torch.float16)
    assert torch.equal(contract(*half, [8]), contract(*half, [8], backend="reference"))
    with pytest.raises(ValueError, match="no compiled loop for these operands"):
        contract(*half, [8], backend="native")
    monkeypatch.setenv("EAPTK_BACKEND", "reference")
    assert torch.equal(contract(*given, [8]), contract(*given, [8], backend="reference"))


def one(operand: Source | Destination, sample: int) -> Source | Destination:
    """The operand of one sample of the batch."""
    part = slice(sample, sample + 1)
    if isinstance(operand, Source):
        replacement = operand.replacement
        if replacement is not None and replacement.ndim > 1:
            replacement = replacement[part]
        return Source(operand.value[part], operand.weight, operand.gain, replacement)
    norm = operand.norm
    if norm is not None:
        norm = Norm(norm.stream[part], norm.gain, norm.eps, norm.centred)
    return Destination(operand.gradient[part], operand.reach, operand.weight, norm)
