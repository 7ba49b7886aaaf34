"""The Triton kernels under Triton's interpreter, against the contraction's definition in float64.

The rule: a kernel's error may not exceed that of plain PyTorch in the same dtype plus a small allowance.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from oracle import relative_error
from test_kernels import by_definition
from tiny import tiny_batch, tiny_model
from torch import Tensor

from eaptk import Graph, attribute
from eaptk.attribution import Ablation
from eaptk.graph import Granularity
from eaptk.kernels import Destination, Norm, Source
from eaptk.kernels.block import contract_block
from eaptk.kernels.head import contract_head
from eaptk.kernels.tuning import ANY, BlockConfig, ExpandConfig, HeadConfig

#: What reordering a float32 sum may cost, and carrying a float32 value as two bfloat16 (16 bits).
ALLOWANCE = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-16, torch.float16: 2.0**-16}
#: Expanded rows are rounded to float16, in that dtype by plain PyTorch as well: of the two draws the kernel's may be
#: the unlucky one, by an eighth of its spacing.
EXPANDED_ALLOWANCE = {**ALLOWANCE, torch.float16: torch.finfo(torch.float16).eps / 8}
#: However far plain PyTorch is off.
MOST = 1e-3
DTYPES = pytest.mark.parametrize("dtype", ALLOWANCE, ids=["float32", "bfloat16", "float16"])
NAN = float("nan")


@dataclass
class Maker:
    """Random operands for samples of `lengths` tokens, padded with NaN; every lead stride is its own."""

    lengths: list[int]
    width: int
    dtype: torch.dtype
    centred: bool = False
    patched: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def lead(self, *tail: int) -> Tensor:
        # The gap of 2 leaves elements of a row apart, which the kernels take as a copy.
        gap = int(torch.randint(0, 3, (), generator=self.generator))
        batch, time, step = len(self.lengths), max(self.lengths), 1 + gap // 2
        whole = self.random(batch + 1, time + gap, *tail[:-1], step * tail[-1] + 8 * gap)
        tensor = whole[:batch, :time, ..., : step * tail[-1] : step]
        for row, length in zip(tensor, self.lengths, strict=True):
            row[length:] = NAN
        return tensor

    def source(self, heads: int = 0, head_dim: int = 0, gain: bool = False) -> Source:
        tail = (heads, head_dim) if heads else (self.width,)
        # As an output projection hands it over: the head's dimension is the contiguous one.
        weight = (
            self.random(self.width, heads * head_dim).T.unflatten(0, (heads, head_dim)) if heads else None
        )
        value, other = self.lead(*tail), self.lead(*tail) if self.patched else None
        return Source(value, weight, self.random(self.width) if gain else None, other)

    def norm(self) -> Norm:
        return Norm(self.lead(self.width) + 2, self.random(self.width), 1e-5, self.centred)

    def destination(
        self, reach: int, norm: Norm | None, heads: int = 0, head_dim: int = 0, transposed: bool = False
    ) -> Destination:
        if not heads:
            return Destination(self.lead(self.width), reach, None, norm)
        shape = (heads, self.width, head_dim) if transposed else (heads, head_dim, self.width)
        weight = self.random(*shape)
        return Destination(self.lead(heads, head_dim), reach, weight.mT if transposed else weight, norm)


def block_operands(make: Maker, n_sources: int, normed: bool) -> tuple[list[Source], list[Destination]]:
    """Sources one by one, read as layers read them: three destinations behind one norm, then one without."""
    destinations = []
    for reach in range(1, n_sources + 1, 2):
        norm = make.norm() if normed else None
        destinations += [make.destination(reach, norm) for _ in range(3)]
        destinations.append(make.destination(min(reach + 1, n_sources), None))
    destinations.append(make.destination(n_sources, None))
    return [make.source() for _ in range(n_sources)], destinations


def head_operands(
    make: Maker, heads: int, kv_heads: int, head_dim: int, layers: int = 2
) -> tuple[list[Source], list[Destination]]:
    """Layers of query, key and value heads that share a norm, and their output heads."""
    sources, destinations, reach = [make.source()], [], 1
    for layer in range(layers):
        norm = make.norm()
        for n in (heads, kv_heads, kv_heads):
            destinations.append(make.destination(reach, norm, n, head_dim, transposed=layer == 1))
        sources += [make.source(heads, head_dim, gain=layer == 1), make.source()]
        destinations.append(make.destination(reach + heads, norm if layer == 1 else None))
        reach += heads + 1
    return sources, [*destinations, make.destination(reach, None)]


def plain(sources: list[Source], destinations: list[Destination], lengths: list[int]) -> Tensor:
    """Plain PyTorch in the operands' dtype: expand, back through the norm, multiply, sum in float32."""

    def written(value: Tensor, source: Source) -> list[Tensor]:
        if source.weight is None:
            return [value]
        gain = 1 if source.gain is None else source.gain
        return [value[..., h, :] @ source.weight[h] * gain for h in range(source.rows)]

    def read(destination: Destination) -> list[Tensor]:
        gradient, weight, norm = destination.gradient, destination.weight, destination.norm
        if norm is None:
            return [gradient]
        stream = norm.stream.detach().requires_grad_()
        wide = stream.float()
        centred = wide - wide.mean(-1, keepdim=True) if norm.centred else wide
        normed = centred * (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        output = normed.to(stream.dtype) * norm.gain
        at_norm = (
            [gradient] if weight is None else [gradient[..., h, :] @ weight[h] for h in range(len(weight))]
        )
        return [torch.autograd.grad(output, stream, u, retain_graph=True)[0] for u in at_norm]

    outputs = []
    for source in sources:
        clean = written(source.value, source)
        if source.replacement is None:
            outputs += [-o for o in clean]
        else:
            outputs += [new - o for new, o in zip(written(source.replacement, source), clean, strict=True)]
    gradients = [(g, d.reach) for d in destinations for g in read(d)]
    rows = []
    for b, n in enumerate(lengths):
        stack = torch.stack([o[b, :n].float().flatten() for o in outputs])
        rows.append(torch.cat([stack[:reach] @ g[b, :n].float().flatten() for g, reach in gradients]))
    return torch.stack(rows)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles of S at small sizes, and an interpreter in less of a hurry to multiply zeros."""
    configs = {
        "BLOCK": BlockConfig(16, 16, 32, 1, 1),
        "HEAD": HeadConfig(16, (32, 16), 256, 1, 1),
        "EXPAND": ExpandConfig(16, 128, 64, 1),
    }
    for table, config in configs.items():
        monkeypatch.setattr(f"eaptk.kernels.tuning.{table}", [(ANY, ANY, ANY, config)])


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory handed out by torch.empty holds NaN: what a kernel leaves unwritten and uses is found out."""
    empty = torch.empty

    def full_of_nan(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return empty(*size, dtype=dtype, device=device).fill_(NAN if dtype.is_floating_point else 100)

    for module in ("block", "head", "norm", "scale"):
        monkeypatch.setattr(f"eaptk.kernels.{module}.torch.empty", full_of_nan)


def check_against_float64(
    sources: list[Source],
    destinations: list[Destination],
    lengths: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = by_definition(sources, destinations, lengths)
    allowed = relative_error(plain(sources, destinations, lengths), expected)
    poisoned(monkeypatch)
    by_head = any(source.weight is not None for source in sources)
    got = (contract_head if by_head else contract_block)(sources, destinations, lengths)
    assert got.dtype == torch.float32
    allowance = EXPANDED_ALLOWANCE if by_head else ALLOWANCE
    assert relative_error(got, expected) <= min(MOST, allowed + allowance[sources[0].value.dtype])


BLOCK_SHAPES = ("width", "n_sources", "lengths", "normed", "centred", "patched")
HEAD_SHAPES = ("width", "heads", "kv_heads", "head_dim", "lengths", "centred", "patched")


@DTYPES
@pytest.mark.parametrize(
    BLOCK_SHAPES,
    [
        (80, 1, [1], False, False, False),
        (96, 65, [2], True, False, False),
        (507, 3, [1, 2], True, True, True),
    ],
)
def test_block_level_scores_are_as_good_as_plain_pytorch(
    dtype: torch.dtype,
    width: int,
    n_sources: int,
    lengths: list[int],
    normed: bool,
    centred: bool,
    patched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = Maker(lengths, width, dtype, centred, patched)
    check_against_float64(*block_operands(make, n_sources, normed), lengths, monkeypatch)


@DTYPES
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    BLOCK_SHAPES,
    [
        (16, 3, [2, 7], True, False, False),
        (160, 9, [5, 1, 2], False, False, True),
        (252, 9, [1], True, True, False),
        (80, 130, [1], False, False, False),
    ],
)
def test_block_level_scores_of_many_tiles_are_as_good_as_plain_pytorch(
    dtype: torch.dtype,
    width: int,
    n_sources: int,
    lengths: list[int],
    normed: bool,
    centred: bool,
    patched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = Maker(lengths, width, dtype, centred, patched)
    check_against_float64(*block_operands(make, n_sources, normed), lengths, monkeypatch)


@DTYPES
@pytest.mark.parametrize(HEAD_SHAPES, [(80, 4, 4, 64, [1], False, False), (160, 7, 1, 96, [3], True, True)])
def test_head_level_scores_are_as_good_as_plain_pytorch(
    dtype: torch.dtype,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: list[int],
    centred: bool,
    patched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = Maker(lengths, width, dtype, centred, patched)
    check_against_float64(*head_operands(make, heads, kv_heads, head_dim), lengths, monkeypatch)


@DTYPES
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    HEAD_SHAPES,
    [
        (32, 2, 2, 80, [2, 7], True, False),
        (252, 8, 1, 128, [2], False, False),
        (507, 4, 1, 64, [1], True, True),
        (96, 2, 1, 256, [19], False, True),
    ],
)
def test_head_level_scores_of_many_tiles_are_as_good_as_plain_pytorch(
    dtype: torch.dtype,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: list[int],
    centred: bool,
    patched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = Maker(lengths, width, dtype, centred, patched)
    check_against_float64(
        *head_operands(make, heads, kv_heads, head_dim, layers=2 if width < 200 else 1), lengths, monkeypatch
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("length", "normed"), [(127, True), (513, False)])
def test_a_long_sample_is_summed_in_pieces(
    length: int, normed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker([length], 20, torch.bfloat16)
    check_against_float64(*block_operands(make, 2, normed), make.lengths, monkeypatch)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("length", "heads"), [(127, 2), (513, 1)])
def test_a_long_sample_is_expanded_in_chunks(
    length: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eaptk.kernels.tiles.SCRATCH", 2**15)
    monkeypatch.setattr("eaptk.kernels.tiles.CHUNK_COLUMNS", 32)
    make = Maker([length], 40, torch.bfloat16)
    check_against_float64(*head_operands(make, heads, 1, 16, layers=1), make.lengths, monkeypatch)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("written", "read"), [(1e4, 1e-4), (1e-4, 1e4), (1.0, 0.0)])
def test_head_level_scores_keep_their_digits_whatever_the_size_of_values_and_gradients(
    dtype: torch.dtype, written: float, read: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.bfloat16:
        written, read = written**4, read**4
    make = Maker([5, 3], 96, dtype)
    sources, destinations = head_operands(make, 2, 1, 32)
    sources = [replace(s, value=s.value * written) for s in sources]
    destinations = [replace(d, gradient=d.gradient * read) for d in destinations]
    expected = by_definition(sources, destinations, make.lengths)
    poisoned(monkeypatch)
    got = contract_head(sources, destinations, make.lengths)
    assert (got - expected).norm() <= MOST * expected.norm()


def two_layers(by_head: bool) -> tuple[list[Source], list[Destination], Callable[..., Tensor]]:
    """Operands of two samples of 5 and 3 tokens, and the kernel that takes them."""
    make = Maker([5, 3], 80, torch.bfloat16, centred=True)
    if by_head:
        return *head_operands(make, 2, 1, 16), contract_head
    return *block_operands(make, 5, normed=True), contract_block


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("by_head", [False, True], ids=["block", "head"])
def test_a_samples_bits_do_not_depend_on_its_neighbours(by_head: bool) -> None:
    sources, destinations, kernel = two_layers(by_head)
    together = kernel(sources, destinations, [5, 3])

    def only(tensor: Tensor) -> Tensor:
        return tensor[1:, :3]

    alone = kernel(
        [replace(s, value=only(s.value)) for s in sources],
        [
            replace(d, gradient=only(d.gradient), norm=d.norm and replace(d.norm, stream=only(d.norm.stream)))
            for d in destinations
        ],
        [3],
    )
    assert torch.equal(together[1:], alone)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("by_head", [False, True], ids=["block", "head"])
def test_bits_do_not_depend_on_how_destinations_are_split_among_calls(by_head: bool) -> None:
    sources, destinations, kernel = two_layers(by_head)
    whole = kernel(sources, destinations, [5, 3])
    parts = [kernel(sources, part, [5, 3]) for part in (destinations[:4], destinations[4:])]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_a_mean_of_another_dtype_stands_in_for_every_token() -> None:
    make = Maker([5, 3], 96, torch.bfloat16)
    sources, destinations = head_operands(make, 2, 1, 64, layers=1)
    means = [torch.randn(s.value.shape[2:], generator=make.generator) for s in sources]
    sources = [
        replace(s, replacement=mean.expand_as(s.value)) for s, mean in zip(sources, means, strict=True)
    ]
    got = contract_head(sources, destinations, [5, 3])
    assert relative_error(got, by_definition(sources, destinations, [5, 3])) < MOST


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("family", "ablation", "granularity"),
    [
        ("qwen2", "zero", "block"),
        ("qwen2", "patching", "head"),
        ("gpt2", "patching", "block"),
        ("gpt2", "zero", "head"),
        ("gemma2", "patching", "head"),
        ("gpt_neox", "zero", "head"),
    ],
)
def test_attribution_takes_the_kernels_as_it_takes_the_reference(
    family: str, ablation: Ablation, granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, dtype=torch.float32)
    graph, batch = Graph.from_model(model, granularity=granularity), tiny_batch(2)
    expected = attribute(model, batch, graph, ablation=ablation).rows
    monkeypatch.setenv("EAPTK_BACKEND", "triton")
    assert relative_error(attribute(model, batch, graph, ablation=ablation).rows, expected.double()) < 1e-5


def test_importing_eaptk_imports_no_triton() -> None:
    script = "import sys, eaptk; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script]).returncode == 0
