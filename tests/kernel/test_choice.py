"""Which members predict, with what weight, and whether the figure that is reported owes anything to the choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def draw_members(
    images: int, qualities: list[float], seed: int = 0, dim: int = 12
) -> tuple[list[np.ndarray], np.ndarray]:
    """Predictions (5, images, dim) of members that see the photo through noise of 1/quality; 0: noise alone."""
    draw = np.random.default_rng(seed)
    gallery = draw.normal(size=(images, dim)).astype(np.float32)
    members = []
    for quality in qualities:
        noise = draw.normal(size=(5, images, dim))
        members.append((quality * gallery + noise).astype(np.float32))
    return members, gallery


def score(kernel, predictions: np.ndarray, gallery: np.ndarray) -> float:
    return kernel.evaluate(predictions, gallery)["pool100_raw"]["mrr"]


def choose(
    kernel, members: list[np.ndarray], gallery: np.ndarray, repulsion: float = 0.0, priors: list[float] | None = None
) -> Any:
    return kernel.choose_blend(members, gallery, repulsion, priors or [1.0] * len(members))


# ------------------------------------------------------------------------------------------------ greedy
def greedy_by_hand(kernel, units: list[np.ndarray], gallery: np.ndarray, rounds: int = 10) -> np.ndarray:
    """The same selection, each step a whole evaluation of a whole average."""
    votes, best = np.zeros(len(units)), -1.0
    for _ in range(rounds):
        tried = [
            score(kernel, sum((votes[j] + (j == k)) * one for j, one in enumerate(units)), gallery)
            for k in range(len(units))
        ]
        if max(tried) <= best:
            break
        best = max(tried)
        votes[int(np.argmax(tried))] += 1
    return votes / votes.sum()


@pytest.mark.parametrize("images", [60, 200])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_weights_equal_a_brute_force(kernel, images: int, seed: int):
    members, gallery = draw_members(images, [0.5, 0.4, 0.3], seed)
    units = [kernel.unit(one) for one in members]
    leads = np.stack([kernel.pool_leads(one, gallery) for one in units])
    found, expected = kernel.greedy_weights(leads), greedy_by_hand(kernel, units, gallery)
    assert found == pytest.approx(expected, abs=1e-6)
    assert (found > 0).sum() > 1


def test_leads_rank_as_the_metric_does(kernel):
    (predictions,), gallery = draw_members(300, [0.5])
    ranks = np.stack([kernel.true_ranks(view, gallery) for view in predictions])
    gains = kernel.reciprocal_ranks(ranks, 100).mean(axis=0)
    assert kernel.mean_gains(kernel.pool_leads(predictions, gallery)) == pytest.approx(gains)


# ------------------------------------------------------------------------------------------------ honesty
def test_on_noise_the_reported_figure_is_chance(kernel):
    """Six members that know nothing: what is chosen looks better than chance on what it was chosen on alone."""
    honest, flattered, chosen = [], [], 0
    for seed in range(24):
        members, gallery = draw_members(200, [0.0] * 6, seed)
        blend = choose(kernel, members, gallery, 0.2, [float(seed % 2)] * 6)  # without priors weights are chosen
        chosen += blend.chosen
        honest.append(score(kernel, blend.predictions, gallery))
        leads = np.stack([kernel.pool_leads(kernel.unit(one), gallery) for one in members])
        flattered.append(kernel.mean_gains(np.tensordot(kernel.greedy_weights(leads), leads, 1)).mean())
    chance, error = 0.0518, np.std(honest, ddof=1) / len(honest) ** 0.5
    assert abs(np.mean(honest) - chance) < 4 * error + 0.001
    assert np.mean(flattered) > np.mean(honest) + 0.004
    assert chosen < 12 + 6, "where there are priors, that too is asked of the other half"


def test_each_half_is_predicted_by_what_was_chosen_on_the_other(kernel):
    """A member that is right on one half of the pools alone can't raise the figure of that half."""
    members, gallery = draw_members(200, [0.0, 0.0, 0.5])
    members[0][:, :100] += 50 * gallery[:100]  # perfect on the first pool, noise on the second
    blend = choose(kernel, members, gallery, priors=[0.0] * 3)
    first = kernel.evaluate(blend.predictions[:, :100], gallery[:100])["pool100_raw"]["mrr"]
    alone = kernel.evaluate(members[2][:, :100], gallery[:100])["pool100_raw"]["mrr"]
    assert first == pytest.approx(alone, abs=0.1)
    assert first < 0.9
    assert blend.weights[0] > 0  # what predicts the test is chosen on all


def test_the_priors_stay_where_choosing_gains_nothing(kernel):
    members, gallery = draw_members(200, [0.5, 0.5, 0.5])
    blend = choose(kernel, members, gallery)
    assert not blend.chosen
    assert blend.weights == pytest.approx([1 / 3] * 3)
    assert blend.chosen_mrr == pytest.approx(blend.prior_mrr, abs=0.01)
    mean = sum(kernel.unit(one) for one in members)
    assert score(kernel, blend.predictions, gallery) == pytest.approx(score(kernel, mean, gallery), abs=1e-6)


def test_weights_follow_their_priors(kernel):
    members, gallery = draw_members(200, [0.0, 0.5, 0.3])
    blend = choose(kernel, members, gallery, priors=[0.0, 2.0, 1.0])
    assert not blend.chosen
    assert blend.weights == pytest.approx([0, 2 / 3, 1 / 3])


