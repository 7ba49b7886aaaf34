"""The sweep over score rows: C++ (both kernels) against numpy, and what holds for any rows."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eaptk import _native
from eaptk.errors import EaptkError
from eaptk.sweep import Sweep, row_dots, sweep, weighted_column_sums

BACKENDS = ["native", "portable", "numpy"]
FIELDS = ["sum_abs", "sum", "m2", "m3", "m4", "min", "max"]
#: Shorter than a vector, not a multiple of one, of one L1 block and longer, and long enough for paired counters.
WIDTHS = [1, 31, 32, 1055, 3221, 100_003]


def make_rows(kind: str, shape: tuple[int, int], dtype: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng(7)
    rows = {
        "gaussian": lambda: rng.normal(size=shape),
        "heavy": lambda: rng.standard_t(2, size=shape).clip(-6e4, 6e4),
        "offset": lambda: 1000 + rng.normal(size=shape),
        "drifting": lambda: np.linspace(-30_000, 30_000, shape[1]) + rng.normal(size=shape),
        "sparse": lambda: rng.normal(size=shape) * (rng.random(shape) < 0.05),
        "on edges": lambda: rng.integers(-64, 65, size=shape) / 64,
    }[kind]()
    return rows.astype(dtype)


def assert_agree(result: Sweep, oracle: Sweep) -> None:
    spread = np.sqrt(oracle.m2)
    scales = {"sum": oracle.sum_abs, "m3": spread**3}
    for field in FIELDS:
        expected = getattr(oracle, field)
        error = np.abs(getattr(result, field) - expected)
        assert np.all(error <= 1e-11 * scales.get(field, np.abs(expected))), field
    np.testing.assert_array_equal(result.count, oracle.count)
    np.testing.assert_array_equal(result.histogram, oracle.histogram)
    np.testing.assert_array_equal(result.above, oracle.above)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "offset", "drifting", "sparse", "on edges"])
@pytest.mark.parametrize("backend", ["native", "portable"])
def test_compiled_kernels_agree_with_numpy(backend, kind, width, dtype):
    rows = make_rows(kind, (3, width), dtype)
    upper = float(np.abs(rows.astype(np.float64)).max()) or 1.0
    for bins, range_end in [(100, upper), (64, upper), (1, upper), (1000, 0.3 * upper)]:
        expected = sweep(rows, bins=bins, upper=range_end, backend="numpy")
        assert_agree(sweep(rows, bins=bins, upper=range_end, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_are_scipys(backend):
    rows = make_rows("heavy", (4, 3221))
    result = sweep(rows, backend=backend)
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(result.mean, exact.mean(1), rtol=1e-12)
    np.testing.assert_allclose(result.m2, exact.var(1), rtol=1e-12)
    np.testing.assert_allclose(result.m3, scipy.stats.moment(exact, 3, axis=1), rtol=1e-9)
    np.testing.assert_allclose(result.m4 / result.m2**2 - 3, scipy.stats.kurtosis(exact, axis=1), rtol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bins", [1, 7, 100, 4096])
def test_bins_are_numpys_right_edge_included(backend, bins):
    edges = np.linspace(0, 1.7, bins + 1)
    below, above = np.nextafter(edges, -1, dtype=np.float32), np.nextafter(edges, 9, dtype=np.float32)
    values = np.concatenate([edges, below, above, -edges]).astype(np.float32)[None]
    result = sweep(values, bins=bins, upper=1.7, backend=backend)
    exact = np.abs(values.astype(np.float64))
    np.testing.assert_array_equal(result.histogram[0], np.histogram(exact, bins, (0, 1.7))[0])
    np.testing.assert_array_equal(result.above, (exact > 1.7).sum(1))


@pytest.mark.parametrize("backend", ["native", "portable"])
@pytest.mark.parametrize("width", [3221, 100_003])
def test_results_are_bit_identical_for_any_number_of_threads(backend, width):
    rows = make_rows("heavy", (7, width))
    weights = np.random.default_rng(0).normal(size=(2, 7))
    one = sweep(rows, bins=100, upper=9.0, threads=1, backend=backend)
    for threads in (2, 3, 8):
        other = sweep(rows, bins=100, upper=9.0, threads=threads, backend=backend)
        for field in [*FIELDS, "histogram", "above"]:
            assert getattr(other, field).tobytes() == getattr(one, field).tobytes()
        assert (
            weighted_column_sums(rows, weights, threads=threads).tobytes()
            == weighted_column_sums(rows, weights, threads=1).tobytes()
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_row_overflows_no_counter(backend):
    rows = np.zeros((1, 1_500_000), dtype=np.float32)
    rows[0, ::3] = 0.5
    result = sweep(rows, bins=4, upper=1.0, backend=backend)
    np.testing.assert_array_equal(result.histogram, [[1_000_000, 0, 500_000, 0]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_and_columns_select_like_numpy_indexing(backend, dtype):
    rows = make_rows("gaussian", (9, 2500), dtype)
    chosen, columns = np.array([8, 0, 3]), np.arange(2499, 0, -2)
    selected = sweep(rows, chosen, columns, bins=50, upper=2.0, backend=backend)
    copied = sweep(np.ascontiguousarray(rows[chosen][:, columns]), bins=50, upper=2.0, backend=backend)
    for field in [*FIELDS, "histogram", "above"]:
        assert getattr(selected, field).tobytes() == getattr(copied, field).tobytes()
    mask_rows, mask_columns = np.isin(np.arange(9), chosen), np.isin(np.arange(2500), columns)
    masked = sweep(rows, mask_rows, mask_columns, bins=50, upper=2.0, backend=backend)
    np.testing.assert_array_equal(masked.histogram, selected.histogram[[1, 2, 0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_memory_map_is_read_in_place(backend, tmp_path):
    rows = make_rows("gaussian", (4, 3221))
    np.save(tmp_path / "scores.npy", rows)
    mapped = np.load(tmp_path / "scores.npy", mmap_mode="r")
    assert_agree(
        sweep(mapped, bins=100, upper=5.0, backend=backend), sweep(rows, bins=100, upper=5.0, backend="numpy")
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weighted_column_sums_and_dots_are_matrix_products(backend, absolute, dtype):
    rng = np.random.default_rng(3)
    rows = make_rows("gaussian", (6, 2100), dtype)
    columns, chosen = rng.permutation(2100)[:1500], [5, 1, 2]
    weights, vector = rng.normal(size=(4, 3)), rng.normal(size=1500)
    exact = rows.astype(np.float64)[chosen][:, columns]
    sums = weighted_column_sums(rows, weights, chosen, columns, absolute=absolute, backend=backend)
    np.testing.assert_allclose(sums, weights @ (np.abs(exact) if absolute else exact), atol=1e-13)
    np.testing.assert_allclose(
        row_dots(rows, vector, chosen, columns, backend=backend), exact @ vector, atol=1e-11
    )


def test_sums_over_more_rows_than_are_read_at_a_time_have_all_of_them():
    """A run may be larger than memory: rows are read some 256 MB at a time. Here most are zeros that take none."""
    n_columns, n = 2**24, 17
    rows = np.zeros((n, n_columns), np.float16)
    rows[:, [0, 4095, 4096, n_columns - 1]] = np.arange(1, n + 1)[:, None]
    sums = weighted_column_sums(rows, np.stack([np.ones(n), np.arange(n)]))
    assert np.flatnonzero(sums[0]).tolist() == [0, 4095, 4096, n_columns - 1]
    assert (sums[0, 0], sums[1, -1]) == (n * (n + 1) / 2, sum(i * (i + 1) for i in range(n)))


float32s = st.floats(-1e6, 1e6, width=32)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=70), elements=float32s)


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(1, 300), st.floats(1e-3, 2e6))
def test_any_rows_any_bins(rows, bins, upper):
    expected = sweep(rows, bins=bins, upper=upper, backend="numpy")
    spread = 1e-10 * np.maximum(np.abs(rows).max(1).astype(np.float64), 1e-300)
    for backend in ("native", "portable"):
        result = sweep(rows, bins=bins, upper=upper, backend=backend)
        np.testing.assert_array_equal(result.histogram, expected.histogram)
        np.testing.assert_array_equal(result.above, expected.above)
        np.testing.assert_array_equal(result.min, expected.min)
        np.testing.assert_array_equal(result.max, expected.max)
        np.testing.assert_allclose(result.sum_abs, expected.sum_abs, rtol=1e-12)
        assert np.all(np.abs(result.m2**0.5 - expected.m2**0.5) <= spread)
        assert np.all(np.abs(result.m4**0.25 - expected.m4**0.25) <= spread)


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(0, 200))
def test_zeros_merged_are_zeros_counted(rows, n_zeros):
    padded = np.concatenate([rows, np.zeros((len(rows), n_zeros), np.float32)], axis=1)
    expected = sweep(padded, bins=20, upper=1e6, backend="numpy")
    merged = sweep(rows, bins=20, upper=1e6).with_zeros(n_zeros)
    scale = np.maximum(np.abs(rows).max(1).astype(np.float64), 1e-60)
    np.testing.assert_array_equal(merged.count, expected.count)
    np.testing.assert_array_equal(merged.histogram, expected.histogram)
    np.testing.assert_allclose(merged.mean / scale, expected.mean / scale, atol=1e-12)
    for power, field in [(2, "m2"), (3, "m3"), (4, "m4")]:
        np.testing.assert_allclose(
            getattr(merged, field) / scale**power, getattr(expected, field) / scale**power, atol=1e-11
        )
    if n_zeros:
        np.testing.assert_array_equal(merged.min, expected.min)
        np.testing.assert_array_equal(merged.max, expected.max)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 1500, 3220])
def test_a_score_that_is_no_number_is_named(backend, value, column):
    rows = make_rows("gaussian", (5, 3221))
    rows[3, column] = value
    with pytest.raises(EaptkError, match=f"sample 3, edge column {column} is {value}"):
        sweep(rows, [1, 3], bins=100, upper=5.0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_scores_do_not_overflow(backend):
    rows = np.full((1, 4096), 3e38, dtype=np.float32)
    rows[0, ::2] = 1e38
    result = sweep(rows, backend=backend)
    np.testing.assert_allclose(result.m2, rows.astype(np.float64).var(1), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": []}, "no sample is selected"),
        ({"rows": [4]}, "there is no sample 4; they are numbered 0 to 3"),
        ({"columns": [-1]}, "there is no edge -1"),
        ({"columns": [0.5]}, "edge indices must be a list of integers"),
        ({"rows": [True, False]}, r"sample mask has shape \(2,\); expected \(4,\)"),
        ({"bins": 10}, "needs both bins and upper"),
        ({"bins": 0, "upper": 1.0}, "bins is 0"),
        ({"bins": 10, "upper": 0.0}, "range ends at 0.0"),
        ({"bins": 10, "upper": float("nan")}, "range ends at nan"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(EaptkError, match=message):
        sweep(make_rows("gaussian", (4, 8)), **arguments)


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros((2, 3)),
        np.zeros(3, np.float32),
        np.zeros((4, 6), np.float32)[:, ::2],
        np.zeros((2, 3), ">f4"),
    ],
)
def test_arrays_that_are_no_score_rows_are_refused(scores):
    with pytest.raises(EaptkError, match=r"scores must be|C-contiguous"):
        sweep(scores)


def test_the_benchmarks_yardstick_sums():
    data = np.arange(1_000_003, dtype=np.float32) % 8
    assert _native.read_sum(data, 2) == data.sum(dtype=np.float64)
