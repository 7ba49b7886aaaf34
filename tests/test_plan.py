"""`Plan`: what it predicts is what is measured, and it chooses what fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from accounting import flops, peak_bytes
from checkpoints import make_model
from tiny import VOCABULARY, tiny_model
from torch import nn

from benchmarks.cost import bare_pass
from eaptk import Batch, EaptkError, Graph, attribute, attribute_cuts, cli, losses
from eaptk.batch import NO_TARGET
from eaptk.budget import tokens_that_fit
from eaptk.graph import Granularity
from eaptk.plan import MARGIN, Plan, Work, flush_cuts, free_memory, parse_bytes
from eaptk.sites import Sites

GRANULARITIES: list[Granularity] = ["block", "head"]
LAYERS, WIDTH, TOKENS = 6, 192, 320


@dataclass(frozen=True)
class Case:
    model: nn.Module
    graph: Graph
    sites: Sites
    batch: Batch
    work: Work


def case(name: str, granularity: Granularity, dtype: torch.dtype = torch.float32, **more: Any) -> Case:
    """A model whose activations outweigh all that is not planned."""
    shape = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "intermediate_size": 512}
    if name == "gpt2":
        shape = {"n_layer": LAYERS, "n_embd": WIDTH, "n_positions": TOKENS}
    elif name in ("qwen3", "gemma2"):
        shape["head_dim"] = 64
    model = tiny_model(
        name, dtype, **{**shape, **({} if name == "gpt2" else {"max_position_embeddings": TOKENS})}, **more
    )
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = Batch.from_mapping({"input_ids": ids})
    graph = Graph.from_model(model, granularity)
    sites = Sites(model, graph)
    n_loss = int((batch.targets != NO_TARGET).sum())
    return Case(model, graph, sites, batch, Work.of(model, sites, 1, TOKENS, n_loss=n_loss))


@pytest.mark.parametrize("dials", [(LAYERS, False), (2, False), (LAYERS, True), (1, True)], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("qwen3", torch.float32),
        ("gpt2", torch.float32),
        ("gpt_neox", torch.float32),
        ("gemma2", torch.float32),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_the_height_of_memory_is_predicted_within_the_margin(
    name: str, dtype: torch.dtype, granularity: Granularity, dials: tuple[int, bool]
) -> None:
    found = case(name, granularity, dtype)
    flush_layers, checkpoint = dials
    measured = peak_bytes(
        lambda: attribute(
            found.model, found.batch, found.graph, flush_layers=flush_layers, checkpoint=checkpoint
        )
    )
    assert 1 / MARGIN < found.work.peak(flush_layers, checkpoint) / measured < MARGIN


@pytest.mark.parametrize("dials", [(LAYERS, False), (1, True)], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=lambda value: str(value).removeprefix("torch.")
)
def test_so_is_that_of_two_prompts(
    dtype: torch.dtype, granularity: Granularity, dials: tuple[int, bool]
) -> None:
    found = case("llama", granularity, dtype)
    work = Work.of(found.model, found.sites, 1, TOKENS, n_loss=TOKENS - 1, patched=True)
    batch = replace(found.batch, corrupt_ids=found.batch.ids.flip(1))
    flush_layers, checkpoint = dials
    measured = peak_bytes(
        lambda: attribute(
            found.model,
            batch,
            found.graph,
            ablation="patching",
            flush_layers=flush_layers,
            checkpoint=checkpoint,
        )
    )
    assert 1 / MARGIN < work.peak(flush_layers, checkpoint) / measured < MARGIN


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_what_the_bare_passes_take_is_predicted_as_well(name: str) -> None:
    found = case(name, "block")
    measured = peak_bytes(lambda: bare_pass(found.model, found.sites, found.batch))
    assert 1 / MARGIN < found.work.bare_peak() / measured < MARGIN


@pytest.mark.parametrize("flush_layers", [1, LAYERS])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_flops_are_those_that_torch_counts(
    name: str, granularity: Granularity, flush_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAPTK_BACKEND", "reference")  # torch sees no products of compiled loops
    found = case(name, granularity, attention="eager")
    work = found.work
    bare = flops(lambda: bare_pass(found.model, found.sites, found.batch))
    assert work.bare_flops == pytest.approx(bare, rel=0.03)
    for checkpoint in (False, True):
        whole = flops(
            lambda again=checkpoint: attribute(
                found.model, found.batch, found.graph, flush_layers=flush_layers, checkpoint=again
            )
        )
        added = work.contraction_flops(flush_layers) + work.expansion_flops(flush_layers)
        assert added + work.recompute_flops * checkpoint == pytest.approx(whole - bare, rel=0.03)


@pytest.mark.parametrize("cuts", [None, [300, 310, TOKENS]], ids=["one-pass", "three-passes"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_logits_of_a_wide_vocabulary_are_counted_a_chunk_at_a_time(
    checkpoint: bool, cuts: list[int] | None
) -> None:
    found = case("llama", "block", vocab_size=32768)
    n_cuts = 1 if cuts is None else len(cuts)
    work = Work.of(found.model, found.sites, 1, TOKENS, n_loss=TOKENS - 1, n_cuts=n_cuts)
    assert losses.MIN_POSITIONS < work.n_together <= losses.chunk_positions(32768, "cpu")
    dials = {"flush_layers": LAYERS, "checkpoint": checkpoint}
    measured = peak_bytes(
        lambda: (
            attribute(found.model, found.batch, found.graph, **dials)
            if cuts is None
            else attribute_cuts(found.model, found.batch, found.graph, cuts, **dials)
        )
    )
    assert 1 / MARGIN < work.peak(**dials) / measured < MARGIN


def test_a_loss_of_ones_own_has_the_logits_of_all_positions() -> None:
    found = case("llama", "block", vocab_size=8192)
    work = Work.of(found.model, found.sites, 1, TOKENS, n_loss=TOKENS, whole_logits=True)

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return torch.log_softmax(logits, -1)[:, :, 0].mean(1)

    measured = peak_bytes(
        lambda: attribute(
            found.model, found.batch, found.graph, loss=loss, flush_layers=LAYERS, checkpoint=False
        )
    )
    assert 1 / MARGIN < work.peak(LAYERS, False) / measured < MARGIN


@pytest.mark.parametrize("lengths", [[20, 50], [20, 50, 100_000]], ids=["short", "one-long"])
def test_a_batch_has_as_many_tokens_as_memory_holds(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = case("llama", "block")
    chosen = []
    for memory in (2**40, 10**8, 10**7, 1):
        monkeypatch.setattr("eaptk.budget.free_memory", lambda device, memory=memory: memory)
        chosen.append(tokens_that_fit(found.model, found.graph, lengths, False))
    assert chosen[0] == 2048
    assert chosen[-1] == 256
    assert chosen == sorted(chosen, reverse=True)
    assert 256 < chosen[1] < 2048, "a sample that is scored alone does not count"


def test_processes_share_a_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0.2 < free_memory(torch.device("cpu")) / alone < 0.3


def test_the_fastest_dials_that_fit_are_chosen() -> None:
    work = case("llama", "block").work
    chosen = [Plan.within(memory, work) for memory in range(10**6, 2 * work.peak(LAYERS, False), 10**6)]
    dials = [(plan.checkpoint, -plan.flush_layers) for plan in chosen if plan.fits]
    assert dials == sorted(dials, reverse=True), "more memory never asks for more frugality"
    assert dials[-1] == (False, -LAYERS)
    assert dials[0][0], "the least memory that does asks for checkpointing"
    assert all(plan.peak * MARGIN <= plan.memory for plan in chosen if plan.fits)


def test_where_nothing_fits_the_most_frugal_is_tried() -> None:
    work = case("llama", "head").work
    least = min(work.peak(layers, checkpoint) for layers in (1, 2, 3, 6) for checkpoint in (False, True))
    assert Plan.within(0, work).peak == least


def test_given_dials_are_kept() -> None:
    work = case("llama", "block").work
    plan = Plan.within(0, work, flush_layers=3, checkpoint=False)
    assert (plan.flush_layers, plan.checkpoint, plan.fits) == (3, False, False)


def test_nothing_is_traded_where_memory_abounds() -> None:
    work = case("llama", "head").work
    plan = Plan.within(2**40, work)
    assert (plan.flush_layers, plan.checkpoint) == (LAYERS, False)


@pytest.mark.parametrize("flush_layers", [1, 2, 3, 7])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_flush_groups_are_whole_and_cover_every_destination(
    granularity: Granularity, flush_layers: int
) -> None:
    found = case("llama", granularity)
    cuts = flush_cuts(found.sites.readers, flush_layers)
    flushed = [reader for _, readers in reversed(found.work.flushes(flush_layers)) for reader in readers]
    assert flushed == found.sites.readers
    for layer, first in cuts.items():
        assert all(reader.layer >= layer for reader in found.sites.readers[first:]), "not known by then"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("80GB", 80 * 10**9),
        ("64GiB", 64 * 2**30),
        ("500 MB", 5 * 10**8),
        ("8e9", 8 * 10**9),
        ("1.5T", 1.5e12),
    ],
)
def test_bytes_are_read_as_people_write_them(text: str, number: float) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "80 XB", "-1GB", "0", "..GB", "1.2.3GB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(EaptkError, match="write 80GB"):
        parse_bytes(text)


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["inspect", *arguments])
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


@pytest.fixture
def config_alone(tmp_path: Any) -> str:
    """The folder of a checkpoint without weights."""
    make_model().config.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_command_line_shows_a_plan_without_reading_weights(
    config_alone: str, granularity: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = inspected(
        capsys,
        "--plan",
        config_alone,
        "--tokens",
        "4096",
        "--card",
        "a100-80gb",
        "--granularity",
        granularity,
    )
    assert code == 0
    for part in ("weights", "sources", "gradients", "peak", "passes", "contraction", "overhead", "A100"):
        assert part in out
    assert ("expansion" in out) == (granularity == "head")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--card", "h1000"], "no card named 'h1000'"),
        (["--budget", "much"], "'much' is no amount of memory"),
        (["--budget", "1kB"], "the weights alone take"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    config_alone: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = inspected(capsys, "--plan", config_alone, *arguments)
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1
