"""The commands of a study: study, and its first stages alone. Loads as lightly as `eaptk.cli`, which adds them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from eaptk.errors import EaptkError

_Dtype = Literal["float32", "bfloat16", "float16"]
_Protocol = Literal["paper-code", "paper-text"]

_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda if there is one.")]


def study(
    file: Annotated[Path | None, typer.Argument(help="A study file.", metavar="[FILE]")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH of a model, again for each; the first is the baseline.", metavar="NAME=PATH"
        ),
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Questions, again for each set.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; default: studies/NAME.")] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="Share of the reference length to score, again for each.")
    ] = None,
    protocol: Annotated[_Protocol | None, typer.Option(help="How questions are selected.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Template that questions are put into.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of the longest answer.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Questions drawn to be scored.")] = None,
    granularity: Annotated[
        Literal["block", "head"] | None, typer.Option(help="A node per block, or per head.")
    ] = None,
    dtype: Annotated[_Dtype | None, typer.Option(help="Of the weights; default: as saved.")] = None,
    device: _Device = None,
    until: Annotated[
        Literal["generate", "grade", "select", "score", "compare", "report"],
        typer.Option(help="Stop after this stage."),
    ] = "report",
) -> None:
    """Compare models as arXiv 2509.21044 does: generate, grade, select, score, compare, report.

    From a study file, from flags, or from a file with flags that replace what
    it says. The same command again goes on with a study that was stopped.

    Examples:

      eaptk study examples/arithmetic/study.yaml

      eaptk study --model sft=ckpts/sft --model rl=ckpts/rl --data gsm8k
    """
    from rich.console import Console

    from eaptk.loading import quiet_transformers

    quiet_transformers()
    from eaptk.study import run_study
    from eaptk.study_file import folder_name, make_study, read_study

    flags: dict[str, Any] = {
        "models": dict(map(_named, model)) if model else None,
        "datasets": [*map(_absolute, data)] if data else None,
        "alphas": alpha or None,
        "protocol": protocol,
        "dtype": dtype,
        "device": device,
        "generation": _given(prompt=prompt, max_new_tokens=max_new_tokens),
        "selection": _given(samples=samples),
        "scoring": _given(granularity=granularity),
    }
    given = _given(**flags)
    if file is None:
        if not (model and data):
            raise EaptkError("a study needs a file, or --model NAME=PATH twice and --data")
        planned = make_study({"name": "study" if out is None else out.resolve().name, **given})
    else:
        planned = read_study(file, given)
    folder = out or Path("studies") / folder_name(planned.name)
    try:
        run_study(planned, folder, until=until, console=Console())
    except KeyboardInterrupt:
        print(
            f"eaptk: stopped; what is finished is kept in {folder}, the same command goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None


def generate(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or its name on the hub.")],
    data: Annotated[
        str,
        typer.Option(
            help="gsm8k, math, math500, college-math, a JSONL or Parquet file, or a hub name (name:split)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Parquet file of the answers to write, or to resume.")],
    question: Annotated[str | None, typer.Option(help="Field of the question.")] = None,
    reference: Annotated[str | None, typer.Option(help="Field of the reference answer or solution.")] = None,
    config: Annotated[str | None, typer.Option(help="Of a dataset on the hub that has several.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    prompt: Annotated[
        str,
        typer.Option(
            help="plain, chat, deepseek-math, mistral, qwen25-math, or a text with {question} in it."
        ),
    ] = "plain",
    stop: Annotated[
        list[str] | None, typer.Option(help="A token that ends an answer besides the model's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the longest answer.")] = 512,
    tokens_per_batch: Annotated[
        int, typer.Option(min=1, help="Tokens of a batch, longest answers included: memory against speed.")
    ] = 16384,
    engine: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="vllm where it is installed, on CUDA; untested.")
    ] = "transformers",
    dtype: Annotated[_Dtype | None, typer.Option(help="Of the weights; default: as saved.")] = None,
    device: _Device = None,
) -> None:
    """Let a model answer questions, one greedy answer each.

    The same command again resumes what was stopped.

    Examples:

      eaptk generate --model ckpts/rl --data gsm8k --out answers/rl.parquet

      eaptk generate --model gpt2 --data q.jsonl --limit 50 --out a.parquet
    """
    from eaptk.loading import quiet_transformers

    quiet_transformers()
    from eaptk.answers import answer_questions
    from eaptk.questions import question_set, read_questions

    fields = {"question": question, "reference": reference, "config": config, "limit": limit}
    try:
        found = answer_questions(
            model,
            read_questions(question_set(data, **fields)),
            out,
            prompt=prompt,
            stop=stop or (),
            max_new_tokens=max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            engine=engine,
            dtype=dtype,
            device=device,
        )
    except KeyboardInterrupt:
        print("eaptk: stopped; the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    finished = sum(found.table["finished"].to_pylist())
    print(
        f"{out}: {len(found)} answers of {found.lengths.mean():.1f} tokens in the mean, "
        f"{len(found) - finished} cut off at {found.facts['max_new_tokens']}"
    )


def grade(
    answers: Annotated[list[Path], typer.Argument(help="Files that generate wrote.", metavar="ANSWERS")],
    wrong: Annotated[int, typer.Option(min=0, help="How many wrong answers to show, with the reason.")] = 0,
) -> None:
    """Grade answers by their final result and keep verdict and reason in the file.

    The final result is what follows ####, what the last \\boxed{} holds, or
    else what math-verify finds.

    Examples:

      eaptk grade answers/sft.parquet answers/rl.parquet

      eaptk grade answers/rl.parquet --wrong 20
    """
    from rich.console import Console

    from eaptk import study_console
    from eaptk.answers import Answers
    from eaptk.grading import grade_answers

    console = Console()
    found = [grade_answers(Answers.open(path)) for path in answers]
    console.print(study_console.answered({(str(each.path), ""): each for each in found}))
    if wrong:
        for each in found:
            console.print(study_console.verdicts(each, wrong))


def select(
    answers: Annotated[
        list[Path], typer.Argument(help="Graded files of answers to the same questions.", metavar="ANSWERS")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for a file a model, ready for score, and selection.json.")
    ] = None,
    protocol: Annotated[
        _Protocol, typer.Option(help="Reference length and bounds as in the paper's code, or its text.")
    ] = "paper-code",
    low: Annotated[
        float | None, typer.Option(help="Lower bound of lengths, as a share of the reference.")
    ] = None,
    high: Annotated[float | None, typer.Option(help="Upper bound.")] = None,
    balance: Annotated[
        float | None, typer.Option(help="Largest difference of lengths, as a share of their mean.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Questions drawn at the end.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draw.")] = None,
) -> None:
    """Select the questions on which models can be compared, and show how many each filter leaves.

    Without options the paper's: all right, prompts of equal length, mean
    length between half and one and a half of the shortest model's mean,
    lengths within half of their mean, 100 at random.

    Examples:

      eaptk select answers/sft.parquet answers/rl.parquet --out selected

      eaptk select a.parquet b.parquet --protocol paper-text --samples 50
    """
    from dataclasses import replace

    from rich.console import Console

    from eaptk import study_console
    from eaptk.answers import Answers
    from eaptk.files import write_json
    from eaptk.selection import PROTOCOLS
    from eaptk.selection import select as select_questions

    changes = _given(low=low, high=high, balance=balance, samples=samples, seed=seed)
    opened = [Answers.open(path) for path in answers]
    names = [path.stem for path in answers]
    if len(set(names)) < len(names):
        names = ["-".join(path.with_suffix("").parts[-2:]) for path in answers]
    if len(set(names)) < len(names):
        raise EaptkError(
            f"two of the files would be named alike ({', '.join(names)}); rename one, or its folder"
        )
    found = select_questions(opened, replace(PROTOCOLS[protocol], **changes), names)
    Console().print(study_console.funnel(" and ".join(names), found.funnel, found.notes))
    print(f"reference length {found.reference:.2f} tokens; cut = max(int(alpha * reference), 1)")
    if out is None:
        return
    write_json(out / "selection.json", found.to_dict())
    for name, each in zip(names, opened, strict=True):
        each.write_samples(out / f"{name}.parquet", found.ids)
    print(
        f"wrote {out}; score each model on its own answers: eaptk score --loss self-nll --given-answers "
        f"--data {out / names[0]}.parquet --cut N …"
    )


COMMANDS = (study, generate, grade, select)


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise EaptkError(f"--model {text!r} is not NAME=PATH, as in sft=checkpoints/sft")
    return name, _absolute(path)


def _absolute(place: str) -> str:
    """What a flag names is where the command runs, not where the study file lies."""
    return str(Path(place).absolute()) if Path(place).exists() else place


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None and value != {}}
