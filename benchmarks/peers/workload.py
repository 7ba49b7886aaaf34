"""What every tool is given: the same weights and tokens, saved once, loaded by each as it loads a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

#: Prompts are as long as the longest run may be.
MOST_TOKENS = 1024


@dataclass(frozen=True)
class Shape:
    """A model's shape, and how deep it is when time is short."""

    config_class: str
    config: dict[str, Any]
    n_layers: int
    quick_layers: int


SHAPES = {
    "gpt2-small": Shape(
        "GPT2Config", {"n_positions": MOST_TOKENS, "n_ctx": MOST_TOKENS}, n_layers=12, quick_layers=3
    ),
    # "Qwen2, narrow" of benchmarks.floor.
    "qwen2": Shape(
        "Qwen2Config",
        {
            "hidden_size": 512,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 1536,
            "vocab_size": 4096,
            "max_position_embeddings": MOST_TOKENS,
        },
        n_layers=8,
        quick_layers=4,
    ),
}


def save(shape: Shape, n_layers: int, folder: Path) -> None:
    """Random weights of a shape, a tokenizer that some loaders ask for, and a clean and a corrupted prompt."""
    if (folder / "tokens.json").exists():
        return
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    arguments = {**shape.config, **special, "num_hidden_layers": n_layers, "dtype": "float32"}
    config = getattr(transformers, shape.config_class)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    _randomise(model, generator)
    model.save_pretrained(folder)
    _tokenizer(config.vocab_size).save_pretrained(folder)
    clean = torch.randint(1, config.vocab_size, (MOST_TOKENS,), generator=generator)
    changed = torch.rand(MOST_TOKENS, generator=generator) < 0.5
    corrupt = torch.where(changed, clean.roll(1), clean)
    prompts = {"clean": clean.tolist(), "corrupt": corrupt.tolist()}
    (folder / "tokens.json").write_text(json.dumps(prompts))


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Gains and biases too, so that no term of a gradient vanishes; 1/√fan-in, so that attention is not uniform."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_((name == "weight") + 0.1 * noise)
            else:
                fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[1]
                parameter.copy_(fan_in**-0.5 * noise)


def _tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="0", eos_token="0", pad_token="0", unk_token="0"
    )
