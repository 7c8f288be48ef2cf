"""What verify measures, against loops that compute it anew."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lib.report import contents, numbers
from lib.report.measure import measure, model_of
from lib.weights import held_out, load_run, predict, repelled


@pytest.fixture(scope="module")
def pairs(run: Path, data: Path, kernel) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and gallery, computed without verify."""
    bundle = kernel.load_weights(run / kernel.FINAL_MODEL)
    train = kernel.read_train(data / "train/train/train.npz")
    chosen = [train.image_names.index(name) for name in bundle["val_images"]]
    predictions = []
    for view in range(5):
        rows = [5 * i + view for i in chosen]
        plain = kernel.predict(bundle, train.text[rows], [train.captions[i] for i in rows])
        predictions.append(kernel.repel(plain, bundle["repulsion"], bundle["length"]))
    return np.stack(predictions), train.images[chosen]


def test_the_run_s_own_record_says_the_same(run: Path, verified: tuple[Path, dict], kernel) -> None:
    recorded = json.loads((run / kernel.METRICS).read_text())["validation"]
    for name, table in verified[1]["retrieval"]["pooled"].items():  # the blend is chosen here, half by half there
        assert table["mrr"] == pytest.approx(recorded[name]["mrr"], abs=recorded[name]["mrr_se"])
        assert table["recall@10"] == pytest.approx(recorded[name]["recall@10"], abs=0.02)
    assert verified[1]["recorded"] == recorded["pool100_raw"]
    assert verified[1]["baselines"][0]["recorded"] == recorded["pool100_raw"]["mrr"]
    assert not [line for line in verified[1]["warnings"] if "metrics.json" in line]


def test_retrieval_is_the_kernel_s(verified: tuple[Path, dict], pairs, kernel) -> None:
    predictions, gallery = pairs
    assert len(gallery) == 100
    views = verified[1]["retrieval"]["views"]
    for view, prediction in zip(views, predictions, strict=True):
        assert view["pool100_raw"] == pytest.approx(kernel.evaluate(prediction[None], gallery)["pool100_raw"])
    raw = np.mean([view["pool100_raw"]["mrr"] for view in views])
    assert verified[1]["retrieval"]["pooled"]["pool100_raw"]["mrr"] == pytest.approx(raw)
    assert verified[1]["baselines"][0]["raw"] == pytest.approx(raw)


def test_distances_against_loops(verified: tuple[Path, dict], pairs) -> None:
    predictions, gallery = pairs
    table = verified[1]["distances"]
    measures = {
        "euclidean": lambda p, y: math.dist(p, y),
        "manhattan": lambda p, y: sum(abs(a - b) for a, b in zip(p.tolist(), y.tolist(), strict=True)),
        "cosine": lambda p, y: 1 - p @ y / np.sqrt((p @ p) * (y @ y)),
    }
    for metric, distance in measures.items():
        own = [distance(view[i], gallery[i]) for view in predictions for i in range(len(gallery))]
        assert table[metric]["own"]["mean"] == pytest.approx(np.mean(own), rel=1e-4)
        assert table[metric]["own"]["sd"] == pytest.approx(np.std(own, ddof=1), rel=1e-3)
        assert table[metric]["own"]["median"] == pytest.approx(np.median(own), rel=1e-4)
        others = np.mean(
            [
                distance(view[i], gallery[j])
                for view in predictions
                for i in range(0, 100, 5)
                for j in range(0, 100, 7)
                if i != j
            ]
        )
        assert table[metric]["random"]["mean"] == pytest.approx(others, rel=0.03)
        assert (
            table[metric]["improvement_low"] < table[metric]["improvement_percent"] < table[metric]["improvement_high"]
        )


def test_mean_image_and_permutation_are_chance(verified: tuple[Path, dict]) -> None:
    rows = {row["model"]: row for row in verified[1]["baselines"]}
    assert rows["mean image"]["raw"] == pytest.approx(0.0518, abs=1e-3)
    assert rows["random permutation"]["raw"] == pytest.approx(0.0519, abs=0.025)


