"""Memory that does not suffice: batches in halves, down to the samples that do not fit, and everything else done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from checkpoints import make_model, make_records, make_tokenizer, save_checkpoint, write_jsonl
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import eaptk
from eaptk.errors import EaptkError

RECORDS = make_records(40)
LENGTHS = [sample.n_tokens for sample in eaptk.read_samples(RECORDS, make_tokenizer())]


class Narrow(Qwen2MLP):
    """One that has room for so many tokens."""

    room: int

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] * x.shape[1] > self.room:
            raise torch.OutOfMemoryError(f"no room for {x.shape[0]} × {x.shape[1]} tokens")
        return super().forward(x)


def model_with_room(n_tokens: int) -> Any:
    model = make_model()
    mlp = model.model.layers[1].mlp
    mlp.__class__, mlp.room = Narrow, n_tokens
    return model


def score(out: Path, model: Any, dataset: Any = RECORDS, **options: Any) -> eaptk.Run:
    options = {"tokens_per_batch": 200, "tokenizer": make_tokenizer(), "progress": False} | options
    return eaptk.score(model, dataset, out, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "head", "row_dtype": "float16"},
        {"ablation": "mean"},
        {"loss": "self_nll", "max_new_tokens": 4},
    ],
    ids=str,
)
def test_batches_that_do_not_fit_are_done_in_halves(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = score(tmp_path / "whole", make_model(), **options)
    halved = score(tmp_path / "halved", model_with_room(50), **options)
    assert halved.complete
    tolerance = 1e-3 if whole.scores.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(halved.scores, whole.scores, rtol=tolerance, atol=tolerance)
    assert halved.samples["answer_ids"] == whole.samples["answer_ids"]


def test_statistics_of_halves_are_those_of_the_whole(tmp_path: Path) -> None:
    options: dict[str, Any] = {"metrics_only": True, "upper": 3.0}
    whole = score(tmp_path / "whole", make_model(), **options).statistics
    halved = score(tmp_path / "halved", model_with_room(50), **options).statistics
    assert whole is not None
    assert halved is not None
    assert halved.done.all()
    np.testing.assert_allclose(halved.sums, whole.sums, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"metrics_only": True, "upper": 3.0}], ids=str)
def test_a_sample_that_does_not_fit_alone_is_named_and_the_others_are_done(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    room = sorted(LENGTHS)[-5]
    too_long = [n > room for n in LENGTHS]
    with pytest.raises(EaptkError) as caught:
        score(tmp_path / "run", model_with_room(room), tokens_per_batch=60, **options)
    longest = RECORDS[LENGTHS.index(max(LENGTHS))]["id"]
    assert f"{sum(too_long)} of 40 samples do not fit into memory even one by one, {longest!r}" in str(
        caught.value
    )
    left = ~(eaptk.Run.open(tmp_path / "run").done == 1)
    if options:
        # Of sums over samples only whole stretches are done.
        assert left[too_long].all()
        n_others = left.sum() - sum(too_long)
        assert 0 < n_others < 20
        assert f"the others are done, but for {n_others} about as long" in str(caught.value)
    else:
        assert "the others are done:" in str(caught.value)
        assert left.tolist() == too_long
    # The same command does what is left where there is room.
    whole = score(tmp_path / "whole", make_model(), tokens_per_batch=60, **options)
    again = score(tmp_path / "run", make_model(), tokens_per_batch=60, **options)
    assert again.complete
    np.testing.assert_allclose(again.loss, whole.loss, rtol=1e-5)


def test_a_prompt_that_cannot_be_answered_alone_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        EaptkError, match=r"out of memory while answering 'q\d+' alone, \d+ tokens with up to 4 more"
    ):
        score(tmp_path / "run", model_with_room(5), loss="self_nll", max_new_tokens=4)


def test_an_allocation_that_fails_halves_the_batch(tmp_path: Path) -> None:
    """No module that pretends: the process may not have more memory."""
    model = save_checkpoint(tmp_path / "model", intermediate_size=6000)
    data = write_jsonl(tmp_path / "data.jsonl", make_records(500))
    command = ["score", "--model", str(model), "--data", str(data), "--tokens-per-batch"]
    code, log = processes.run(
        "test_memory_short:with_more_bytes", 2**29, *command, "30000", "--out", str(tmp_path / "short"),
        log=tmp_path / "short.log",
    )  # fmt: skip
    assert code == 0, log
    code, log = processes.run(
        "processes:eaptk", *command, "1000", "--out", str(tmp_path / "small"), log=tmp_path / "small.log"
    )
    assert code == 0, log
    halved, small = (eaptk.Run.open(tmp_path / name).scores for name in ("short", "small"))
    np.testing.assert_allclose(halved, small, rtol=1e-4, atol=1e-5)


def with_more_bytes(n_bytes: int, *arguments: str) -> None:
    """Target: the command line in a process that may have so many bytes more than it has now."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + n_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    processes.eaptk(*arguments)


def test_how_many_tokens_fit_is_found_once_and_recorded(tmp_path: Path) -> None:
    first = score(tmp_path / "run", make_model(), tokens_per_batch=None)
    assert first.manifest["tokens_per_batch"] == 2048
    given = score(tmp_path / "given", make_model(), tokens_per_batch=77)
    again = score(tmp_path / "given", make_model(), tokens_per_batch=None)
    assert again.manifest["tokens_per_batch"] == 77
    assert np.array_equal(again.scores, given.scores)
