"""The contraction on a processor with wide vectors, compiled from csrc/: the reference's steps, fewer trips to memory.

A head is expanded, and goes back through its norm, while its rows are near the core, and what needs no change is
multiplied where it lies. What libraries of matrix products do worst is few rows with many, all of them long: 37 × 157
of 49,152 elements at half the rate of square products. Predicted for GPT-2 small's 27 GFLOP at head level: two thirds
of the reference's time. Measured, 2 cores: 0.6 to 0.7 of it, and 0.70 to 0.77 of five other shapes; block level, which
memory bounds, takes as long as before. `python -m benchmarks.floor --quick --parts passes` shows the contraction's
milliseconds, with `EAPTK_BACKEND=reference` the reference's.

Bits: of a score all additions are in one order, in float32 over four tokens at most and in double beyond, whatever
other edges, samples, chunks and threads there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eaptk import _native

from . import reference
from .operands import Destination, Source
from .tiles import cdiv

DTYPES = (torch.float32, torch.bfloat16)
#: What PyTorch's profiler, which sees its own operators alone, calls the compiled loops.
NAME = "eaptk::contract"


def takes(sources: Sequence[Source], destinations: Sequence[Destination]) -> bool:
    """Whether it was compiled for this processor, and for these operands' devices and dtypes."""
    held = [x for s in sources for x in (s.value, s.replacement) if x is not None]
    held += [d.gradient for d in destinations] + [d.norm.stream for d in destinations if d.norm is not None]
    return bool(_native.lanes()) and all(x.device.type == "cpu" and x.dtype in DTYPES for x in held)


def contract(
    sources: Sequence[Source],
    destinations: Sequence[Destination],
    lengths: Sequence[int],
    lanes: int | None = None,
) -> Tensor:
    """As `reference.contract`, of operands that it `takes`.

    Args:
        lanes: float32 numbers in a vector, one of those that the processor has; the most by default.
    """
    reference.check(sources, destinations, lengths)
    if lanes not in (None, *_native.lanes()):
        raise ValueError(f"no vectors of {lanes} here; there are those of {_native.lanes()}")
    width = reference.width_of(sources[0])
    chunk = reference.chunk_tokens(sum(s.rows for s in sources), width)
    sources = reference.read_by(sources, destinations)
    groups = reference.groups_of(destinations, torch.float32)
    addresses = _Addresses()
    given = [addresses.source(source) for source in sources]
    readers = [[addresses.reader(reader) for reader in group.readers] for group in groups]
    n_runs = min(chunk // _native.TOKENS, sum(cdiv(length, _native.TOKENS) for length in lengths))
    size = n_runs * _native.pitch(width)
    written = _float32(size * sum(source.rows for source in sources))
    gradients = _float32(size * max(group.rows for group in groups))
    normed = _float32(size * max(len(group.readers) for group in groups))

    n_products = sum(group.rows * group.reach for group in groups)
    real = torch.cat([group.real() for group in groups]).nonzero().flatten().cpu()
    scores = _float32(len(lengths), len(real))
    for samples in packs(lengths, chunk):
        sums = torch.zeros(samples.stop - samples.start, n_products, dtype=torch.float64, device="cpu")
        with torch.profiler.record_function(NAME):
            _native.contract(
                given,
                readers,
                samples.start,
                lengths[samples],
                width,
                written=written.data_ptr(),
                gradients=gradients.data_ptr(),
                normed=normed.data_ptr(),
                runs=n_runs,
                threads=torch.get_num_threads(),
                lanes=lanes or _native.lanes()[0],
                out=sums.data_ptr(),
            )
        scores[samples] = sums[:, real]
    return scores if sources[0].replacement is not None else scores.neg_()


def packs(lengths: Sequence[int], chunk: int) -> Iterator[slice]:
    """Neighbouring samples that fill no more than a chunk together, as all have sums of their own at one time."""
    first = tokens = 0
    for i, length in enumerate(lengths):
        if tokens and tokens + length > chunk:
            yield slice(first, i)
            first, tokens = i, 0
        tokens += length
    yield slice(first, len(lengths))


def _float32(*shape: int) -> Tensor:
    """Whatever the default dtype and device are."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


class _Addresses:
    """Operands as compiled code takes them, which knows only where they lie; they are held for as long as this is."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def source(self, source: Source) -> _native.Source:
        replacement = source.replacement
        if replacement is not None:
            replacement = replacement.expand_as(source.value)
        weight = self._weight(reference.source_weight(source, torch.float32))
        return _native.Source(self._operand(source.value), self._operand(replacement), weight, source.rows)

    def reader(self, reader: reference.Reader) -> _native.Reader:
        gradients = [
            _native.Gradient(self._operand(m.gradient), self._weight(m.weight), m.rows, m.reach)
            for m in reader.members
        ]
        norm, gain = reader.norm, None
        if norm is not None:
            width = len(norm.gain)
            gain = torch.nn.functional.pad(norm.gain.float(), (0, _native.padded(width) - width))
        return _native.Reader(
            gradients,
            self._operand(None if norm is None else norm.stream),
            mean=self._of(reader.mean),
            rho=self._of(reader.rho),
            n_tokens=reader.members[0].gradient.shape[1],
            gain=self._of(gain),
        )

    def _operand(self, x: Tensor | None) -> _native.Operand:
        """Of [samples, tokens, width] or [samples, tokens, rows, columns]."""
        if x is None:
            return _native.Operand(0, False, 0, 0, 0)
        x = x if x.stride(-1) == 1 else x.contiguous()
        sample, token, *row = x.stride()[:-1]
        return _native.Operand(self._of(x), x.dtype == torch.bfloat16, sample, token, row[0] if row else 0)

    def _weight(self, x: Tensor | None) -> _native.Weight:
        """Of [rows, head_dim, width]."""
        if x is None:
            return _native.Weight(0, 0, 0, 0, 0)
        x = x.float() if 1 in x.stride()[1:] else x.float().contiguous()
        return _native.Weight(self._of(x), x.shape[1], *x.stride())

    def _of(self, x: Tensor | None) -> int:
        if x is None:
            return 0
        self._held.append(x)
        return x.data_ptr()