def test_the_closed_form_is_the_run_s_own_candidate(run: Path, verified: tuple[Path, dict], kernel) -> None:
    alone = json.loads((run / kernel.METRICS).read_text())["members"][0]
    (row,) = [row for row in verified[1]["baselines"] if row["model"] == "closed form"]
    assert row["raw"] == pytest.approx(alone["pool100_raw"], abs=1e-6)
    assert row["full_cosine"] == pytest.approx(alone["full_cosine"], abs=1e-6)


def test_the_comparison_pairs_images(run: Path, baseline: Path, verified: tuple[Path, dict]) -> None:
    rows, against = verified[1]["baselines"], verified[1]["against"]
    assert [row["model"] for row in rows[:2]] == [run.name, baseline.name]
    assert [row["recorded"] is not None for row in rows] == [True, True, False, False, False]
    for name in ("raw", "cosine"):
        assert against[name]["difference"] == pytest.approx(rows[0][name] - rows[1][name], abs=1e-6)
        assert against[name]["images"] == 100


def test_pool_sizes_end_at_the_full_gallery(verified: tuple[Path, dict], kernel, pairs) -> None:
    rows = verified[1]["pool_sizes"]
    assert [row["pool"] for row in rows] == [10, 20, 50, 100]
    assert rows[0]["chance"] == pytest.approx(0.2929, abs=1e-4)
    ten = [
        kernel.true_ranks(view[start : start + 10], pairs[1][start : start + 10], None)
        for view in pairs[0]
        for start in range(0, 100, 10)
    ]
    assert rows[0]["raw"] == pytest.approx(np.mean(1 / np.concatenate(ten)))
    assert all(a["raw"] >= b["raw"] for a, b in pairwise(rows))


def test_only_where_distances_differ_it_is_said_which_one_to_look_at(kernel) -> None:
    directions = kernel.unit(np.random.default_rng(0).normal(size=(50, 8)))
    photos = directions * np.linspace(1, 4, 50)[:, None]

    def notes(predictions: np.ndarray, gallery: np.ndarray) -> list[str]:
        measured = numbers.distances(predictions[None], gallery)
        return numbers.distance_notes({metric: numbers.summarise_distance(*each) for metric, each in measured.items()})

    assert notes(photos, photos) == notes(directions, directions) == []
    (note,) = notes(directions, photos)
    assert "by it 100.0% of captions are nearer to their own photo, by Euclidean distance " in note


def test_the_common_direction_of_photos_is_a_mean_over_pairs(kernel) -> None:
    rng = np.random.default_rng(0)
    gallery, predictions = rng.normal(size=(9, 5)) + 1, rng.normal(size=(2, 9, 5))
    images, queries = kernel.unit(gallery), kernel.unit(predictions)
    pairs = [images[i] @ images[j] for i in range(9) for j in range(9) if i != j]
    asked = [query @ image for query in queries.reshape(-1, 5) for image in images]
    expected = {"cosine_image_to_random_image": np.mean(pairs), "cosine_prediction_to_random_image": np.mean(asked)}
    assert numbers.anisotropy(predictions, gallery) == pytest.approx(expected)


def test_repulsion_and_seen_images_are_lines_of_the_table(run: Path, data: Path, kernel) -> None:
    bundle = load_run(run)[0] | {"repulsion": 0.3}
    held = held_out(bundle, data)
    train, seen = held.problem.train, held.problem.train_images
    plain = predict(bundle, held, held.problem.views)
    rows = {
        row[0]: row[1] for row in contents.official_table(measure(bundle, held, model_of(run, bundle, held), None))[1]
    }
    assert rows["raw, without repulsion"] == f"{kernel.evaluate(plain, held.images)['pool100_raw']['mrr']:.4f}"
    assert rows["raw: the official metric"] != rows["raw, without repulsion"]
    views = kernel.caption_views(train.image_of, seen, 1)
    learnt = kernel.evaluate(repelled(bundle, predict(bundle, held, views)), train.images[seen])["pool100_raw"]["mrr"]
    assert rows[f"raw, {len(seen)} seen images (no measure of quality)"] == f"{learnt:.4f}"
