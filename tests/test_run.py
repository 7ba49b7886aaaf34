"""A dataset through a model into a run: rows in order, own answers, resume, and options that cannot work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import losses
import numpy as np
import pytest
import torch
from checkpoints import CONTEXT, make_model, make_records, make_tokenizer, save_checkpoint, write_jsonl
from safetensors.torch import load_file

import eaptk
from eaptk.errors import EaptkError
from eaptk.loading import load_model, load_tokenizer, weights_fingerprint
from eaptk.store import RunWriter

RECORDS = make_records(12)


def score(out: Path, dataset: Any = RECORDS, model: Any = None, **options: Any) -> eaptk.Run:
    options = {"tokens_per_batch": 40, "tokenizer": make_tokenizer(), "progress": False} | options
    return eaptk.score(make_model() if model is None else model, dataset, out, **options)


def refused(out: Path, **options: Any) -> str:
    with pytest.raises(EaptkError) as caught:
        score(out, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "block"},
        {"granularity": "head"},
        {"granularity": "head", "qkv": "merged"},
        {"ablation": "patching"},
        {"ablation": "patching", "loss": "kl"},
        {"loss": "logit_diff"},
        {"segment": 5},
    ],
    ids=str,
)
def test_rows_are_in_the_order_of_the_data_and_each_is_its_samples_own(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    run = score(tmp_path / "run", **options)
    assert run.samples["id"].to_pylist() == [record["id"] for record in RECORDS]
    graph_options = {name: options.pop(name) for name in ("granularity", "qkv") if name in options}
    graph = eaptk.Graph.from_model(make_model(), **graph_options)
    assert run.graph == graph
    for row, sample in enumerate(eaptk.read_samples(RECORDS, make_tokenizer())):
        alone = eaptk.attribute(make_model(), eaptk.collate([sample]), graph, **options)
        np.testing.assert_allclose(run.scores[row], alone.rows[0], rtol=1e-4, atol=1e-5)
        assert run.loss[row] == pytest.approx(alone.loss.item(), rel=1e-5)


def test_a_model_by_name_and_the_same_model_loaded_give_the_same_bytes(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    by_name = score(tmp_path / "by-name", model=folder, tokenizer=None)
    loaded = score(tmp_path / "loaded", model=load_model(folder), tokenizer=load_tokenizer(folder))
    assert (by_name.path / "scores.npy").read_bytes() == (loaded.path / "scores.npy").read_bytes()
    assert by_name.manifest["model"] == loaded.manifest["model"]


def test_a_finished_run_is_returned_as_it_is(tmp_path: Path) -> None:
    first = score(tmp_path / "run")
    changed = {file.name: file.stat().st_mtime_ns for file in first.path.glob("[!.]*")}
    again = score(tmp_path / "run")
    assert np.array_equal(again.scores, first.scores)
    assert {file.name: file.stat().st_mtime_ns for file in first.path.glob("[!.]*")} == changed


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ({"granularity": "head"}, "graph.granularity is 'block' there, 'head' here"),
        ({"loss": "logit_diff"}, "loss is 'nll' there, 'logit_diff' here"),
        ({"tokens_per_batch": 41}, "tokens_per_batch is 40 there, 41 here"),
        ({"segment": 8}, "segment is None there, 8 here"),
        ({"row_dtype": "float16"}, "row_dtype is 'float32' there, 'float16' here"),
        ({"dataset": RECORDS[::-1]}, "dataset.fingerprint is 'sha256:"),
        ({"model": make_model(seed=1)}, "model.weights is 'sha256:"),
        ({"model": make_model(rms_norm_eps=1e-3)}, "model.config is 'sha256:"),
    ],
)
def test_another_run_in_the_same_place_is_refused_with_both_values(
    tmp_path: Path, option: dict[str, Any], shown: str
) -> None:
    score(tmp_path / "run")
    assert shown in refused(tmp_path / "run", **option)


def test_half_precision_rows_are_the_rounded_single_precision_ones(tmp_path: Path) -> None:
    single, half = score(tmp_path / "single"), score(tmp_path / "half", row_dtype="float16")
    assert half.scores.dtype == np.float16
    assert np.array_equal(half.scores, single.scores.astype(np.float16))


def test_a_score_that_half_precision_cannot_hold_names_sample_and_edge(tmp_path: Path) -> None:
    message = refused(tmp_path / "run", row_dtype="float16", loss=enormous)
    assert "the score of edge" in message
    assert "beyond the range of float16; use row dtype float32" in message


def enormous(logits: torch.Tensor, batch: eaptk.Batch) -> torch.Tensor:
    return logits.flatten(1).sum(1) * 1e7


def closure(factor: float) -> Any:
    def scaled(logits: torch.Tensor, batch: eaptk.Batch) -> torch.Tensor:
        return logits.flatten(1).sum(1) * factor

    return scaled


@dataclass
class Scaled:
    factor: float

    def loss(self, logits: torch.Tensor, batch: eaptk.Batch) -> torch.Tensor:
        return logits.flatten(1).sum(1) * self.factor


def test_a_loss_of_ones_own_is_known_by_its_name_in_every_process(tmp_path: Path) -> None:
    run = score(tmp_path / "run", loss=losses.of_a_set)
    name, fingerprint = run.manifest["loss"].split()
    assert name == "losses.of_a_set"
    for seed in ("1", "2"):  # sets are ordered by hashes
        code = "from eaptk.manifest import loss_name; import losses; print(loss_name(losses.of_a_set))"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
        shown = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        ).stdout
        assert shown.split() == [name, fingerprint]


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("logits.sum((1, 2))", "logits.mean((1, 2))"),
        ("logits.sum((1, 2)) * 2.0", "logits.sum((1, 2)) * 3.0"),
        ("sum(x.sum(1) for x in (logits, logits)).sum(1)", "sum(x.sum(1) for x in (logits, -logits)).sum(1)"),
    ],
    ids=["name", "constant", "inner function"],
)
def test_a_loss_whose_code_has_changed_is_refused(tmp_path: Path, then: str, now: str) -> None:
    def defined(body: str) -> Any:
        names: dict[str, Any] = {"__name__": "mine"}
        exec(f"def loss(logits, batch):\n    return {body}", names)
        return names["loss"]

    first = score(tmp_path / "run", loss=defined(then))
    assert np.array_equal(score(tmp_path / "run", loss=defined(then)).scores, first.scores)
    assert "loss is 'mine.loss sha256:" in refused(tmp_path / "run", loss=defined(now))


def test_answers_survive_a_change_of_batches_that_an_error_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is answered twice, whether memory ran out while answering or in the first batch of scores."""
    whole = score(tmp_path / "whole", loss="self_nll", max_new_tokens=5, tokens_per_batch=30)
    manifest = {k: v for k, v in whole.manifest.items() if k != "schema"} | {"tokens_per_batch": 10_000}
    answers = dict(enumerate(whole.samples["answer_ids"].to_pylist()))
    with RunWriter(tmp_path / "answering", manifest) as writer:
        writer.keep_answers(answers)
    with RunWriter(tmp_path / "scoring", manifest) as writer:
        writer.keep_answers(answers)
        writer.begin(whole.samples.drop_columns(["loss"]))
    model = make_model()
    monkeypatch.setattr(model, "generate", lambda **_: pytest.fail("a prompt was answered again"))
    for stage in ("answering", "scoring"):
        run = score(tmp_path / stage, model=model, loss="self_nll", max_new_tokens=5, tokens_per_batch=30)
        assert np.array_equal(run.scores, whole.scores)
        assert run.manifest["tokens_per_batch"] == 30
        assert not (run.path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ({"max_new_tokens": 4}, "max_new_tokens is 5 there, 4 here"),
        ({"cut": 5}, "cut is None there, 5 here"),
        ({"loss": "nll"}, "loss is 'self_nll' there, 'nll' here"),
        ({"model": make_model(seed=1)}, "model.weights is 'sha256:"),
        ({"dataset": RECORDS[::-1]}, "dataset.fingerprint is 'sha256:"),
    ],
    ids=["max-new-tokens", "cut", "loss", "weights", "dataset"],
)
def test_answers_are_not_thrown_away_for_another_run(
    tmp_path: Path, option: dict[str, Any], shown: str
) -> None:
    whole = score(tmp_path / "whole", loss="self_nll", max_new_tokens=5)
    with RunWriter(tmp_path / "run", {k: v for k, v in whole.manifest.items() if k != "schema"}) as writer:
        writer.keep_answers({0: [3, 4]})
    message = refused(
        tmp_path / "run", **{"loss": "self_nll", "max_new_tokens": 5, "tokens_per_batch": 50} | option
    )
    assert "holds generated answers of another run: " in message
    assert shown in message
    assert "tokens_per_batch" not in message
    assert (tmp_path / "run/answers.jsonl").read_text() == "[0, [3, 4]]\n"


