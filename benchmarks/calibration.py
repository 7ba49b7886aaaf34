"""The two constants of this machine, fitted to small batches that are measured on it, and held to others.

One core computes each batch bare, at block and at head level, in turns, and the fastest round of each counts: the
machine has other users, who can only make it slower. A third of the cases sets the constants. The others, which differ
in width, depth, heads, tokens, and in architecture, checkpointing and flush groups, are predicted with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import claims
from benchmarks.claims import lengths_of, queue_of, simulate
from benchmarks.cost import bare_pass
from benchmarks.forecast import Machine, Replica, traffic
from eaptk import Batch, Graph, attribute
from eaptk.plan import Plan, Work, without_weights
from eaptk.sites import Sites
from eaptk.sweep import Doubles

ROOT = Path(__file__).parents[1]

Level = Literal["bare", "block", "head"]
LEVELS: tuple[Level, ...] = ("bare", "block", "head")
#: Rounds before the clock counts, and that it counts.
WARM_UP, ROUNDS = 1, 3


@dataclass(frozen=True)
class Case:
    """A model of random weights and a batch.

    Args:
        model: type, as transformers names it.
        heads: query and key/value heads.
        flush_layers: dial of `attribute`; None: all.
        fitted: sets the constants; else it is predicted with them.
    """

    width: int
    layers: int
    heads: tuple[int, int]
    inner: int
    vocabulary: int
    n_samples: int
    n_tokens: int
    fitted: bool
    model: str = "qwen2"
    flush_layers: int | None = None
    checkpoint: bool = False

    def config(self) -> Any:
        vocabulary = {"vocab_size": self.vocabulary, "bos_token_id": None, "eos_token_id": None}
        if self.model == "gpt2":
            shape = {
                "n_embd": self.width,
                "n_layer": self.layers,
                "n_head": self.heads[0],
                "n_inner": self.inner,
                "n_positions": self.n_tokens,
            }
        else:
            shape = {
                "hidden_size": self.width,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads[0],
                "num_key_value_heads": self.heads[1],
                "head_dim": self.width // self.heads[0],
                "intermediate_size": self.inner,
            }
        return AutoConfig.for_model(self.model, **shape, **vocabulary)

    def plan(self, level: Level) -> Plan:
        """Of the batch at one level, its dials as the case has them."""
        model = without_weights(self.config(), torch.float32)
        sites = Sites(model, Graph.from_model(model, "block" if level == "bare" else level))
        n_loss = self.n_samples * (self.n_tokens - 1)
        work = Work.of(model, sites, self.n_samples, self.n_tokens, n_loss=n_loss, on_gpu=False)
        dials = self.flush_layers or self.layers, self.checkpoint and level != "bare"
        return Plan(work, 0, *dials, work.peak(*dials))


#: The first is "Qwen2, narrow" of `benchmarks.floor`.
CASES = (
    Case(512, 8, (8, 2), 1536, 4096, 4, 256, fitted=True),
    Case(256, 4, (4, 2), 768, 2048, 4, 256, fitted=True),
    Case(768, 6, (12, 4), 2304, 4096, 2, 192, fitted=True),
    Case(384, 16, (6, 2), 1024, 2048, 4, 128, fitted=True),
    Case(128, 8, (4, 2), 384, 1024, 8, 256, fitted=True),
    Case(256, 4, (4, 2), 768, 2048, 1, 2048, fitted=True),
    Case(256, 12, (4, 4), 768, 2048, 2, 384, fitted=False),
    Case(320, 24, (5, 1), 896, 2048, 2, 256, fitted=False),
    Case(512, 4, (8, 8), 2048, 4096, 1, 1024, fitted=False),
    Case(640, 6, (10, 5), 1280, 4096, 3, 160, fitted=False),
    Case(192, 20, (6, 3), 640, 1024, 2, 320, fitted=False),
    Case(768, 12, (12, 2), 2048, 8192, 1, 256, fitted=False),
    Case(1024, 4, (16, 4), 3072, 8192, 1, 384, fitted=False),
    Case(896, 3, (14, 2), 2432, 4096, 1, 512, fitted=False, model="llama"),
    Case(512, 8, (8, 4), 1408, 4096, 2, 256, fitted=False, model="llama"),
    Case(384, 8, (6, 6), 1536, 4096, 2, 256, fitted=False, model="gpt2"),
    Case(512, 8, (8, 2), 1536, 4096, 2, 256, fitted=False, checkpoint=True),
    Case(384, 12, (6, 2), 1024, 2048, 2, 256, fitted=False, flush_layers=2),
)


@dataclass(frozen=True)
class Measured:
    """One level of a case.

    Args:
        seconds: of each round that counts.
        work: of the batch.
        plan: its dials.
    """

    case: Case
    level: Level
    seconds: tuple[float, ...]
    plan: Plan

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    def predicted(self, machine: Machine) -> float:
        parts = Replica().seconds(self.plan, machine)
        bare = ("passes", "recomputation", "traffic")
        return sum(seconds for name, seconds in parts.items() if self.level != "bare" or name in bare)


def measure(cases: Sequence[Case] = CASES, rounds: int = ROUNDS) -> list[Measured]:
    """Every case at every level, on one thread."""
    torch.set_num_threads(1)
    return [found for case in cases for found in _measure(case, rounds)]


def _measure(case: Case, rounds: int) -> list[Measured]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config()).eval()
    ids = torch.randint(0, case.vocabulary, (case.n_samples, case.n_tokens))
    batch = Batch.from_mapping({"input_ids": ids})
    plans = {level: case.plan(level) for level in LEVELS}
    work = {level: _run(model, batch, level, plans[level]) for level in LEVELS}
    seconds: dict[Level, list[float]] = {level: [] for level in LEVELS}
    for i in range(WARM_UP + rounds):
        for level in LEVELS:
            started = time.perf_counter()
            work[level]()
            if i >= WARM_UP:
                seconds[level].append(time.perf_counter() - started)
    return [Measured(case, level, tuple(seconds[level]), plans[level]) for level in LEVELS]


def _run(model: Any, batch: Batch, level: Level, plan: Plan) -> Callable[[], Any]:
    graph = plan.work.graph
    if level == "bare":
        sites = Sites(model, graph)
        return lambda: bare_pass(model, sites, batch)
    return lambda: attribute(model, batch, graph, flush_layers=plan.flush_layers, checkpoint=plan.checkpoint)


def fit(measured: Sequence[Measured]) -> Machine:
    """Rate and bandwidth of least squared relative error, over the cases that are to set them, by Gauss and Newton."""
    cases = [each for each in measured if each.case.fitted]

    def errors(constants: Doubles) -> Doubles:
        machine = _machine(constants)
        return np.array([each.predicted(machine) / each.fastest - 1 for each in cases])

    # Logarithms: both are positive, and of unlike size.
    constants, step = np.log([1e11, 1e10]), 1e-4
    for _ in range(50):
        found = errors(constants)
        slopes = np.stack([(errors(constants + step * axis) - found) / step for axis in np.eye(2)], 1)
        constants -= np.linalg.lstsq(slopes, found, rcond=None)[0]
    return _machine(constants)


def _machine(constants: Doubles) -> Machine:
    rate, bandwidth = np.exp(constants).tolist()
    return Machine(rate, rate, bandwidth)


def hashing_rate(n_bytes: int = 2**26, rounds: int = 5) -> float:
    """Bytes a second at which one core takes the SHA-256 that weights are known by."""
    content, seconds = os.urandom(n_bytes), []
    for _ in range(rounds):
        started = time.perf_counter()
        hashlib.sha256(content).digest()
        seconds.append(time.perf_counter() - started)
    return n_bytes / min(seconds)


def record(measured: Measured, machine: Machine) -> dict[str, Any]:
    """What is kept of a measured batch beside its prediction."""
    predicted, work = measured.predicted(machine), measured.plan.work
    return {
        **asdict(measured.case),
        "level": measured.level,
        "seconds": list(measured.seconds),
        "predicted": predicted,
        "error": predicted / measured.fastest - 1,
        "bare_flops": work.bare_flops,
        "traffic": traffic(work, measured.plan.checkpoint),
    }


#: Of the runs by one process and by two: a model, and tokens of a batch.
TEAM_CASE = Case(384, 6, (6, 2), 1024, 2048, 4, 400, fitted=False)
TEAM_SAMPLES, TEAM_TOKENS, TEAM_BATCH = 27, 400, 1800


def measure_team(machine: Machine) -> dict[str, Any]:
    """Seconds in which one process and two score the same samples, beside those of the simulated queue.

    What a process takes to start is told by the same command again, which finds nothing left to do.
    """
    lengths = lengths_of(TEAM_SAMPLES, TEAM_TOKENS)
    queue = queue_of(lengths, TEAM_BATCH)
    work = [[claims.Batch(_seconds(n, tokens, machine)) for n, tokens in part] for part in queue]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model, data = f"{folder}/model", Path(folder) / "data.jsonl"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(TEAM_CASE.config()).save_pretrained(model)
        rng = np.random.default_rng(0)
        with data.open("w") as file:
            for n_tokens in lengths:
                ids = rng.integers(0, TEAM_CASE.vocabulary, n_tokens + 1).tolist()
                file.write(json.dumps({"prompt_ids": ids[:1], "answer_ids": ids[1:]}) + "\n")
        for processes in (1, 2):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={processes}",
            ]
            command += ["-m", "eaptk", "score", "--model", model, "--data", str(data)]
            command += ["--out", f"{folder}/run-{processes}", f"--tokens-per-batch={TEAM_BATCH}"]
            whole, start = _wall(command), _wall(command)
            found[processes] = {"measured": whole - start, "predicted": simulate(work, processes).seconds}
    return {"samples": TEAM_SAMPLES, "stretches": len(queue), "by_processes": found}


def _seconds(n_samples: int, n_tokens: int, machine: Machine) -> float:
    case = replace(TEAM_CASE, n_samples=n_samples, n_tokens=n_tokens)
    return sum(Replica().seconds(case.plan("block"), machine).values())


def _wall(command: Sequence[str]) -> float:
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started