def test_a_member_without_a_prior_gets_weight_where_that_gains(kernel):
    """So come the closed form and what a search has drawn into a blend."""
    members, gallery = draw_members(200, [0.2, 0.8])
    blend = choose(kernel, members, gallery, priors=[1.0, 0.0])
    assert blend.chosen
    assert blend.weights[1] > 0.5
    alone = choose(kernel, members[:1], gallery, priors=[0.0])
    assert alone.weights.tolist() == [1.0]


def test_weights_are_chosen_where_that_gains(kernel):
    members, gallery = draw_members(200, [0.8, 0.0, 0.0, 0.0])
    blend = choose(kernel, members, gallery)
    assert blend.chosen_mrr > blend.prior_mrr + 0.03
    assert blend.chosen
    assert blend.weights[0] > 0.7
    assert blend.weights.sum() == pytest.approx(1)
    assert score(kernel, blend.predictions, gallery) > score(kernel, sum(map(kernel.unit, members)), gallery) + 0.03


@pytest.mark.parametrize("images", [2, 3, 60])
def test_less_than_a_pool_is_halved_by_its_queries(kernel, images: int):
    members, gallery = draw_members(images, [0.5, 0.5])
    blend = choose(kernel, members, gallery, 0.2)
    assert blend.predictions.shape == (5, images, 12)
    assert np.isfinite(blend.predictions).all()
    assert blend.weights.sum() == pytest.approx(1)


# ---------------------------------------------------------------------------------------------- repulsion
def test_repulsion_stays_within_a_pool_and_moves_no_length(kernel):
    predictions = np.random.default_rng(0).normal(size=(230, 8)).astype(np.float32)
    whole = kernel.repel(predictions, 0.3, 5.0)
    assert whole.shape == predictions.shape
    assert np.allclose(np.linalg.norm(whole, axis=1), 5, rtol=1e-4)
    parts = [kernel.repel(predictions[s : s + 100], 0.3, 5.0) for s in (0, 100, 200)]
    assert np.allclose(whole, np.concatenate(parts), atol=1e-6)
    assert kernel.repel(predictions[:1], 0.3, 5.0).shape == (1, 8)
    assert np.isfinite(kernel.repel(whole[:1], 0.3, 5.0)).all()
    assert kernel.repel(predictions, 0.0, 5.0) is predictions


def test_repulsion_takes_off_what_the_others_of_the_pool_predict(kernel):
    """The more, the more they are like it."""
    predictions = np.random.default_rng(0).normal(size=(20, 8))
    own = predictions / np.linalg.norm(predictions, axis=1, keepdims=True)
    expected = []
    for i, one in enumerate(own):
        others = np.delete(own, i, axis=0)
        share = np.exp(others @ one / 0.1)
        pushed = one - 0.3 * share / share.sum() @ others
        expected.append(5 * pushed / np.linalg.norm(pushed))
    assert np.allclose(kernel.repel(predictions.astype(np.float32), 0.3, 5.0), expected, atol=1e-4)


def test_repulsion_is_taken_where_validation_gains_and_left_where_it_loses(kernel):
    """Twins in a pool, told apart by little."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(100, 12))
    gallery = np.repeat(centres, 2, axis=0) + 0.3 * draw.normal(size=(200, 12))
    members = [(gallery + 0.35 * draw.normal(size=(5, 200, 12))).astype(np.float32)]
    options = {
        strength: score(kernel, np.stack([kernel.repel(view, strength, 1.0) for view in members[0]]), gallery)
        for strength in (0.0, 0.1, 0.2, -0.2, -0.4)
    }
    blend = choose(kernel, members, gallery.astype(np.float32), 0.2)
    assert blend.repulsion == max((0.0, 0.1, 0.2), key=options.get)
    assert options[0.0] != options[0.2]
    spoilt = choose(kernel, members, gallery.astype(np.float32), -0.4)  # a pull: it loses
    assert max(options[-0.4], options[-0.2]) < options[0.0]
    assert spoilt.repulsion == 0


def test_each_half_has_the_repulsion_that_was_chosen_on_the_other(kernel):
    """The first pool holds twins, where it gains; in the second one, which is mostly noise, it loses."""
    draw = np.random.default_rng(3)
    twins = np.repeat(draw.normal(size=(50, 12)), 2, axis=0) + 0.3 * draw.normal(size=(100, 12))
    gallery = np.concatenate([twins, draw.normal(size=(100, 12))]).astype(np.float32)
    noise = np.repeat([0.35, 3.0], 100)[:, None] * draw.normal(size=(5, 200, 12))
    member, strengths = (gallery + noise).astype(np.float32), (0.0, 0.15, 0.3)
    options = {strength: np.stack([kernel.repel(view, strength, 1.0) for view in member]) for strength in strengths}
    halves, best = (slice(0, 100), slice(100, 200)), []
    for rows in halves:
        best.append(max(strengths, key=lambda s, rows=rows: score(kernel, options[s][:, rows], gallery[rows])))
    assert best == [0.3, 0.0]
    blend = choose(kernel, [member], gallery, 0.3)
    for rows, strength in zip(halves, reversed(best), strict=True):
        assert np.allclose(kernel.unit(blend.predictions[:, rows]), kernel.unit(options[strength][:, rows]), atol=1e-5)
