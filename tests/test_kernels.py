"""The contraction against its definition, written out in float64 on the same operands."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import relative_error
from tiny import NAMES, tiny_batch, tiny_model
from torch import Tensor

from eaptk import Graph
from eaptk.capture import Capture, frozen
from eaptk.kernels import Destination, Norm, Source, contract
from eaptk.passes import sample_losses
from eaptk.sites import Sites

HEADS, HEAD_DIM, WIDTH = 3, 5, 12


def by_definition(sources: list[Source], destinations: list[Destination], lengths: list[int]) -> Tensor:
    """[B, n_edges] = Σ_t ⟨G, O' − O⟩, everything expanded, autograd for the norms, no chunks."""
    written = [o for source in sources for o in expanded_source(source)]
    rows = []
    for b, length in enumerate(lengths):
        row = []
        for destination in destinations:
            for gradient in expanded_destination(destination):
                row += [(gradient[b, :length] * o[b, :length]).sum() for o in written[: destination.reach]]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def expanded_source(source: Source) -> list[Tensor]:
    value = source.value.double()
    value = -value if source.replacement is None else source.replacement.double() - value
    if source.weight is None:
        return [value]
    gain = 1 if source.gain is None else source.gain.double()
    return [value[..., h, :] @ source.weight[h].double() * gain for h in range(source.rows)]


def expanded_destination(destination: Destination) -> list[Tensor]:
    gradient, weight, norm = destination.gradient.double(), destination.weight, destination.norm
    if norm is None:
        return [gradient]
    at_norm = (
        [gradient]
        if weight is None
        else [gradient[..., h, :] @ weight[h].double() for h in range(len(weight))]
    )
    stream = norm.stream.double().requires_grad_()
    centred = stream - stream.mean(-1, keepdim=True) if norm.centred else stream
    output = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.gain.double()
    return [torch.autograd.grad(output, stream, u, retain_graph=True)[0] for u in at_norm]


def operands(
    n_samples: int, n_tokens: int, dtype: torch.dtype, centred: bool, patched: bool, seed: int = 0
) -> tuple[list[Source], list[Destination]]:
    """Two layers' worth of every kind of operand, with strides as models hand them over."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def lead(*tail: int) -> Tensor:
        return random(n_samples, n_tokens, *tail)

    def source(*tail: int, **fields: Tensor) -> Source:
        return Source(lead(*tail), replacement=lead(*tail) if patched else None, **fields)

    def norm() -> Norm:
        return Norm(lead(WIDTH), random(WIDTH), 1e-5, centred)

    transposed = random(WIDTH, HEADS * HEAD_DIM).T.unflatten(0, (HEADS, HEAD_DIM))
    interleaved = lead(HEADS, 3, HEAD_DIM)
    sources = [
        source(WIDTH),
        source(HEADS, HEAD_DIM, weight=transposed),
        source(WIDTH),
        source(HEADS, HEAD_DIM, weight=random(HEADS, HEAD_DIM, WIDTH), gain=random(WIDTH)),
    ]
    destinations = [
        Destination(lead(WIDTH), 1, norm=norm()),
        Destination(interleaved[:, :, :, 1], 4, random(HEADS, HEAD_DIM, WIDTH), norm()),
        Destination(lead(WIDTH), 5),
        Destination(lead(HEADS, HEAD_DIM), 5, transposed, norm()),
        Destination(lead(WIDTH), 8),
    ]
    return sources, destinations


@pytest.mark.parametrize("patched", [False, True], ids=["zero", "patched"])
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
    ids=["float64", "float32", "bfloat16", "float16"],
)
def test_scores_are_the_definition_on_the_same_operands(
    dtype: torch.dtype, bound: float, centred: bool, patched: bool
) -> None:
    sources, destinations = operands(3, 21, dtype, centred, patched)
    lengths = [21, 1, 17]
    got = contract(sources, destinations, lengths)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(got, by_definition(sources, destinations, lengths)) < bound


@pytest.mark.parametrize("chunk", [16, 17, 64])
def test_the_size_of_a_chunk_changes_nothing_but_rounding(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, destinations = operands(2, 70, torch.float64, centred=False, patched=False)
    n_rows = sum(s.rows for s in sources) + sum(d.rows for d in destinations)
    monkeypatch.setattr("eaptk.kernels.reference.SCRATCH", n_rows * WIDTH * chunk)
    got = contract(sources, destinations, [70, 33])
    assert relative_error(got, by_definition(sources, destinations, [70, 33])) < 1e-13


@given(rows=st.integers(1, 40))
def test_grouping_of_destinations_changes_nothing_but_rounding(rows: int) -> None:
    sources, destinations = operands(1, 9, torch.float64, centred=True, patched=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eaptk.kernels.reference.GROUP_ROWS", rows)
        got = contract(sources, destinations, [9])
    assert relative_error(got, by_definition(sources, destinations, [9])) < 1e-13


def test_padding_is_never_read() -> None:
    sources, destinations = operands(2, 12, torch.float32, centred=False, patched=False)
    clean = contract(sources, destinations, [12, 5])
    for operand in (*(s.value for s in sources), *(d.gradient for d in destinations)):
        operand[1, 5:] = float("nan")
    assert torch.equal(contract(sources, destinations, [12, 5]), clean)


def test_the_same_operands_give_the_same_bits_on_any_number_of_threads() -> None:
    sources, destinations = operands(2, 64, torch.float32, centred=True, patched=False)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            results.append(contract(sources, destinations, [64, 50]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, d: (s[0].value.resize_(2, 8, WIDTH + 1), None), "width"),
        (lambda s, d: d.__setitem__(0, Destination(d[0].gradient, 9)), "reach 9"),
        (lambda s, d: s.__setitem__(1, Source(s[1].value, s[1].weight, replacement=s[1].value)), "source 1"),
        (lambda s, d: d.__setitem__(1, Destination(d[1].gradient, 4, d[1].weight)), "needs the norm"),
    ],
    ids=["width", "reach", "half-patched", "no-norm"],
)
def test_operands_that_do_not_fit_are_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    sources, destinations = operands(2, 8, torch.float32, centred=False, patched=False)
    change(sources, destinations)
    with pytest.raises(ValueError, match=message):
        contract(sources, destinations, [8, 8])


def test_lengths_must_fit_the_tokens() -> None:
    sources, destinations = operands(2, 8, torch.float32, centred=False, patched=False)
    with pytest.raises(ValueError, match="lengths"):
        contract(sources, destinations, [8, 9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("granularity", ["block", "head"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_models_lose_nothing_in_the_contraction(
    name: str, granularity: str, dtype: torch.dtype
) -> None:
    model, batch = tiny_model(name, dtype), tiny_batch()
    sites = Sites(model, Graph.from_model(model, granularity))
    with frozen(model), Capture(sites, gradients=True) as run:
        loss = sample_losses(model, sites, batch)
        run.backward(loss.sum() * 2**12)
    operands = run.sources(), run.destinations(), batch.lengths.tolist()
    assert relative_error(contract(*operands), by_definition(*operands)) < 1e-5
