"""Mode predict: the submission from weights alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from drawn import BENT, IMAGE, TINY, draw_data
from forked import failed_in_one_line, succeeded
from lib.project import sha256_of
from outputs import FINAL, MANIFEST, SUBMISSION, fails, read_json


@pytest.mark.parametrize("recipe", ["align", "baseline"])
def test_predicting_from_weights_equals_training_then_predicting(kernel, server, data, first, tmp_path: Path, recipe):
    trained = first[0] if recipe == "align" else tmp_path / "trained"
    if recipe != "align":
        succeeded(server.run("--input", data, "--output", trained, *TINY, "--recipe", recipe))
    root = draw_data(tmp_path / "input", **BENT)
    shutil.rmtree(root / "train")  # no training data is needed
    shutil.copy(trained / FINAL, root / "test")
    done = succeeded(server.run("--input", root, "--output", tmp_path / "out", "--set=device=cpu", "--mode=predict"))
    assert not done.stderr, done.stderr
    expected, found = (folder / SUBMISSION for folder in (trained, tmp_path / "out"))
    assert found.read_bytes() == expected.read_bytes()
    manifest = read_json(tmp_path / "out" / MANIFEST)
    assert manifest["outputs"] == {SUBMISSION: kernel.file_facts(found)}
    assert manifest["complete"] is True
    assert manifest["inputs"][FINAL]["sha256"] == sha256_of(trained / FINAL)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {SUBMISSION, MANIFEST}


@pytest.fixture
def weights(first, tmp_path: Path) -> Path:
    """An input folder with test data and weights."""
    root = draw_data(tmp_path / "input", **BENT)
    shutil.copy(first[0] / FINAL, root)
    return root


def test_predicting_honours_repulsion(server, weights: Path, tmp_path: Path):
    shas = {}
    for strength in ("0", "0.2", "0.6"):
        output, settings = (
            tmp_path / strength,
            (f"--set=repulsion={strength}", "--set=device=cpu", "--set=infer_batch=7"),
        )
        succeeded(server.run("--input", weights, "--output", output, "--mode=predict", *settings))
        assert read_json(output / MANIFEST)["repulsion"] == float(strength)
        shas[strength] = sha256_of(output / SUBMISSION)
    assert len(set(shas.values())) == 3


@pytest.mark.parametrize("setting", ["epochs=3", "seed=1", "refit=false", "dtype=float32", "recipe=align"])
def test_predicting_refuses_what_changes_nothing(server, weights: Path, tmp_path: Path, setting: str):
    message = f"knob '{setting.split('=')[0]}' changes nothing in mode predict"
    fails(server, message, tmp_path / "out", weights, "--mode=predict", f"--set={setting}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_predicting_into_the_folder_of_the_weights_is_refused(kernel, server, first, weights: Path, linked: bool):
    """What lies in an output folder makes way: the weights would be gone."""
    output = weights.with_name("elsewhere") if linked else weights / "out"
    output.mkdir()
    (weights / FINAL).rename(output / FINAL)
    if linked:
        (weights / FINAL).symlink_to(output / FINAL)
    arguments = ("--input", weights, "--output", output, "--mode=predict", "--set=device=cpu")
    failed_in_one_line(server.run(*arguments), 2, "the weights lie in the output folder; choose another --output")
    assert (output / FINAL).read_bytes() == (first[0] / FINAL).read_bytes()


def test_predicting_with_wrong_weights_or_none(server, first, tmp_path: Path):
    predicting, output = ("--mode=predict", "--set=device=cpu"), tmp_path / "out"
    root = draw_data(tmp_path / "input", None, {"metadata/embedding_dim_image": np.array([IMAGE + 1])})
    fails(server, f"no {FINAL} below it", output, root, *predicting)
    (root / FINAL).write_bytes(b"no weights")
    fails(server, f"{FINAL}: the weights file cannot be read", output, root, *predicting)
    torch.save([1, 2], root / FINAL)
    fails(server, f"{FINAL}: the weights file cannot be read", output, root, *predicting)
    torch.save({"model": 1}, root / FINAL)
    fails(server, f"{FINAL}: the weights of this script cannot be read", output, root, *predicting)
    shutil.copy(first[0] / FINAL, root)
    fails(server, "predicts 48 dimensions, but", output, root, *predicting)
    narrow = draw_data(tmp_path / "narrow", None, {"captions/embeddings": lambda text: text[:, 1:]})
    shutil.copy(first[0] / FINAL, narrow)
    fails(server, "weights take 32-d captions, the data has 31-d", output, narrow, *predicting)
