"""The contraction in plain PyTorch: the specification of every faster one, and where none of these can run.

For sample b, source row s and destination row d:

    S[b, s, d] = Σ_t ⟨G_d[t], O'_s[t] − O_s[t]⟩       over the sample's real tokens t

with O_s = z_s·W_O^s where a source comes as heads, and G_d = ∂L/∂H_d through d alone. From the gradient
u_d at the norm's output (u_d = g_d·W_d where it comes as heads), the norm's vector-Jacobian product is

    RMSNorm:    G = v − x̂⟨v, x̂⟩/D,              v = ρ γ⊙u
    LayerNorm:  G = v − x̂⟨v, x̂⟩/D − mean(v),    x̂ = (x − mean(x))ρ

γ and the removal of the mean are linear in W_d's rows, so they are folded into the weights once.

Tokens are taken in chunks whose expanded rows stay in cache: within a chunk every source is expanded
once, then destinations group by group, and each group is one matrix product with the sources it reads.
A group holds several layers to make that product worth its overhead; the few products with no edge
that this costs are dropped when rows are packed. Short samples of one length share a chunk.

Bits: a chunk's tokens depend on lengths and the number of sources alone, and a product on its group alone. So
destinations may come in several calls, cut where `group_starts` says, and the bits are the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from itertools import accumulate, groupby
from math import gcd

import torch
from torch import Tensor

from .operands import Destination, Norm, Source
from .tiles import cdiv

#: Elements of the scratch that holds one chunk's expanded rows: 32 MB in float32, about a last-level cache.
SCRATCH = 8 * 2**20
#: Fewest tokens a chunk holds, however wide the graph: with 16 weights are read more than they are multiplied.
MIN_TOKENS = 64
#: Destination rows a group is filled up to, of blocks and of heads: wide enough for vector units (18 heads a layer take
#: a fifth less time two layers at once), narrow enough to skip half the non-edges, and few layers' blocks to wait for.
GROUP_ROWS, GROUP_HEADS = 16, 32
#: Partial products a chunk is split into at most, added in order in float64: work for several threads, the same bits
#: for any number of them, and a third of the error of 8, as float32 adds up less of it.
SPLIT = 32


def contract(
    sources: Sequence[Source], destinations: Sequence[Destination], lengths: Sequence[int]
) -> Tensor:
    """Scores of every real edge of every sample.

    Args:
        sources: in order of writing; all with a replacement or none. Those that no destination reads are left
            alone.
        destinations: in order of reading; `reach` counts source rows and never decreases.
        lengths: [B], how many leading tokens of each sample are real.

    Returns:
        [B, n_edges] float32 (float64 if any operand is), packed by destination: each destination row's
        edges from its first source on.

    Raises:
        ValueError: shapes, devices or reaches do not fit together; the message names the operand.
    """
    check(sources, destinations, lengths)
    operands = [*(s.value for s in sources), *(d.gradient for d in destinations)]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in operands) else torch.float32
    device, width = operands[0].device, width_of(sources[0])

    chunk = chunk_tokens(sum(s.rows for s in sources), width)
    sources = read_by(sources, destinations)
    source_weights = [source_weight(s, dtype) for s in sources]
    groups = groups_of(destinations, dtype)
    n_sources = sum(s.rows for s in sources)
    group_rows = max(group.rows for group in groups)

    packs = _packs(lengths, chunk)
    most = max(min(chunk, length) * (samples.stop - samples.start) for samples, length in packs)
    source_scratch = torch.empty(n_sources * most * width, dtype=dtype, device=device)
    group_scratch = torch.empty(group_rows * most * width, dtype=dtype, device=device)
    behind_norm = max(reader.rows for group in groups for reader in group.readers)
    norm_scratch = torch.empty(behind_norm * most * width, dtype=dtype, device=device)
    real = torch.cat([group.real() for group in groups]).nonzero().flatten().to(device)
    scores = torch.empty(len(lengths), len(real), dtype=dtype, device=device)
    for samples, length in packs:
        n_samples = samples.stop - samples.start
        sums = [
            torch.zeros(n_samples, group.rows, group.reach, dtype=torch.float64, device=device)
            for group in groups
        ]
        even = cdiv(length, cdiv(length, chunk))  # chunks of one size, rather than a small last one
        for start in range(0, length, even):
            part = samples, slice(start, min(start + even, length))
            shape = (n_samples, part[1].stop - start, width)
            size = n_samples * shape[1] * width
            expanded = source_scratch[: n_sources * size].view(n_sources, *shape)
            row = 0
            for source, weight in zip(sources, source_weights, strict=True):
                _expand_source(source, weight, part, expanded[row : row + source.rows])
                row += source.rows
            for group, total in zip(groups, sums, strict=True):
                gradients = group_scratch[: group.rows * size].view(group.rows, *shape)
                row = 0
                for reader in group.readers:
                    spare = norm_scratch[: reader.rows * size].view(reader.rows, *shape)
                    reader.expand(part, gradients[row : row + reader.rows], spare)
                    row += reader.rows
                total += _product(gradients, expanded[: group.reach])
        scores[samples] = torch.cat([total.flatten(1) for total in sums], 1)[:, real]
    return scores if sources[0].replacement is not None else scores.neg_()


def chunk_tokens(n_sources: int, width: int) -> int:
    """Most tokens of a chunk."""
    return max(MIN_TOKENS, SCRATCH // ((n_sources + GROUP_ROWS) * width))


def _packs(lengths: Sequence[int], chunk: int) -> list[tuple[slice, int]]:
    """Neighbouring samples of one length that fill no more than a chunk together, and their length."""
    packs, first = [], 0
    for length, members in groupby(lengths):
        last = first + len(list(members))
        size = max(1, chunk // length)
        packs += [(slice(a, min(a + size, last)), length) for a in range(first, last, size)]
        first = last
    return packs


def read_by(sources: Sequence[Source], destinations: Sequence[Destination]) -> list[Source]:
    """The leading sources that any of the destinations reads."""
    reach = destinations[-1].reach
    ends = accumulate(source.rows for source in sources)
    return [source for source, end in zip(sources, ends, strict=True) if end - source.rows < reach]


def group_starts(destinations: Sequence[tuple[Hashable, int]]) -> list[int]:
    """The first destination of each group that is contracted in one product.

    Args:
        destinations: a key and the rows of each; neighbours of one key go back through their norm together.
    """
    starts, rows, index = [0], 0, 0
    enough = GROUP_HEADS if any(n > 1 for _, n in destinations) else GROUP_ROWS
    for _, members in groupby(destinations, key=lambda d: d[0]):
        if rows >= enough:
            starts.append(index)
            rows = 0
        counts = [n for _, n in members]
        rows += sum(counts)
        index += len(counts)
    return starts


class Reader:
    """Consecutive destinations behind one norm: their gradients go back through it together."""

    def __init__(self, members: Sequence[Destination], dtype: torch.dtype) -> None:
        self.members = members
        self.norm = members[0].norm
        self.rows = sum(member.rows for member in members)
        #: [B, T, 1], and the mean that goes before it; None without a norm.
        self.mean: Tensor | None = None
        self.rho: Tensor | None = None
        self._dtype = dtype
        if self.norm is not None:
            self.mean, self.rho = _statistics(self.norm, dtype)

    @cached_property
    def weight(self) -> Tensor | None:
        """[rows, head_dim, D], with the norm's gain, and the removal of the mean, folded in."""
        weights = [member.weight for member in self.members if member.weight is not None]
        if not weights:
            return None
        assert self.norm is not None
        folded = weights[0].new_empty(self.rows, *weights[0].shape[1:], dtype=self._dtype)
        shares = folded.split([member.rows for member in self.members])
        for share, weight in zip(shares, weights, strict=True):
            torch.mul(weight.to(self._dtype), self.norm.gain.to(self._dtype), out=share)
        if self.norm.centred:
            folded -= folded.mean(-1, keepdim=True)
        return folded

    def expand(self, part: tuple[slice, slice], out: Tensor, spare: Tensor) -> None:
        """Write G of a part of samples and tokens into out [rows, b, t, D]; spare is scratch of its shape."""
        norm = self.norm
        if norm is None:
            for row, member in zip(out, self.members, strict=True):
                row.copy_(member.gradient[part])
            return
        assert self.rho is not None
        rho = self.rho[part]
        normed = norm.stream[part].to(out.dtype)
        normed = (normed if self.mean is None else normed - self.mean[part]) * rho
        if self.weight is None:
            scale = rho * norm.gain.to(out.dtype)
            for row, member in zip(out, self.members, strict=True):
                torch.mul(member.gradient[part], scale, out=row)
            if norm.centred:
                out -= out.mean(-1, keepdim=True)
        else:
            narrow = torch.empty(
                *out.shape[1:3], self.rows, self.weight.shape[1], dtype=out.dtype, device=out.device
            )
            shares = narrow.split([member.rows for member in self.members], dim=2)
            for share, member in zip(shares, self.members, strict=True):
                torch.mul(member.gradient[part], rho.unsqueeze(-1), out=share)
            torch.bmm(narrow.flatten(0, 1).transpose(0, 1), self.weight, out=out.flatten(1, 2))
        # Into memory that is there: of a product made anew for each chunk page faults cost more than arithmetic.
        along = torch.mul(out, normed, out=spare).sum(-1, keepdim=True)
        out.addcmul_(along, normed, value=-1 / normed.shape[-1])


