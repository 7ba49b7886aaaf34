"""Which tiles of S[destination, source] hold an edge, and how the sum over tokens is cut. Pure arithmetic.

Launchers and the traffic model (`cost`) read the same functions, so what is counted is what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: A piece of a sum is long enough that writing its partial result costs little beside reading its operands …
MIN_INNER = 4096
#: … and short enough that a float32 accumulator loses nothing on the way.
MAX_INNER = 32768
#: Pieces a sequence is cut into when neither bound binds: work for every multiprocessor.
PIECES = 256
#: Bytes of scratch that one chunk's expanded sources fill, about; destinations take as much again, thrice at most.
SCRATCH = 112 * 2**20
#: A chunk has whole tiles of the expansion, one at least.
CHUNK_COLUMNS = 128
CHUNK_TOKENS = 64


class Tile(NamedTuple):
    """One tile of S: destination rows from `destination` on (may be negative: masked), source rows from `source` on."""

    destination: int
    source: int


class Piece(NamedTuple):
    """Leading token and number of tokens of one partial sum of one sample."""

    sample: int
    start: int
    tokens: int


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tiles(reach: Sequence[int], block_d: int, widths: Sequence[int]) -> dict[int, list[Tile]]:
    """Tiles that hold an edge, by width, those of one destination block together.

    Args:
        reach: [n_destinations], how many leading sources each reads; never decreases.
        widths: tile widths in sources, widest first: a block's sources are covered by the widest tiles that they
            fill, and the rest by the narrowest.
    """
    # The block that is not full comes first, where destinations read few sources, so padding costs least.
    first = -(-len(reach) % block_d)
    found: dict[int, list[Tile]] = {width: [] for width in widths}
    for d in range(first, len(reach), block_d):
        s, last = 0, reach[min(d + block_d, len(reach)) - 1]
        while s < last:
            width = next((w for w in widths if s + w <= last), widths[-1])
            found[width].append(Tile(d, s))
            s += width
    return {width: members for width, members in found.items() if members}


def pieces(lengths: Sequence[int], width: int) -> list[Piece]:
    """Every sample's tokens in order. How a sample is cut depends on its own length alone, so its bits do too."""
    found = []
    for sample, length in enumerate(lengths):
        tokens = max(cdiv(MIN_INNER, width), cdiv(length, PIECES))
        tokens = min(tokens, max(1, MAX_INNER // width))
        found += [Piece(sample, start, min(tokens, length - start)) for start in range(0, length, tokens)]
    return found


class HeadPlan(NamedTuple):
    """How a sample is expanded: `tokens` × `columns` a chunk, of whose product one split sums `part`."""

    tokens: int
    columns: int
    part: int
    splits: int


def head_plan(n_sources: int, length: int, width: int, itemsize: int) -> HeadPlan:
    """The chunks for which least is read: weights once for each part of the tokens, what heads wrote and read once
    for each part of the columns, D to T of it.

    From the sample's own length and the number of all sources, so that neither its neighbours nor how destinations
    are split among calls change its bits.
    """
    units = cdiv(width, CHUNK_COLUMNS)
    room = SCRATCH // (n_sources * itemsize)
    plans = []
    for parts in (n for n in range(1, units + 1) if units % n == 0):
        columns = units // parts * CHUNK_COLUMNS
        fitting = room // columns // CHUNK_TOKENS * CHUNK_TOKENS
        if fitting or parts == units:
            tokens = min(even(length, max(CHUNK_TOKENS, fitting), CHUNK_TOKENS), cdiv(length, 16) * 16)
            plans.append((width * cdiv(length, tokens) + length * parts, tokens, columns))
    _, tokens, columns = min(plans)
    inner = tokens * columns
    part = even(inner, MIN_INNER, 128)
    return HeadPlan(tokens, columns, part, cdiv(inner, part))


def even(total: int, largest: int, multiple: int) -> int:
    """Size of the parts when `total` is cut into the fewest even ones of at most `largest`, a `multiple`."""
    part = cdiv(total, cdiv(total, largest))
    return cdiv(part, multiple) * multiple
