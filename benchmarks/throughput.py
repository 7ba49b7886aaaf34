"""How many tokens a second `eaptk score` scores, beside what the model alone could do.

The samples: 2,000, of the lengths that questions with their solutions have (GSM8K, MATH-500 and College Math test
sets together, tokenised with 12,000 byte pairs and one token a digit): 9 to 1,447 tokens, half of them below 82.

Two figures of the same tokens, taken in turns in one process:

- *bare*: plain PyTorch on batches that are packed perfectly: each batch of eaptk's plan, its real tokens spread
  evenly over its rows, so that none is padding; forward pass, logits where there is loss, mean negative
  log-likelihood, gradient to the embeddings' output.
- *score*: `eaptk.score` from the moment its first batch reaches the model until it returns. In: batches laid out,
  padding, attribution, rows on their way to the disk and synced there, the run finished and opened again. Out, and
  told apart as start: reading samples, knowing weights and dataset, planning, laying out files.

Tokens are real ones in both. Shares are of wall time; those of processor time are beside them, which other work on the
machine and a slow disk leave alone: where the two differ, the machine was not quiet. Plans for other budgets and
numbers of samples, and the time it takes to read a dataset, are recorded beside.

    python -m benchmarks.throughput
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

import eaptk
from benchmarks import record
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
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "vocab_size": 4096,
}
TARGETS = {"block": 0.90, "head": None}
BUDGETS = (2048, 8192, 65536)
N_READ = 100_000

#: [2] seconds: on the wall, and of processor time.
Times = npt.NDArray[np.float64]


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


def now() -> Times:
    """Seconds on the wall, and of processor time of all threads."""
    return np.array([time.perf_counter(), time.process_time()])


@contextmanager
def first_call(model: torch.nn.Module) -> Iterator[list[Times]]:
    """When the model was called, of which the first time counts."""
    calls: list[Times] = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(now()))
    try:
        yield calls
    finally:
        handle.remove()


def seconds_of_score(model: Any, samples: Sequence[Sample], level: str, budget: int) -> tuple[Times, Times]:
    """Of the start, and from the first batch to the end."""
    with tempfile.TemporaryDirectory() as folder, first_call(model) as calls:
        started = now()
        eaptk.score(
            model,
            samples,
            Path(folder) / "run",
            granularity=level,  # type: ignore[arg-type]
            tokens_per_batch=budget,
            progress=False,
        )
        ended = now()
    return calls[0] - started, ended - calls[0]


def seconds_of_bare(model: Any, batches: Sequence[Batch]) -> Times:
    started = now()
    for batch in batches:
        bare_pass(model, batch)
    return now() - started


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
    parser.add_argument("--rounds", type=int, default=3, help="of all figures in turn (medians are reported)")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vocabulary, budget = SHAPE["vocab_size"], BUDGETS[0]
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval().requires_grad_(False)
    samples = make_samples(options.samples, vocabulary)
    plan = plan_batches([sample.n_tokens for sample in samples], budget)
    batches = [without_padding([samples[row] for row in rows], vocabulary) for rows in plan]
    tokens = sum(sample.n_tokens for sample in samples)
    bare_tokens = sum(batch.ids.numel() for batch in batches)

    for batch in batches[::10]:
        bare_pass(model, batch)
    for level in TARGETS:  # the first call of anything pays for more than itself
        seconds_of_score(model, samples[:50], level, budget)
    speeds: dict[str, list[Times]] = {name: [] for name in ("bare", *TARGETS)}
    ratios: dict[str, list[Times]] = {level: [] for level in TARGETS}
    starts = []
    for _ in range(options.rounds):
        for level in TARGETS:
            speeds["bare"].append(bare_tokens / seconds_of_bare(model, batches))
            start, seconds = seconds_of_score(model, samples, level, budget)
            starts.append(start[0])
            speeds[level].append(tokens / seconds)
            ratios[level].append(speeds[level][-1] / speeds["bare"][-1])

    table = Table(title=f"{len(samples):,} samples, {tokens:,} tokens, {options.threads} threads")
    for heading in ("level", "bare tokens/s", "score tokens/s", "share", "rounds", "of processor", "target"):
        table.add_column(heading, justify="right")
    rows = {}
    for level, target in TARGETS.items():
        wall, processor = np.array(ratios[level]).T.round(4).tolist()
        rows[level] = {
            "tokens_per_second": statistics.median(speed[0] for speed in speeds[level]),
            "bare_tokens_per_second": statistics.median(speed[0] for speed in speeds["bare"]),
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
    plans = [plan_facts(n, each) for n in (options.samples, 1_000_000) for each in BUDGETS]
    with tempfile.TemporaryDirectory() as folder:
        reading = reading_facts(Path(folder))
    Console().print(table)
    for facts in plans:
        print(
            f"{facts['samples']:,} samples in batches of {facts['budget']:,}: {facts['batches']:,} of them, "
            f"{facts['padding']:.2%} padding, {facts['fill']:.1%} full, planned in {facts['seconds']:.2f} s"
        )
    print(f"start of a run: {statistics.median(starts):.2f} s; reading: {reading}")
    if not options.no_record:
        result = {"shape": SHAPE, "samples": len(samples), "tokens": tokens, "budget": budget, "rows": rows}
        result |= {"start_seconds": statistics.median(starts), "plans": plans, "reading": reading}
        path = record.write("throughput", result)
        print(f"written to {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
