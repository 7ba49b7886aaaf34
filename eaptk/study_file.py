"""What a study is: models, families, questions and every option, from a YAML file or from flags.

    name: my-study
    models:
      sft: checkpoints/sft                    # a folder (relative to this file) or a name on the hub
      rl: {path: checkpoints/rl, prompt: chat}
    datasets: [gsm8k, math500]

Nothing else is needed: the first model is the baseline of every other. docs/study.md has all keys. Keys that are
unknown are errors.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from eaptk.answers import Engine
from eaptk.errors import EaptkError
from eaptk.files import is_meant_as_path
from eaptk.graph import Granularity, Qkv
from eaptk.prompts import find_template
from eaptk.questions import READY_MADE, QuestionSet, question_set
from eaptk.resampling import Resampling
from eaptk.selection import PROTOCOLS, Protocol
from eaptk.sweep import bin_edges
from eaptk.typed import build, guess, known_keys, mapping

ALPHAS = (0.03, 0.1, 0.3, 0.5)


@dataclass(frozen=True)
class Model:
    """A model and how it is asked.

    Args:
        path: a folder, or a name on the hub.
        prompt: a template; see `eaptk.prompts`. None: the study's.
        stop: tokens that end an answer, besides the template's and the model's own.
        max_new_tokens: of the longest answer. None: the study's.
        dtype, attention: as for `load_model`.
    """

    path: str
    prompt: str | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    attention: Literal["sdpa", "eager"] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _at_least_one(f"model {self.path}", max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True)
class Family:
    """Models that are compared with each other; the first is the baseline.

    Args:
        name: of the family.
        models: [k] names.
        method: what families are grouped by; the family's own name by default.
        steps: [k] position of each model along training, for a series of checkpoints.
    """

    name: str
    models: tuple[str, ...]
    method: str
    steps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Generation:
    """How models answer; see `eaptk.answers.answer_questions`."""

    prompt: str = "plain"
    max_new_tokens: int = 512
    tokens_per_batch: int = 16384
    engine: Engine = "transformers"

    def __post_init__(self) -> None:
        _at_least_one(
            "generation", max_new_tokens=self.max_new_tokens, tokens_per_batch=self.tokens_per_batch
        )


@dataclass(frozen=True)
class Scoring:
    """How answers are scored; see `eaptk.score`."""

    granularity: Granularity = "block"
    qkv: Qkv = "split"
    ablation: Literal["zero", "mean"] = "zero"
    tokens_per_batch: int = 4096

    def __post_init__(self) -> None:
        _at_least_one("scoring", tokens_per_batch=self.tokens_per_batch)


@dataclass(frozen=True)
class Comparing:
    """How runs are compared; see `eaptk.compare`."""

    bins: int = 100
    upper: float | None = None
    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    @property
    def resampling(self) -> Resampling:
        return Resampling(self.confidence, self.resamples, self.seed)

    def __post_init__(self) -> None:
        # Each of these refuses what it cannot do; better now than when everything is scored.
        bin_edges(self.bins, 1.0 if self.upper is None else self.upper)
        _ = self.resampling


@dataclass(frozen=True)
class Validating:
    """How first-order scores are held against exact ablation; see `eaptk.validation.validate`.

    Args:
        edges, samples: of the subset; none where either is 0.
        alpha: the α whose runs are validated; None: the smallest.
        seed: of the edges.
    """

    edges: int = 64
    samples: int = 8
    alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.edges < 0 or self.edges == 1:
            raise EaptkError(f"validation.edges is {self.edges}; a correlation needs at least 2 (0: none)")
        for option in ("samples", "seed"):
            if getattr(self, option) < 0:
                raise EaptkError(f"validation.{option} is {getattr(self, option)}; it must not be negative")


@dataclass(frozen=True)
class Study:
    """A whole study.

    Args:
        name: of it.
        models: by name.
        families: see there.
        datasets: sets of questions by name.
        alphas: shares of the reference length that answers are cut to.
        protocol: how questions are selected.
        drop_short: leave out questions with an answer shorter than the cut.
        device: for all models; None: cuda if there is one.
        dtype: of weights, where a model does not say; None: as saved.
        generation, scoring, comparison, validation: see there.
    """

    name: str
    models: Mapping[str, Model]
    families: tuple[Family, ...]
    datasets: Mapping[str, QuestionSet]
    alphas: tuple[float, ...] = ALPHAS
    protocol: Protocol = PROTOCOLS["paper-code"]
    drop_short: bool = False
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    generation: Generation = field(default_factory=Generation)
    scoring: Scoring = field(default_factory=Scoring)
    comparison: Comparing = field(default_factory=Comparing)
    validation: Validating = field(default_factory=Validating)

    def __post_init__(self) -> None:
        if not self.datasets:
            raise EaptkError("a study needs questions: give at least one dataset")
        if not self.families:
            raise EaptkError("a study compares models: give at least two, the baseline first")
        if not self.alphas or not all(0 < alpha <= 1 for alpha in self.alphas):
            raise EaptkError(f"alphas are {list(self.alphas)}; give shares of the answer, in (0, 1]")
        for what, names in (
            ("models", [*self.models]),
            ("families", [family.name for family in self.families]),
            ("datasets", [*self.datasets]),
        ):
            _distinct(what, names)
        _distinct("alphas", [f"{alpha:g}" for alpha in self.alphas])
        for model in self.models.values():
            find_template(model.prompt or self.generation.prompt)
        for family in self.families:
            _check_family(family, self.models)
        _check_replicates(self.families)
        if self.validation.alpha is not None and self.validation.alpha not in self.alphas:
            raise EaptkError(f"validation.alpha is {self.validation.alpha}; it must be one of the alphas")

    @property
    def used_models(self) -> tuple[str, ...]:
        """Names of the models that a family has, in the order of the file."""
        return tuple(n for n in self.models if any(n in family.models for family in self.families))


#: Mappings of options.
_OPTIONS: dict[str, type[Any]] = {
    "generation": Generation,
    "scoring": Scoring,
    "comparison": Comparing,
    "validation": Validating,
}


def read_study(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Study:
    """A study from its YAML file; folders and files in it are relative to where it lies.

    Args:
        path: of the file.
        changes: replace what the file says; of a mapping of options only the keys given.

    Raises:
        EaptkError: no such file, no YAML, an unknown key, a value of another type, or what `Study` refuses.
    """
    try:
        import yaml
    except ImportError as error:
        raise EaptkError("reading a study file needs PyYAML: pip install 'eaptk[study]'") from error
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EaptkError(f"cannot read the study file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EaptkError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise EaptkError(f"{path} is no study: it needs the keys models and datasets")
    content.setdefault("name", path.resolve().parent.name if path.stem == "study" else path.stem)
    changes = changes or {}
    for key, value in changes.items():
        if key in _OPTIONS or key == "selection":
            value = mapping(content.get(key), key) | value
        content[key] = value
    if isinstance(content.get("models"), dict) and "models" not in changes:
        # What is said of all models goes for those that the file says it of one by one, too.
        general = {*changes, *changes.get("generation", {})}
        content["models"] = {
            name: {key: value for key, value in model.items() if key not in general}
            if isinstance(model, dict)
            else model
            for name, model in content["models"].items()
        }
    try:
        return make_study(content, path.parent)
    except EaptkError as error:
        raise EaptkError(f"{path}: {error}") from error


def make_study(content: Mapping[str, Any], folder: Path = Path()) -> Study:
    """A study from what a YAML file holds.

    Args:
        content: see docs/study.md.
        folder: what paths are relative to.

    Raises:
        EaptkError: as `read_study`.
    """
    known_keys(content, [*(f.name for f in fields(Study)), "selection"], "the study")
    models = _models(content.get("models"), folder)
    families = _families(content.get("families"), models, folder)
    simple = {
        key: content[key] for key in ("name", "alphas", "drop_short", "device", "dtype") if key in content
    }
    options = {key: build(kind, content.get(key), key) for key, kind in _OPTIONS.items()}
    return build(
        Study,
        simple
        | options
        | {
            "models": models,
            "families": families,
            "datasets": _datasets(content.get("datasets"), folder),
            "protocol": _protocol(content.get("protocol", "paper-code"), content.get("selection")),
        },
        "the study",
    )


def _models(given: Any, folder: Path) -> dict[str, Model]:
    if not isinstance(given, Mapping) or not given:
        raise EaptkError("models must map names to folders or names on the hub: {sft: checkpoints/sft, …}")
    models: dict[str, Model] = {}
    for name, value in given.items():
        where = f"models.{name}"
        model = build(Model, value if isinstance(value, Mapping) else {"path": value}, where)
        _new(str(name), models, "models")
        models[str(name)] = replace(model, path=_place(model.path, folder, where))
    return models


def _new(name: str, found: Mapping[str, Any], what: str) -> None:
    """YAML's 1 and "1" are two keys, but one name."""
    if name in found:
        raise EaptkError(f"{what}: the name {name!r} is given twice")