class Group:
    """Consecutive destinations contracted in one product."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = readers
        members = [member for reader in readers for member in reader.members]
        reaches = [member.reach for member in members for _ in range(member.rows)]
        self.reaches = torch.tensor(reaches, device="cpu")
        self.rows = len(self.reaches)
        self.reach = members[-1].reach

    def real(self) -> Tensor:
        """[rows·reach] bool: which products of the group are edges."""
        return (torch.arange(self.reach, device="cpu") < self.reaches[:, None]).flatten()


def _statistics(norm: Norm, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Mean (of a norm that removes it) and ρ, [B, T, 1]."""
    stream = norm.stream.to(dtype)
    mean = stream.mean(-1, keepdim=True) if norm.centred else None
    size = torch.linalg.vector_norm(stream if mean is None else stream - mean, dim=-1, keepdim=True)
    return mean, torch.rsqrt(size.square() / stream.shape[-1] + norm.eps)


def groups_of(destinations: Sequence[Destination], dtype: torch.dtype) -> list[Group]:
    keys = [i if d.norm is None else (id(d.norm), d.weight is None) for i, d in enumerate(destinations)]
    starts = group_starts([(key, d.rows) for key, d in zip(keys, destinations, strict=True)])
    groups = []
    for start, end in zip(starts, [*starts[1:], len(destinations)], strict=True):
        readers = groupby(range(start, end), key=lambda i: keys[i])
        groups.append(Group([Reader([destinations[i] for i in members], dtype) for _, members in readers]))
    return groups


