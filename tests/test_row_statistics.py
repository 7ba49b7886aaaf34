"""Statistics of rows where they are computed equal those that the sweep finds in stored rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from eaptk.kernels import row_statistics
from eaptk.kernels.dispatch import Backend
from eaptk.sweep import sweep

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
MOMENTS = ("count", "sum_abs", "sum", "m2", "m3", "m4", "min", "max")


def rows_of(n_edges: int, mean: float = 0.0) -> Tensor:
    """Three heavy-tailed rows, the last of one value throughout."""
    rows = torch.randn(3, n_edges, generator=torch.Generator().manual_seed(n_edges)) ** 5 * 1e-3 + mean
    rows[2] = 0.25
    return rows


@BACKENDS
@pytest.mark.parametrize(("n_edges", "mean"), [(1, 0.0), (7, 1.0), (4096, 0.0), (9001, 100.0)])
def test_moments_are_those_of_the_sweep(n_edges: int, mean: float, backend: Backend) -> None:
    rows = rows_of(n_edges, mean)
    got, expected = row_statistics(rows, backend=backend), sweep(rows.numpy(), backend="numpy")
    for name in MOMENTS:
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-9, err_msg=name)
    assert got.histogram is None
    assert got.above is None


@BACKENDS
@pytest.mark.parametrize(("bins", "upper"), [(1, 1e-3), (10, 0.01), (10, 0.25), (1000, 0.37)])
def test_every_score_is_counted_in_the_bin_where_the_sweep_counts_it(
    bins: int, upper: float, backend: Backend
) -> None:
    rows = rows_of(9001)
    edges = torch.linspace(0, upper, bins + 1, dtype=torch.float64).float()
    beside = [edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(1.0)), -edges]
    rows[0, : 4 * len(edges)] = torch.cat(beside)
    got = row_statistics(rows, bins, upper, backend=backend)
    expected = sweep(rows.numpy(), bins=bins, upper=upper)
    np.testing.assert_array_equal(got.histogram, expected.histogram)
    np.testing.assert_array_equal(got.above, expected.above)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in Triton's interpreter
@BACKENDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows(bad: float, backend: Backend) -> None:
    rows = rows_of(5000)
    rows[1, 4999] = bad
    found = row_statistics(rows, 10, 1.0, backend=backend)
    assert found.sum_abs.isfinite().tolist() == [True, False, True]


@BACKENDS
def test_a_rows_bits_do_not_depend_on_its_neighbours(backend: Backend) -> None:
    rows = rows_of(5000)
    together, alone = (row_statistics(r, 10, 1.0, backend=backend) for r in (rows, rows[1:2]))
    for name in (*MOMENTS, "histogram", "above"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name)), name


def test_the_kernel_takes_rows_that_are_no_contiguous_matrix() -> None:
    rows = rows_of(600)
    expected = row_statistics(rows.double()[:, ::3], 10, 1.0)
    for given in (rows[:, ::3], rows.T.contiguous().T[:, ::3]):
        assert row_statistics(given, 10, 1.0, backend="triton").m4.tolist() == pytest.approx(
            expected.m4.tolist()
        )


@pytest.mark.parametrize(
    ("bins", "upper"), [(10, None), (None, 1.0), (0, 1.0), (10, 0.0), (10, float("nan"))]
)
def test_half_a_histogram_is_refused(bins: int | None, upper: float | None) -> None:
    with pytest.raises(ValueError, match="a histogram needs at least one bin and a finite range"):
        row_statistics(rows_of(5), bins, upper)


def test_what_is_no_matrix_of_scores_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[n_rows, n_edges\]; got \(5,\)"):
        row_statistics(torch.zeros(5))
