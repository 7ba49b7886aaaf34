"""One model's answers to a list of questions: generated greedily, kept in one Parquet file.

    id, question, reference      of the question
    prompt_ids, answer_ids       tokens that were fed and given
    answer                       the answer as text, without special tokens
    finished                     whether it ended by itself, and not because it grew too long
    right, reason, given         of the verdict, once it is graded (`eaptk.grading`)

What gave the answers (model, tokenizer, questions, prompt, …) stands in the file's own metadata, and other
answers never take the place of those that are there.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import nn

import eaptk
from eaptk.answering import answer_rest
from eaptk.batch import Sample
from eaptk.dataset import read_samples
from eaptk.errors import EaptkError
from eaptk.files import differences_between, explained, read_table, write_table
from eaptk.generate import end_tokens
from eaptk.journal import append_journal, read_journal
from eaptk.loading import config_fingerprint, load_config, load_model, load_tokenizer, tokenizer_fingerprint
from eaptk.manifest import model_facts
from eaptk.prompts import find_template, prompt_tokens, stop_tokens
from eaptk.questions import Question, questions_fingerprint
from eaptk.weights import bare

Engine = Literal["transformers", "vllm"]
ENGINES: tuple[Engine, ...] = ("transformers", "vllm")

_FACTS = b"eaptk"


@dataclass(frozen=True)
class Answers:
    """A file of answers, opened for reading.

    Args:
        path: of the file.
        facts: what gave the answers.
        table: one row a question; see the module for its columns.
    """

    path: Path
    facts: dict[str, Any]
    table: pa.Table

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Answers:
        """Open a file of answers.

        Raises:
            EaptkError: there is none, or it is none.
        """
        path = Path(path)
        if not path.is_file():
            raise EaptkError(f"there are no answers {path}; `eaptk generate … --out {path}` makes them")
        nothing = f"{path} holds no answers of eaptk; `eaptk generate … --out FILE` makes them"
        try:
            table = read_table(path)
        except EaptkError as error:  # which speaks of runs
            raise EaptkError(nothing) from error
        facts = (table.schema.metadata or {}).get(_FACTS)
        if facts is None:
            raise EaptkError(nothing)
        return cls(path, json.loads(facts), table)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """[n] of the questions."""
        return tuple(self.table["id"].to_pylist())

    @cached_property
    def prompt_lengths(self) -> npt.NDArray[np.int64]:
        """[n] tokens of each prompt."""
        return np.array([len(ids) for ids in self.table["prompt_ids"].to_pylist()], dtype=np.int64)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[n] tokens of each answer, its end-of-sequence token included."""
        return np.array([len(ids) for ids in self.table["answer_ids"].to_pylist()], dtype=np.int64)

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """[n] whether each answer is right.

        Raises:
            EaptkError: they have not been graded.
        """
        if "right" not in self.table.column_names:
            raise EaptkError(f"{self.path} is not graded yet; `eaptk grade {self.path}` does it")
        return np.array(self.table["right"].to_pylist(), dtype=bool)

    def samples(self, ids: Sequence[str]) -> list[Sample]:
        """Prompts with the model's own answers, of the questions named."""
        rows = {name: row for row, name in enumerate(self.ids)}
        prompts, answers = (self.table[c].to_pylist() for c in ("prompt_ids", "answer_ids"))
        return [Sample(name, tuple(prompts[rows[name]]), tuple(answers[rows[name]])) for name in ids]

    def write_samples(self, path: Path, ids: Sequence[str]) -> None:
        """Write what `eaptk.score` reads: id, prompt_ids and answer_ids of the questions named."""
        samples = self.samples(ids)
        columns = {
            "id": [sample.id for sample in samples],
            "prompt_ids": [list(sample.prompt_ids) for sample in samples],
            "answer_ids": [list(sample.answer_ids) for sample in samples],
        }
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_table(path, pa.table(columns))

    def write(self) -> None:
        """Write the file, whole or not at all."""
        table = self.table.replace_schema_metadata({_FACTS: json.dumps(self.facts).encode()})
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_table(self.path, table)


