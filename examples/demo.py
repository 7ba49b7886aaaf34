"""The main job from nothing to a picture: train a small model, score two of its checkpoints, compare them.

A Qwen2 model of 150,000 parameters learns word problems of two and three steps until it answers most
held-out ones. An early and a late checkpoint answer the same held-out questions; those that both get right
are scored, every edge of every sample, and compared. No network, no GPU, one or two minutes:

    python examples/demo.py [--out demo_out] [--steps 800] [--questions 300] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arithmetic.problems import (
    END,
    Problem,
    final_result,
    held_out_problems,
    make_tokenizer,
    training_problems,
)
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

import eaptk
from eaptk.comparison import Comparison
from eaptk.figures import comparison_figure, save_figure

BATCH = 32
PROGRESS_QUESTIONS = 100  # held out too, but used to watch training and to pick the early checkpoint
EARLY_ACCURACY = 0.4  # of the checkpoint that counts as early: half-taught, neither blank nor finished
MAX_NEW_TOKENS = 48
MARKER = ".made-by-eaptk-demo"


@dataclass
class Checkpoint:
    step: int
    accuracy: float
    weights: dict[str, Tensor]


def make_model(tokenizer: Any) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.06,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    model: Qwen2ForCausalLM, tokenizer: Any, steps: int, seed: int, watch: list[Problem], console: Console
) -> list[Checkpoint]:
    """Supervised training on the tokens of worked answers; a checkpoint every 40 steps and at the end."""
    drawn = training_problems(seed, steps * BATCH)
    questions = tokenizer([problem.question for problem in drawn]).input_ids
    answers = tokenizer([problem.answer + END for problem in drawn]).input_ids
    samples = [eaptk.Sample("", tuple(q), tuple(a)) for q, a in zip(questions, answers, strict=True)]

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.01 + 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    checkpoints: list[Checkpoint] = []
    columns = (
        TextColumn("         training"),
        BarColumn(20),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, state="")
        for step in range(1, steps + 1):
            batch = eaptk.collate(samples[(step - 1) * BATCH : step * BATCH])
            logits = model(input_ids=batch.ids, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 40 == 0 or step == steps:
                right = sum(grade(watch, answer(model, tokenizer, watch)))
                weights = {name: weight.clone() for name, weight in model.state_dict().items()}
                checkpoints.append(Checkpoint(step, right / len(watch), weights))
                state = f"step {step}, loss {loss:.3f}, held-out {right / len(watch):.0%}"
                progress.update(task, completed=step, state=state)
    return checkpoints


def answer(model: Qwen2ForCausalLM, tokenizer: Any, problems: Sequence[Problem]) -> list[str]:
    """The model's greedy answers, without their end token."""
    prompts = tokenizer([problem.question for problem in problems], padding=True, return_tensors="pt")
    with torch.inference_mode():
        full = model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
    texts: list[str] = tokenizer.batch_decode(full[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def grade(problems: Sequence[Problem], answers: Sequence[str]) -> list[bool]:
    """Whether each answer's final number is right."""
    return [
        final_result(given) == final_result(problem.answer)
        for problem, given in zip(problems, answers, strict=True)
    ]


def fresh_folder(out: Path) -> None:
    """Empty `out`, if it is this demo's own."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise eaptk.EaptkError(f"{out} is not empty and not this demo's; give another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def write_questions(path: Path, questions: dict[str, Problem]) -> None:
    """The JSONL that eaptk reads; `expression` is a column of our own, carried along."""
    with path.open("w", encoding="utf-8") as file:
        for name, problem in questions.items():
            record = {"id": name, "prompt": problem.question, "answer": problem.answer}
            file.write(json.dumps(record | {"expression": problem.expression}) + "\n")


def score_and_compare(out: Path) -> Comparison:
    """Score both checkpoints on questions.jsonl, each on its own answers, and compare the runs."""
    runs = [
        eaptk.score(
            out / name,
            out / "questions.jsonl",
            out / "runs" / name,
            granularity="head",
            loss="self_nll",
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for name in ("early", "late")
    ]
    comparison = eaptk.compare(runs)
    comparison.write(out)
    save_figure(comparison_figure(comparison), out / "comparison")
    return comparison


def demo(out: Path, steps: int, n_questions: int, seed: int) -> None:
    started = time.monotonic()
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:5.1f} s[/]  {text}")

    fresh_folder(out)
    # So small a model gains little from more threads, and its numbers then do not depend on the cores there are.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    held_out = held_out_problems(seed + 1, PROGRESS_QUESTIONS + n_questions)
    watch, exam = held_out[:PROGRESS_QUESTIONS], held_out[PROGRESS_QUESTIONS:]

    n_problems = steps * BATCH
    say(f"Training a Qwen2 model of {model.num_parameters():,} parameters on {n_problems:,} word problems.")
    checkpoints = train(model, tokenizer, steps, seed, watch, console)
    chosen = {
        "early": min(checkpoints, key=lambda c: abs(c.accuracy - EARLY_ACCURACY)),
        "late": checkpoints[-1],
    }
    answers, right = {}, {}
    for name, checkpoint in chosen.items():
        model.load_state_dict(checkpoint.weights)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        answers[name] = answer(model, tokenizer, exam)
        right[name] = grade(exam, answers[name])
        say(f"{name} (step {checkpoint.step}): {sum(right[name])} of {n_questions} held-out questions right.")
    for outcome in (False, True):
        if outcome not in right["early"]:
            continue
        i = right["early"].index(outcome)
        console.print(Padding(f"[bold]{exam[i].question}[/]", (1, 0, 0, 9)))
        for name in chosen:
            mark = "[green]right[/]" if right[name][i] else "[red]wrong[/]"
            console.print(f"         {name:>5} {mark} {answers[name][i]}")
    console.print()

    # As the paper does: on questions both get right, what differs is how they get there, not what they say.
    kept = {f"q{i:03}": exam[i] for i in range(n_questions) if right["early"][i] and right["late"][i]}
    if len(kept) < 2:
        raise eaptk.EaptkError(
            f"both checkpoints were right on {len(kept)} questions; train longer, with --steps"
        )
    write_questions(out / "questions.jsonl", kept)
    say(f"Scoring both on the {len(kept)} questions both got right, at head granularity.")
    comparison = score_and_compare(out)
    say(f"Compared {len(comparison.sample_ids)} pairs over {comparison.graph.n_edges} edges.\n")
    console.print(comparison.to_table())
    console.print(f"""
The surer a model is of its answers, the smaller its gradients and with them
its scores: that is why the loss stands beside them.

  picture  {out / "comparison.png"}
  tables   {out / "comparison.csv"}, {out / "edges.parquet"}

Go on with

  .venv/bin/eaptk compare {out / "runs/early"} {out / "runs/late"}
  .venv/bin/eaptk inspect {out / "runs/late"}
  .venv/bin/eaptk check {out / "late"}
""")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=800, help="of training; default: %(default)s")
    parser.add_argument(
        "--questions", type=int, default=300, help="held out, to answer; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if min(options.steps, options.questions) < 1:
        parser.error("--steps and --questions must be at least 1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        demo(options.out, options.steps, options.questions, options.seed)
    except eaptk.EaptkError as error:
        sys.exit(f"demo: error: {error}")


if __name__ == "__main__":
    main()