def test_the_models_own_answers_are_those_it_finds_most_likely(tmp_path: Path) -> None:
    run = score(tmp_path / "run", loss="self_nll", max_new_tokens=5)
    model = make_model()
    for sample in run.samples.to_pylist():
        fed = list(sample["prompt_ids"])
        for token in sample["answer_ids"]:
            assert model(torch.tensor([fed])).logits[0, -1].argmax().item() == token
            fed.append(token)
        ended = sample["answer_ids"][-1] == model.config.eos_token_id
        assert ended or len(sample["answer_ids"]) == 5
        assert model.config.eos_token_id not in sample["answer_ids"][:-1]


def test_the_score_of_an_own_answer_is_that_of_the_same_answer_given(tmp_path: Path) -> None:
    own = score(tmp_path / "own", loss="self_nll", max_new_tokens=5)
    given = [
        {name: sample[name] for name in ("id", "prompt_ids", "answer_ids")}
        for sample in own.samples.to_pylist()
    ]
    assert np.array_equal(score(tmp_path / "given", given).scores, own.scores)


def test_a_cut_own_answer_is_the_beginning_of_the_whole_one(tmp_path: Path) -> None:
    whole = score(tmp_path / "whole", loss="self_nll", max_new_tokens=5).samples["answer_ids"].to_pylist()
    cut = score(tmp_path / "cut", loss="self_nll", max_new_tokens=5, cut=2).samples["answer_ids"].to_pylist()
    assert cut == [answer[:2] for answer in whole]