def answer_questions(
    model: str | os.PathLike[str] | nn.Module,
    questions: Sequence[Question],
    out: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    prompt: str = "plain",
    stop: Sequence[str] = (),
    max_new_tokens: int = 512,
    tokens_per_batch: int = 16384,
    engine: Engine = "transformers",
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    progress: bool = True,
) -> Answers:
    """Let a model answer questions, one greedy answer each; the same call resumes what was stopped.

    Args:
        model: a folder, a name on the hub, or a loaded Hugging Face causal LM with its `tokenizer`.
        questions: see `eaptk.questions.read_questions`.
        out: the file to write.
        prompt: a template; see `eaptk.prompts`.
        stop: tokens that end an answer, besides those of the template and of the model's generation config.
        max_new_tokens: of the longest answer; fewer where the model's context ends.
        tokens_per_batch: prompt and longest answer of all that is answered together.
        engine: ``"transformers"``, or ``"vllm"`` where that is installed: for a model given by name, on CUDA
            only; it answers all at once, keeps nothing if it is stopped, and eaptk's tests do not cover it.
        dtype, device, attention: as for `load_model`.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        EaptkError: no tokenizer, no such template, a prompt longer than the model's context, or a file that
            holds answers to another call.
    """
    for option, number in (("max_new_tokens", max_new_tokens), ("tokens_per_batch", tokens_per_batch)):
        if number < 1:
            raise EaptkError(f"{option} is {number}; it must be at least 1")
    if engine not in ENGINES:
        raise EaptkError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    model = bare(model) if isinstance(model, nn.Module) else model
    loaded = model if isinstance(model, nn.Module) else None
    if loaded is not None and (dtype or device or attention or engine == "vllm"):
        raise EaptkError(
            "dtype, device, attention and vLLM are for a model given by name; this one is loaded already"
        )
    config: Any = model.config if isinstance(model, nn.Module) else load_config(model)
    if tokenizer is None and not isinstance(model, nn.Module):
        tokenizer = load_tokenizer(model)
    if tokenizer is None:
        name = getattr(model, "name_or_path", model)
        raise EaptkError(f"{name} has no tokenizer to read questions with; save one beside the weights")
    template = find_template(prompt)
    stops = [*(template.stop if template else ()), *stop]
    prompts = prompt_tokens(prompt, [question.text for question in questions], tokenizer)
    context = getattr(config, "max_position_embeddings", None)
    longest = max(map(len, prompts))
    # The last token of an answer is not fed, so it may stand one beyond the context.
    n_new = max_new_tokens if context is None else min(max_new_tokens, context - longest + 1)
    if n_new < 1:
        worst = questions[[len(p) for p in prompts].index(longest)].id
        raise EaptkError(
            f"the prompt of question {worst!r} has {longest} tokens, more than the model's context of {context}; "
            f"leave it out, or shorten the prompt"
        )
    samples = read_samples(
        [Sample(question.id, tokens, ()) for question, tokens in zip(questions, prompts, strict=True)],
        context=context,
        vocabulary=config.vocab_size,
        own_answers=n_new,
    )
    if engine == "transformers" and loaded is None:
        loaded = load_model(model, dtype, device, attention)  # type: ignore[arg-type]
    facts = {
        "model": _named_facts(model, config, dtype) if loaded is None else model_facts(loaded),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "questions": {"fingerprint": questions_fingerprint(questions), "number": len(questions)},
        "prompt": prompt,
        "stop": stops,
        "max_new_tokens": n_new,
        "tokens_per_batch": tokens_per_batch if engine == "transformers" else None,
        "engine": engine,
        "versions": _versions(engine),
    }
    out = Path(out)
    if out.exists():
        found = Answers.open(out)
        _refuse_others(found, facts)
        return found
    ends = stop_tokens(stops, tokenizer)
    if engine == "vllm":
        answers = _vllm_answers(model, samples, n_new, ends, dtype)
        ends = [*ends, tokenizer.eos_token_id]
    else:
        answers = _answers(loaded, samples, out, facts, n_new, tokens_per_batch, ends, progress)
        ends = [*ends, *end_tokens(loaded)]
    rows = [answers[row] for row in range(len(questions))]
    tokens = pa.list_(pa.int32())
    table = pa.table(
        {
            "id": [question.id for question in questions],
            "question": [question.text for question in questions],
            "reference": [question.reference for question in questions],
            "prompt_ids": pa.array(prompts, tokens),
            "answer_ids": pa.array(rows, tokens),
            "answer": [tokenizer.decode(row, skip_special_tokens=True) for row in rows],
            "finished": [row[-1] in ends for row in rows],
        }
    )
    Answers(out, facts, table).write()
    for journal in out.parent.glob(f".{glob.escape(out.name)}.*.jsonl"):
        journal.unlink()
    # As read back, whether answered now or before: the file written from it is then the same to the byte.
    return Answers.open(out)


