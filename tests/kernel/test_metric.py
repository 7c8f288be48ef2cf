"""The official metric against a brute force in plain Python, and what it does at its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest


def brute_force_ranks(predictions: np.ndarray, gallery: np.ndarray, pool: int | None, cosine: bool) -> list[int]:
    """1-based ranks by sorting every pool, one query at a time; of equal scores the query's own image comes last."""
    ranks, size = [], pool or len(gallery)
    for i, query in enumerate(predictions.tolist()):
        start = i // size * size
        scores = []
        for j in range(start, min(start + size, len(gallery))):
            image = gallery[j].tolist()
            length = math.sqrt(sum(value * value for value in image)) if cosine else 1.0
            scores.append((sum(a * b for a, b in zip(query, image, strict=True)) / length, j != i))
        scores.sort(reverse=True)
        ranks.append(next(place for place, (_, other) in enumerate(scores, 1) if not other))
    return ranks


def random_pair(rows: int, dim: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    gallery = draw.normal(size=(rows, dim)) * draw.uniform(0.5, 2, size=(rows, 1))
    return gallery + draw.normal(size=(rows, dim)), gallery


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("pool", [100, 7, None])
@pytest.mark.parametrize("rows", [100, 230])
def test_ranks_and_all_numbers_equal_a_brute_force(kernel, rows: int, pool: int | None, cosine: bool):
    predictions, gallery = random_pair(rows, seed=rows)
    expected = brute_force_ranks(predictions, gallery, pool, cosine)
    assert kernel.true_ranks(predictions, gallery, pool, cosine).tolist() == expected
    gains = [1 / rank if pool is None or rank <= 99 else 0.0 for rank in expected]
    mean = sum(gains) / rows
    found = kernel.retrieval_metrics(predictions, gallery, pool, cosine)
    assert found["mrr"] == pytest.approx(mean)
    variance = sum((gain - mean) ** 2 for gain in gains) / (rows - 1)
    assert found["mrr_se"] == pytest.approx(math.sqrt(variance / rows))
    for k in (1, 3, 5, 10, 50):
        assert found[f"recall@{k}"] == pytest.approx(sum(rank <= k for rank in expected) / rows)
    ndcg = [1 / math.log2(rank + 1) if gain else 0.0 for rank, gain in zip(expected, gains, strict=True)]
    assert found["ndcg"] == pytest.approx(sum(ndcg) / rows)
    assert found["l2"] == pytest.approx(np.mean([math.dist(a, b) for a, b in zip(predictions, gallery, strict=True)]))


def test_perfect_predictions_score_one(kernel):
    gallery = np.eye(150)
    found = kernel.retrieval_metrics(gallery, gallery)
    assert (found["mrr"], found["recall@1"], found["ndcg"], found["l2"]) == (1, 1, 1, 0)


def test_raw_and_cosine_differ_only_by_the_length_of_the_images(kernel):
    predictions, gallery = random_pair(100)
    gallery[0] *= 1000  # one long photo wins every raw query that points its way
    raw, cosine = (kernel.true_ranks(predictions, gallery, 100, how) for how in (False, True))
    assert raw.mean() > cosine.mean()
    longer = predictions * np.linspace(0.1, 10, 100)[:, None]  # the length of a prediction moves nothing
    assert (kernel.true_ranks(longer, gallery, 100, False) == raw).all()
    assert (kernel.true_ranks(longer, gallery, 100, True) == cosine).all()


def test_a_tie_counts_against_the_query(kernel):
    gallery = np.random.default_rng(1).integers(-2, 3, size=(200, 2)).astype(np.float32)  # exact scores, many equal
    predictions = np.random.default_rng(2).integers(-2, 3, size=(200, 2)).astype(np.float32)
    expected = brute_force_ranks(predictions, gallery, 100, cosine=False)
    assert kernel.true_ranks(predictions, gallery).tolist() == expected
    assert kernel.retrieval_metrics(np.ones((100, 2)), np.ones((100, 2)))["mrr"] == 0  # constant predictions: last


def test_the_last_of_a_pool_of_100_scores_nothing(kernel):
    gallery = np.arange(100, 0, -1, dtype=float)[:, None]  # one dimension: query i has rank i + 1
    ranks = kernel.true_ranks(np.ones((100, 1)), gallery)
    assert ranks.tolist() == list(range(1, 101))
    found = kernel.retrieval_metrics(np.ones((100, 1)), gallery)
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in range(1, 100)) / 100)  # .0518: without 1/100
    full = kernel.retrieval_metrics(np.ones((100, 1)), gallery, pool=None)
    assert full["mrr"] == pytest.approx(found["mrr"] + 1 / 100 / 100)


def test_random_predictions_score_as_chance_says(kernel):
    draw = np.random.default_rng(0)
    found = kernel.retrieval_metrics(draw.normal(size=(20_000, 8)), draw.normal(size=(20_000, 8)))
    assert found["mrr"] == pytest.approx(0.0518, abs=4 * found["mrr_se"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predictions_that_are_no_numbers_are_no_score(kernel, bad: float):
    predictions, gallery = random_pair(100)
    predictions[3, 1] = bad
    with pytest.raises(ValueError, match="NaN"):
        kernel.true_ranks(predictions, gallery)


def test_an_image_of_length_zero_is_never_found_but_breaks_nothing(kernel):
    predictions, gallery = random_pair(100)
    gallery[5] = 0
    ranks = kernel.true_ranks(predictions, gallery, 100, cosine=True)
    assert ranks.min() >= 1
    assert np.isfinite(kernel.retrieval_metrics(predictions, gallery, 100, True)["mrr"])


def test_views_are_averaged_and_the_error_is_over_images(kernel):
    gallery = random_pair(200)[1]
    views = np.stack([random_pair(200, seed=seed)[0] for seed in range(5)])
    table = kernel.evaluate(views, gallery)
    each = [kernel.retrieval_metrics(view, gallery) for view in views]
    for key in ("mrr", "recall@5", "ndcg", "l2"):
        assert table["pool100_raw"][key] == pytest.approx(np.mean([one[key] for one in each]))
    cosine = [kernel.retrieval_metrics(view, gallery, cosine=True)["mrr"] for view in views]
    assert table["pool100_cosine"]["mrr"] == pytest.approx(np.mean(cosine))
    gains = np.mean([1 / kernel.true_ranks(view, gallery, None, True) for view in views], axis=0)
    assert table["full_cosine"]["mrr_se"] == pytest.approx(gains.std(ddof=1) / math.sqrt(200))
    same = kernel.evaluate(np.stack([views[0]] * 5), gallery)  # five times one view is no more evidence
    assert same["pool100_raw"]["mrr_se"] == pytest.approx(each[0]["mrr_se"])
