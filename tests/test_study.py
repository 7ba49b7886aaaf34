"""A whole study on tiny models: what each stage leaves, that it goes on after any kill, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import yaml
from checkpoints import make_records, write_jsonl
from pupils import MAX_NEW_TOKENS, save_pupils, write_exam
from rich.console import Console

from eaptk.answers import Answers
from eaptk.cli import main
from eaptk.comparison import compare
from eaptk.errors import EaptkError
from eaptk.experiment import StudyResults
from eaptk.resampling import Resampling
from eaptk.run import score
from eaptk.selection import PROTOCOLS, select
from eaptk.store import Run
from eaptk.study import run_study, select_stage, settings
from eaptk.study_file import make_study, read_study

OPTIONS = {
    "alphas": [0.2, 0.6],
    "selection": {"samples": 12},
    "generation": {"max_new_tokens": MAX_NEW_TOKENS, "tokens_per_batch": 128},
    "scoring": {"tokens_per_batch": 96},
    "comparison": {"resamples": 200},
    "validation": {"edges": 5, "samples": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, questions and a study file."""
    folder = tmp_path_factory.mktemp("study")
    noises = {"sft": 0.0, "rl": 0.0005, "rl-series/step-10": 0.0003, "rl-series/step-5": 0.0002}
    save_pupils(folder, noises)
    write_exam(folder / "exam.jsonl")
    content = {
        "name": "tiny",
        "models": {"sft": "sft", "rl": "rl"},
        "families": [
            {"name": "RL seed 0", "method": "RL", "models": ["sft", "rl"]},
            {"name": "in training", "baseline": "sft", "checkpoints": "rl-series/step-*"},
        ],
        "datasets": ["exam.jsonl"],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content | OPTIONS, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def results(place: Path) -> StudyResults:
    found = run_study(read_study(place / "study.yaml"), place / "out", progress=False)
    assert found is not None
    return found


def numbers(folder: Path) -> dict[str, bytes]:
    """Everything a study found, by file: all but manifests, which know when a run was made."""
    files = [*folder.glob("runs/**/*.np*"), *folder.glob("answers/**/*"), *folder.glob("selected/**/*")]
    files += folder.glob("results/**/*")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


def run(capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    output = capfd.readouterr()
    return int(end.value.code or 0), output.out, output.err


def test_experiments_are_families_times_datasets_times_alphas(results: StudyResults) -> None:
    pairs = ("sft", "rl")
    series = ("sft", "in training 5", "in training 10")
    assert [(e.family, e.method, e.dataset, e.alpha, e.names, e.steps) for e in results.experiments] == [
        ("RL seed 0", "RL", "exam", 0.2, pairs, None),
        ("RL seed 0", "RL", "exam", 0.6, pairs, None),
        ("in training", "in training", "exam", 0.2, series, (0.0, 5.0, 10.0)),
        ("in training", "in training", "exam", 0.6, series, (0.0, 5.0, 10.0)),
    ]
    assert results.protocol == "paper-code"
    assert results.facts["selection"]["samples"] == 12


def test_questions_are_those_that_select_keeps_of_the_graded_answers(
    place: Path, results: StudyResults
) -> None:
    answers = [Answers.open(place / f"out/answers/{name}/exam.parquet") for name in ("sft", "rl")]
    protocol = replace(PROTOCOLS["paper-code"], samples=12)
    chosen = select(answers, protocol, ["sft", "rl"])
    first, second = results.experiments[:2]
    assert first.funnel[:-1] == second.funnel[:-1] == chosen.funnel
    assert first.real.sample_ids == chosen.ids
    assert first.accuracy == chosen.accuracy
    assert first.lengths == chosen.lengths
    assert (first.cut, second.cut) == (chosen.cut(0.2), chosen.cut(0.6))
    stored = json.loads((place / "out/selected/RL-seed-0/exam.json").read_text())
    assert tuple(stored["ids"]) == chosen.ids


@pytest.mark.parametrize("name", ["sft", "rl"])
@pytest.mark.parametrize("number", [0, 1])
def test_each_model_is_scored_on_its_own_answers_cut_alike(
    place: Path, results: StudyResults, name: str, number: int
) -> None:
    experiment = results.experiments[number]
    scored = Run.open(place / f"out/runs/RL-seed-0/exam/alpha-{experiment.alpha:g}/{name}")
    answers = Answers.open(place / f"out/answers/{name}/exam.parquet")
    own = {s.id: s for s in answers.samples(experiment.real.sample_ids)}
    table = scored.samples.to_pylist()
    assert [row["id"] for row in table] == list(experiment.real.sample_ids)
    for row in table:
        assert tuple(row["prompt_ids"]) == own[row["id"]].prompt_ids
        assert tuple(row["answer_ids"]) == own[row["id"]].answer_ids[: experiment.cut]
    assert (scored.manifest["loss"], scored.manifest["cut"]) == ("self_nll", experiment.cut)


def test_comparisons_are_those_of_the_runs_and_corrected_over_the_study(
    place: Path, results: StudyResults
) -> None:
    for experiment, folder in zip(
        results.experiments, ("RL-seed-0", "RL-seed-0", "in-training", "in-training"), strict=True
    ):
        where = place / f"out/runs/{folder}/exam/alpha-{experiment.alpha:g}"
        runs = [Run.open(where / name.replace(" ", "-")) for name in experiment.names]
        for dense, found in ((False, experiment.real), (True, experiment.dense)):
            alone = compare(
                runs,
                names=experiment.names,
                dense=dense,
                control_loss=not dense,
                resampling=Resampling(n_resamples=200),
            )
            assert tuple(replace(d, q=None) for d in found.differences) == alone.differences
            assert all(d.q is not None for d in found.differences if d.p_holm is not None)


def test_scores_are_validated_at_the_smallest_alpha_model_by_model(results: StudyResults) -> None:
    assert [[v.model for v in e.validation] for e in results.experiments] == [
        ["sft", "rl"],
        [],
        ["sft", "in training 5", "in training 10"],
        [],
    ]
    for experiment in results.experiments:
        for validation in experiment.validation:
            assert len(validation.predicted) == len(validation.exact) == 5 * 2
            assert validation.sign_agreement >= 0.5


def test_complexity_is_measured_under_several_histograms(results: StudyResults) -> None:
    for experiment in results.experiments:
        assert len(experiment.sensitivity) > 1
        same = [
            s for s in experiment.sensitivity if s.bins == 100 and s.upper == experiment.real.metrics[0].upper
        ]
        assert [s.values for s in same] == [tuple(m.complexity for m in experiment.real.metrics)]


def test_the_report_and_the_results_are_files(place: Path, results: StudyResults) -> None:
    assert (place / "out/report/index.html").stat().st_size > 10_000
    stored = json.loads((place / "out/results/study.json").read_text())
    assert [e["family"] for e in stored["experiments"]] == [e.family for e in results.experiments]
    assert stored["experiments"][0]["real"]["n_pairs"] == len(results.experiments[0].real.sample_ids)


@pytest.mark.usefixtures("results")
def test_the_same_command_again_changes_nothing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = numbers(place / "out")
    scores = place / "out/runs/RL-seed-0/exam/alpha-0.2/rl/scores.npy"
    written = scores.stat().st_mtime_ns
    command = ("study", place / "study.yaml", "--out", place / "out", "--until", "compare")
    code, printed, error = run(capfd, *command)
    assert (code, error) == (0, "")
    assert numbers(place / "out") == before
    assert scores.stat().st_mtime_ns == written
    for expected in (
        "answers",
        "RL seed 0 on exam",
        "not answered right by every model",
        "scored sft: 4 runs",
    ):
        assert expected in printed


@pytest.mark.usefixtures("results")
def test_a_study_with_fewer_cuts_goes_on_with_the_runs_that_are_there(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    arguments = (
        "study",
        place / "study.yaml",
        "--out",
        tmp_path / "out",
        "--alpha",
        0.6,
        "--until",
        "compare",
    )
    code, _, error = run(capfd, *arguments)
    assert (code, error) == (0, "")
    for name in ("sft", "rl"):
        where = f"out/runs/RL-seed-0/exam/alpha-0.6/{name}/scores.npy"
        assert (tmp_path / where).read_bytes() == (place / where).read_bytes()


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("call", [9, 90, 260])
def test_a_study_killed_anywhere_goes_on_to_the_same_numbers(place: Path, tmp_path: Path, call: int) -> None:
    command = ["study", str(place / "study.yaml"), "--out", str(tmp_path / "out"), "--until", "compare"]
    arguments = ("processes:killed_at_call", call, "processes:eaptk", *command)
    killed = processes.start(*arguments, log=tmp_path / "log").wait()
    assert killed == -9, (tmp_path / "log").read_text()
    code, log = processes.run("processes:eaptk", *command, log=tmp_path / "log")
    assert code == 0, log
    assert numbers(tmp_path / "out") == numbers(place / "out")


@pytest.mark.usefixtures("results")
def test_the_commands_one_after_the_other_are_the_study(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("sft", "rl"):
        code, out, _ = run(
            capfd,
            *("generate", "--model", place / name, "--data", place / "exam.jsonl"),
            *("--out", tmp_path / f"{name}.parquet"),
            *("--max-new-tokens", MAX_NEW_TOKENS, "--tokens-per-batch", 128),
        )
        assert code == 0
        assert "24 answers of " in out
    files = (tmp_path / "sft.parquet", tmp_path / "rl.parquet")
    code, out, _ = run(capfd, "grade", *files, "--wrong", "3")
    assert code == 0
    assert "q5" in out, "a wrong answer is shown with its reason"
    assert "file" in out
    assert "questions" not in out
    code, out, _ = run(capfd, "select", *files, "--samples", 12, "--out", tmp_path / "selected")
    assert code == 0
    for name in ("sft", "rl"):
        assert (tmp_path / f"{name}.parquet").read_bytes() == (
            place / f"out/answers/{name}/exam.parquet"
        ).read_bytes()
        study = Run.open(place / f"out/runs/RL-seed-0/exam/alpha-0.6/{name}")
        code, _, _ = run(
            capfd,
            *("score", "--model", place / name, "--data", tmp_path / f"selected/{name}.parquet"),
            *("--loss", "self-nll", "--given-answers", "--cut", study.manifest["cut"]),
            *("--tokens-per-batch", 96, "--out", tmp_path / f"runs/{name}"),
        )
        assert code == 0
        assert np.array_equal(Run.open(tmp_path / f"runs/{name}").scores, study.scores)


def test_answers_leave_the_journal_of_another_file_alone(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / ".a1.parquet.0123456789ab.jsonl"
    other.write_text("")
    code, _, _ = run(
        capfd,
        *("generate", "--model", place / "sft", "--data", place / "exam.jsonl", "--limit", 3),
        *("--out", tmp_path / "a[1].parquet", "--max-new-tokens", 4),
    )
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "a[1].parquet"]


@pytest.mark.usefixtures("results")
def test_files_of_one_name_are_not_written_over_each_other(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = place / "out/answers/sft/exam.parquet"
    code, _, error = run(capfd, "select", file, file, "--out", tmp_path / "selected")
    assert code == 1
    assert "two of the files would be named alike (sft-exam, sft-exam); rename one, or its folder" in error
    assert not (tmp_path / "selected").exists()


def test_a_file_that_holds_no_answers_is_named(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capfd, "grade", place / "exam.jsonl")
    assert code == 1
    assert "exam.jsonl holds no answers of eaptk; `eaptk generate" in error


@pytest.mark.parametrize("call", [2, 6])
def test_generation_killed_between_batches_goes_on_to_the_same_file(
    place: Path, tmp_path: Path, call: int
) -> None:
    files = []
    for name in ("whole", "killed"):
        out = tmp_path / name / "a.parquet"
        command = ["generate", "--model", str(place / "sft"), "--data", str(place / "exam.jsonl")]
        command += ["--max-new-tokens", "6", "--tokens-per-batch", "60", "--out", str(out)]
        if name == "killed":
            killed = ("processes:killed_at_call", call, "processes:eaptk", *command)
            assert processes.start(*killed, log=tmp_path / "log").wait() == -9
            assert not out.exists()
        code, log = processes.run("processes:eaptk", *command, log=tmp_path / "log")
        assert code == 0, log
        files.append(out.read_bytes())
        assert [path.name for path in out.parent.iterdir()] == ["a.parquet"]
    assert files[0] == files[1]


@pytest.mark.usefixtures("results")
def test_another_question_or_length_does_not_mix_with_answers_that_are_there(
    place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "out/answers", tmp_path / "out/answers")
    study = read_study(place / "study.yaml", {"generation": {"max_new_tokens": 5}})
    with pytest.raises(
        EaptkError, match=r"exam.parquet holds answers to another call: max_new_tokens is 8 there, 5"
    ):
        run_study(study, tmp_path / "out", progress=False)


@pytest.mark.usefixtures("results")
def test_other_weights_under_the_same_name_are_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out/answers", tmp_path / "out/answers")
    study = read_study(place / "study.yaml", {"models": {"sft": "rl", "rl": "sft"}})
    with pytest.raises(
        EaptkError, match=r"model sft: .*holds answers to another call: model.weights is 'sha256:"
    ):
        run_study(study, tmp_path / "out", progress=False)


def test_a_study_from_flags_needs_no_file(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = run(
        capfd,
        *("study", "--model", f"sft={place / 'sft'}", "--model", f"rl={place / 'rl'}"),
        *("--data", place / "exam.jsonl", "--max-new-tokens", MAX_NEW_TOKENS, "--until", "select"),
    )
    assert (code, error) == (0, "")
    assert "rl on exam" in out
    assert [p.name for p in (tmp_path / "studies/study").iterdir()] == ["answers", "selected"]


def test_a_study_stays_in_the_folder_of_studies_whatever_its_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load((place / "study.yaml").read_text()) | {"name": "../mine / yours"}
    (place / "slash.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    assert run(capfd, "study", place / "slash.yaml", "--until", "generate")[0] == 0
    assert [path.name for path in tmp_path.rglob("answers")] == ["answers"]
    assert [path.name for path in (tmp_path / "studies").iterdir()] == ["mine-yours"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a study needs a file, or --model NAME=PATH twice and --data"),
        (["--model", "sft", "--data", "gsm8k"], "--model 'sft' is not NAME=PATH"),
        (["nowhere.yaml"], "cannot read the study file nowhere.yaml: No such file"),
        (["--model", "a=./nowhere", "--model", "b=x", "--data", "gsm8k"], "models.a: there is no nowhere"),
        (["{place}/study.yaml", "--alpha", "1.5"], "alphas are [1.5]; give shares of the answer, in (0, 1]"),
        (["{place}/study.yaml", "--prompt", "plane"], "prompt 'plane' is no template: did you mean 'plain'?"),
        (
            ["{place}/study.yaml", "--prompt", "chat"],
            "model sft: prompt 'chat' needs a tokenizer with a chat",
        ),
        (
            ["{place}/study.yaml", "--data", "{place}/hard.jsonl"],
            "family 'RL seed 0' on hard: sft answered none",
        ),
        (
            ["{place}/study.yaml", "--data", "{place}/long.jsonl"],
            "the prompt of question '1' has 61 tokens, more",
        ),
    ],
)
def test_what_stops_a_study_is_said_in_one_line(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    hard = [{"question": r["prompt"], "answer": "w0 w0 w0"} for r in make_records(4)]
    write_jsonl(place / "hard.jsonl", hard)
    write_jsonl(place / "long.jsonl", [{"question": "w1 " * 60, "answer": "w2"}])
    given = [argument.format(place=place) for argument in arguments]
    code, _, error = run(capfd, "study", *given, "--out", tmp_path / "out")
    assert code == 1
    assert error.startswith("eaptk: error: ")
    assert error.count("\n") == 1, error
    assert message in error


def test_models_that_do_not_differ_are_compared_all_the_same(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "sft", tmp_path / "twin")
    models = {"sft": str(place / "sft"), "twin": str(tmp_path / "twin")}
    content = OPTIONS | {"models": models, "datasets": [str(place / "exam.jsonl")], "alphas": [0.6, 0.601]}
    found = run_study(
        make_study(content | {"name": "twins"}), tmp_path / "out", until="compare", progress=False
    )
    assert found is not None
    for experiment in found.experiments:
        assert all(d.difference == 0 and d.direction == "unresolved" for d in experiment.real.differences)
        assert any(
            note.startswith("nothing at equal loss: the loss of twin differs")
            for note in experiment.real.notes
        )
    first, second = found.experiments
    assert first.cut == second.cut
    assert any("α = 0.601 cuts answers to as many tokens as 0.6" in note for note in first.real.notes)
    assert any("α = 0.6 cuts answers to as many tokens as 0.601" in note for note in second.real.notes)


@pytest.mark.usefixtures("results")
def test_questions_with_answers_shorter_than_the_cut_are_dropped_on_request(place: Path) -> None:
    files = {n: Answers.open(place / f"out/answers/{n}/exam.parquet") for n in ("sft", "rl")}
    changes = {"families": [{"name": "f", "models": ["sft", "rl"]}], "alphas": [0.2, 1.0]}
    found = []
    for drop in (False, True):
        study = read_study(place / "study.yaml", changes | {"drop_short": drop})
        chosen = select_stage(study, {(n, "exam"): a for n, a in files.items()}, place / "short")
        found.append(settings(study, chosen)[-1])
    kept, dropped = found
    lengths = {q: min(len(s.answer_ids) for a in files.values() for s in a.samples([q])) for q in kept.ids}
    assert dropped.ids == tuple(q for q in kept.ids if lengths[q] >= kept.cut)
    assert (dropped.stage.n_in, dropped.stage.n_out) == (len(kept.ids), len(dropped.ids))


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (
            "yaml",
            ["study", "{place}/study.yaml"],
            "reading a study file needs PyYAML: pip install 'eaptk[study]'",
        ),
        (
            "math_verify",
            ["grade", "{place}/out/answers/sft/exam.parquet"],
            "grading needs math-verify: pip install",
        ),
        (
            "vllm",
            ["generate", "--model", "{place}/sft", "--data", "{place}/exam.jsonl", "--engine", "vllm"],
            "engine 'vllm' needs vLLM and a CUDA device",
        ),
    ],
)
@pytest.mark.usefixtures("results")
def test_a_missing_extra_is_named_with_how_to_get_it(
    place: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    out = [] if arguments[0] == "grade" else ["--out", tmp_path / "out"]
    code, _, error = run(capfd, *(argument.format(place=place) for argument in arguments), *out)
    assert code == 1
    assert message in error


def test_given_answers_are_for_the_loss_on_a_models_own(place: Path, tmp_path: Path) -> None:
    with pytest.raises(EaptkError, match="given answers are the model's own with loss 'self_nll' only"):
        score(place / "sft", place / "exam.jsonl", tmp_path / "run", given_answers=True)


def test_names_are_printed_to_the_letter(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    models = {"sft [/red]": str(place / "sft"), "rl [red]": str(place / "rl")}
    study = make_study({"name": "x", "models": models, "datasets": [str(place / "exam.jsonl")], **OPTIONS})
    run_study(study, tmp_path, until="grade", console=Console(), progress=False)
    lines = capfd.readouterr().out.splitlines()
    assert {"sft [/red] answers exam", "rl [red] answers exam"} <= {*lines}
