"""What cards can do by their spec sheets, and the shares of it that plans assume. Nothing here was measured."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from eaptk.errors import EaptkError

#: Assumed share of the spec sheet's rate of products that a model's own passes reach …
PASSES = 0.5
#: … that expansion and contraction reach (the line `benchmarks.gpu` holds the head kernel to) …
PRODUCTS = 0.6
#: … and of its bandwidth that reading operands reaches (the line it holds the block kernel to).
COPIES = 0.8


@dataclass(frozen=True)
class Card:
    """One accelerator.

    Args:
        memory: bytes.
        bandwidth: bytes a second of its memory.
        half, single: FLOPs a second of dense products in bfloat16, and in float32 without tf32.
        source: where the figures stand.
    """

    name: str
    memory: int
    bandwidth: float
    half: float
    single: float
    source: str

    def rate(self, itemsize: int) -> float:
        """FLOPs a second with elements of so many bytes."""
        return self.half if itemsize < 4 else self.single


CARDS = {
    card.name: card
    for card in (
        Card("A100-80GB", 80 * 10**9, 2.039e12, 312e12, 19.5e12, "NVIDIA A100 datasheet, SXM"),
        Card("H100", 80 * 10**9, 3.35e12, 989e12, 67e12, "NVIDIA H100 datasheet, SXM"),
        Card("H200", 141 * 10**9, 4.8e12, 989e12, 67e12, "NVIDIA H200 datasheet, SXM"),
        Card("B200", 180 * 10**9, 8.0e12, 2250e12, 75e12, "NVIDIA HGX B200 datasheet, an eighth of it"),
        Card("MI300X", 192 * 10**9, 5.3e12, 1307e12, 163e12, "AMD Instinct MI300X datasheet"),
        Card("cpu", 16 * 10**9, 20e9, 0.2e12, 0.2e12, "nominal: two cores, 3 GHz, 32 FLOPs a cycle"),
    )
}


def find_card(name: str) -> Card:
    """A card by name, whatever its case.

    Raises:
        EaptkError: there is none of that name.
    """
    known = {card.lower(): card for card in CARDS}
    if name.lower() in known:
        return CARDS[known[name.lower()]]
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {known[close[0]]!r}?" if close else ""
    raise EaptkError(f"no card named {name!r}; known: {', '.join(CARDS)}{hint}")
