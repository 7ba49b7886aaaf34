"""What a contraction takes: sources and destinations as they leave the model, not yet expanded.

One operand stands for one node, or for all heads of one attention block. A head's output and a head's
input gradient are kept as they are before and after the projections, `head_dim` wide, with the weights
that expand them to the model width; the contraction expands them chunk by chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """The norm between the residual stream and a destination, x → x̂⊙γ (+β).

    RMSNorm: x̂ = xρ, ρ = (mean(x²) + ε)^(−1/2). LayerNorm (`centred`): the same of x − mean(x).

    Args:
        stream: [B, T, D], the residual stream the norm reads.
        gain: [D], γ.
        eps: ε.
    """

    stream: Tensor
    gain: Tensor
    eps: float
    centred: bool


@dataclass(frozen=True)
class Source:
    """What one node, or all heads of one block, wrote to the stream: O = `value`, or value[..., h, :] @ weight[h].

    Args:
        value: [B, T, D]; with `weight` [B, T, heads, head_dim].
        weight: [heads, head_dim, D], or None.
        gain: [D] multiplying the expanded output (a norm between projection and stream), or None.
        replacement: what `value` is replaced by, broadcastable to it; None stands for zero.
    """

    value: Tensor
    weight: Tensor | None = None
    gain: Tensor | None = None
    replacement: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of nodes."""
        return 1 if self.weight is None else len(self.weight)


@dataclass(frozen=True)
class Destination:
    """The loss's gradient through one node, or through all query, key or value heads of one block.

    `gradient` is taken at the residual stream (no `norm`), at the norm's output (`norm`), or at the
    output of the projection that follows the norm (`norm` and `weight`).

    Args:
        gradient: [B, T, D]; with `weight` [B, T, heads, head_dim].
        reach: number of source rows this destination reads: the first ones.
        weight: [heads, head_dim, D], the projection's rows, or None.
        norm: the norm to go back through, or None.
    """

    gradient: Tensor
    reach: int
    weight: Tensor | None = None
    norm: Norm | None = None

    @property
    def rows(self) -> int:
        """Number of nodes."""
        return 1 if self.weight is None else len(self.weight)
