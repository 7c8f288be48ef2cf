"""A whole run as it is started: its outputs and what they say of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from drawn import BENT, IMAGE, JOINED, SMALL, TINY, TRAIN, draw_arrays, draw_data
from forked import same_weights, succeeded
from lib.project import sha256_of
from outputs import FINAL, MANIFEST, METRICS, SUBMISSION, VALIDATED, check_outputs, mrr, read_json, rows_of


def test_the_records_of_a_run(kernel, data: Path, first):
    output, ended = first
    manifest = check_outputs(kernel, output, checkpoints=(3, 6))
    assert manifest["inputs"]["train.npz"]["sha256"] == sha256_of(data / TRAIN)
    assert manifest["knobs"]["hidden"] == 64
    assert manifest["versions"]["torch"] == torch.__version__
    metrics = read_json(output / METRICS)
    assert {"recipe", "device", "dtype", "seconds", "peak_rss_bytes", "validation"} <= set(metrics)
    assert (metrics["recipe"], metrics["device"], metrics["dtype"]) == ("align", "cpu", "float32")
    assert set(metrics["seconds"]) == {"load", "train", "refit", "predict", "total"}
    assert 0 < metrics["validate_seconds"] < metrics["seconds"]["train"]
    assert metrics["peak_rss_bytes"] > 50 << 20
    assert set(metrics["validation"]) == {"pool100_raw", "pool100_cosine", "full_cosine"}
    for table in metrics["validation"].values():
        assert set(table) == {"mrr", "mrr_se", "ndcg", "l2", *(f"recall@{k}" for k in (1, 3, 5, 10, 50))}
        assert 0 < table["mrr"] <= 1
    assert f"{mrr(output):.4f}" in ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("done in ")


def test_what_each_member_scored_weighs_and_whether_it_was_refitted(first):
    closed_form, network = read_json(first[0] / METRICS)["members"]
    assert "network=linear" in closed_form["knobs"]
    assert (closed_form["candidate"], network["candidate"]) == (0, 1)
    assert network["weight"] > 0.4
    assert network["refitted"]
    assert network["epochs"] == 8
    assert network["seconds"] > 0
    assert closed_form["weight"] == pytest.approx(1 - network["weight"])
    for member in (closed_form, network):
        assert {"pool100_raw", "pool100_cosine", "full_cosine"} <= set(member)
    assert network["pool100_raw"] > closed_form["pool100_raw"] + 0.05
    rows = rows_of(first[0] / "training_log.csv")
    assert [(row["phase"], row["candidate"], row["epoch"]) for row in rows] == [
        (phase, "1", str(epoch)) for phase in ("validate", "refit") for epoch in range(1, 9)
    ]
    assert [row["epoch"] for row in rows if row["pool100_raw"]] == ["4", "8"]


def test_a_pool_of_fewer_than_100_is_named_as_what_it_is(first):
    """96 images are held out."""
    output, ended = first
    assert "validation on 96 unseen images, 5 captions each, pools of 96" in ended.stdout
    tables = [line.split()[0] for line in ended.stdout.split("validation on 96")[1].splitlines()[2:5]]
    assert tables == ["pool96_raw", "pool96_cosine", "full_cosine"]
    assert read_json(output / METRICS)["pool"] == 96


def test_whole_pools_are_named_so(server, tmp_path: Path):
    root = draw_data(tmp_path / "data", images=320)
    settings = (*SMALL, "--recipe=closed_form", "--set=val_fraction=0.7")
    ended = succeeded(server.run("--input", root, "--output", tmp_path / "out", *settings))
    assert "validation on 200 unseen images, 5 captions each, pools of 100" in ended.stdout
    assert "pool100_raw" in ended.stdout
    assert read_json(tmp_path / "out" / METRICS)["pool"] == 100


def test_the_first_submission_is_the_closed_forms_and_later_ones_are_better(first):
    said = [float(score) for score in re.findall(r"^submission: .*; ([\d.]+) raw in validation", first[1].stdout, re.M)]
    lines = first[1].stdout.splitlines()
    at = [k for k, line in enumerate(lines) if line.startswith("submission: ")]
    assert not any(" validate " in line for line in lines[: at[0]]), "before any network"
    assert len(said) >= 2
    assert said == sorted(said)
    assert said[-1] > said[0] + 0.05


def test_named_checkpoints_predict(kernel, first):
    bundle = kernel.load_weights(first[0] / "pipeline_model_checkpoint_epoch_3.pth")
    test = draw_arrays(**BENT)[1]
    found = kernel.predict(bundle, test["captions/embeddings"], test["captions/text"].tolist())
    assert found.shape == (100, IMAGE)


def test_the_figures_of_the_validated_model_can_be_computed_again(kernel, data: Path, first):
    """From what it says of itself."""
    bundle, train = kernel.load_weights(first[0] / VALIDATED), kernel.read_train(data / TRAIN)
    images = np.array([train.image_names.index(name) for name in bundle["val_images"]])
    captions = kernel.caption_views(train.image_of, images).ravel()
    texts = [train.captions[k] for k in captions]
    for member, expected in zip(bundle["members"], read_json(first[0] / MANIFEST)["predicted_by"], strict=True):
        predictions = kernel.predict(bundle | {"members": [member]}, train.text[captions], texts)
        found = kernel.evaluate(predictions.reshape(5, len(images), -1), train.images[images])
        figures = read_json(first[0] / METRICS)["members"][expected["candidate"]]
        for table in ("pool100_raw", "pool100_cosine", "full_cosine"):
            assert found[table]["mrr"] == pytest.approx(figures[table], abs=1e-6)
    assert not same_weights(first[0] / VALIDATED, first[0] / FINAL)


@pytest.mark.parametrize("recipe", ["closed_form", "baseline"])
def test_validation_photos_are_trained_on_in_the_refit_alone(kernel, server, data, tmp_path: Path, recipe: str):
    """Where they are other ones, what was validated is the same to the bit, and what predicts is not."""

    def other(vectors: np.ndarray) -> np.ndarray:
        held_out = kernel.split_images(len(vectors), 0.1, 0)[1]
        vectors[held_out] = -vectors[held_out]
        return vectors

    changed = draw_data(tmp_path / "data", {"images/embeddings": other}, **BENT)
    for name, source in (("as drawn", data), ("changed", changed)):
        arguments = ("--input", source, "--output", tmp_path / name, *SMALL, f"--recipe={recipe}")
        succeeded(server.run(*arguments))
    for weights, same in ((VALIDATED, True), (FINAL, False)):
        assert same_weights(tmp_path / "as drawn" / weights, tmp_path / "changed" / weights) == same, weights


def test_the_reported_figure_is_near_what_predicts(kernel, data: Path, first):
    """The whole blend, with the weights that were chosen on all: the honest figure may differ by the choice alone."""
    bundle, train = kernel.load_weights(first[0] / VALIDATED), kernel.read_train(data / TRAIN)
    images = np.array([train.image_names.index(name) for name in bundle["val_images"]])
    views = kernel.caption_views(train.image_of, images)
    predictions = [kernel.predict(bundle, train.text[view], [train.captions[k] for k in view]) for view in views]
    predictions = np.stack([kernel.repel(view, bundle["repulsion"], bundle["length"]) for view in predictions])
    found = kernel.evaluate(predictions, train.images[images])["pool100_raw"]["mrr"]
    assert found == pytest.approx(mrr(first[0]), abs=0.03)


def test_another_seed_is_another_submission(server, data, first, tmp_path: Path):
    for seed in (0, 1):
        output = tmp_path / str(seed)
        succeeded(server.run("--input", data, "--output", output, *JOINED, f"--set=seed={seed}"))
        assert same_weights(first[0] / FINAL, output / FINAL) == (seed == 0)
        assert (sha256_of(first[0] / SUBMISSION) == sha256_of(output / SUBMISSION)) == (seed == 0)


def test_refit_false_submits_the_validated_model(kernel, server, data: Path, first, tmp_path: Path):
    """The named checkpoints are of the training without validation photos: they are those of a run with a refit."""
    output, settings = tmp_path / "out", (*JOINED, "--set=checkpoint_every=3", "--set=refit=false")
    ended = succeeded(server.run("--input", data, "--output", output, *settings))
    assert " refit " not in ended.stdout
    assert same_weights(output / VALIDATED, output / FINAL)
    manifest = check_outputs(kernel, output, checkpoints=(3, 6))
    assert not any(one["refitted"] for one in manifest["predicted_by"])
    for epoch in (3, 6):
        checkpoint = f"pipeline_model_checkpoint_epoch_{epoch}.pth"
        assert same_weights(output / checkpoint, first[0] / checkpoint)


def test_the_split_seed_chooses_the_photos_that_are_held_out(kernel, server, data: Path, tmp_path: Path):
    settings = (*SMALL, "--recipe=closed_form", "--set=split_seed=1")
    succeeded(server.run("--input", data, "--output", tmp_path / "out", *settings))
    held_out, names = kernel.split_images(240, 0.1, 1)[1], kernel.read_train(data / TRAIN).image_names
    assert kernel.load_weights(tmp_path / "out" / FINAL)["val_images"] == [names[k] for k in held_out]


def test_a_shuffled_label_trains_the_same_task(server, tmp_path: Path):
    """Captions in another order: their label alone says which photo they belong to."""
    order = np.random.default_rng(0).permutation(1200)
    changes = {key: lambda array: array[order] for key in ("captions/text", "captions/embeddings", "captions/label")}
    root = draw_data(tmp_path / "data", changes)
    for name, source in (("plain", draw_data(tmp_path / "plain-data")), ("shuffled", root)):
        succeeded(server.run("--input", source, "--output", tmp_path / name, *TINY, "--recipe=closed_form"))
    scores = [mrr(tmp_path / name) for name in ("plain", "shuffled")]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)
    assert scores[0] > 0.5


def test_the_baseline_runs_alone(kernel, server, data: Path, tmp_path: Path):
    settings = ("--recipe=baseline", "--set=epochs=5", "--set=hidden=32", "--set=device=cpu", "--set=dtype=float32")
    ended = succeeded(server.run("--input", data, "--output", tmp_path / "out", *settings))
    assert not ended.stderr, ended.stderr
    manifest = check_outputs(kernel, tmp_path / "out", checkpoints=(5,))
    assert len(manifest["predicted_by"]) == 1
    assert manifest["repulsion"] == 0
