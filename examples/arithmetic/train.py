"""Train the checkpoints that the study compares: SFT, and from it GRPO, RLOO, DPO and more SFT.

A Qwen2 model of 1.2 million parameters learns word problems by SFT until it answers about half of the held-out
ones. From there it goes on four ways, each with the same number of optimizer steps: GRPO and RLOO (rewarded
for a right final result), DPO (on right and wrong answers sampled once from the SFT model) and more SFT.
Checkpoints that are already there are left alone, so an interrupted call is simply repeated.

    python examples/arithmetic/train.py [--seeds 0 1 2] [--methods sft grpo ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# ruff: noqa: E402 - what is set here the libraries read while they are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
# Where it is installed TRL imports it, and it tells of kernels for weights that there are none of here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
from datasets import Dataset, disable_progress_bars
from problems import USUAL, Level, Problem, final_result, held_out_problems, make_tokenizer, training_problems
from transformers import (
    GenerationConfig,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging as transformers_logging
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from eaptk import EaptkError, Sample
from eaptk.files import whole_file
from eaptk.generate import greedy_answers
from eaptk.loading import load_model

HERE = Path(__file__).parent
#: With the minutes each takes, roughly.
METHODS = {"sft": 4, "grpo": 2, "sft-continued": 1, "dpo": 2, "rloo": 3}
EXAM_SEED, WATCH_SEED = 1_000_000, 2_000_000  # of questions; training seeds lie far below


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the checkpoints become, apart from the seed."""

    level: Level = USUAL

    # Model
    hidden_size: int = 160
    intermediate_size: int = 480
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    initializer_range: float = 0.06

    # Of every method: AdamW in float32
    adam_beta2: float = 0.98
    max_grad_norm: float = 1.0
    max_new_tokens: int = 40

    # SFT: a cosine to zero at `sft_steps`, left as soon as `sft_enough` of the watched questions are right
    sft_batch: int = 32
    sft_steps: int = 800
    sft_warmup: int = 50
    sft_learning_rate: float = 3e-3
    sft_enough: float = 0.5

    # After SFT, with a learning rate that rises over `warmup` steps and falls linearly to zero
    warmup: int = 10
    batch: int = 128  # sequences a step
    steps: int = 80
    sft_continued_learning_rate: float = 3e-4
    online_learning_rate: float = 2e-4
    dpo_learning_rate: float = 5e-5
    generations: int = 8  # answers to each of batch / generations questions a step (GRPO, RLOO)
    temperature: float = 1.0
    grpo_beta: float = 0.0  # weight of the KL term: TRL's default of each method
    rloo_beta: float = 0.05
    dpo_beta: float = 0.1
    dpo_questions: int = 1200  # each answered `generations` times; one pair of those answered both ways

    # What is measured and kept
    watch_questions: int = 200
    watch_every: int = 20
    exam_questions: int = 400
    series_seed: int = 0  # whose GRPO run leaves checkpoints along the way
    series: tuple[int, ...] = (10, 20, 40, 60)


#: Just enough to be right now and then, so that DPO finds pairs.
QUICK = Settings(
    level=Level(steps=(1,), largest=99, operand=1),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.1,
    sft_batch=16,
    sft_warmup=5,
    batch=32,
    warmup=1,
    max_new_tokens=24,
    sft_steps=160,
    sft_learning_rate=1e-2,
    steps=8,
    dpo_questions=64,
    watch_questions=4,
    watch_every=8,
    exam_questions=8,
    series=(1,),
)


#: Of what the trainers log: its name in training.jsonl.
LOGGED = {
    "loss": "loss",
    "mean_token_accuracy": "token_accuracy",
    "reward": "reward",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "rewards/accuracies": "preferred",
    "rewards/margins": "margin",
}


@dataclass(frozen=True)
class Task:
    """One checkpoint to train."""

    seed: int
    method: str
    folder: Path

    @property
    def data_seed(self) -> int:
        """Every method and seed draws problems of its own."""
        return 100 * self.seed + list(METHODS).index(self.method)


