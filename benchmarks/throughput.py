"""How many tokens a second `eaptk score` scores, beside what the model alone could do.

The samples: 2,000, of the lengths that questions with their solutions have (GSM8K, MATH-500 and College Math test
sets together, tokenised with 12,000 byte pairs and one token a digit): 9 to 1,447 tokens, half of them below 82.

Two figures of the same tokens, of programs that have the machine in turns of a second (`benchmarks.turns`):

- *bare*: plain PyTorch on batches that are packed perfectly: each batch of eaptk's plan, its real tokens spread
  evenly over its rows, so that none is padding; forward pass, logits where there is loss, mean negative
  log-likelihood, gradient to the embeddings' output.
- *score*: `eaptk.score` from the moment its first batch reaches the model until it returns. In: batches laid out,
  padding, attribution, rows on their way to the disk and synced there, the run finished and opened again. Out, as it
  is some tenths of a second whatever the number of tokens: knowing weights and dataset, planning, laying out files.

The model is as wide as "Qwen2, narrow" of `benchmarks.floor`, half as deep. Of a model half as wide the share at block
level is .84 to .87, as what passes take falls with the square of the width, and what reading sources and gradients
takes with the width.

Tokens are real ones in both. Shares are of wall time; those of processor time are beside them, which a slow disk leaves
alone. Plans for other budgets and numbers of samples, and the time it takes to read a dataset, are recorded beside.

    python -m benchmarks.throughput
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

import eaptk
from benchmarks import record
from benchmarks.turns import Pace, Program, Times, in_turns
from eaptk.batch import NO_TARGET, Batch, Sample, collate
from eaptk.dataset import plan_batches, read_samples, samples_table
from eaptk.manifest import dataset_fingerprint

#: Of the samples in order of length: at this percentile, so many tokens of prompt, so many of answer.
QUANTILES = [
    (0, 8, 1), (4, 14, 5), (8, 16, 8), (12, 19, 8), (16, 21, 9), (20, 25, 9), (24, 25, 12), (28, 27, 14),
    (32, 30, 15), (36, 34, 16), (40, 37, 20), (44, 44, 21), (48, 45, 31), (52, 51, 37), (56, 49, 51),
    (60, 56, 55), (64, 53, 72), (68, 54, 84), (72, 58, 94), (76, 58, 109), (80, 65, 120), (84, 67, 137),
    (88, 79, 148), (92, 77, 186), (96, 95, 236), (98, 112, 315), (99, 130, 428), (99.5, 155, 528),
    (100, 325, 1122),
]  # fmt: skip
SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1536,
    "vocab_size": 4096,
}
TARGETS = {"block": 0.90, "head": None}
#: Tokens a batch: what is measured, and what plans are made for beside it.
BUDGET, OTHER_BUDGETS = 2048, (8192, 65536)
N_READ = 100_000


def lengths(n: int) -> tuple[list[int], list[int]]:
    """Tokens of prompts and of answers of `n` samples, in an order that has nothing to do with them."""
    percentiles, prompts, answers = np.array(QUANTILES).T
    at = (np.random.default_rng(0).permutation(n) + 0.5) * (100 / n)
    found = [
        np.rint(np.interp(at, percentiles, values)).astype(int).tolist() for values in (prompts, answers)
    ]
    return found[0], found[1]


def make_samples(n: int, vocabulary: int) -> list[Sample]:
    random = np.random.default_rng(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(random.integers(vocabulary, size=count).tolist())

    pairs = zip(*lengths(n), strict=True)
    return [Sample(str(i), tokens(prompt), tokens(answer)) for i, (prompt, answer) in enumerate(pairs)]


def without_padding(samples: Sequence[Sample], vocabulary: int) -> Batch:
    """As many samples, all of the mean length, with the mean number of tokens that carry loss."""
    width = round(statistics.mean(sample.n_tokens for sample in samples))
    n_answer = round(statistics.mean(len(sample.answer_ids) for sample in samples))
    ids = np.random.default_rng(2).integers(vocabulary, size=(len(samples), width + 1)).tolist()
    cut = width + 1 - n_answer
    return collate([Sample("", tuple(row[:cut]), tuple(row[cut:])) for row in ids])


def bare_pass(model: Any, batch: Batch) -> None:
    """Nothing of eaptk but its batch."""
    embedded = model.model.embed_tokens(batch.ids).requires_grad_()
    hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    carries = batch.targets != NO_TARGET
    negative = cross_entropy(model.lm_head(hidden[carries]), batch.targets[carries], reduction="none")
    weights = (1 / carries.sum(1, keepdim=True)).expand_as(carries)[carries]
    torch.autograd.grad((negative * weights).sum(), embedded)


def the_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval().requires_grad_(False)


def score_all(
    pace: Pace, n: int, level: str, n_threads: int, new_model: Callable[[], Any] = the_model
) -> None:
    """Program: one mark at the first batch, and one at the end."""
    torch.set_num_threads(n_threads)
    model = new_model()
    samples = make_samples(n, model.config.vocab_size)

    def score(samples: Sequence[Sample]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            eaptk.score(
                model,
                samples,
                Path(folder) / "run",
                granularity=level,  # type: ignore[arg-type]
                tokens_per_batch=BUDGET,
                progress=False,
            )

    def first_call(*_: Any) -> None:
        pace.mark()
        handle.remove()

    score(samples[:50])  # the first call of anything pays for more than itself
    pace.ready()
    handle = model.register_forward_pre_hook(first_call)
    score(samples)
    pace.mark()


def pass_bare(pace: Pace, n: int, n_threads: int, new_model: Callable[[], Any] = the_model) -> None:
    """Program: a mark at the start, and one a batch, over and over again until nobody is there to be compared with."""
    torch.set_num_threads(n_threads)
    model = new_model()
    samples = make_samples(n, model.config.vocab_size)
    batches = [
        without_padding([samples[row] for row in rows], model.config.vocab_size)
        for rows in plan_batches([sample.n_tokens for sample in samples], BUDGET)
    ]
    for batch in batches[::10]:
        bare_pass(model, batch)
    pace.ready()
    pace.mark()
    for done, batch in enumerate(cycle(batches)):
        if done >= len(batches) and pace.is_over:
            break
        bare_pass(model, batch)
        pace.mark()


def shares(n: int, n_threads: int, new_model: Callable[[], Any] = the_model) -> dict[str, Times]:
    """[2] seconds of all samples: ``bare``, and by level."""
    programs = {level: Program(score_all, (n, level, n_threads, new_model)) for level in TARGETS}
    found = in_turns({"bare": Program(pass_bare, (n, n_threads, new_model), ends=False), **programs})
    n_batches = len(plan_batches([sum(each) - 1 for each in zip(*lengths(n), strict=True)], BUDGET))
    # Each batch as long as it took on average: of the last pass some may be missing.
    bare = [found["bare"][batch::n_batches].mean(0) for batch in range(n_batches)]
    return {"bare": np.sum(bare, axis=0), **{level: found[level][0] for level in TARGETS}}


def plan_facts(n: int, budget: int) -> dict[str, Any]:
    """How full the batches of a plan are, and how much of them is padding."""
    prompts, answers = lengths(n)
    tokens = [prompt + answer - 1 for prompt, answer in zip(prompts, answers, strict=True)]
    started = time.perf_counter()
    plan = plan_batches(tokens, budget)
    seconds = time.perf_counter() - started
    padded = sum(len(batch) * tokens[batch[0]] for batch in plan)
    return {
        "samples": n,
        "budget": budget,
        "batches": len(plan),
        "fewest_batches": -(-sum(tokens) // budget),
        "padding": 1 - sum(tokens) / padded,
        "fill": padded / len(plan) / budget,
        "seconds": seconds,
    }


def reading_facts(folder: Path) -> dict[str, Any]:
    """Seconds to read short texts, and to write down which they are."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    random = np.random.default_rng(3)
    words = ["".join(map(chr, row)) for row in random.integers(97, 123, size=(5000, 6))]
    texts = [" ".join(row) for row in random.choice(words, size=(N_READ, 16))]
    with open(folder / "data.jsonl", "w") as file:
        for i, text in enumerate(texts):
            record_ = {"id": i, "group": i // 4, "prompt": text[:84], "answer": text[84:], "level": i % 5}
            file.write(json.dumps(record_) + "\n")
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel()
    pairs.train_from_iterator(texts[:2000], trainers.BpeTrainer(vocab_size=5000, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs)
    marks = [time.perf_counter()]
    samples = read_samples(folder / "data.jsonl", tokenizer, context=4096, vocabulary=5000)
    for step in (dataset_fingerprint, samples_table):
        marks.append(time.perf_counter())
        step(samples)
    marks.append(time.perf_counter())
    names = ("read_seconds", "fingerprint_seconds", "table_seconds")
    seconds = dict(zip(names, np.diff(marks).round(3).tolist(), strict=True))
    return {"samples": len(samples), "tokens": sum(s.n_tokens for s in samples), **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2, help="of all samples (medians are reported)")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    rounds = [shares(options.samples, options.threads) for _ in range(options.rounds)]
    tokens = sum(map(sum, lengths(options.samples))) - options.samples

    table = Table(title=f"{options.samples:,} samples, {tokens:,} tokens, {options.threads} threads")
    for heading in ("level", "bare tokens/s", "score tokens/s", "share", "rounds", "of processor", "target"):
        table.add_column(heading, justify="right")
    rows = {}
    for level, target in TARGETS.items():
        wall, processor = np.array([found["bare"] / found[level] for found in rounds]).T.round(4).tolist()
        rows[level] = {
            "tokens_per_second": tokens / statistics.mean(found[level][0] for found in rounds),
            "bare_tokens_per_second": tokens / statistics.mean(found["bare"][0] for found in rounds),
            "share": statistics.median(wall),
            "shares": wall,
            "processor_share": statistics.median(processor),
            "processor_shares": processor,
            "target": target,
        }
        table.add_row(
            level,
            f"{rows[level]['bare_tokens_per_second']:,.0f}",
            f"{rows[level]['tokens_per_second']:,.0f}",
            f"{rows[level]['share']:.3f}",
            f"{min(wall):.3f}–{max(wall):.3f}",
            f"{rows[level]['processor_share']:.3f}",
            "" if target is None else f"≥ {target:.2f}",
        )
    plans = [plan_facts(n, each) for n in (options.samples, 1_000_000) for each in (BUDGET, *OTHER_BUDGETS)]
    with tempfile.TemporaryDirectory() as folder:
        reading = reading_facts(Path(folder))
    Console().print(table)
    for facts in plans:
        print(
            f"{facts['samples']:,} samples in batches of {facts['budget']:,}: {facts['batches']:,} of them, "
            f"{facts['padding']:.2%} padding, {facts['fill']:.1%} full, planned in {facts['seconds']:.2f} s"
        )
    print(f"reading: {reading}")
    if not options.no_record:
        result = {
            "shape": SHAPE,
            "samples": options.samples,
            "tokens": tokens,
            "budget": BUDGET,
            "rows": rows,
        }
        result |= {"plans": plans, "reading": reading}
        path = record.write("throughput", result)
        print(f"written to {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
