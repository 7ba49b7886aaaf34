"""Study files: what they may say, what follows from leaving it out, and how a mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from eaptk.errors import EaptkError
from eaptk.prompts import TEMPLATES
from eaptk.questions import READY_MADE
from eaptk.selection import PROTOCOLS
from eaptk.study_file import ALPHAS, Family, make_study, read_study

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"models": {"a": "gpt2", "b": "gpt2-medium"}, "datasets": ["gsm8k"], "name": "s"}


def test_models_and_questions_are_enough() -> None:
    study = make_study(SMALL)
    assert study.families == (Family("b", ("a", "b"), "b"),)
    assert (study.alphas, study.protocol) == (ALPHAS, PROTOCOLS["paper-code"])
    assert study.datasets == {"gsm8k": READY_MADE["gsm8k"]}
    assert study.models["b"].path == "gpt2-medium"


def test_every_other_model_is_held_against_the_first() -> None:
    study = make_study(SMALL | {"models": {"a": "x", "b": "y", "c": "z"}})
    assert [family.models for family in study.families] == [("a", "b"), ("a", "c")]


def test_folders_are_relative_to_the_file_and_other_names_are_the_hubs(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "q.jsonl").write_text("{}\n")
    content = {"models": {"a": "ckpt", "b": "owner/model"}, "datasets": ["q.jsonl", "math"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    study = read_study(tmp_path / "mine.yaml")
    assert study.name == "mine"
    assert [model.path for model in study.models.values()] == [str(tmp_path / "ckpt"), "owner/model"]
    assert study.datasets["q"].source == str(tmp_path / "q.jsonl")


def test_flags_replace_what_the_file_says_option_by_option(tmp_path: Path) -> None:
    content = SMALL | {"generation": {"prompt": "mistral", "max_new_tokens": 7}, "alphas": [0.5]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    study = read_study(tmp_path / "study.yaml", {"generation": {"max_new_tokens": 9}, "alphas": [0.25]})
    assert (study.generation.prompt, study.generation.max_new_tokens) == ("mistral", 9)
    assert study.alphas == (0.25,)


def test_flags_for_all_models_replace_what_the_file_says_of_one(tmp_path: Path) -> None:
    models = {
        "a": {"path": "gpt2", "prompt": "mistral", "max_new_tokens": 7, "dtype": "float16"},
        "b": "gpt2-xl",
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL | {"models": models}))
    changes = {"generation": {"max_new_tokens": 9}, "dtype": "bfloat16"}
    study = read_study(tmp_path / "study.yaml", changes)
    model = study.models["a"]
    assert (model.prompt, model.max_new_tokens, model.dtype) == ("mistral", None, None)
    assert (study.generation.max_new_tokens, study.dtype) == (9, "bfloat16")


def test_checkpoints_of_a_training_run_stand_at_the_steps_in_their_names(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        (tmp_path / f"run2/checkpoint-{step}").mkdir(parents=True)
    family = {"name": "training", "method": "PPO", "baseline": "a", "checkpoints": "run2/checkpoint-*"}
    content = SMALL | {"models": {"a": {"path": "gpt2", "prompt": "mistral"}}, "families": [family]}
    study = make_study(content, tmp_path)
    names = ("a", "training 3", "training 20", "training 100")
    assert study.families == (Family("training", names, "PPO", (0.0, 3.0, 20.0, 100.0)),)
    assert study.models["training 20"].prompt == "mistral", "asked as the baseline is"
    assert study.models["training 20"].path == str(tmp_path / "run2/checkpoint-20")


def test_checkpoints_may_lie_anywhere(tmp_path: Path) -> None:
    (tmp_path / "run/step-5").mkdir(parents=True)
    family = {"name": "training", "baseline": "a", "checkpoints": str(tmp_path / "run/step-*")}
    study = make_study(SMALL | {"families": [family]}, Path("elsewhere"))
    assert study.models["training 5"].path == str(tmp_path / "run/step-5")


def test_a_ready_made_dataset_needs_its_name_only() -> None:
    study = make_study(SMALL | {"datasets": yaml.safe_load("{gsm8k: , few: {source: gsm8k, limit: 3}}")})
    assert study.datasets["gsm8k"] == READY_MADE["gsm8k"]
    assert study.datasets["few"].limit == 3


def test_models_in_no_family_are_left_alone() -> None:
    families = [{"name": "f", "models": ["a", "b"]}]
    study = make_study(SMALL | {"models": {"a": "x", "c": "z", "b": "y"}, "families": families})
    assert study.used_models == ("a", "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": ["gsm8k"]}, "the study: 'dataset' is no key: did you mean 'datasets'?"),
        ({"models": {}}, "models must map names to folders"),
        ({"models": {"a": "x"}}, "give at least two, the baseline first"),
        ({"models": {"a": {"path": "x", "promt": "chat"}, "b": "y"}}, "models.a: 'promt' is no key: did you mean"),
        ({"models": {"a": {"prompt": "chat"}, "b": "y"}}, "models.a needs path"),
        ({"models": {"a": "./gone", "b": "y"}}, "models.a: there is no gone"),
        ({"models": {"a b": "x", "a-b": "y"}}, "'a b' and 'a-b' would share a folder; rename one"),
        ({"datasets": []}, "a study needs questions"),
        ({"datasets": [{"source": "gsm8k"}]}, "datasets must be a list of names"),
        ({"datasets": ["a:x/q.jsonl", "b:x/q.jsonl"]}, "datasets: 'q' and 'q' would share a folder; rename one"),
        ({"datasets": {"q": 3}}, "datasets.q must be a mapping of options, not 3"),
        ({"datasets": {"q": {"source": "gsm8k", "limt": 3}}}, "datasets.q: 'limt' is no key: did you mean 'limit'"),
        ({"datasets": {"q": {"source": "gsm8k", "limit": "3"}}}, "datasets.q.limit must be a whole number, not '3'"),
        ({"alphas": 0.3}, "alphas must be a list, not 0.3"),
        ({"alphas": [0.3, "all"]}, "alphas must be a number, not 'all'"),
        ({"alphas": [0.3, 0.3]}, "alphas: '0.3' and '0.3' would share a folder"),
        ({"protocol": "paper_code"}, "'paper_code' is no protocol: did you mean 'paper-code'?"),
        ({"protocol": ["paper-code"]}, "is no protocol"),
        ({"selection": {"balanse": 1}}, "selection: 'balanse' is no key: did you mean 'balance'?"),
        ({"selection": {"name": "x"}}, "selection has no 'name'"),
        ({"selection": 3}, "selection must be a mapping of options, not 3"),
        ({"scoring": {"granularity": "layer"}}, "scoring.granularity: 'layer' is no value: known are block, head"),
        ({"generation": {"max_new_tokens": 1.5}}, "generation.max_new_tokens must be a whole number, not 1.5"),
        ({"generation": {"max_new_tokens": 0}}, "generation: max_new_tokens is 0; it must be at least 1"),
        ({"models": {"a": {"path": "x", "max_new_tokens": 0}, "b": "y"}}, "model x: max_new_tokens is 0"),
        ({"scoring": {"tokens_per_batch": 0}}, "scoring: tokens_per_batch is 0; it must be at least 1"),
        ({"comparison": {"confidence": 95}}, "confidence is 95.0; it must lie between 0 and 1"),
        ({"comparison": {"bins": 0}}, "bins is 0; it must lie between 1 and"),
        ({"comparison": {"upper": -1}}, "the histogram's range ends at -1.0"),
        ({"validation": {"edges": 1}}, "validation.edges is 1; a correlation needs at least 2 (0: none)"),
        ({"validation": {"samples": -1}}, "validation.samples is -1; it must not be negative"),
        ({"drop_short": 1}, "drop_short must be true or false, not 1"),
        ({"validation": {"alpha": 0.2}}, "validation.alpha is 0.2; it must be one of the alphas"),
        ({"families": {"f": ["a", "b"]}}, "families must be a list"),
        ({"families": [{"name": "f", "models": ["a", "c"]}]}, "family 'f': 'c' is no model: known are a, b"),
        ({"families": [{"models": 5}]}, "families[0].models must be a list, not 5"),
        ({"families": [{"models": {"a": "b"}}]}, "families[0].models must be a list, not {'a': 'b'}"),
        ({"families": [{"name": "f", "models": ["a"]}]}, "family 'f' has 1 models; two are needed"),
        ({"families": [{"name": "f", "models": ["a", "b"], "steps": [1]}]}, "has 1 steps for 2 models"),
        ({"families": [{"name": "f", "models": ["a", "b"], "steps": [2, 2]}]}, "[2.0, 2.0]; they must increase"),
        ({"models": {1: "x", "1": "y"}}, "models: the name '1' is given twice"),
        (
            {
                "models": {"a": "x", "b": "y", "c": "z"},
                "families": [
                    {"name": "s0", "method": "m", "models": ["a", "b", "c"]},
                    {"name": "s1", "method": "m", "models": ["a", "c", "b"]},
                ],
            },
            "families 's0' and 's1' of 'm' have 'c' at different places",
        ),
        ({"families": [{"name": "f", "models": ["a", "b"]}] * 2}, "families: 'f' and 'f' would share a folder"),
        ({"families": [{"name": "f", "checkpoints": "x-*"}]}, r"families[0]: checkpoints go with a baseline"),
        ({"families": [{"name": "f", "baseline": "a", "checkpoints": "x-*"}]}, "no folder x-* with a step in its name"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place_and_the_nearest_word(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EaptkError) as error:
        make_study(SMALL | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "is no YAML"),
        ("3", "is no study: it needs the keys"),
        ("modles: {}", "did you mean 'models'?"),
    ],
)
def test_a_file_that_is_no_study_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(EaptkError) as error:
        read_study(tmp_path / "s.yaml")
    assert str(error.value).startswith(str(tmp_path / "s.yaml"))
    assert message in str(error.value)


def test_the_papers_study_has_its_four_families_and_three_datasets() -> None:
    study = read_study(ROOT / "examples/paper/study.yaml")
    assert [(family.name, family.method) for family in study.families] == [
        ("DeepSeek-Math", "GRPO"),
        ("Mistral", "PPO"),
        ("Distilled-Qwen", "GRPO"),
        ("Qwen2.5", "DPO"),
    ]
    assert set(study.datasets) == {"math", "college-math", "gsm8k"}
    for family in study.families:
        assert len({study.models[name].prompt for name in family.models}) == 1
        assert study.models[family.models[0]].prompt in TEMPLATES


def test_the_file_in_the_documentation_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs/study.md").read_text()
    content = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    for folder in ("checkpoints/sft", "checkpoints/rl", "ppo/checkpoint-10"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "questions.jsonl").touch()
    study = make_study(content, tmp_path)
    shown = {k: v for k, v in content.items() if k not in ("name", "models", "families", "datasets")}
    bare = make_study(SMALL | {"name": "mine"})
    assert (study.generation, study.scoring, study.comparison, study.validation) == (
        bare.generation,
        bare.scoring,
        bare.comparison,
        bare.validation,
    ), "what is shown is the default"
    assert (study.alphas, study.protocol, study.drop_short) == (bare.alphas, bare.protocol, bare.drop_short)
    assert set(shown) == set(vars(bare)) - {"name", "models", "families", "datasets"} | {"selection"}
