"""The report's numbers against loops and known truths, its pictures by what can be read off them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib.report import contents, figures, numbers
from lib.report.figures import find_photos


def test_distances_pair_each_caption_with_other_images_only() -> None:
    gallery = np.eye(30, dtype=np.float32)
    own, others = numbers.distances(np.stack([gallery] * 2), gallery)["euclidean"]
    assert (own == 0).all()
    assert others.shape == (2, 30, numbers.OTHERS)
    assert others == pytest.approx(2**0.5)
    summary = numbers.summarise_distance(own, others)
    assert (summary["nearer_to_own"], summary["improvement_percent"]) == (1.0, 100.0)


def test_paired_bootstrap_has_the_right_size_on_shuffled_pairs() -> None:
    rng, refused = np.random.default_rng(0), []
    for seed in range(400):
        pair = 1 / rng.integers(1, 30, size=(2, 100))
        pair = np.where(rng.random(100) < 0.5, pair, pair[::-1])  # who is who is chance: there is no difference
        refused.append(numbers.paired_bootstrap(*pair, rounds=400, seed=seed)["p"] < 0.05)
    assert 0.02 < np.mean(refused) < 0.09


def test_paired_bootstrap_finds_a_real_difference() -> None:
    rng = np.random.default_rng(0)
    theirs = 1 / rng.integers(1, 30, size=300)
    result = numbers.paired_bootstrap(theirs + rng.normal(0.05, 0.1, 300), theirs)
    assert result["p"] < 0.001
    assert 0 < result["low"] < result["difference"] < result["high"]
    assert numbers.verdict(result, "B") == "Better than B: sure"
    same = numbers.paired_bootstrap(theirs, theirs)
    assert (same["p"], numbers.verdict(same, "B")) == (1, "As good as B, to the digit")
    swapped = numbers.paired_bootstrap(theirs, theirs + rng.normal(0.001, 0.1, 300))
    assert numbers.verdict(swapped, "B") == "No sure difference from B"
    worse = numbers.paired_bootstrap(theirs, theirs + rng.normal(0.05, 0.1, 300))
    assert numbers.verdict(worse, "B") == "Worse than B: sure"


def test_hubs_against_loops() -> None:
    rng = np.random.default_rng(0)
    predictions, gallery = rng.normal(size=(2, 40, 8)), rng.normal(size=(40, 8)) * rng.uniform(0.5, 2, size=(40, 1))
    hubs = numbers.hubness(predictions, gallery, [f"{i}.jpg" for i in range(40)])
    counts = [0] * 40
    for query in predictions.reshape(-1, 8):
        for image in sorted(range(40), key=lambda j: -(query @ gallery[j]))[:10]:
            counts[image] += 1
    assert hubs["counts"] == counts
    assert hubs["expected"] == 20
    assert hubs["worst"][0]["lists"] == max(counts)
    spread = np.array(counts) - 20
    assert hubs["skew"] == pytest.approx(np.mean(spread**3) / np.mean(spread**2) ** 1.5)
    assert hubs["never"] == counts.count(0) / 40


def test_calibration_of_scores_whose_truth_is_known() -> None:
    rng, temperature = np.random.default_rng(0), 0.1
    logits = rng.normal(size=(4000, 20)) * 2
    own = np.array([rng.choice(20, p=row) for row in numbers.softmax(logits)])
    scores = temperature * np.take_along_axis(logits, (own[:, None] + np.arange(20)) % 20, axis=1)
    right = numbers.calibration(scores, temperature)
    assert right["ece"] < 0.03
    assert numbers.calibration(scores, temperature / 4)["ece"] > 0.2
    assert numbers.best_temperature(scores) == pytest.approx(temperature, rel=0.12)
    assert sum(row["captions"] for row in right["curve"]) == 4000


def test_pool_scores_put_the_own_image_first(kernel) -> None:
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(250, 6))
    scores = numbers.pool_scores(gallery[None], gallery)
    assert scores.shape == (200, 100)
    expected = (kernel.unit(gallery) * gallery).sum(1) / np.linalg.norm(gallery, axis=1).mean()
    assert scores[:, 0] == pytest.approx(expected[:200])


def test_caption_lengths_cover_every_caption_once() -> None:
    captions = [["a dog ."] * 10 + ["a big dog runs , fast"] * 10, ["one two three four five six"] * 20]
    rows = numbers.by_caption_length(captions, np.arange(40).reshape(2, 20) / 40)
    assert sum(row["captions"] for row in rows) == 40
    assert (rows[0]["from"], rows[-1]["to"]) == (2, 6)
    same = numbers.by_caption_length([["a dog"] * 4], np.ones((1, 4)))
    assert [(row["captions"], row["mrr"]) for row in same] == [(4, 1.0)]


def test_the_worst_gap_is_of_a_well_filled_bin() -> None:
    confident, unsure = np.array([[9.0, 0, 0, 0]]), np.array([[0.0, 0.1, 0, 0]])
    scores = np.concatenate([np.repeat(confident, 70, 0), np.repeat(np.roll(confident, 1, 1), 30, 0), unsure])
    worst = numbers.calibration(scores, 1.0)["worst"]
    assert worst["captions"] == 100
    assert worst["confidence"] - worst["right"] == pytest.approx(0.3, abs=0.01)


def test_pools_are_named_by_what_they_are() -> None:
    said = {60: "one pool of 60", 100: "pools of 100", 600: "pools of 100", 250: "pools of 100 (the last of 50)"}
    assert {images: str(numbers.Pools(images)) for images in said} == said


# ----------------------------------------------------------------------------------------------------------- pictures


def results_of(scores: dict[str, float], against: dict[str, float] | None = None) -> dict[str, Any]:
    errors = {"raw_se": 0.01, "cosine_se": 0.01}
    rows = [{"model": name, "raw": score, "cosine": score, **errors} for name, score in scores.items()]
    return {"baselines": rows, "pools": "pools of 100", "against": {"raw": against} if against else None}


def test_the_comparison_is_the_picture_s_title_and_no_name_is_cut() -> None:
    long = "20260101-000000-a-run-of-a-rather-long-name"
    against = {"difference": 0.01, "low": -0.01, "high": 0.03}
    results = results_of({"align": 0.61, long: 0.6, "closed form": 0.3, "random permutation": 0.05}, against)
    figure = figures.baseline_figure(results)
    title = figure.get_suptitle()
    assert title.startswith(f"No sure difference from\n{long}")
    assert title.endswith("+0.0100, 95%\ninterval -0.0100 to +0.0300)")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    names = [text for text in axes.texts if text.get_text() in ("align", long, "closed form")]
    assert len(names) == 3
    assert max(text.get_window_extent().x1 for text in names) <= figure.bbox.x1
    assert "2.00 times that of the closed form" in figures.baseline_title(
        results_of({"align": 0.6, "closed form": 0.3, "random permutation": 0.05})
    )


@pytest.mark.parametrize(("hits", "rank"), [(4, 5), (5, 8), (6, 8), (9, 1)])
def test_the_median_caption_is_one_of_the_misses_where_most_come_first(hits: int, rank: int) -> None:
    """Of nine captions; else its sheet would show what that of the good ones does."""
    ranks = np.array([[1] * hits + list(range(hits + 1, 10))])
    picked = contents.pick_captions(ranks)
    assert [ranks[pair] for pair in picked["good"]] == [1, 1, 1]
    assert ranks[picked["median"][0]] == rank


@pytest.mark.parametrize(
    ("top", "word"), [(0.97, "is well calibrated"), (0.79, "is over-confident: where it says 95%, 79%")]
)
def test_one_wide_gap_is_not_well_calibrated(top: float, word: str) -> None:
    """The mean gap is small in both: most captions lie where probability and truth agree."""
    shown = {"temperature": 0.02, "ece": 0.02, "worst": {"confidence": 0.95, "right": top, "captions": 60}}
    assert word in figures.calibration_title(shown, True)


def test_the_distances_picture_says_what_a_dot_is_and_where_it_is_good() -> None:
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(30, 6))
    measured = numbers.distances(gallery + rng.normal(size=(2, 30, 6)), gallery)
    summary = {metric: numbers.summarise_distance(*each) for metric, each in measured.items()}
    figure = figures.distance_figure(measured, summary, figures.Photos(), ["a dog ."] * 30)
    good, _ = (text.get_text() for text in figure.legends[0].get_texts())
    assert re.search(r"caption below the line.*own photo is nearer \(good\)", good)
    for metric, panel in zip(numbers.METRICS, figure.axes[-4:], strict=False):
        assert panel.get_title() == f"{metric}: {summary[metric]['nearer_to_own']:.0%} below"
        assert (panel.get_xlabel(), panel.get_ylabel()) == ("distance to a random photo", "distance to the own photo")


@pytest.mark.parametrize("worst", [3, 29, 30, 200])
def test_hub_bins_hold_equally_many_whole_numbers(worst: int) -> None:
    counts = np.arange(worst + 1)
    (axes,) = figures.hub_figure(
        {"counts": counts.tolist(), "worst": [{"lists": worst}], "expected": 2.0, "k": 10, "never": 0.0}
    ).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert len(set(heights[:-1])) == 1
    assert sum(heights) == worst + 1


def test_legends_lie_outside_the_panels() -> None:
    figure = figures.calibration_figure(
        None,
        {"temperature": 0.02, "ece": 0.1, "worst": None, "curve": [{"confidence": 0.1, "right": 0.9, "captions": 5}]},
    )
    figure.draw_without_rendering()
    legend, (axes,) = figure.legends[0].get_window_extent(), figure.axes
    assert legend.y1 <= axes.get_window_extent().y0


def test_a_photo_is_found_in_any_folder_called_images(tmp_path: Path) -> None:
    """Also on another disk, behind a link."""
    (tmp_path / "disk/deep/images").mkdir(parents=True)
    Image.new("L", (500, 900), 7).save(tmp_path / "disk/deep/images/1.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "disk")
    photos = find_photos(tmp_path / "data", ["1.jpg", "2.jpg"])
    assert figures.read_tile(photos.paths[0]).shape == (230, 128, 3)
    assert 1 not in photos.paths
    assert photos.missing == ["2.jpg"]