def _place(name: str, folder: Path, where: str) -> str:
    """A folder beside the study file, else a name on the hub."""
    here = folder / name
    if here.exists():
        return str(here)
    if is_meant_as_path(name):
        raise EaptkError(f"{where}: there is no {here}")
    return name


def _families(given: Any, models: dict[str, Model], folder: Path) -> tuple[Family, ...]:
    """Families as given, and the checkpoints of series added to `models`."""
    if given is None:
        baseline, *others = models
        return tuple(Family(name, (baseline, name), name) for name in others)
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise EaptkError("families must be a list of {name: …, models: [baseline, …]}")
    return tuple(_family(each, f"families[{i}]", models, folder) for i, each in enumerate(given))


def _family(given: Any, where: str, models: dict[str, Model], folder: Path) -> Family:
    if not isinstance(given, Mapping):
        raise EaptkError(f"{where} must be a mapping: {{name: …, models: [baseline, …]}}")
    known_keys(given, ["name", "method", "models", "steps", "baseline", "checkpoints"], where)
    content = dict(given)
    if "checkpoints" in content:
        if "models" in content or "steps" in content or "baseline" not in content:
            raise EaptkError(f"{where}: checkpoints go with a baseline, and with neither models nor steps")
        name = str(content.get("name", content["checkpoints"]))
        start = str(content.pop("baseline"))
        if start not in models:
            raise EaptkError(f"{where}: {guess(start, [*models], 'baseline')}")
        found = _checkpoints(str(content.pop("checkpoints")), folder, where)
        series = {f"{name} {step:g}": replace(models[start], path=str(path)) for step, path in found}
        if clash := series.keys() & models.keys():
            raise EaptkError(f"{where}: {min(clash)!r} is a model already; give the family another name")
        models |= series
        content |= {"models": [start, *series], "steps": [0.0, *(step for step, _ in found)]}
    members = content.get("models")
    last = members[-1:] if isinstance(members, (list, tuple)) else ()
    content.setdefault("name", " ".join(map(str, last)))
    content.setdefault("method", content["name"])
    return build(Family, content, where)


