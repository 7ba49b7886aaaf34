"""The field's names for a decoder's nodes, in order of writing and of reading.

Read by the processes of all tools, so it needs no package; `eaptk.graph` says the same for eaptk.
"""

from __future__ import annotations


def head_nodes(n_layers: int, n_heads: int, n_kv_heads: int) -> tuple[list[str], list[str]]:
    """Sources and destinations at head level, with q, k and v read separately."""
    sources, destinations = ["input"], []
    for layer in range(n_layers):
        sources += [f"a{layer}.h{head}" for head in range(n_heads)] + [f"m{layer}"]
        for branch, n in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads)):
            destinations += [f"a{layer}.h{head}<{branch}>" for head in range(n)]
        destinations.append(f"m{layer}")
    return sources, [*destinations, "logits"]


def block_nodes(n_layers: int, qkv: str) -> tuple[list[str], list[str]]:
    """Sources and destinations at block level, with q, k and v ``"split"`` or ``"merged"``."""
    sources, destinations = ["input"], []
    for layer in range(n_layers):
        sources += [f"a{layer}", f"m{layer}"]
        branches = [f"a{layer}<{branch}>" for branch in "qkv"]
        destinations += [*(branches if qkv == "split" else [f"a{layer}"]), f"m{layer}"]
    return sources, [*destinations, "logits"]
