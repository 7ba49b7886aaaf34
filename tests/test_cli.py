"""The command line: quick help, one line for each error, and what its commands print."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONTEXT, make_records, save_checkpoint, write_jsonl
from transformers import BertConfig, BertForMaskedLM

from eaptk.cli import main
from eaptk.errors import EaptkError
from eaptk.store import Run

TEXT = '{"prompt": "w1", "answer": "w2"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", make_records(6))


def run(*arguments: Any) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def error_of(capfd: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line in which a command that fails says why."""
    code = run(*arguments)
    output = capfd.readouterr()
    assert code == 1, output
    assert output.out == ""
    assert output.err.startswith("eaptk: error: ")
    assert output.err.count("\n") == 1, output.err
    return output.err


def test_the_version_is_that_of_the_package(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capfd.readouterr().out == f"eaptk {version('eaptk')}\n"


def test_a_folder_of_runs_is_told_from_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/manifest.json").write_text("{}")
    assert f"`eaptk runs list {tmp_path}/runs` shows them" in error_of(capfd, "inspect", tmp_path / "runs")


@pytest.mark.parametrize(("range_", "said"), [("1e-6", True), ("1e6", False)])
def test_scores_above_the_range_of_a_run_of_metrics_are_spoken_of(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], range_: str, said: bool
) -> None:
    where = ("--model", model, "--data", data, "--out", tmp_path / "run")
    assert run("score", *where, "--metrics-only", "--range", range_) == 0
    assert ("of |W| lies above --range" in capfd.readouterr().err) is said