def width_of(source: Source) -> int:
    return (source.value if source.weight is None else source.weight).shape[-1]


def source_weight(source: Source, dtype: torch.dtype) -> Tensor | None:
    if source.weight is None:
        return None
    weight = source.weight.to(dtype)
    return weight if source.gain is None else weight * source.gain.to(dtype)


def _expand_source(source: Source, weight: Tensor | None, part: tuple[slice, slice], out: Tensor) -> None:
    """Write O_s, or O'_s − O_s, of a part of samples and tokens into out [rows, b, t, D]."""
    value = source.value[part]
    if source.replacement is not None:
        value = source.replacement.expand_as(source.value)[part].to(out.dtype) - value.to(out.dtype)
    if weight is None:
        out[0].copy_(value)
    else:
        torch.bmm(value.to(out.dtype).flatten(0, 1).transpose(0, 1), weight, out=out.flatten(1, 2))


def _product(gradients: Tensor, expanded: Tensor) -> Tensor:
    """[n_d, b, t, D] × [n_s, b, t, D] → [b, n_d, n_s], summed over tokens and width."""
    n_samples = gradients.shape[1]
    parts = gcd(gradients[0, 0].numel(), SPLIT)
    left = gradients.view(len(gradients), n_samples * parts, -1).transpose(0, 1)
    right = expanded.reshape(len(expanded), n_samples * parts, -1).permute(1, 2, 0)
    return torch.bmm(left, right).unflatten(0, (n_samples, parts)).sum(1, dtype=torch.float64)


def check(sources: Sequence[Source], destinations: Sequence[Destination], lengths: Sequence[int]) -> None:
    if not sources or not destinations:
        raise ValueError("a contraction needs at least one source and one destination")
    batch, time = sources[0].value.shape[:2]
    width = width_of(sources[0])
    device = sources[0].value.device
    if len(lengths) != batch or not all(0 < length <= time for length in lengths):
        raise ValueError(f"lengths {list(lengths)} do not fit {batch} samples of at most {time} tokens")
    patched = sources[0].replacement is not None
    n_sources = 0
    for i, source in enumerate(sources):
        _check_operand(f"source {i}", source.value, source.weight, (batch, time), width, device)
        if (source.replacement is not None) != patched:
            raise ValueError(f"source {i}: either every source has a replacement or none")
        n_sources += source.rows
    reach = 1
    for i, destination in enumerate(destinations):
        name = f"destination {i}"
        _check_operand(name, destination.gradient, destination.weight, (batch, time), width, device)
        if not reach <= destination.reach <= n_sources:
            raise ValueError(
                f"{name}: reach {destination.reach} must not decrease nor exceed {n_sources} sources"
            )
        reach = destination.reach
        if destination.weight is not None and destination.norm is None:
            raise ValueError(f"{name}: a projection's weight needs the norm before it")
        if destination.norm is not None:
            norm = destination.norm
            _check_operand(f"{name}'s stream", norm.stream, None, (batch, time), width, device)
            if norm.gain.shape != (width,) or norm.gain.device != device:
                raise ValueError(
                    f"{name}'s gain: {tuple(norm.gain.shape)} on {norm.gain.device}, not ({width},) on {device}"
                )


def _check_operand(
    name: str, value: Tensor, weight: Tensor | None, lead: tuple[int, int], width: int, device: torch.device
) -> None:
    tail = (width,) if weight is None else tuple(weight.shape[:2])
    if tuple(value.shape) != (*lead, *tail) or (weight is not None and weight.shape[-1] != width):
        shape = None if weight is None else tuple(weight.shape)
        raise ValueError(
            f"{name}: shape {tuple(value.shape)} with weight {shape} does not fit {lead[0]} samples, "
            f"{lead[1]} tokens, width {width}"
        )
    if value.device != device or (weight is not None and weight.device != device):
        raise ValueError(f"{name}: on {value.device}, the first source on {device}")
