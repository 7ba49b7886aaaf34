"""Several cuts of the answers in one go: each run as if it had been scored alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_model, make_records, make_tokenizer
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import eaptk
from eaptk.errors import EaptkError

RECORDS = make_records(30)
CUTS = (2, 5, 9)


def options(**more: Any) -> dict[str, Any]:
    return {"tokenizer": make_tokenizer(), "tokens_per_batch": 60, "progress": False} | more


def cuts(out: Path, cuts: tuple[int, ...] = CUTS, **more: Any) -> dict[int, eaptk.Run]:
    outs = {cut: out / f"cut-{cut}" for cut in cuts}
    return eaptk.score_cuts(make_model(), RECORDS, outs, **options(**more))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"granularity": "head", "ablation": "patching"},
        {"ablation": "mean"},
        {"loss": "self_nll", "max_new_tokens": 6},
        {"layer_pairs": True},
    ],
    ids=str,
)
def test_each_cut_is_the_run_that_it_would_be_alone(tmp_path: Path, more: dict[str, Any]) -> None:
    for cut, run in cuts(tmp_path / "together", **more).items():
        alone = eaptk.score(make_model(), RECORDS, tmp_path / f"{cut}", cut=cut, **options(**more))
        assert run.complete
        np.testing.assert_allclose(run.scores, alone.scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(run.loss, alone.loss, rtol=1e-5)
        assert run.samples.drop_columns(["loss"]) == alone.samples.drop_columns(["loss"])
        for key in ("cut", "dataset", "max_new_tokens", "graph", "loss"):
            assert run.manifest[key] == alone.manifest[key]


def test_statistics_of_each_cut_are_those_it_would_have_alone(tmp_path: Path) -> None:
    more: dict[str, Any] = {"metrics_only": True, "upper": 3.0}
    for cut, run in cuts(tmp_path / "together", **more).items():
        alone = eaptk.score(make_model(), RECORDS, tmp_path / f"{cut}", cut=cut, **options(**more))
        found, expected = run.statistics, alone.statistics
        assert found is not None
        assert expected is not None
        np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-4, atol=1e-4)


class Breaking(Qwen2MLP):
    """One that runs so many times."""

    left: int

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("broken")
        return super().forward(x)


@pytest.mark.parametrize("more", [{}, {"metrics_only": True, "upper": 3.0}], ids=str)
def test_cuts_that_were_stopped_end_with_the_same_bytes(tmp_path: Path, more: dict[str, Any]) -> None:
    whole = cuts(tmp_path / "whole", **more)
    model = make_model()
    mlp: Any = model.model.layers[1].mlp
    mlp.__class__, mlp.left = Breaking, 3
    outs = {cut: tmp_path / "again" / f"cut-{cut}" for cut in CUTS}
    with pytest.raises(RuntimeError, match="broken"):
        eaptk.score_cuts(model, RECORDS, outs, **options(**more))
    assert all(0 < eaptk.Run.open(out).done.sum() < len(RECORDS) for out in outs.values())
    for cut, run in cuts(tmp_path / "again", **more).items():
        for file in whole[cut].path.glob("[!.]*"):
            if file.name != "manifest.json":
                assert (run.path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_run_of_other_cuts_is_refused(tmp_path: Path) -> None:
    cuts(tmp_path)
    with pytest.raises(EaptkError, match=r"cuts is \[2, 5, 9\] there, \[2, 5\] here"):
        cuts(tmp_path, (2, 5))


@pytest.mark.parametrize("outs", [{}, {2: "same", 3: "same"}], ids=["none", "one place"])
def test_each_cut_needs_a_place_of_its_own(tmp_path: Path, outs: dict[int, str]) -> None:
    with pytest.raises(EaptkError, match="give each cut its own"):
        eaptk.score_cuts(
            make_model(), RECORDS, {cut: tmp_path / name for cut, name in outs.items()}, **options()
        )
    assert not list(tmp_path.iterdir())