@pytest.mark.parametrize("arguments", [[], ["score"], ["inspect"]], ids=str)
def test_help_needs_neither_torch_nor_transformers(arguments: list[str]) -> None:
    program = f"""
import sys
from eaptk.cli import main
from eaptk.errors import EaptkError
try:
    main({[*arguments, "--help"]})
except SystemExit as end:
    assert not end.code
loaded = {{"torch", "transformers", "pandas", "pyarrow", "scipy", "matplotlib", "numpy"}} & set(sys.modules)
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage: eaptk" in result.stdout


@pytest.mark.parametrize(
    "command",
    ["score", "inspect", "metrics", "compare", "check", "study", "generate", "grade", "select"],
)
def test_help_fits_a_terminal_of_80_columns_with_its_examples_set_apart(command: str) -> None:
    environment = {**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"}
    shown = subprocess.run(
        [sys.executable, "-m", "eaptk", command, "--help"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    prose, _, examples = shown.partition("╭")[0].partition("Examples:")
    lines = [line.rstrip() for line in examples.splitlines() if line.strip()]
    assert len(lines) >= 2
    assert all(re.match(rf"   (eaptk|torchrun .* -m eaptk) {command} ", line) for line in lines), lines
    # A paragraph wrapped twice, in the source and by the terminal, has short lines in its middle.
    for paragraph in prose.split("\n" + " " * 80 + "\n")[1:]:
        *full, _ = [line.strip() for line in paragraph.strip().splitlines()] or [""]
        assert all(len(line) > 55 for line in full), paragraph


def test_help_answers_in_under_half_a_second() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "eaptk", "--help"], capture_output=True, check=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.5


def test_score_writes_a_run_and_the_same_command_again_keeps_it(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["score", "--model", model, "--data", data, "--out", tmp_path / "run"]
    assert run(*command) == 0
    first = capfd.readouterr()
    assert first.out.startswith(f"{tmp_path / 'run'}: 6 samples × 23 edges (float32), mean loss ")
    assert first.err == ""
    rows = (tmp_path / "run/scores.npy").read_bytes()
    assert run(*command) == 0
    assert (tmp_path / "run/scores.npy").read_bytes() == rows


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ("--granularity head --qkv merged", {"graph.granularity": "head", "graph.qkv": "merged"}),
        ("--ablation patching --loss logit-diff", {"ablation": "patching", "loss": "logit_diff"}),
        ("--ablation mean", {"ablation": "mean"}),
        ("--ablation patching --loss kl", {"loss": "kl"}),
        ("--loss self-nll --max-new-tokens 4 --cut 3", {"loss": "self_nll", "cut": 3, "max_new_tokens": 3}),
        ("--row-dtype float16 --tokens-per-batch 64", {"row_dtype": "float16", "tokens_per_batch": 64}),
        ("--segment 4", {"segment": 4}),
        ("--dtype bfloat16 --device cpu", {"model.dtype": "bfloat16", "model.device": "cpu"}),
        ("--attention eager", {"model.attention": "eager"}),
        ("--limit 2", {"dataset.samples": 2}),
    ],
)
def test_every_option_of_score_is_what_the_manifest_records(
    model: Path, data: Path, tmp_path: Path, options: str, recorded: dict[str, Any]
) -> None:
    assert run("score", "--model", model, "--data", data, "--out", tmp_path / "run", *options.split()) == 0
    manifest = Run.open(tmp_path / "run").manifest
    for key, value in recorded.items():
        found: Any = manifest
        for part in key.split("."):
            found = found[part]
        assert found == value, key


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file: {data}; give a JSONL file"),
        ("", "{data} is empty: it needs at least one sample"),
        (TEXT + '{"prompt": "w1", "answer"\n', "{data} line 2 is not valid JSON"),
        (TEXT + '{"prompt": "w1"}\n', "{data} line 2: it has no 'answer'"),
        (TEXT + '{"prompt": "w1", "answer": ""}\n', "{data} line 2: its answer is empty"),
        (
            TEXT + json.dumps({"prompt": "w1 " * CONTEXT, "answer": "w2"}),
            "longer than the model's context of 48",
        ),
        (
            '{"prompt_ids": [99], "answer": "w1"}',
            "{data} line 1: token 99 of prompt_ids is not in the model's voc",
        ),
        (
            '{"id": 1, "prompt": "w1", "answer": "w2"}\n' * 2,
            "{data} line 2: id '1' is already that of {data} line 1",
        ),
    ],
    ids=["missing", "empty", "malformed", "no-field", "no-answer", "too-long", "vocabulary", "duplicate"],
)
def test_bad_data_ends_in_one_line_that_names_file_line_and_remedy(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    data = tmp_path / "bad.jsonl"
    if content is not None:
        data.write_text(content)
    error = error_of(capfd, "score", "--model", model, "--data", data, "--out", tmp_path / "run")
    assert message.format(data=data) in error
    assert not (tmp_path / "run").exists()


def config_only(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def bad_model(kind: str, model: Path, folder: Path) -> Path:
    """A folder that no run can be made of."""
    match kind:
        case "nothing":
            return folder
        case "no config":
            folder.mkdir()
        case "a file":
            folder.write_text("")
        case "broken config":
            folder.mkdir()
            (folder / "config.json").write_text("{")
        case "encoder":
            BertForMaskedLM(
                BertConfig(
                    vocab_size=32,
                    hidden_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                    intermediate_size=8,
                )
            ).save_pretrained(folder)
        case "encoder-decoder":
            return config_only(folder, model_type="t5")
        case "quantised":
            shutil.copytree(model, folder)
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
            (folder / "config.json").write_text(json.dumps(config))
        case "no weights":
            shutil.copytree(model, folder)
            (folder / "model.safetensors").unlink()
        case "broken weights":
            shutil.copytree(model, folder)
            (folder / "model.safetensors").write_bytes(b"garbage")
        case "broken tokenizer":
            shutil.copytree(model, folder)
            (folder / "tokenizer.json").write_text("garbage")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "is no model: no such folder; give a folder with config.json"),
        ("no config", "is no model: it has no config.json"),
        ("a file", "is no model: no such folder"),
        ("broken config", "is no model that can be loaded"),
        ("encoder", "model type 'bert' has no architecture entry"),
        ("encoder-decoder", "'t5' is an encoder-decoder"),
        ("quantised", "is quantised (fp8), and the backward pass of quantised weights is not supported"),
        ("no weights", "cannot load the weights of"),
        ("broken weights", "cannot load the weights of"),
        ("broken tokenizer", "cannot load the tokenizer of"),
    ],
)
def test_a_bad_model_ends_in_one_line(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, message: str
) -> None:
    folder = bad_model(kind, model, tmp_path / "bad")
    capfd.readouterr()
    assert message in error_of(capfd, "score", "--model", folder, "--data", data, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_none_ends_in_one_line(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["score", "--model", model, "--data", data, "--out", tmp_path / "run"]
    assert "device 'gpu' cannot be used" in error_of(capfd, *command, "--device", "gpu")


def test_logits_that_are_not_finite_name_the_sample(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    bad = shutil.copytree(model, tmp_path / "bad")
    weights = load_file(bad / "model.safetensors")
    weights["model.embed_tokens.weight"][5] = float("nan")
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    data = write_jsonl(
        tmp_path / "data.jsonl",
        [
            {"id": "good", "prompt_ids": [0, 3], "answer_ids": [4]},
            {"id": "bad", "prompt_ids": [0, 5], "answer_ids": [4]},
        ],
    )
    error = error_of(capfd, "score", "--model", bad, "--data", data, "--out", tmp_path / "run")
    assert "sample 'bad': the loss is nan" in error


def test_a_fresh_process_ends_a_bad_run_in_one_line_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{")
    words = ["score", "--model", model, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "run"]
    result = subprocess.run(
        [sys.executable, "-m", "eaptk", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"eaptk: error: {tmp_path / 'data.jsonl'} line 1 is not valid JSON (Expecting property name enclosed in "
        f"double quotes at column 2); write one object a line\n"
    )


@pytest.mark.parametrize("how", ["--debug", "EAPTK_DEBUG"])
def test_debugging_lets_the_error_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    arguments = ["score", "--model", model, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "run"]
    if how == "--debug":
        arguments.append(how)
    else:
        monkeypatch.setenv(how, "1")
    with pytest.raises(EaptkError, match="no such file"):
        main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ["score"],
        ["scroe"],
        ["score", "--loss", "mse", "--model", "m", "--data", "d", "--out", "o"],
        ["score", "--cut", "-3", "--model", "m", "--data", "d", "--out", "o"],
    ],
    ids=str,
)
def test_wrong_usage_ends_with_code_two_and_no_traceback(
    capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(*arguments) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_inspect_shows_what_a_run_holds_and_its_strongest_edges(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run("score", "--model", model, "--data", data, "--out", tmp_path / "run")
    capfd.readouterr()
    assert run("inspect", tmp_path / "run", "--top", 3) == 0
    shown = capfd.readouterr().out
    opened = Run.open(tmp_path / "run")
    strength = abs(opened.scores).mean(0)
    strongest = [opened.graph.edge_name(column) for column in (-strength).argsort()[:3]]
    positions = [shown.index(edge) for edge in strongest]
    assert positions == sorted(positions)
    assert f"{strength.max():.4e}" in shown
    assert "6 of 6 done" in shown
    assert "zero ablation, loss nll" in shown


def test_inspect_shows_the_graph_of_a_model_without_its_weights(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(model / "config.json", tmp_path)
    assert run("inspect", tmp_path) == 0
    shown = capfd.readouterr().out
    assert "2 serial layers" in shown
    for number in ("23", "92", "82", "328"):
        assert number in shown


@pytest.mark.parametrize("name", ["[red]run", "run[/]", "a:smile:b"])
def test_names_are_shown_to_the_letter(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(model, tmp_path / "models" / name)
    checkpoint = tmp_path / "models" / name
    run("score", "--model", checkpoint, "--data", data, "--out", tmp_path / name)
    capfd.readouterr()
    assert run("inspect", tmp_path / name) == 0
    facts = unwrapped(capfd)
    assert facts.startswith(str(tmp_path / name))
    assert f"model{checkpoint}(qwen2," in facts
    assert run("inspect", checkpoint) == 0
    assert f"{checkpoint}:qwen2," in unwrapped(capfd)
    assert run("check", checkpoint, "--edges", 1) == 0
    assert f"{checkpoint}:identities" in unwrapped(capfd)


def unwrapped(capfd: pytest.CaptureFixture[str]) -> str:
    """What was printed, without the white space and lines of tables."""
    return "".join(capfd.readouterr().out.replace("│", "").split())


def test_a_manifest_that_lacks_what_inspect_shows_is_named(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run("score", "--model", model, "--data", data, "--out", tmp_path / "run")
    file = tmp_path / "run/manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["provenance"]["data"]
    file.write_text(json.dumps(manifest))
    capfd.readouterr()
    assert f"{file} is damaged: it has no 'provenance.data'" in error_of(capfd, "inspect", tmp_path / "run")


def test_a_path_with_a_typing_error_is_not_looked_up_on_the_hub(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "checkpoints/nope is no model: no such folder" in error_of(capfd, "inspect", "checkpoints/nope")


def test_a_name_that_is_no_folder_and_that_the_hub_does_not_answer_for_ends_in_one_line() -> None:
    program = """
import time
time.sleep = lambda seconds: None  # the hub's library waits before it tries again
from eaptk.cli import main
main(["inspect", "nope"])
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("eaptk: error: there is no folder nope here, and no model of that name")
    assert result.stderr.count("\n") == 1, result.stderr


def test_inspect_names_what_is_neither(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path} is no model" in error_of(capfd, "inspect", tmp_path)


@pytest.mark.parametrize(
    "option", [("--granularity", "head"), ("--tokens", 512), ("--card", "A100-80GB")], ids=str
)
def test_inspect_refuses_what_only_a_plan_reads(
    model: Path, capfd: pytest.CaptureFixture[str], option: Any
) -> None:
    assert f"{option[0]} is for --plan alone" in error_of(capfd, "inspect", model, *option)