class Diary(TrainerCallback):
    """What a trainer logs, with greedy accuracy on watched questions every so often, and checkpoints along the way."""

    def __init__(
        self,
        method: str,
        settings: Settings,
        tokenizer: Any,
        exam: Sequence[Problem],
        series: dict[int, Path],
        say: Callable[[str], None],
    ) -> None:
        self.method, self.settings, self.tokenizer = method, settings, tokenizer
        self.exam, self.series, self.say = exam, series, say
        self.watched = held_out_problems(WATCH_SEED, settings.watch_questions, settings.level)
        self.rows: list[dict[str, float]] = []
        self.started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return  # the summary at the end
        row = {"step": state.global_step}
        row |= {short: round(float(logs[name]), 6) for name, short in LOGGED.items() if name in logs}
        self.rows.append(row)
        if state.global_step % self.settings.watch_every:
            return
        row["accuracy"] = right = accuracy(kwargs["model"], self.tokenizer, self.watched, self.settings)
        control.should_training_stop |= self.method == "sft" and right >= self.settings.sft_enough
        passed = time.monotonic() - self.started
        left = passed / state.global_step * (state.max_steps - state.global_step)
        shown = ", ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "step")
        self.say(f"step {state.global_step}/{state.max_steps}, {left:.0f} s left: {shown}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.series:
            self.keep(kwargs["model"], self.series[state.global_step])

    def keep(self, model: Any, folder: Path) -> None:
        """Write a checkpoint in bfloat16 with its diary, examined as it is on disk; it appears once it is whole."""
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        config = copy.deepcopy(model.config)
        config.use_cache = True  # SFTTrainer turns it off, and sampling would crawl
        halved = Qwen2ForCausalLM(config)
        halved.load_state_dict(model.state_dict())
        halved.to(torch.bfloat16).save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        right = accuracy(load(partial), self.tokenizer, self.exam, self.settings)
        last = {"exam_accuracy": right, "seconds": round(time.monotonic() - self.started)}
        with (partial / "training.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*self.rows, last])
        partial.rename(folder)
        self.say(f"{folder.name}: {right:.1%} of the exam right")


def new_model(settings: Settings, tokenizer: Any) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            num_key_value_heads=settings.num_key_value_heads,
            max_position_embeddings=256,
            initializer_range=settings.initializer_range,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def load(folder: Path) -> Qwen2ForCausalLM:
    """A checkpoint, its bfloat16 weights widened to float32: what trains on and what the study sees."""
    return load_model(folder, dtype="float32", device="cpu")


def accuracy(model: Any, tokenizer: Any, problems: Sequence[Problem], settings: Settings) -> float:
    """Share of `problems` whose greedy answer ends with the right result."""
    prompts = tokenizer([problem.question for problem in problems]).input_ids
    samples = [Sample("", tuple(prompt), (0,)) for prompt in prompts]
    batches = [range(i, min(i + 100, len(samples))) for i in range(0, len(samples), 100)]
    right = 0
    for answers in greedy_answers(model, samples, batches, settings.max_new_tokens):
        texts = tokenizer.batch_decode(list(answers.values()), skip_special_tokens=True)
        right += sum(is_right(text, problems[i].answer) for i, text in zip(answers, texts, strict=True))
    return right / len(problems)


def prompts_and_completions(problems: Sequence[Problem]) -> Dataset:
    return Dataset.from_list([{"prompt": p.question, "completion": p.answer} for p in problems])


def prompts_and_references(problems: Sequence[Problem]) -> Dataset:
    return Dataset.from_list([{"prompt": p.question, "reference": p.answer} for p in problems])


def preferences(model: Any, tokenizer: Any, problems: Sequence[Problem], settings: Settings) -> Dataset:
    """One right and one wrong answer, as sampled, to each problem that got both."""
    sampling = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        num_return_sequences=settings.generations,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pairs = []
    for start in range(0, len(problems), 32):
        asked = problems[start : start + 32]
        prompts = tokenizer([p.question for p in asked], padding=True, return_tensors="pt")
        with torch.inference_mode():
            full = model.generate(
                input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, generation_config=sampling
            )
        texts = tokenizer.batch_decode(full[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
        for i, problem in enumerate(asked):
            answers = texts[i * settings.generations : (i + 1) * settings.generations]
            wrong, right = ([a for a in answers if is_right(a, problem.answer) is v] for v in (False, True))
            if right and wrong:
                pairs.append({"prompt": problem.question, "chosen": right[0], "rejected": wrong[0]})
    if not pairs:
        raise EaptkError(
            "DPO has no pairs: no problem was answered both right and wrong; train SFT for longer"
        )
    return Dataset.from_list(pairs)


def is_right(answer: str, reference: str) -> bool:
    return final_result(answer) == final_result(reference)


def reward_right(completions: list[str], reference: list[str], **_: Any) -> list[float]:
    return [float(is_right(given, right)) for given, right in zip(completions, reference, strict=True)]


def make_trainer(
    task: Task, model: Any, tokenizer: Any, settings: Settings, scratch: str, diary: Diary
) -> Any:
    """The TRL trainer of one method, on `model` and problems of its own."""
    method = task.method
    steps, batch, warmup = settings.steps, settings.batch, settings.warmup
    if method == "sft":
        steps, batch, warmup = settings.sft_steps, settings.sft_batch, settings.sft_warmup
    common: dict[str, Any] = {
        "output_dir": scratch,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "warmup_steps": warmup,
        "lr_scheduler_type": "cosine" if method == "sft" else "linear",
        "logging_steps": settings.watch_every if method == "sft" else max(settings.watch_every // 4, 1),
        "max_grad_norm": settings.max_grad_norm,
        "adam_beta2": settings.adam_beta2,
        "seed": task.data_seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    online = common | {
        "learning_rate": settings.online_learning_rate,
        "num_generations": settings.generations,
        "temperature": settings.temperature,
        "max_completion_length": settings.max_new_tokens,
    }
    drawn = training_problems(task.data_seed, steps * batch, settings.level)
    shared = {"processing_class": tokenizer, "callbacks": [diary]}
    if method == "sft":
        args = SFTConfig(**common, learning_rate=settings.sft_learning_rate)
        return SFTTrainer(model, args, train_dataset=prompts_and_completions(drawn), **shared)
    if method == "sft-continued":
        args = SFTConfig(**common, learning_rate=settings.sft_continued_learning_rate)
        return SFTTrainer(model, args, train_dataset=prompts_and_completions(drawn), **shared)
    if method == "grpo":
        questions = prompts_and_references(drawn[: steps * settings.batch // settings.generations])
        args = GRPOConfig(**online, beta=settings.grpo_beta)
        return GRPOTrainer(model, reward_right, args, train_dataset=questions, **shared)
    if method == "rloo":
        questions = prompts_and_references(drawn[: steps * settings.batch // settings.generations])
        args = RLOOConfig(**online, beta=settings.rloo_beta)
        return RLOOTrainer(model, reward_right, args, train_dataset=questions, **shared)
    pairs = preferences(model, tokenizer, drawn[: settings.dpo_questions], settings)
    halved = {"per_device_train_batch_size": settings.batch // 2}  # a pair is two sequences
    args = DPOConfig(**common | halved, learning_rate=settings.dpo_learning_rate, beta=settings.dpo_beta)
    return DPOTrainer(model, args=args, train_dataset=pairs, **shared)


def train(task: Task, settings: Settings, exam: Sequence[Problem], say: Any) -> None:
    """Train one checkpoint and write it, with those of the series along the way."""
    tokenizer = make_tokenizer()
    set_seed(task.data_seed)
    sft = task.folder.with_name("sft")
    model = new_model(settings, tokenizer) if task.method == "sft" else load(sft)
    series = {}
    if task.method == "grpo" and task.seed == settings.series_seed:
        along = task.folder.with_name("grpo-steps")
        shutil.rmtree(along, ignore_errors=True)
        series = {step: along / f"step-{step}" for step in settings.series}
    diary = Diary(task.method, settings, tokenizer, exam, series, say)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(task, model, tokenizer, settings, scratch, diary)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    diary.keep(model, task.folder)


def write_questions(path: Path, exam: Sequence[Problem]) -> None:
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for i, problem in enumerate(exam):
            record = {"id": f"q{i:03}", "question": problem.question, "answer": problem.answer.strip()}
            file.write(json.dumps(record) + "\n")


def write_accuracies(out: Path) -> list[tuple[str, float]]:
    """accuracy.csv: the last row of every diary there is."""
    table = []
    for path in sorted((out / "checkpoints").glob("seed*/**/training.jsonl")):
        last = json.loads(path.read_text().splitlines()[-1])
        table.append((path.parent.relative_to(out / "checkpoints").as_posix(), last["exam_accuracy"]))
    with whole_file(out / "accuracy.csv") as temporary:
        lines = [f"{name},{value:.4f}\n" for name, value in table]
        temporary.write_text("checkpoint,exam_accuracy\n" + "".join(lines))
    return table


def require_settings(path: Path, settings: Settings) -> None:
    """Write the settings beside the checkpoints, or see that those there were trained with the same.

    Raises:
        EaptkError: they differ.
    """
    wanted = json.loads(json.dumps(asdict(settings)))
    if not path.exists():
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1) + "\n")
        return
    found = json.loads(path.read_text())
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        name = differing[0]
        raise EaptkError(
            f"the checkpoints of {path.parent} were trained with {name} {found.get(name)}, not {wanted[name]}; "
            f"remove {path.parent / 'checkpoints'} and {path}, or give another folder with --out"
        )


def reproduce(out: Path, seeds: Sequence[int], methods: Sequence[str], settings: Settings) -> None:
    """Train what is missing of `methods` for each of `seeds`, SFT first."""
    started = time.monotonic()

    def say(text: str) -> None:
        passed = int(time.monotonic() - started)
        print(f"{passed // 60:3}:{passed % 60:02}  {text}", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    require_settings(out / "settings.json", settings)
    exam = held_out_problems(EXAM_SEED, settings.exam_questions, settings.level)
    write_questions(out / "questions.jsonl", exam)
    tasks = [
        Task(seed, method, out / "checkpoints" / f"seed{seed}" / method)
        for seed in seeds
        for method in METHODS
        if method in methods
    ]
    missing = [task for task in tasks if not task.folder.exists()]
    say(f"{len(tasks) - len(missing)} of {len(tasks)} checkpoints are there.")
    spent = 0.0  # in minutes of METHODS
    began = time.monotonic()
    for i, task in enumerate(missing):
        rest = sum(METHODS[other.method] for other in missing[i:])
        pace = (time.monotonic() - began) / 60 / spent if spent else 1.0
        say(
            f"Seed {task.seed}, {task.method}: {i + 1} of {len(missing)}, about {rest * pace:.0f} min left in all."
        )
        if task.method != "sft" and not task.folder.with_name("sft").exists():
            raise EaptkError(f"seed {task.seed} has no SFT checkpoint to start from; add sft to --methods")
        train(task, settings, exam, lambda text: say("  " + text))
        spent += METHODS[task.method]
    say("Share of the exam answered right, greedily:")
    for name, value in write_accuracies(out):
        print(f"        {name:24} {value:6.1%}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Finished checkpoints are kept: call again after an interruption.",
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="gets checkpoints/ and questions.jsonl; default: %(default)s"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="toy sizes that teach nothing: does it run?")
    options = parser.parse_args(arguments)
    # So small a model gains little from more threads, and its weights then do not depend on the cores there are.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("trl").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        reproduce(options.out, options.seeds, options.methods, QUICK if options.quick else Settings())
    except EaptkError as error:
        sys.exit(f"train: error: {error}")


if __name__ == "__main__":
    main()
