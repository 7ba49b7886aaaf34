"""Models that answer alike, and questions they answer right: a tiny model, and copies with a little noise."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import make_model, make_records, make_tokenizer, write_jsonl

from eaptk.batch import Sample
from eaptk.generate import greedy_answers

MAX_NEW_TOKENS = 8


def save_pupils(folder: Path, noises: dict[str, float], seed: int = 0) -> dict[str, Path]:
    """A checkpoint by name: the same random model, each with noise of its own size on every weight."""
    paths = {}
    for number, (name, noise) in enumerate(noises.items()):
        model = make_model(seed)
        torch.manual_seed(100 + number)
        with torch.no_grad():
            for weight in model.parameters():
                weight += noise * torch.randn_like(weight)
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
        paths[name] = folder / name
    return paths


def write_exam(path: Path, n: int = 24, seed: int = 0) -> Path:
    """Questions whose reference is what the model without noise answers, but for every sixth."""
    tokenizer, model = make_tokenizer(), make_model(seed)
    texts = [record["prompt"] for record in make_records(n, seed=7)]
    samples = [Sample(str(i), tuple(tokenizer(text)["input_ids"]), ()) for i, text in enumerate(texts)]
    (found,) = greedy_answers(model, samples, [range(n)], MAX_NEW_TOKENS)
    answers = [tokenizer.decode(found[i], skip_special_tokens=True) for i in range(n)]
    return write_jsonl(
        path,
        [
            {"id": f"q{i}", "question": text, "answer": "w0" if i % 6 == 5 else answer or "w0"}
            for i, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ],
    )
