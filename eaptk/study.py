"""The pipeline of arXiv 2509.21044 as one call: generate → grade → select → score → compare → report.

    answers/<model>/<dataset>.parquet                        answers and verdicts
    selected/<family>/<dataset>.json                         questions kept, and the funnel that kept them
    runs/<family>/<dataset>/alpha-<α>/<model>/               runs of `eaptk.score`
    results/<family>/<dataset>/alpha-<α>/{real,dense}/       comparisons: .csv, .json, edges.parquet
    results/<family>/<dataset>/alpha-<α>/validation/         first-order scores against exact ablation
    results/study.json                                       all of it
    report/                                                  index.html, report.md, figures

Each stage is a function of its own and finds what an earlier call left: a study that was stopped goes on, and ends
with the same numbers. What cannot be known to be the same (other weights, other questions, another option) is
refused, never mixed.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.text import Text

from eaptk import study_console
from eaptk.answers import Answers, answer_questions
from eaptk.comparison import Comparison, compare
from eaptk.errors import EaptkError
from eaptk.experiment import Experiment, Stage, StudyResults, Validation
from eaptk.files import read_json, write_json
from eaptk.grading import grade_answers
from eaptk.graph import Graph
from eaptk.loading import load_model, load_tokenizer
from eaptk.questions import Question, read_questions
from eaptk.replicates import correct
from eaptk.run import score, score_cuts
from eaptk.selection import Selection, select
from eaptk.sensitivity import complexity_sensitivity
from eaptk.store import Run
from eaptk.study_file import Family, Study, folder_name
from eaptk.validation import validate

if TYPE_CHECKING:
    from rich.console import Console

#: What a study can stop after.
Until = Literal["generate", "grade", "select", "score", "compare", "report"]
STAGES: tuple[Until, ...] = ("generate", "grade", "select", "score", "compare", "report")

#: Of a model and a dataset.
AnswerFiles = dict[tuple[str, str], Answers]
#: Of a family and a dataset.
Selections = dict[tuple[str, str], Selection]


@dataclass(frozen=True)
class Setting:
    """One experiment before it is scored: a family on a dataset at one α."""

    family: Family
    dataset: str
    alpha: float
    cut: int
    ids: tuple[str, ...]
    stage: Stage

    @property
    def place(self) -> Path:
        return Path(folder_name(self.family.name), folder_name(self.dataset), f"alpha-{self.alpha:g}")


def run_study(
    study: Study,
    out: str | os.PathLike[str],
    *,
    until: Until = "report",
    console: Console | None = None,
    progress: bool = True,
) -> StudyResults | None:
    """Run a study, or go on with one that was stopped.

    Args:
        study: see `eaptk.study_file.read_study`.
        out: its folder.
        until: the last stage.
        console: where funnels and tables are printed; None: nowhere.
        progress: show bars on standard error, if that is a terminal.

    Returns:
        The results, once they are compared.

    Raises:
        EaptkError: anything the user can put right.
    """
    if until not in STAGES:
        raise EaptkError(f"a study stops after one of {', '.join(STAGES)}, not {until!r}")
    out, last = Path(out), STAGES.index(until)
    questions = {name: read_questions(source) for name, source in study.datasets.items()}
    answers = generate_stage(study, questions, out, console, progress)
    if last < STAGES.index("grade"):
        return None
    answers = grade_stage(study, answers, console, progress)
    if last < STAGES.index("select"):
        return None
    selections = select_stage(study, answers, out, console)
    if last < STAGES.index("score"):
        return None
    score_stage(study, answers, selections, out, console, progress)
    if last < STAGES.index("compare"):
        return None
    results = compare_stage(study, selections, out, console)
    if until == "report":
        from eaptk.report import write_report

        written = write_report(results, out / "report")
        if console is not None:
            _say(console, f"report: {written[0]} and {len(written) - 1} files beside it")
    return results


def generate_stage(
    study: Study,
    questions: Mapping[str, Sequence[Question]],
    out: Path,
    console: Console | None = None,
    progress: bool = True,
) -> AnswerFiles:
    """Every model of a family answers every question."""
    found: AnswerFiles = {}
    for name in study.used_models:
        model = study.models[name]
        options: dict[str, Any] = {
            "prompt": model.prompt or study.generation.prompt,
            "stop": model.stop,
            "max_new_tokens": model.max_new_tokens or study.generation.max_new_tokens,
            "tokens_per_batch": study.generation.tokens_per_batch,
            "progress": progress,
        }
        if console is not None:
            _say(console, f"{name} answers {', '.join(questions)}")
        with ExitStack() as stack:
            if study.generation.engine == "vllm":  # which loads the weights itself
                asked: Any = model.path
                options |= {"engine": "vllm", "dtype": model.dtype or study.dtype}
            else:
                asked, options["tokenizer"] = stack.enter_context(_loaded(study, name))
            for dataset, each in questions.items():
                file = out / "answers" / folder_name(name) / f"{folder_name(dataset)}.parquet"
                found[name, dataset] = answer_questions(asked, each, file, **options)
            del asked  # before the next model is loaded
    return found


def grade_stage(
    study: Study, answers: AnswerFiles, console: Console | None = None, progress: bool = True
) -> AnswerFiles:
    """Grade every answer."""
    graded = {key: grade_answers(each, progress) for key, each in answers.items()}
    if console is not None:
        console.print(study_console.answered(graded))
    return graded


def select_stage(study: Study, answers: AnswerFiles, out: Path, console: Console | None = None) -> Selections:
    """The questions each family is compared on, by dataset."""
    found: Selections = {}
    for family in study.families:
        for dataset in study.datasets:
            try:
                chosen = select([answers[n, dataset] for n in family.models], study.protocol, family.models)
            except EaptkError as error:
                raise EaptkError(f"family {family.name!r} on {dataset}: {error}") from error
            found[family.name, dataset] = chosen
            file = out / "selected" / folder_name(family.name) / f"{folder_name(dataset)}.json"
            write_json(file, chosen.to_dict() | {"protocol": asdict(study.protocol)})
            if console is not None:
                console.print(
                    study_console.funnel(f"{family.name} on {dataset}", chosen.funnel, chosen.notes)
                )
    return found


def settings(study: Study, selections: Selections) -> list[Setting]:
    """All experiments, in the order of families, datasets and α."""
    found = []
    for family in study.families:
        for dataset in study.datasets:
            chosen = selections[family.name, dataset]
            for alpha in study.alphas:
                ids, stage = chosen.at(alpha, study.drop_short)
                found.append(Setting(family, dataset, alpha, chosen.cut(alpha), ids, stage))
    return found


def score_stage(
    study: Study,
    answers: AnswerFiles,
    selections: Selections,
    out: Path,
    console: Console | None = None,
    progress: bool = True,
) -> None:
    """Score every model on its own answers, in every experiment it is part of, and validate the scores."""
    everything = settings(study, selections)
    for name in study.used_models:
        mine = [setting for setting in everything if name in setting.family.models]
        with _loaded(study, name) as (model, tokenizer):
            for setting, outs in _together(mine, out, name):
                options: dict[str, Any] = {"tokenizer": tokenizer, "progress": progress}
                options |= {"loss": "self_nll", "given_answers": True, **asdict(study.scoring)}
                samples = answers[name, setting.dataset].samples(setting.ids)
                if len(outs) > 1:
                    score_cuts(model, samples, outs, **options)
                else:
                    ((cut, run),) = outs.items()
                    score(model, samples, run, cut=cut, **options)
            # Last, as it turns a model in half precision into float32.
            for setting in mine:
                _validation(study, setting, name, answers[name, setting.dataset], out, model)
            del model
        if console is not None:
            _say(console, f"scored {name}: {len(mine)} {'run' if len(mine) == 1 else 'runs'}")


def _run_folder(out: Path, setting: Setting, name: str) -> Path:
    return out / "runs" / setting.place / folder_name(name)


def _together(settings: Sequence[Setting], out: Path, name: str) -> Iterator[tuple[Setting, dict[int, Path]]]:
    """Experiments of one model that share forward passes, being of the same questions: one of them, and runs by cut.

    Runs that are there go on with the cuts they were begun with: α may have been added since, or taken out.
    """
    left = list(settings)
    while left:
        alike = [s for s in left if (s.place.parent, s.ids) == (left[0].place.parent, left[0].ids)]
        begun = [_begun_with(_run_folder(out, s, name), s.cut) for s in alike]
        cuts = next((each for each in begun if each), [s.cut for s in alike])
        together: dict[int, Setting] = {}
        for s, each in zip(alike, begun, strict=True):
            if s.cut in cuts and each in (None, cuts):
                together.setdefault(s.cut, s)
        runs = {cut: _run_folder(out, s, name) for cut, s in together.items()}
        first = next(iter(runs.values()))
        for sibling in sorted(first.parent.parent.glob(f"*/{first.name}/manifest.json")):
            found = read_json(sibling)
            if found.get("cuts") == cuts and found["cut"] not in runs:
                runs[found["cut"]] = sibling.parent
        yield alike[0], runs
        left = [s for s in left if not any(s is other for other in together.values())]


def _begun_with(run: Path, cut: int) -> list[int] | None:
    """The cuts that a run shares its forward passes with, itself included; None if there is no run."""
    manifest = run / "manifest.json"
    if not manifest.exists():
        return None
    cuts = list(read_json(manifest).get("cuts", ()))
    return cuts if cut in cuts else [cut]


def compare_stage(
    study: Study, selections: Selections, out: Path, console: Console | None = None
) -> StudyResults:
    """Compare the runs of every experiment, both conventions, and correct over all of them."""
    experiments = []
    for setting in settings(study, selections):
        family, chosen = setting.family, selections[setting.family.name, setting.dataset]
        runs = [Run.open(_run_folder(out, setting, name)) for name in family.models]
        options: dict[str, Any] = {
            "names": family.models,
            "bins": study.comparison.bins,
            "upper": study.comparison.upper,
            "resampling": study.comparison.resampling,
        }
        real = _controlled(runs, options)
        experiments.append(
            Experiment(
                family=family.name,
                method=family.method,
                dataset=setting.dataset,
                alpha=setting.alpha,
                cut=setting.cut,
                names=family.models,
                steps=family.steps,
                funnel=(*chosen.funnel, setting.stage),
                lengths=chosen.lengths,
                accuracy=chosen.accuracy,
                real=replace(real, notes=(*real.notes, *chosen.notes, *_same_cut(study, setting, chosen))),
                dense=compare(runs, dense=True, **options),
                sensitivity=complexity_sensitivity(runs, real),
                validation=tuple(_validations(study, setting, out)),
            )
        )
    results = correct(StudyResults(study.name, tuple(experiments), study.protocol.name, _facts(study)))
    for experiment, setting in zip(results.experiments, settings(study, selections), strict=True):
        for convention in ("real", "dense"):
            getattr(experiment, convention).write(out / "results" / setting.place / convention)
    write_json(out / "results" / "study.json", to_dict(results))
    if console is not None:
        for table in study_console.summary(results):
            console.print(table)
        _say(console, "relative to the baseline, kurtosis as it is; ?: not resolved over the whole study")
    return results


def _controlled(runs: Sequence[Run], options: dict[str, Any]) -> Comparison:
    """Over real edges, at equal loss too where the losses allow it: those of equal models are no line."""
    try:
        return compare(runs, control_loss=True, **options)
    except EaptkError as error:
        found = compare(runs, **options)
        return replace(found, notes=(*found.notes, f"nothing at equal loss: {error}"))


def _same_cut(study: Study, setting: Setting, chosen: Selection) -> tuple[str, ...]:
    """A note where another α cuts to as many tokens, as it does where answers are short."""
    others = [alpha for alpha in study.alphas if alpha != setting.alpha and chosen.cut(alpha) == setting.cut]
    if not others:
        return ()
    named = ", ".join(f"{alpha:g}" for alpha in others)
    return (
        f"α = {named} cuts answers to as many tokens as {setting.alpha:g}, {setting.cut}: the same experiment, "
        f"counted again in the correction",
    )


def to_dict(results: StudyResults) -> dict[str, Any]:
    """JSON-ready, without the edges and the lengths."""
    return {
        "name": results.name,
        "protocol": results.protocol,
        "facts": results.facts,
        "experiments": [
            {
                key: getattr(e, key)
                for key in ("family", "method", "dataset", "alpha", "cut", "names", "steps", "accuracy")
            }
            | {
                "funnel": [asdict(stage) for stage in e.funnel],
                "real": e.real.to_dict(),
                "dense": e.dense.to_dict(),
                "sensitivity": [asdict(row) for row in e.sensitivity],
                "validation": [asdict(each) for each in e.validation],
            }
            for e in results.experiments
        ],
    }


def _validated_alpha(study: Study) -> float | None:
    if not (study.validation.edges and study.validation.samples):
        return None
    return min(study.alphas) if study.validation.alpha is None else study.validation.alpha


def _validation(study: Study, setting: Setting, name: str, answers: Answers, out: Path, model: Any) -> None:
    """Validate one model in one experiment, unless that has been done."""
    if setting.alpha != _validated_alpha(study):
        return
    run = _run_folder(out, setting, name)
    options = study.validation
    samples = [
        replace(sample, answer_ids=sample.answer_ids[: setting.cut])
        for sample in answers.samples(setting.ids[: options.samples])
    ]
    manifest = Run.open(run).manifest
    key = {
        "weights": manifest["model"]["weights"],
        "samples": [[s.id, s.prompt_ids, s.answer_ids] for s in samples],
        "graph": manifest["graph"],
        "ablation": study.scoring.ablation,
        "edges": options.edges,
        "seed": options.seed,
        "versions": manifest["versions"],
    }
    key = json.loads(json.dumps(key))
    file = out / "results" / setting.place / "validation" / f"{folder_name(name)}.json"
    if file.exists() and read_json(file)["of"] == key:
        return
    means = None
    if study.scoring.ablation == "mean":
        from safetensors.torch import load_file

        means = {n: mean.to(model.device).float() for n, mean in load_file(run / "means.safetensors").items()}
    graph = Graph.from_model(model, study.scoring.granularity, study.scoring.qkv)
    found = validate(
        model.float(),
        samples,
        graph,
        n_edges=options.edges,
        seed=options.seed,
        ablation=study.scoring.ablation,
        means=means,
        name=name,
    )
    write_json(file, {"of": key, "validation": asdict(found)})


def _validations(study: Study, setting: Setting, out: Path) -> Iterable[Validation]:
    if setting.alpha != _validated_alpha(study):
        return
    for name in setting.family.models:
        file = out / "results" / setting.place / "validation" / f"{folder_name(name)}.json"
        found = read_json(file)["validation"]
        yield Validation(**found | {key: tuple(found[key]) for key in ("predicted", "exact")})


def _say(console: Console, line: str) -> None:
    """Print a line to the letter: names may hold what rich takes for markup, and a path must not be broken."""
    console.print(Text(line), soft_wrap=True)


@contextmanager
def _loaded(study: Study, name: str) -> Iterator[tuple[Any, Any]]:
    """A model of the study and its tokenizer, let go of at the end."""
    model = study.models[name]
    try:
        loaded = load_model(model.path, model.dtype or study.dtype, study.device, model.attention)
        yield loaded, load_tokenizer(model.path)
    except EaptkError as error:
        raise EaptkError(f"model {name}: {error}") from error
    finally:
        loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _facts(study: Study) -> dict[str, Any]:
    """What the numbers follow from; no times, so that the same command says the same."""
    return {
        "versions": {
            package: version(package)
            for package in ("eaptk", "torch", "transformers", "math-verify", "numpy")
        },
        "models": {
            name: {key: value for key, value in asdict(study.models[name]).items() if value}
            for name in study.used_models
        },
        "datasets": {name: str(source.source) for name, source in study.datasets.items()},
        "alphas": list(study.alphas),
        "selection": asdict(study.protocol) | {"drop_short": study.drop_short},
        **{
            name: asdict(getattr(study, name))
            for name in ("generation", "scoring", "comparison", "validation")
        },
    }
