"""Metrics of a run against the formulas written out with numpy and scipy on dense matrices."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from runs import BLOCK, FakeRun, make_run

from eaptk.errors import EaptkError
from eaptk.graph import Graph
from eaptk.metrics import entropy, measure

GRAPHS = {
    "block": BLOCK,
    "merged": Graph(2, 4, 2, qkv="merged"),
    "head": Graph(2, 4, 2, granularity="head"),
    "parallel": Graph(3, 2, 2, parallel=True),
}


def flat_samples(run, dense):
    """[n, entries] float64: the rows, or the whole matrices, structural zeros and all."""
    rows = run.scores.astype(np.float64)
    return run.graph.matrix(rows).reshape(len(rows), -1) if dense else rows


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_metrics_are_their_formulas(backend, graph, dense):
    run = make_run(9, graph=GRAPHS[graph])
    found = measure(run, dense=dense, backend=backend)
    w = flat_samples(run, dense)

    pooled = np.histogram(np.abs(w), 100, (0, np.abs(w).max()))[0]
    pairs = np.corrcoef(w)[np.triu_indices(len(w), 1)]
    strength = run.graph.matrix(np.abs(run.scores.astype(np.float64)).mean(0))
    assert found.n_entries == w.shape[1]
    assert found.intensity == pytest.approx(np.abs(w).mean(), rel=1e-9)
    assert found.complexity == pytest.approx(scipy.stats.entropy(pooled), rel=1e-9)
    assert found.kurtosis == pytest.approx(scipy.stats.kurtosis(w, axis=1).mean(), rel=1e-9)
    assert found.diversity == pytest.approx(1 - pairs.mean(), rel=1e-9)
    np.testing.assert_allclose(found.source_entropy, scipy.stats.entropy(strength, axis=1), rtol=1e-9)
    assert found.output_entropy == pytest.approx(scipy.stats.entropy(strength, axis=1).mean(), rel=1e-9)


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_conventions_convert_into_each_other(graph):
    """With f the share of pairs that are edges: real entries are a share f of the dense, all others 0."""
    run = make_run(9, graph=GRAPHS[graph])
    real, dense = measure(run), measure(run, dense=True)
    f = run.graph.n_edges / (run.graph.n_sources * run.graph.n_destinations)
    assert real.n_entries == pytest.approx(f * dense.n_entries)
    assert dense.intensity == pytest.approx(f * real.intensity, rel=1e-9)

    w = run.scores.astype(np.float64)
    m, m2, m3, m4 = (f * np.mean(w**p, axis=1) for p in (1, 2, 3, 4))
    fourth = m4 - 4 * m * m3 + 6 * m**2 * m2 - 3 * m**4
    np.testing.assert_allclose(dense.sample_kurtosis, fourth / (m2 - m**2) ** 2 - 3, rtol=1e-9)
    # Where a row's mean is 0 this is all: kurtosis + 3 grows by 1/f.
    centred = FakeRun((w - w.mean(1, keepdims=True)).astype(np.float32), graph=run.graph)
    both = measure(centred), measure(centred, dense=True)
    assert both[1].kurtosis + 3 == pytest.approx((both[0].kurtosis + 3) / f, rel=1e-6)

    n_zeros = dense.n_samples * (dense.n_entries - real.n_entries)
    counts = real.sample_histogram.sum(0)
    counts[0] += n_zeros
    assert dense.complexity == pytest.approx(scipy.stats.entropy(counts), rel=1e-9)
    np.testing.assert_array_equal(dense.source_entropy, real.source_entropy)


@pytest.mark.parametrize("dense", [False, True])
def test_arrays_a_sample_average_to_the_metrics(dense):
    found = measure(make_run(), dense=dense)
    correlations = np.corrcoef(flat_samples(make_run(), dense))
    np.testing.assert_allclose(found.sample_correlation, (correlations.sum(0) - 1) / 11, rtol=1e-9)
    assert found.sample_intensity.mean() == pytest.approx(found.intensity)
    assert found.sample_kurtosis.mean() == pytest.approx(found.kurtosis)
    assert entropy(found.sample_histogram.sum(0)) == pytest.approx(found.complexity)
    assert (found.sample_histogram.sum(1) == found.n_entries).all()


@pytest.mark.parametrize("dense", [False, True])
def test_a_mask_measures_the_graph_without_the_other_edges(dense):
    run = make_run()
    small = Graph(n_layers=2, n_heads=4, n_kv_heads=2)
    # Everything up to layer 1 and nothing into the logits is a smaller model's graph without its logits.
    first_layers = [
        c for c in range(BLOCK.n_edges) if BLOCK.destinations[BLOCK.edge_destination[c]].layer < 2
    ]
    columns = np.arange(small.n_edges - small.reach[-1])
    found = measure(run, columns=first_layers, dense=dense)
    expected = measure(
        FakeRun(run.scores[:, : small.n_edges].copy(), graph=small), columns=columns, dense=dense
    )
    for name in ("n_entries", "intensity", "complexity", "kurtosis", "diversity", "output_entropy"):
        assert getattr(found, name) == getattr(expected, name), name


def test_dense_counts_every_pair_without_an_edge():
    assert measure(make_run(), dense=True).n_entries == BLOCK.n_sources * BLOCK.n_destinations
    assert measure(make_run()).n_entries == BLOCK.n_edges


@given(st.permutations(range(12)), st.integers(-8, 8))
def test_order_and_scale(order, power):
    run = make_run()
    scale = np.float32(2.0**power)
    found, moved = measure(run), measure(FakeRun(run.scores[list(order)] * scale))
    assert moved.intensity == pytest.approx(float(scale) * found.intensity, rel=1e-12)
    for name in ("complexity", "kurtosis", "diversity", "output_entropy"):
        assert getattr(moved, name) == pytest.approx(getattr(found, name), rel=1e-9), name
    np.testing.assert_allclose(moved.sample_kurtosis, found.sample_kurtosis[list(order)], rtol=1e-12)


@pytest.mark.parametrize("selection", [[4, 1, 7], np.isin(np.arange(12), [1, 4, 7])])
def test_a_subset_is_measured_like_a_run_of_its_own(selection):
    run = make_run()
    found, alone = measure(run, rows=selection), measure(FakeRun(run.scores[[1, 4, 7]]))
    assert found.n_samples == 3
    assert found.kurtosis == pytest.approx(alone.kurtosis, rel=1e-12)
    assert found.diversity == pytest.approx(alone.diversity, rel=1e-12)
    assert found.complexity == alone.complexity


def test_only_finished_rows_count_and_the_others_are_reported():
    run = make_run()
    run.done[[0, 5]] = 0
    run.scores[[0, 5]] = np.nan
    found = measure(run)
    assert (found.n_samples, found.n_unfinished) == (10, 2)
    assert found.intensity == measure(FakeRun(np.delete(run.scores, [0, 5], axis=0))).intensity


@pytest.mark.parametrize("dense", [False, True])
def test_samples_whose_scores_are_all_equal_leave_kurtosis_and_diversity_to_the_others(dense):
    run = make_run()
    run.scores[3] = 0
    found, others = measure(run, dense=dense), measure(run, rows=np.arange(12) != 3, dense=dense)
    assert found.n_constant == 1
    assert found.kurtosis == pytest.approx(others.kurtosis, rel=1e-12)
    assert found.diversity == pytest.approx(others.diversity, rel=1e-12)
    assert found.intensity == pytest.approx(others.intensity * 11 / 12)
    assert np.isnan(found.sample_kurtosis).nonzero()[0].tolist() == [3]


def test_what_is_undefined_is_none():
    alone = measure(make_run(1))
    assert alone.diversity is None
    one_edge = measure(make_run(), columns=[5])
    assert (one_edge.kurtosis, one_edge.diversity, one_edge.n_constant) == (None, None, 12)
    assert measure(make_run(), columns=[5], dense=True).n_entries == 1
    nothing = measure(FakeRun(np.zeros((2, BLOCK.n_edges), np.float32)), upper=1.0)
    assert (nothing.complexity, nothing.output_entropy) == (0.0, None)


def test_the_result_keeps_its_parameters_and_becomes_json():
    found = measure(make_run(), bins=20, upper=0.004, log_base=2)
    kept = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (kept["bins"], kept["upper"], kept["log_base"]) == (20, 0.004, 2)
    counts = np.histogram(np.abs(make_run().scores.astype(np.float64)), 20, (0, 0.004))[0]
    assert kept["complexity"] == pytest.approx(scipy.stats.entropy(counts, base=2), rel=1e-9)
    assert kept["n_above"] == found.n_samples * found.n_entries - counts.sum() > 0


def test_float16_rows_are_measured_like_their_float32_values():
    half = make_run().scores.astype(np.float16)
    found, expected = measure(FakeRun(half)), measure(FakeRun(half.astype(np.float32)))
    assert found.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [12]}, "there is no sample 12"),
        ({"rows": [1, 1]}, "selected twice"),
        ({"rows": [True]}, "sample mask has shape"),
        ({"rows": [0.9, 1.9]}, "sample indices must be a list of integers; got float64"),
        ({"rows": [[0, 1], [2, 3]]}, "must be a list of integers; got int64 of shape (2, 2)"),
        ({"rows": []}, "no sample is selected"),
        ({"rows": np.zeros(12, bool)}, "no sample is selected"),
        ({"columns": [0.9, 1.9]}, "edge indices must be a list of integers; got float64"),
        ({"columns": [[0, 1], [2, 3]]}, "must be a list of integers; got int64 of shape (2, 2)"),
        ({"columns": [BLOCK.n_edges]}, "there is no edge"),
        ({"columns": [False]}, "edge mask has shape"),
        ({"columns": []}, "no edge is selected"),
        ({"log_base": 1}, "log_base is 1"),
        ({"upper": 1e-20}, "no |W| is as small as 1e-20"),
    ],
)
def test_selections_that_do_not_fit_are_refused(arguments, message):
    run = make_run()
    run.scores[run.scores == 0] = 1
    with pytest.raises(EaptkError, match=re.escape(message)):
        measure(run, **arguments)


def test_scores_that_are_all_zero_have_no_range():
    with pytest.raises(EaptkError, match="every score of runs/made-up that was selected is 0"):
        measure(FakeRun(np.zeros((2, BLOCK.n_edges), np.float32)))


def test_a_run_without_a_finished_row_is_refused():
    with pytest.raises(EaptkError, match="no row of runs/made-up"):
        measure(make_run(done=np.zeros(12, np.uint8)))


def test_entropy_of_nothing_is_not_a_number_and_of_one_bin_zero():
    assert np.isnan(entropy([0, 0]))
    assert str(entropy([0, 7])) == "0.0"
    assert entropy([1, 1, 1, 1], 2) == pytest.approx(2)
    assert entropy([1, 1], math.e) == pytest.approx(math.log(2))
