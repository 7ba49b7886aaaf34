"""Tiny checkpoints on disk, with a tokenizer whose tokens are words, and data to score them on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WORDS = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(29))]
CONTEXT = 48


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, ``w0`` … ``w28``; a prompt begins with ``<s>``."""
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """A random two-layer Qwen2 of which no part is near linear."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.4,
        "eos_token_id": 1,
    }
    return Qwen2ForCausalLM(Qwen2Config(**shape | changes)).eval()


def save_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Model and tokenizer as `save_pretrained` leaves them."""
    make_model(seed, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_records(n: int, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """Text records of all lengths up to `longest` words a side, with corrupt prompts, foils and a user column."""
    random = torch.Generator().manual_seed(seed)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(29, (count,), generator=random).tolist())

    records = []
    for i in range(n):
        n_prompt, n_answer = (torch.randint(longest, (2,), generator=random) + 1).tolist()
        prompt, corrupt = words(n_prompt), words(n_prompt)
        answer, foil = words(n_answer), words(n_answer)
        records.append(
            {"id": f"q{i}", "group": f"g{i // 2}", "level": i % 3}
            | {"prompt": prompt, "answer": answer, "corrupt": corrupt, "foil": foil}
        )
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
