"""A model that is shared out over processes scores as the whole one does, in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from oracle import relative_error
from tiny import tiny_model

from eaptk import EaptkError
from eaptk.loading import load_model

HERE = Path(__file__).parent
NAMES = ["qwen2", "qwen3", "gemma2", "gpt_neox"]
#: Models that cannot be shared out over two processes, and why.
REFUSED = {
    "gpt2": ({}, "transformers has no plan to share a gpt2 model out over processes"),
    "uneven": ({"num_key_value_heads": 1}, "1 key/value heads cannot be shared out evenly over 2 processes"),
}
SAME = 1e-5
Results = dict[str, dict[Any, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    models = {name: tiny_model(name, torch.float32) for name in NAMES}
    models |= {
        name: tiny_model("llama" if name == "uneven" else name, torch.float32, **changes)
        for name, (changes, _) in REFUSED.items()
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture(scope="module")
def ranks(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each of two processes found, by model."""
    out = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(HERE / "sharded.py"), str(out), *map(str, folders.values())]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def wholes(folders: dict[str, Path]) -> Results:
    return {name: sharded.results(load_model(folders[name], device="cpu")) for name in NAMES}


@pytest.mark.parametrize(
    "what",
    [
        *((granularity, way) for granularity in ("block", "head") for way in (*sharded.WAYS, "cuts")),
        ("head", "merged"),
    ],
    ids=", ".join,
)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_shared_out_scores_as_whole(
    ranks: list[Results], wholes: Results, name: str, what: tuple[str, str]
) -> None:
    assert relative_error(ranks[0][name][what], wholes[name][what]) < SAME
    assert torch.equal(ranks[0][name][what], ranks[1][name][what])


@pytest.mark.parametrize("name", NAMES)
def test_a_model_shared_out_has_the_whole_one_s_fingerprint_and_answers(
    ranks: list[Results], wholes: Results, name: str
) -> None:
    for rank in ranks:
        assert rank[name]["weights"] == wholes[name]["weights"]
        assert rank[name]["answers"] == wholes[name]["answers"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shared_out_is_refused_in_every_process(ranks: list[Results], name: str) -> None:
    for rank in ranks:
        assert isinstance(rank[name], str), rank[name]
        assert REFUSED[name][1] in rank[name]
        assert "\n" not in rank[name]


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device_map": "auto"}], ids=str)
def test_a_model_goes_to_one_place(folders: dict[str, Path], options: dict[str, Any]) -> None:
    with pytest.raises(EaptkError, match="each say where the model goes; give one of them"):
        load_model(folders["qwen2"], tensor_parallel=True, **options)


def test_one_process_alone_is_told_to_start_several(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(EaptkError, match="start them with torchrun --nproc-per-node N"):
        load_model(folders["qwen2"], tensor_parallel=True)