def with_columns(answers: Answers, columns: dict[str, Any], **facts: Any) -> Answers:
    """The same answers with columns added or replaced, written."""
    table = answers.table
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, values)
    changed = replace(answers, table=table, facts=answers.facts | facts)
    changed.write()
    return changed


def _answers(
    model: Any,
    samples: Sequence[Sample],
    out: Path,
    facts: dict[str, Any],
    n_new: int,
    tokens_per_batch: int,
    stop: Sequence[int],
    progress: bool,
) -> dict[int, list[int]]:
    # Named by what gives them, so that answers to another call are not mixed in.
    key = hashlib.sha256(json.dumps(_matched(facts), sort_keys=True).encode()).hexdigest()[:12]
    journal = out.with_name(f".{out.name}.{key}.jsonl")

    def keep(found: dict[int, list[int]]) -> None:
        with explained(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            append_journal(journal, found)

    return answer_rest(
        model,
        samples,
        read_journal(journal),
        keep,
        n_new,
        tokens_per_batch,
        stop,
        unit="questions",
        progress=progress,
    )


def _vllm_answers(
    model: Any, samples: Sequence[Sample], n_new: int, stop: Sequence[int], dtype: str | None
) -> dict[int, list[int]]:
    if find_spec("vllm") is None:
        raise EaptkError("engine 'vllm' needs vLLM and a CUDA device: pip install vllm, or use transformers")
    prompts = [list(sample.prompt_ids) for sample in samples]
    # vLLM gives a device's memory back for certain only when its process ends.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(_vllm_tokens, os.fspath(model), prompts, n_new, list(stop), dtype).result()
    return dict(enumerate(found))


def _vllm_tokens(
    model: str, prompts: list[list[int]], n_new: int, stop: list[int], dtype: str | None
) -> list[list[int]]:
    import vllm  # type: ignore[import-not-found]

    neutral = vllm.SamplingParams(temperature=0.0, max_tokens=n_new, stop_token_ids=stop)
    engine = vllm.LLM(model=model, dtype=dtype or "auto")
    outputs = engine.generate([vllm.TokensPrompt(prompt_token_ids=ids) for ids in prompts], neutral)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _named_facts(model: Any, config: Any, dtype: str | None) -> dict[str, Any]:
    """Of a model that is not loaded here: its weights are known by name only."""
    return {
        "id": os.fspath(model),
        "type": config.model_type,
        "weights": None,
        "config": config_fingerprint(config),
        "dtype": dtype,
        "attention": None,
        "device": "cuda",
    }


def _versions(engine: Engine) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"eaptk": eaptk.__version__}
    for package in ("torch", "transformers", *(["vllm"] if engine == "vllm" else [])):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _matched(facts: dict[str, Any]) -> dict[str, Any]:
    """What a resume must repeat: all but the name of the model and the grading."""
    model = {key: value for key, value in facts["model"].items() if key != "id"}
    return {key: value for key, value in facts.items() if key != "grading"} | {"model": model}


def _refuse_others(found: Answers, facts: dict[str, Any]) -> None:
    unlike = differences_between(_matched(found.facts), _matched(facts)).values()
    if unlike:
        raise EaptkError(
            f"{found.path} holds answers to another call: {'; '.join(unlike)}; delete it, or choose another place"
        )
