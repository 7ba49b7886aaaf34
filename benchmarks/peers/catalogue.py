"""The peers: what each computes, and what it is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.peers.client import Form

HEAD = {"granularity": "head", "qkv": "split", "ablation": "patching", "gradient_on": "clean"}


@dataclass(frozen=True)
class Peer:
    """A tool beside eaptk.

    Args:
        tool: its module in tools/.
        what: in a few words, for the table.
        form: what it computes, and hence what eaptk is asked for beside it.
        environment: whose requirements it runs with; None: eaptk's own.
    """

    tool: str
    what: str
    form: Form
    environment: str | None


PEERS = {
    "transformer-lens-4": Peer(
        "transformer_lens_bridge",
        "its attribution_patch, edges",
        # It takes the gradient on the prompt it patches from clean to corrupt, and calls that one corrupt.
        {**HEAD, "gradient_on": "corrupt"},
        "transformer-lens-4",
    ),
    "transformer-lens-2": Peer(
        "transformer_lens_plain", "plain EAP, an einsum a destination", HEAD, "transformer-lens-2"
    ),
    "auto-circuit": Peer("auto_circuit_gradient", "its mask gradients", HEAD, "auto-circuit"),
    "nnsight": Peer("nnsight_plain", "plain EAP, an einsum a destination", HEAD, "nnsight"),
    "nnsight-block": Peer("nnsight_plain", "the same, blocks", {**HEAD, "granularity": "block"}, "nnsight"),
    "captum": Peer(
        "captum_layers",
        "its layer gradients, blocks, q k v merged: it tells neither heads nor branches apart",
        {**HEAD, "granularity": "block", "qkv": "merged"},
        "captum",
    ),
    "dense": Peer("dense_einsum", "hooks and einsums on Hugging Face", {**HEAD, "ablation": "zero"}, None),
}
