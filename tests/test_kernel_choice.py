"""Who gets the kernels: named or unasked, trusted or not, with which tile sizes. All in Triton's interpreter."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import relative_error
from test_triton import Maker, block_operands, head_operands
from torch import Tensor

from eaptk.kernels import contract, row_statistics
from eaptk.kernels.block import reduce
from eaptk.kernels.row_kernels import row_statistics as kernel_statistics
from eaptk.kernels.tuning import ANY, BlockConfig, ExpandConfig, HeadConfig

SMALL = BlockConfig(16, 16, 32, 1, 1)
OTHER = BlockConfig(32, 16, 16, 1, 1)


@pytest.fixture(autouse=True)
def of_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No trial was held and no tile size timed yet; tiles are small, as the interpreter is slow."""
    monkeypatch.setattr("eaptk.kernels.trial.VERDICTS", {})
    monkeypatch.setattr("eaptk.kernels.autotune.KNOWN", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("eaptk.kernels.tuning.BLOCK", [(ANY, ANY, ANY, SMALL)])
    monkeypatch.setattr("eaptk.kernels.tuning.HEAD", [(ANY, ANY, ANY, HeadConfig(16, (16,), 64, 1, 1))])
    monkeypatch.setattr("eaptk.kernels.tuning.EXPAND", [(ANY, ANY, ANY, ExpandConfig(16, 64, 64, 1))])


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor counts as a GPU."""
    monkeypatch.setattr("eaptk.kernels.dispatch.DEVICES", ("cpu",))


def operands(dtype: torch.dtype = torch.float32, by_head: bool = False) -> tuple[Any, Any, list[int]]:
    make = Maker([3], 32, dtype)
    return *(head_operands(make, 2, 1, 16, layers=1) if by_head else block_operands(make, 3, False)), [3]


def negated(partials: Tensor, *args: Any, negated: bool) -> None:
    """A kernel that is wrong: every score has the other sign."""
    reduce(partials, *args, negated=not negated)


def unable(*args: Any, **options: Any) -> None:
    """A kernel that does not compile."""
    raise RuntimeError("PassManager::run failed\nand much more")


def test_float64_has_no_kernel_and_says_so() -> None:
    with pytest.raises(ValueError, match="float64; use backend='reference'"):
        contract(*operands(torch.float64), backend="triton")


def test_the_backend_is_chosen_by_argument_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    default = contract(*operands(torch.float64))
    monkeypatch.setenv("EAPTK_BACKEND", "triton")
    with pytest.raises(ValueError, match="float64"):
        contract(*operands(torch.float64))
    assert torch.equal(contract(*operands(torch.float64), backend="reference"), default)


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAPTK_BACKEND", "cuda")
    with pytest.raises(
        ValueError, match="EAPTK_BACKEND is 'cuda'; it must be one of native, reference, triton"
    ):
        contract(*operands())


def test_on_the_processor_nobody_gets_the_kernels_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eaptk.kernels.block.reduce", unable)
    monkeypatch.setattr("eaptk.kernels.row_kernels.packed", unable)
    contract(*operands())
    row_statistics(torch.ones(2, 3))


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("by_head", [False, True], ids=["block", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_a_kernel_that_is_right_is_taken_unasked(dtype: torch.dtype, by_head: bool) -> None:
    given = operands(dtype, by_head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = contract(*given)
    assert torch.equal(got, contract(*given, backend="triton"))
    assert relative_error(got, contract(*given, backend="reference").double()) < 1e-2


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("broken", "symptom"),
    [(negated, r"it is off by 2.0e\+00, where 1.0e-05 is allowed"), (unable, "PassManager::run failed")],
)
def test_on_a_gpu_a_kernel_that_is_not_gives_way_to_the_reference(
    broken: Callable[..., None], symptom: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eaptk.kernels.block.reduce", broken)
    given = operands()
    with pytest.warns(
        RuntimeWarning, match=rf"'block' for float32 cannot be trusted on cpu: .*{symptom}"
    ) as seen:
        got = contract(*given)
    assert len(seen) == 1
    assert torch.equal(got, contract(*given, backend="reference"))


def test_who_names_the_kernels_is_told_that_they_err(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eaptk.kernels.block.reduce", negated)
    with pytest.raises(ValueError, match=r"it is off by .* use backend='reference', or unset EAPTK_BACKEND"):
        contract(*operands(), backend="triton")


@pytest.mark.usefixtures("on_gpu")
def test_a_kernel_that_broke_the_device_gives_way_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(*args: Any, **options: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nand much more")

    monkeypatch.setattr("eaptk.kernels.block.reduce", breaking)
    with pytest.raises(
        ValueError, match=r"left cpu unusable: .*illegal memory access; start again with EAPTK"
    ):
        contract(*operands())


def test_each_kernel_is_tried_once_for_each_kind_of_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        contract(*operands(dtype), backend="triton")
    monkeypatch.setattr("eaptk.kernels.block.reduce", negated)
    contract(*operands(), backend="triton")
    with pytest.raises(ValueError, match="for float16"):
        contract(*operands(torch.float16), backend="triton")


@pytest.mark.usefixtures("on_gpu")
def test_on_a_gpu_float64_silently_takes_the_reference() -> None:
    given = operands(torch.float64)
    assert torch.equal(contract(*given), contract(*given, backend="reference"))


def test_without_triton_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eaptk.kernels.trial.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'eaptk\[gpu\]'"):
        contract(*operands(), backend="triton")


@pytest.mark.usefixtures("on_gpu")
def test_on_a_gpu_statistics_of_rows_come_from_the_kernel_unless_it_errs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    expected = row_statistics(rows, 10, 1.0, backend="reference")
    assert row_statistics(rows, 10, 1.0).m4.tolist() == pytest.approx(expected.m4.tolist(), rel=1e-12)

    def of_half_of_them(rows: Tensor, *histogram: Any) -> Any:
        return kernel_statistics(rows[:, ::2], *histogram)

    monkeypatch.setattr("eaptk.kernels.trial.VERDICTS", {})
    monkeypatch.setattr("eaptk.kernels.row_kernels.row_statistics", of_half_of_them)
    with pytest.warns(RuntimeWarning, match="'rows' for float32"):
        assert row_statistics(rows, 10, 1.0).m4.tolist() == expected.m4.tolist()


class Timer:
    """Finds one configuration after another faster than those before it, or none."""

    def __init__(self, steps: list[float]) -> None:
        self.steps = steps

    def __call__(self, work: Callable[[], Tensor]) -> float:
        return self.steps.pop(0)


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = BlockConfig(16, 16, 48, 1, 1)  # no power of two: it does not compile
    for table, found in (("BLOCK", (wrong, OTHER)), ("HEAD", ()), ("EXPAND", (ExpandConfig(16, 32, 64, 1),))):
        monkeypatch.setattr(f"eaptk.kernels.autotune.{table}_CANDIDATES", {"float": found})


def kept(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eaptk" / "autotune.json").read_text())
    return found


@pytest.mark.usefixtures("candidates")
def test_autotuning_keeps_the_fastest_and_does_not_time_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("eaptk.kernels.autotune.seconds", Timer([2.0, 1.0]))
    monkeypatch.setenv("EAPTK_AUTOTUNE", "1")
    given = operands()
    got = contract(*given, backend="triton")
    assert relative_error(got, contract(*given, backend="reference").double()) < 1e-6
    ((key, sizes),) = kept(tmp_path).items()
    assert BlockConfig(**sizes) == OTHER
    assert key.startswith("cpu | triton ")
    assert key.endswith(" | block | float32 plain 16x4 of 32")
    monkeypatch.setattr("eaptk.kernels.autotune.KNOWN", {})  # as a new process
    assert torch.equal(contract(*given, backend="triton"), got)


@pytest.mark.usefixtures("candidates")
def test_autotuning_by_head_times_both_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("eaptk.kernels.autotune.seconds", Timer([1.0, 2.0, 1.0]))
    given = operands(by_head=True)
    got = contract(*given, backend="triton", autotune=True)
    assert relative_error(got, contract(*given, backend="reference").double()) < 1e-6
    head, expand = kept(tmp_path).values()
    assert head == {"block_d": 16, "widths": [16], "block_k": 64, "stages": 1, "warps": 1}
    assert ExpandConfig(**expand) == ExpandConfig(16, 32, 64, 1)


def test_without_being_asked_nothing_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("eaptk.kernels.autotune.seconds", Timer([]))
    contract(*operands(), backend="triton")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("candidates")
@pytest.mark.parametrize("text", ["{", "[]", '{"cpu | triton 3 | block | x": {"block_d": 16}}', '{"x": 1}'])
def test_a_corrupt_cache_is_named_ignored_and_replaced(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "eaptk").mkdir()
    (tmp_path / "eaptk" / "autotune.json").write_text(text)
    monkeypatch.setattr("eaptk.kernels.autotune.seconds", Timer([2.0, 1.0]))
    with pytest.warns(RuntimeWarning, match=r"autotune.json: .*it is ignored, and they are timed again"):
        contract(*operands(), backend="triton", autotune=True)
    assert [BlockConfig(**sizes) for sizes in kept(tmp_path).values()] == [OTHER]


@pytest.mark.usefixtures("candidates")
def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "eaptk").write_text("a file where the folder should be")
    monkeypatch.setattr("eaptk.kernels.autotune.seconds", Timer([2.0, 1.0]))
    with pytest.warns(RuntimeWarning, match="tile sizes are not kept"):
        contract(*operands(), backend="triton", autotune=True)
