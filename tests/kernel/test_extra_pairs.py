"""Extra pairs: what joins, what is left out because validation or the test asks for it, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drawn import BENT, JOINED, TRAIN, draw_arrays, draw_data
from forked import succeeded
from outputs import MANIFEST, check_submitted, fails, read_json

NEW = slice(300, 340)  # images of the drawing that are in neither file


def draw_pairs(root: Path, name: str = "pairs.npz", label: bool = True, rows: slice = NEW, **changes: Any) -> Path:
    """A pairs file beside the data: further photos of the same world, with five captions each."""
    whole = draw_arrays(images=360, **BENT)[0]
    images = np.arange(360)[rows]
    captions = np.flatnonzero(np.isin(whole["captions/label"].argmax(axis=1), images))
    arrays = {
        "captions/ids": whole["captions/ids"][captions],
        "captions/text": whole["captions/text"][captions],
        "captions/embeddings": whole["captions/embeddings"][captions],
        "images/names": np.array([f"new{i}.jpg" for i in images]),
        "images/embeddings": whole["images/embeddings"][images],
    }
    if label:
        arrays["captions/label"] = whole["captions/label"][captions][:, images]
    for key, change in changes.items():
        arrays[key.replace("_", "/")] = change(arrays[key.replace("_", "/")].copy())
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / name, **arrays)
    return root / name


@pytest.fixture
def sets(kernel, data: Path) -> tuple[Any, Any, np.ndarray]:
    """Training and test set, and what is held out. The photos of `draw_pairs` are of another drawing."""
    train = kernel.read_train(data / TRAIN)
    return train, kernel.read_test(data / "test/test/test.clean.npz"), kernel.split_images(240, 0.4, 0)[1]


@pytest.mark.parametrize("label", [True, False])
def test_new_pairs_join_behind_the_own_ones(kernel, sets, tmp_path: Path, label: bool):
    train, test, held_out = sets
    path = draw_pairs(tmp_path, label=label)
    joined, (facts,) = kernel.join_pairs(train, test, held_out, [path])
    assert (facts["images"], facts["joined_images"], facts["joined_captions"]) == (40, 40, 200)
    assert facts["file"] == "pairs.npz"
    assert len(facts["sha256"]) == 64
    assert (joined.extra, joined.own, len(joined.images)) == (40, 240, 280)
    for name in ("text", "image_of", "images", "caption_ids"):
        assert (getattr(joined, name)[: len(getattr(train, name))] == getattr(train, name)).all(), name
    assert (joined.image_of[1200:] == np.repeat(np.arange(240, 280), 5)).all()
    assert joined.image_names[240:] == [f"new{i}.jpg" for i in range(300, 340)]
    assert len(joined.captions) == 1400


def test_images_that_validation_or_the_test_could_ask_for_stay_out(kernel, sets, tmp_path: Path):
    train, test, held_out = sets
    held_caption = train.text[train.image_of == held_out[0]][0]
    trained = np.setdiff1d(np.arange(240), held_out)[0]

    def captions(text: np.ndarray) -> np.ndarray:
        text[7], text[60] = 2 * test.text[3], held_caption  # of images 1 and 12
        return text

    def images(vectors: np.ndarray) -> np.ndarray:
        vectors[20] = 3 * train.images[trained]
        return vectors

    def names(array: np.ndarray) -> np.ndarray:
        array[30] = train.image_names[5]
        return array

    path = draw_pairs(tmp_path, captions_embeddings=captions, images_embeddings=images, images_names=names)
    joined, (facts,) = kernel.join_pairs(train, test, held_out, [path])
    assert facts["like_test_or_validation"] == 2
    assert facts["same_name"] == 1
    assert facts["same_vector"] == 1
    left = [f"new{300 + i}.jpg" for i in range(40) if i not in (1, 12, 20, 30)]
    assert joined.image_names[240:] == left
    assert facts["joined_captions"] == 180


def test_a_second_file_does_not_bring_the_first_ones_again(kernel, sets, tmp_path: Path):
    train, test, held_out = sets
    paths = [draw_pairs(tmp_path, "pairs1.npz"), draw_pairs(tmp_path, "pairs2.npz", rows=slice(320, 350))]
    joined, facts = kernel.join_pairs(train, test, held_out, paths)
    assert [one["joined_images"] for one in facts] == [40, 10]
    assert joined.extra == 50


def test_vectors_of_another_encoder_are_warned_of(kernel, sets, tmp_path: Path, capsys):
    train, test, held_out = sets
    kernel.join_pairs(train, test, held_out, [draw_pairs(tmp_path, images_embeddings=lambda images: -4 * images)])
    assert "warning: these may be of another encoder: pairs.npz: 48-d" in capsys.readouterr().out


def test_other_dimensions_are_refused(kernel, sets, tmp_path: Path):
    train, test, held_out = sets
    path = draw_pairs(tmp_path, captions_embeddings=lambda text: text[:, 1:])
    with pytest.raises(kernel.UserError, match=r"pairs\.npz: 31 dimensions, but the training data has 32"):
        kernel.join_pairs(train, test, held_out, [path])


def test_extra_pairs_are_trained_on_and_never_validated_on(kernel, sets, lab, tmp_path: Path):
    train, test, _ = sets
    knobs = lab.knobs(pairs=True, val_fraction=0.4, pairs_weight=0.25)
    problem = kernel.make_problem(train, test, knobs, [knobs], [draw_pairs(tmp_path)])
    assert problem.val_images.max() < 240
    assert len(problem.val_images) == 96
    for phase, own in (("validate", 144), ("refit", 240)):
        assert len(problem.images_of(phase, False)) == own
        assert len(problem.images_of(phase, True)) == own + 40
        task = lab.task(problem, phase=phase, pairs=True, pairs_weight=0.25)
        assert task.weight.tolist() == [1.0] * own + [0.25] * 40
        assert len(task.captions) == 5 * (own + 40)
        assert lab.task(problem, phase=phase).weight.tolist() == [1.0] * own
    length = kernel.make_bundle(problem, knobs, [], 0.0)["length"]
    assert length == pytest.approx(np.linalg.norm(train.images, axis=1).mean(), rel=1e-6)
    plain = lab.train(problem)
    light, heavy = (lab.train(problem, pairs=True, pairs_weight=weight) for weight in (1e-3, 1.0))
    assert not np.array_equal(light.weights["expand.weight"], heavy.weights["expand.weight"])
    assert plain.history != heavy.history


@pytest.mark.parametrize("compare", [False, True])
def test_a_run_with_pairs_says_what_joined(kernel, server, tmp_path: Path, compare: bool):
    root = draw_data(tmp_path / "data", **BENT)
    draw_pairs(root / "more", "pairs_mine.npz")
    settings = (*JOINED, "--set=pairs=true", f"--set=pairs_compare={compare}")
    ended = succeeded(server.run("--input", root, "--output", tmp_path / "out", *settings))
    assert not ended.stderr, ended.stderr
    manifest = check_submitted(kernel, tmp_path / "out")
    assert [one["joined_images"] for one in manifest["pairs"]] == [40]
    assert "joined images 40" in ended.stdout
    members = read_json(tmp_path / "out" / "metrics.json")["members"]
    assert len(members) == (4 if compare else 2)
    assert sum("pairs=False" in one["knobs"] for one in members) == (2 if compare else 0)
    assert ("without extra pairs: raw" in ended.stdout) == compare


def test_pairs_are_not_joined_unasked_and_missing_ones_are_an_error(server, data: Path, tmp_path: Path):
    root = draw_data(tmp_path / "data", **BENT)
    draw_pairs(root)
    ended = succeeded(server.run("--input", root, "--output", tmp_path / "out", *JOINED, "--set=epochs=1"))
    assert "pairs:" not in ended.stdout
    assert read_json(tmp_path / "out" / MANIFEST)["pairs"] == []
    fails(server, "no pairs*.npz below it", tmp_path / "none", data, *JOINED, "--set=pairs=true")
    assert not (tmp_path / "none").exists()
