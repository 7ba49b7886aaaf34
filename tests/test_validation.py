"""`validate`: which edges are drawn, and what is said of scores and exact effects."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from tiny import tiny_model, tiny_samples

from eaptk import EaptkError, Graph, attribute, collate, exact_effects
from eaptk.validation import spread_edges, validate

SAMPLES = tiny_samples(3)


def test_pairs_are_scores_and_exact_effects_and_statistics_are_the_textbooks() -> None:
    model = tiny_model("qwen2")
    graph = Graph.from_model(model)
    found = validate(model, SAMPLES, graph, n_edges=12, seed=3, name="sft")
    assert (found.model, found.n_edges, found.n_samples) == ("sft", 12, 3)
    scores = attribute(model, collate(SAMPLES), graph).rows
    columns = spread_edges(scores.abs().mean(0).numpy(), 12, 3)
    exact = exact_effects(model, collate(SAMPLES), graph, columns)
    x, y = (np.asarray(pairs) for pairs in (found.predicted, found.exact))
    np.testing.assert_allclose(x, scores[:, columns].flatten(), rtol=1e-12)
    np.testing.assert_allclose(y, exact.flatten(), rtol=1e-12)
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert found.slope == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    assert found.sign_agreement == np.mean(x * y > 0)


def test_where_edges_do_little_first_order_is_all_there_is() -> None:
    model = tiny_model("qwen2")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 1e-3
        layer.mlp.down_proj.weight.data *= 1e-3
    graph = Graph.from_model(model)
    found = validate(model, SAMPLES, graph, n_edges=graph.n_edges)
    # The embedding alone is large; what leaves it is no small change.
    small = np.tile(graph.edge_source > 0, 3)
    x, y = (np.asarray(pairs)[small] for pairs in (found.predicted, found.exact))
    np.testing.assert_allclose(x, y, rtol=0.02, atol=1e-3 * np.abs(y).max())


def test_batches_and_calls_do_not_change_the_numbers() -> None:
    model = tiny_model("llama")
    graph = Graph.from_model(model)
    together = validate(model, SAMPLES, graph, n_edges=6)
    assert validate(model, SAMPLES, graph, n_edges=6) == together
    apart = validate(model, SAMPLES, graph, n_edges=6, batch_size=1)
    np.testing.assert_allclose(apart.exact, together.exact, rtol=1e-9)
    np.testing.assert_allclose(apart.predicted, together.predicted, rtol=1e-9)


def test_edges_are_spread_over_the_ranking_and_each_is_as_likely_as_another() -> None:
    strength = np.random.default_rng(0).standard_t(2, 100) ** 2
    drawn = np.array([spread_edges(strength, 10, seed) for seed in range(400)])
    rank = scipy.stats.rankdata(strength)
    for columns in drawn:
        assert sorted((rank[columns] - 1) // 10) == list(range(10))
    times = np.bincount(drawn.ravel(), minlength=100)
    # Binomial, 40 each with a standard deviation of 6.
    assert times.min() > 15
    assert times.max() < 70
    assert spread_edges(strength, 500, 0) == list(range(100))


def test_ranks_of_equal_values_are_shared() -> None:
    """An edge without any effect is one of many: m0 writes nothing."""
    model = tiny_model("qwen2")
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    graph = Graph.from_model(model)
    found = validate(model, SAMPLES, graph, n_edges=graph.n_edges)
    assert found.exact.count(0.0) > 10
    expected = scipy.stats.spearmanr(found.predicted, found.exact).statistic
    assert found.spearman == pytest.approx(expected)


def test_what_gives_no_correlation_is_refused() -> None:
    model = tiny_model("llama")
    graph = Graph.from_model(model)
    with pytest.raises(EaptkError, match="there are no samples"):
        validate(model, [], graph)
    with pytest.raises(EaptkError, match="n_edges is 1"):
        validate(model, SAMPLES, graph, n_edges=1)
    model.lm_head.weight.data.zero_()
    with pytest.raises(EaptkError, match=r"all scores are -?0\.0; there is nothing to correlate"):
        validate(model, SAMPLES, graph)
    with pytest.raises(EaptkError, match="float16"):
        validate(tiny_model("llama", torch.float16), SAMPLES, graph)