def test_settings_of_the_checkpoint_do_not_change_what_greedy_means(tmp_path: Path) -> None:
    model = make_model()
    plain = score(tmp_path / "plain", model=model, loss="self_nll", max_new_tokens=5)
    model.generation_config.update(
        do_sample=True, temperature=9.0, repetition_penalty=3.0, no_repeat_ngram_size=1
    )
    settings = model.generation_config.to_dict()
    again = score(tmp_path / "again", model=model, loss="self_nll", max_new_tokens=5)
    assert again.samples["answer_ids"] == plain.samples["answer_ids"]
    assert model.generation_config.to_dict() == settings


def test_means_are_taken_over_the_whole_dataset_and_kept(tmp_path: Path) -> None:
    run = score(tmp_path / "run", ablation="mean")
    model, samples = make_model(), eaptk.read_samples(RECORDS, make_tokenizer())
    means = eaptk.source_means(model, [eaptk.collate([sample]) for sample in samples], run.graph)
    kept = load_file(run.path / "means.safetensors")
    assert kept.keys() == means.keys()
    for name, mean in means.items():
        torch.testing.assert_close(kept[name], mean, rtol=1e-4, atol=1e-5)
    expected = eaptk.attribute(model, eaptk.collate(samples[:1]), run.graph, ablation="mean", means=means)
    np.testing.assert_allclose(run.scores[0], expected.rows[0], rtol=1e-3, atol=1e-4)


def test_user_columns_and_groups_are_carried_along(tmp_path: Path) -> None:
    samples = score(tmp_path / "run").samples.to_pydict()
    assert samples["level"] == [record["level"] for record in RECORDS]
    assert samples["group"] == [record["group"] for record in RECORDS]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = make_model().train()
    before, trainable = weights_fingerprint(model), [p.requires_grad for p in model.parameters()]
    score(tmp_path / "run", model=model, loss="self_nll", max_new_tokens=3)
    assert model.training
    assert weights_fingerprint(model) == before
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ablation": "none"}, "ablation is 'none'; it must be one of zero, patching, mean"),
        ({"loss": "mse"}, "loss is 'mse'; it must be one of nll, logit_diff, kl, self_nll"),
        ({"granularity": "neuron"}, "granularity is 'neuron'"),
        ({"row_dtype": "int8"}, "row_dtype is 'int8'"),
        ({"loss": "kl"}, "use it with ablation 'patching', not 'zero'"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0; it must be at least 1"),
        ({"segment": 0}, "segment is 0; it must be at least 1"),
        ({"segment": 8, "loss": enormous}, "by segments a loss is a named one"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"cut": -3}, "cut is -3; it must be at least 1"),
        ({"cut": 0}, "cut is 0; it must be at least 1"),
        ({"limit": -1}, "limit is -1; it must be at least 1"),
        ({"loss": lambda logits, batch: logits.sum((1, 2))}, "the loss <lambda> has no name and code"),
        ({"loss": partial(enormous)}, "the loss partial has no name and code of its own"),
        ({"loss": closure(2.0)}, "closure.<locals>.scaled has no name and code of its own"),
        ({"loss": Scaled(2.0).loss}, "give a named function of a module"),
        ({"dtype": "bfloat16"}, "this one is loaded already"),
        ({"loss": "self_nll", "max_new_tokens": CONTEXT}, f"longer than the model's context of {CONTEXT}"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    assert message in refused(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "field"), [({"ablation": "patching"}, "corrupt"), ({"loss": "logit_diff"}, "foil")]
)
def test_the_first_sample_that_lacks_what_a_method_needs_is_named(
    tmp_path: Path, options: dict[str, Any], field: str
) -> None:
    records = [dict(record) for record in RECORDS]
    del records[4][field], records[7][field]
    message = refused(tmp_path / "run", dataset=records, **options)
    assert f"needs '{field}' or '{field}_ids' in every sample; 'q4' has none" in message