def _checkpoints(pattern: str, folder: Path, where: str) -> list[tuple[float, Path]]:
    """Folders that match, by the last number in their name."""
    found = []
    # Not Path.glob, which takes no absolute pattern.
    for path in (folder / match for match in glob.glob(pattern, root_dir=folder, recursive=True)):
        numbers = re.findall(r"\d+", path.name)
        if path.is_dir() and numbers:
            found.append((float(numbers[-1]), path))
    if not found:
        raise EaptkError(
            f"{where}: no folder {folder / pattern} with a step in its name, as in checkpoint-100"
        )
    found.sort(key=lambda pair: pair[0])
    _distinct(f"{where}: steps", [f"{step:g}" for step, _ in found])
    return found


def _datasets(given: Any, folder: Path) -> dict[str, QuestionSet]:
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Sequence) and all(isinstance(source, str) for source in given):
        names = [source if source in READY_MADE else Path(source).stem for source in given]
        # A mapping would keep the last of two alike, and say nothing.
        _distinct("datasets", names)
        given = dict(zip(names, given, strict=True))
    if not isinstance(given, Mapping):
        raise EaptkError(
            f"datasets must be a list of names ({', '.join(READY_MADE)}) or files, or map names to them"
        )
    found: dict[str, QuestionSet] = {}
    for name, value in given.items():
        where = f"datasets.{name}"
        content = {"source": value} if isinstance(value, str) else mapping(value, where)
        known_keys(content, [f.name for f in fields(QuestionSet)], where)
        source = str(content.pop("source", name))
        if source not in READY_MADE:
            split = (source, "", "") if (folder / source).exists() else source.partition(":")
            source = _place(split[0], folder, where) + "".join(split[1:])
        _new(str(name), found, "datasets")
        found[str(name)] = build(QuestionSet, vars(question_set(source, **content)), where)
    return found


def _protocol(name: Any, changes: Any) -> Protocol:
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise EaptkError(guess(str(name), [*PROTOCOLS], "protocol"))
    if changes is None:
        return PROTOCOLS[name]
    if isinstance(changes, Mapping) and "name" in changes:
        raise EaptkError("selection has no 'name'; protocol names it")
    return build(Protocol, vars(PROTOCOLS[name]) | mapping(changes, "selection"), "selection")


def _at_least_one(where: str, **options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise EaptkError(f"{where}: {name} is {value}; it must be at least 1")


def _check_family(family: Family, models: Mapping[str, Model]) -> None:
    where = f"family {family.name!r}"
    for name in family.models:
        if name not in models:
            raise EaptkError(f"{where}: {guess(name, [*models], 'model')}")
    if len(family.models) < 2:
        raise EaptkError(f"{where} has {len(family.models)} models; two are needed, the baseline first")
    _distinct(f"{where}: models", family.models)
    if family.steps is not None and len(family.steps) != len(family.models):
        raise EaptkError(
            f"{where} has {len(family.steps)} steps for {len(family.models)} models; give one each"
        )
    if family.steps is not None and any(b <= a for a, b in pairwise(family.steps)):
        raise EaptkError(f"{where}: steps are {[*family.steps]}; they must increase, as training goes on")


def _check_replicates(families: Sequence[Family]) -> None:
    """Families of a method are seeds of one experiment, so each has its models in the same order."""
    places: dict[tuple[str, str], tuple[int, Family]] = {}
    for family in families:
        for position, model in enumerate(family.models if family.steps is None else ()):
            before, other = places.setdefault((family.method, model), (position, family))
            if before != position:
                raise EaptkError(
                    f"families {other.name!r} and {family.name!r} of {family.method!r} have {model!r} at different "
                    f"places; means over them are taken place by place, so give both one order"
                )


def folder_name(name: str) -> str:
    """A name as a folder: what is no letter, digit or one of ``. _ + = @ -`` becomes ``-``."""
    return re.sub(r"[^\w.+=@-]+", "-", name).strip("-.") or "-"


def _distinct(what: str, names: Sequence[str]) -> None:
    folders: dict[str, str] = {}
    for name in names:
        folder = folder_name(name)
        if folder in folders:
            raise EaptkError(f"{what}: {folders[folder]!r} and {name!r} would share a folder; rename one")
        folders[folder] = name
