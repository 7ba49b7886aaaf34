"""Models and batches that are measured.

Widths, heads and inner widths are those of published configs. Depth and vocabulary are cut to what the machine does in
seconds: a batch's bare passes grow with the depth and head level's contraction with its square, so of a shallower model
the ratio is lower, and each result has what FLOPs alone would make of it here and at full depth beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from benchmarks.exact import float64_throughout
from eaptk import Batch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Of all models: logits of 152,064 are a third of a shallow one's time, and no affair of attribution.
VOCABULARY = 8192


@dataclass(frozen=True)
class Shape:
    """A published model.

    Args:
        kind: as transformers names it.
        heads: query and key/value heads.
    """

    kind: str
    layers: int
    width: int
    heads: tuple[int, int]
    inner: int

    def config(self, layers: int, tokens: int) -> Any:
        special = {
            "bos_token_id": None,
            "eos_token_id": None,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
            "initializer_range": 1.0,
        }
        if self.kind == "gpt2":
            shape = {"n_embd": self.width, "n_layer": layers, "n_head": self.heads[0], "n_inner": self.inner}
            return AutoConfig.for_model("gpt2", n_positions=tokens, **shape, **special)
        return AutoConfig.for_model(
            self.kind,
            hidden_size=self.width,
            num_hidden_layers=layers,
            num_attention_heads=self.heads[0],
            num_key_value_heads=self.heads[1],
            intermediate_size=self.inner,
            max_position_embeddings=tokens,
            **special,
        )


SHAPES = {
    "GPT-2 small": Shape("gpt2", 12, 768, (12, 12), 3072),
    # No published model: narrow, hence the hardest on a CPU, and measured since the beginning.
    "Qwen2, narrow": Shape("qwen2", 8, 512, (8, 2), 1536),
    "Qwen2.5-0.5B": Shape("qwen2", 24, 896, (14, 2), 4864),
    "Qwen2.5-1.5B": Shape("qwen2", 28, 1536, (12, 2), 8960),
    "Qwen2.5-7B": Shape("qwen2", 28, 3584, (28, 4), 18944),
    "Llama-3-8B": Shape("llama", 32, 4096, (32, 8), 14336),
    "Llama-3-70B": Shape("llama", 80, 8192, (64, 8), 28672),
}


@dataclass(frozen=True)
class Case:
    """One batch through one model.

    Args:
        layers: of the model as it is measured.
        checkpoint: layers are run again in the backward pass, of the bare passes too.
    """

    shape: str
    layers: int
    n_samples: int
    n_tokens: int
    dtype: str = "float32"
    checkpoint: bool = False

    @property
    def name(self) -> str:
        dials = ", checkpointed" if self.checkpoint else ""
        tokens = f"{self.n_samples}×{self.n_tokens:,}"
        return f"{self.shape}, {self.layers} layers, {tokens} tokens, {self.dtype}{dials}"

    @cached_property
    def model(self) -> torch.nn.Module:
        """Of random weights, and the same ones for every case of a shape, depth and dtype."""
        torch.manual_seed(0)
        config = SHAPES[self.shape].config(self.layers, self.n_tokens)
        with DEVICE:
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
        model.eval().requires_grad_(False)
        # Layers then write about as much as they read. Where one wrote a hundred times the embedding, as of the widest
        # with the usual 0.02, every score was a small difference of large terms, and float32 told little of any path.
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.weight /= (module.nx if isinstance(module, Conv1D) else module.in_features) ** 0.5
        return model

    def free(self) -> None:
        """Let go of the model."""
        vars(self).pop("model", None)

    def batch(self, n_samples: int | None = None, n_tokens: int | None = None) -> Batch:
        """Random tokens, all but the first of each sample with loss.

        Args:
            n_samples, n_tokens: of the first samples so many, cut to so many tokens.
        """
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, VOCABULARY, (self.n_samples, self.n_tokens), generator=generator)
        return Batch.from_mapping({"input_ids": ids[:n_samples, :n_tokens]}).to(DEVICE)


@contextmanager
def in_float64(model: torch.nn.Module) -> Iterator[None]:
    """The same weights, wider for a while: not beside them, as of the largest models there is no room for both."""
    before = {parameter: parameter.dtype for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.data = parameter.data.double()
        with float64_throughout(model):
            yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)


def cases(quick: bool) -> Iterable[Case]:
    """Every shape on one batch, and one shape on all lengths, batches and dtypes; on a card whole models."""
    if DEVICE.type == "cuda":
        return _on_card(quick)
    return _quick() if quick else _whole()


def _quick() -> Iterable[Case]:
    yield Case("GPT-2 small", 4, 1, 256)
    yield Case("Qwen2, narrow", 4, 1, 256)
    yield Case("Qwen2.5-1.5B", 1, 1, 256)
    yield Case("Qwen2.5-7B", 1, 1, 128)
    yield Case("Llama-3-8B", 1, 1, 64)
    yield Case("Llama-3-70B", 1, 1, 32)
    for samples in (1, 4):
        yield Case("Qwen2.5-0.5B", 2, samples, 256)
    yield Case("Qwen2.5-0.5B", 2, 1, 256, "bfloat16")


def _whole() -> Iterable[Case]:
    # Depths at which a round takes seconds: only many rounds tell a twentieth from noise. The quick ones first: the
    # time that they leave is for the others.
    yield Case("Qwen2.5-0.5B", 4, 1, 64)
    # In float16 a backward pass takes minutes: PyTorch has no fast product of it on a CPU.
    yield Case("Qwen2.5-0.5B", 4, 1, 256, "bfloat16")
    yield Case("Qwen2.5-0.5B", 4, 1, 256)
    yield Case("GPT-2 small", 12, 1, 256)
    yield Case("Qwen2.5-1.5B", 2, 1, 256)
    yield Case("Qwen2.5-0.5B", 2, 4, 256)
    yield Case("Qwen2, narrow", 8, 4, 256)
    yield Case("Qwen2.5-0.5B", 2, 1, 1024)
    yield Case("Qwen2.5-0.5B", 2, 4, 256, checkpoint=True)
    yield Case("Llama-3-8B", 1, 1, 256)
    yield Case("Qwen2.5-7B", 1, 1, 256)
    yield Case("Qwen2.5-0.5B", 1, 16, 256)
    yield Case("Qwen2.5-0.5B", 24, 1, 256)
    yield Case("Qwen2.5-0.5B", 1, 1, 4096)
    # Of 32,768 tokens one round of one layer takes minutes here, all but a hundredth of them attention's.
    yield Case("Qwen2, narrow", 1, 1, 8192)
    yield Case("Llama-3-70B", 1, 1, 256)


def _on_card(quick: bool) -> Iterable[Case]:
    for shape in ("GPT-2 small", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3-8B"):
        yield Case(shape, SHAPES[shape].layers, 1, 512, "bfloat16")
    yield Case("Llama-3-70B", 8, 1, 512, "bfloat16")
    for samples, tokens in (
        ((1, 64), (8, 512), (1, 4096)) if quick else ((1, 64), (8, 512), (64, 512), (1, 4096))
    ):
        yield Case("Qwen2.5-0.5B", 24, samples, tokens, "bfloat16")
    if not quick:
        yield Case("Qwen2.5-7B", 28, 1, 4096, "bfloat16")
        yield Case("Qwen2.5-7B", 28, 1, 32768, "bfloat16", checkpoint=True)
    for dtype in ("float32", "float16"):
        yield Case("Qwen2.5-0.5B", 24, 1, 512, dtype)