def test_weights_that_are_not_finite_name_the_sample(tmp_path: Path) -> None:
    model = make_model()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    message = refused(tmp_path / "run", model=model)
    assert "sample 'q" in message
    assert "nan" in message


def test_a_run_resumes_after_an_error_that_has_been_put_right(tmp_path: Path) -> None:
    whole = score(tmp_path / "whole", loss=fails_for_unlucky_samples)
    UNLUCKY.add("q5")
    with pytest.raises(RuntimeError, match="no luck"):
        score(tmp_path / "run", loss=fails_for_unlucky_samples)
    assert 0 < eaptk.Run.open(tmp_path / "run").done.sum() < len(RECORDS)
    UNLUCKY.clear()
    resumed = score(tmp_path / "run", loss=fails_for_unlucky_samples)
    assert np.array_equal(resumed.scores, whole.scores)
    assert np.array_equal(resumed.loss, whole.loss)


UNLUCKY: set[str] = set()


def fails_for_unlucky_samples(logits: torch.Tensor, batch: eaptk.Batch) -> torch.Tensor:
    if UNLUCKY.intersection(batch.names):
        raise RuntimeError("no luck")
    return logits.square().flatten(1).sum(1)


def test_a_batch_of_which_only_some_rows_are_done_is_computed_again_whole(tmp_path: Path) -> None:
    """A smaller batch could round differently: the marked row is a wrong one here, to see that it is replaced."""
    whole = score(tmp_path / "whole", tokens_per_batch=10_000)
    with RunWriter(tmp_path / "run", {k: v for k, v in whole.manifest.items() if k != "schema"}) as writer:
        writer.begin(whole.samples.drop_columns(["loss"]))
        writer.write([3], np.zeros_like(whole.scores[[3]]), np.zeros(1))
    resumed = score(tmp_path / "run", tokens_per_batch=10_000)
    assert np.array_equal(resumed.scores, whole.scores)
    assert np.array_equal(resumed.loss, whole.loss)


def test_weights_that_the_checkpoint_lacks_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save_checkpoint(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EaptkError, match=r"lacks 1 weights .* model\.layers\.0\.mlp\.down_proj\.weight"):
        load_model(folder)


def test_a_generic_tokenizer_is_loaded_to_the_letter(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_checkpoint(tmp_path / "model"))
    assert tokenizer("w0 w28")["input_ids"] == [0, 3, 31]


def test_a_checkpoint_without_a_tokenizer_scores_tokens(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    record = {"id": "a", "prompt_ids": [3, 4], "answer_ids": [5]}
    data = write_jsonl(tmp_path / "data.jsonl", [record])
    assert score(tmp_path / "run", data, model=tmp_path / "model", tokenizer=None).complete
    data.write_text(json.dumps({"prompt": "w1", "answer": "w2"}))
    message = refused(tmp_path / "text", dataset=data, model=tmp_path / "model", tokenizer=None)
    assert "line 1: 'prompt' is text, but there is no tokenizer" in message


def test_a_moved_run_stays_a_run(tmp_path: Path) -> None:
    run = score(tmp_path / "here")
    moved = eaptk.Run.open(shutil.move(tmp_path / "here", tmp_path / "there"))
    assert moved.manifest == run.manifest
