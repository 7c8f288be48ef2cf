"""The script as it is run: from an empty folder to a checked submission, or to one line that says why not."""
from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drawn import IMAGE, TINY, draw_arrays, draw_data
from forked import Ended, KernelServer, same_weights
from lib.project import KERNEL, sha256_of

TRAIN, TEST = "train/train/train.npz", "test/test/test.clean.npz"
SUBMISSION = "pipeline_submission.csv"
OUTPUTS = {SUBMISSION, "pipeline_final_model.pth", "pipeline_validated_model.pth", "metrics.json",
           "training_log.csv", "training_curves.png", "manifest.json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelServer]:
    server = KernelServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def first(server: KernelServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """One finished run: where it wrote and what it said."""
    output = tmp_path_factory.mktemp("first") / "out"
    ended = server.run("--input", data, "--output", output, *TINY, "--set=checkpoint_every=2")
    assert ended.returncode == 0, ended.stderr
    return output, ended


def as_script(folder: Path, *arguments: object, script: Path = KERNEL) -> subprocess.CompletedProcess:
    """The script in a process of its own, in an empty folder, with an empty home."""
    work, home = folder / "work", folder / "empty-home"
    work.mkdir(exist_ok=True)
    home.mkdir(exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=work, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert not list(work.iterdir())
    return done


def check_outputs(kernel: Any, output: Path, checkpoints: tuple[int, ...] = ()) -> dict:
    """Everything is there, nothing else is, and the manifest tells the truth; the manifest."""
    names = OUTPUTS | {f"pipeline_model_checkpoint_epoch_{n}.pth" for n in checkpoints}
    assert {path.name for path in output.iterdir()} == names
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["complete"] is True and set(manifest["outputs"]) == names - {"manifest.json"}
    for name, facts in manifest["outputs"].items():
        assert facts == {"sha256": sha256_of(output / name), "bytes": (output / name).stat().st_size}, name
    assert {"inputs", "knobs", "versions", "device", "seconds"} <= set(manifest)
    kernel.check_submission(output / SUBMISSION, np.arange(1, 101), IMAGE)
    return manifest


# ------------------------------------------------------------------------------------------ the whole job
@pytest.mark.parametrize("mount", ["kaggle/input/competitions/aml-competition", "kaggle/input/aml-competition"])
def test_the_script_runs_in_both_mounts(kernel, server, data: Path, first, tmp_path: Path, mount: str):
    shutil.copytree(data, tmp_path / mount)
    arguments = ("--input", tmp_path / "kaggle/input", "--output", tmp_path / "kaggle/working", *TINY)
    # The new mount by the script itself from an empty folder, the old one by a fork: it is one computation.
    done: Any = as_script(tmp_path, *arguments) if "competitions" in mount else server.run(*arguments)
    assert done.returncode == 0 and not done.stderr, done.stderr
    manifest = check_outputs(kernel, tmp_path / "kaggle/working")
    assert manifest["inputs"]["train.npz"]["sha256"] == sha256_of(data / TRAIN)
    assert manifest["knobs"]["hidden"] == 32 and manifest["versions"]["torch"] == torch.__version__
    assert sha256_of(tmp_path / "kaggle/working" / SUBMISSION) == sha256_of(first[0] / SUBMISSION)


def test_the_records_of_a_run(kernel, first):
    output, ended = first
    check_outputs(kernel, output, checkpoints=(2,))
    metrics = json.loads((output / "metrics.json").read_text())
    assert {"recipe", "device", "dtype", "seconds", "peak_rss_bytes", "validation"} <= set(metrics)
    assert (metrics["recipe"], metrics["device"], metrics["dtype"]) == ("align", "cpu", "float32")
    assert set(metrics["seconds"]) == {"load", "train", "refit", "predict", "total"}
    assert 0 < metrics["validate_seconds"] < metrics["seconds"]["train"]
    assert metrics["peak_rss_bytes"] > 50 << 20
    assert set(metrics["validation"]) == {"pool100_raw", "pool100_cosine", "full_cosine"}
    for table in metrics["validation"].values():
        recalls = {f"recall@{k}" for k in (1, 3, 5, 10, 50)}
        assert set(table) == {"mrr", "mrr_se", "ndcg", "l2"} | recalls
        assert 0 < table["mrr"] <= 1
    with (output / "training_log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["phase"], row["epoch"]) for row in rows] == [(p, e) for p in ("validate", "refit") for e in "123"]
    assert (output / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "validation on 24 unseen images" in ended.stdout and "evaluation on a training subset" in ended.stdout
    assert f"{metrics['validation']['pool100_raw']['mrr']:.4f}" in ended.stdout


def test_named_checkpoints_predict(kernel, first):
    bundle = kernel.load_weights(first[0] / "pipeline_model_checkpoint_epoch_2.pth")
    assert kernel.predict(bundle, draw_arrays()[1]["captions/embeddings"]).shape == (100, IMAGE)


def test_the_validated_model_never_saw_its_validation_images(kernel, data: Path, first):
    """Its own figure can be computed again from what it says of itself."""
    bundle, train = kernel.load_weights(first[0] / "pipeline_validated_model.pth"), kernel.read_train(data / TRAIN)
    images = np.array([train.image_names.index(name) for name in bundle["val_images"]])
    views = kernel.caption_views(train.image_of, images)
    predictions = kernel.predict(bundle, train.text[views.ravel()]).reshape(5, len(images), -1)
    predictions = np.stack([kernel.repel(bundle, view) for view in predictions])  # as they are submitted
    found = kernel.evaluate(predictions, train.images[images])
    expected = json.loads((first[0] / "metrics.json").read_text())["validation"]
    assert found["pool100_raw"]["mrr"] == pytest.approx(expected["pool100_raw"]["mrr"], abs=1e-6)
    assert not same_weights(first[0] / "pipeline_validated_model.pth", first[0] / "pipeline_final_model.pth")


@pytest.mark.parametrize(("recipe", "seeds"), [("align", (0, 0, 1)), ("ensemble", (0, 0))])
def test_the_same_seed_is_the_same_bits_and_another_is_not(server, data, tmp_path: Path, recipe: str, seeds: tuple):
    outputs = [tmp_path / f"out{k}" for k in range(len(seeds))]
    for output, seed in zip(outputs, seeds, strict=True):
        ended = server.run("--input", data, "--output", output, *TINY, "--recipe", recipe, "--set", f"seed={seed}")
        assert ended.returncode == 0 and not ended.stderr, ended.stderr
    for output, seed in zip(outputs[1:], seeds[1:], strict=True):
        assert same_weights(outputs[0] / "pipeline_final_model.pth", output / "pipeline_final_model.pth") == (seed == 0)
        assert (sha256_of(outputs[0] / SUBMISSION) == sha256_of(output / SUBMISSION)) == (seed == 0)


def test_refit_false_submits_the_validated_model(server, data: Path, tmp_path: Path):
    ended = server.run("--input", data, "--output", tmp_path / "out", *TINY, "--set=refit=false")
    assert ended.returncode == 0 and " refit " not in ended.stdout
    assert same_weights(tmp_path / "out/pipeline_validated_model.pth", tmp_path / "out/pipeline_final_model.pth")


def test_a_shuffled_label_trains_the_same_task(server, tmp_path: Path):
    """Captions in another order: their label alone says which photo they belong to."""
    order = np.random.default_rng(0).permutation(1200)
    changes = {key: lambda array: array[order] for key in ("captions/text", "captions/embeddings", "captions/label")}
    root = draw_data(tmp_path / "data", changes)
    for name, source in (("plain", draw_data(tmp_path / "plain-data")), ("shuffled", root)):
        assert not server.run("--input", source, "--output", tmp_path / name, *TINY, "--recipe=closed_form").returncode
    tables = [json.loads((tmp_path / name / "metrics.json").read_text())["validation"]["pool100_raw"]
              for name in ("plain", "shuffled")]
    assert tables[0]["mrr"] == pytest.approx(tables[1]["mrr"], abs=0.02) and tables[0]["mrr"] > 0.5


# ------------------------------------------------------------------------------------ predict from weights
@pytest.mark.parametrize("recipe", ["align", "baseline", "ensemble"])
def test_predicting_from_weights_equals_training_then_predicting(kernel, server, data, first, tmp_path: Path, recipe):
    trained = first[0] if recipe == "align" else tmp_path / "trained"
    if recipe != "align":
        assert not server.run("--input", data, "--output", trained, *TINY, "--recipe", recipe).returncode
    root = draw_data(tmp_path / "input")
    shutil.rmtree(root / "train")  # no training data is needed
    shutil.copy(trained / "pipeline_final_model.pth", root / "test")
    arguments = ("--input", root, "--output", tmp_path / "out", "--set=device=cpu")
    if recipe == "align":  # once by the script itself
        done: Any = as_script(tmp_path, *arguments, "--mode", "predict")
    else:
        done = server.run(*arguments, "--set=mode=predict")
    assert done.returncode == 0 and not done.stderr, done.stderr
    expected, found = (folder / SUBMISSION for folder in (trained, tmp_path / "out"))
    assert found.read_bytes() == expected.read_bytes()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["outputs"] == {SUBMISSION: kernel.file_facts(found)}
    assert manifest["inputs"]["pipeline_final_model.pth"]["sha256"] == sha256_of(trained / "pipeline_final_model.pth")


def test_predicting_with_wrong_weights_or_none(server, data: Path, first, tmp_path: Path):
    root = draw_data(tmp_path / "input", None, {"metadata/embedding_dim_image": np.array([IMAGE + 1])})
    fails(server, "no pipeline_final_model.pth below it", tmp_path / "out", root, "--mode=predict")
    (root / "pipeline_final_model.pth").write_bytes(b"no weights")
    fails(server, "not a readable weights file", tmp_path / "out", root, "--mode=predict")
    torch.save([1, 2], root / "pipeline_final_model.pth")
    fails(server, "holds no weights of this script", tmp_path / "out", root, "--mode=predict")
    shutil.copy(first[0] / "pipeline_final_model.pth", root)
    fails(server, "predicts 48 dimensions, but", tmp_path / "out", root, "--mode=predict")
    narrow = draw_data(tmp_path / "narrow", None, {"captions/embeddings": lambda text: text[:, 1:]})
    shutil.copy(first[0] / "pipeline_final_model.pth", narrow)
    fails(server, "weights take 32-d captions, the data has 31-d", tmp_path / "out", narrow, "--mode=predict")


# ------------------------------------------------------------------------------------------------- knobs
def test_overrides_of_a_packaged_copy(kernel, data: Path, tmp_path: Path):
    """Command line beats OVERRIDES beats recipe beats default, in the script as it is staged."""
    packaged = {"recipe": "baseline", "hidden": 8, "epochs": 2, "batch": 128, "device": "cpu", "dtype": "float32"}
    text = KERNEL.read_text()
    assert text.count("\nOVERRIDES: dict = {}\n") == 1
    script = tmp_path / "staged.py"
    script.write_text(text.replace("\nOVERRIDES: dict = {}\n", f"\nOVERRIDES: dict = {json.dumps(packaged)}\n"))
    done = as_script(tmp_path, "--input", data, "--output", tmp_path / "out", "--set", "epochs=1", script=script)
    assert done.returncode == 0, done.stderr
    knobs = json.loads((tmp_path / "out/manifest.json").read_text())["knobs"]
    assert {key: knobs[key] for key in ("recipe", "epochs", "hidden", "batch", "schedule", "seed")} == {
        "recipe": "baseline", "epochs": 1, "hidden": 8, "batch": 128, "schedule": "constant", "seed": 0}


# ------------------------------------------------------------------------------------------- wrong input
def fails(server: KernelServer, message: str, output: Path, source: Path, *arguments: object, code: int = 2) -> Ended:
    """A run that ends in one line and leaves nothing half-written."""
    ended = server.run("--input", source, "--output", output, *TINY, *arguments)
    assert ended.returncode == code and "Traceback" not in ended.stdout + ended.stderr, ended
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert message in ended.stderr, ended.stderr
    if output.is_dir():
        left = {path.name for path in output.iterdir()}
        assert not [name for name in left if name.startswith((".", "pipeline", "manifest", "metrics"))], left
    return ended


def empty_row(label: np.ndarray) -> np.ndarray:
    label[3] = False
    return label


def double_row(label: np.ndarray) -> np.ndarray:
    label[4, -1] = True
    return label


def with_nan(array: np.ndarray) -> np.ndarray:
    array[6, 2] = np.nan
    return array


NO_ROWS = {key: lambda array: array[:0] for key in ("captions/ids", "captions/text", "captions/embeddings")}
WRONG_DATA: dict[str, tuple[dict | None, dict | None, str]] = {
    "missing key": ({"images/embeddings": None}, None, "images/embeddings: this key is missing; there are"),
    "text dimension": (None, {"captions/embeddings": lambda text: text[:, :-1]}, "31 dimensions, but"),
    "image dimension": (None, {"metadata/embedding_dim_image": np.array([47])}, "47 dimensions, but"),
    "NaN": ({"images/embeddings": with_nan}, None, "train.npz: images/embeddings: row 6 holds NaN or infinity"),
    "NaN in test": (None, {"captions/embeddings": with_nan}, "test.clean.npz: captions/embeddings: row 6 holds NaN"),
    "object array": ({"captions/text": lambda text: text.astype(object)}, None, "captions/text"),
    "empty label row": ({"captions/label": empty_row}, None, "captions/label: row 3 names 0 images, expected 1"),
    "double label row": ({"captions/label": double_row}, None, "captions/label: row 4 names 2 images, expected 1"),
    "zero test rows": (None, NO_ROWS, "test.clean.npz: captions/ids: no rows"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data_is_one_line_and_leaves_nothing(server, tmp_path: Path, case: str):
    change_train, change_test, message = WRONG_DATA[case]
    root = draw_data(tmp_path / "data", change_train, change_test)
    fails(server, message, tmp_path / "out", root)
    assert not (tmp_path / "out").exists()


WRONG_PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing folder": (shutil.rmtree, "no such input folder; give one with --input"),
    "a file for a folder": (lambda root: (shutil.rmtree(root), root.touch()), "no such input folder"),
    "no train": (lambda root: (root / TRAIN).unlink(), "no train.npz below it"),
    "no test": (lambda root: (root / TEST).unlink(), "no test.clean.npz below it"),
    "two candidates": (lambda root: shutil.copytree(root / "train", root / "old"), "more than one train.npz"),
    "truncated": (lambda root: (root / TRAIN).write_bytes((root / TRAIN).read_bytes()[:9000]), "cannot be read"),
    "empty file": (lambda root: (root / TEST).write_bytes(b""), "test.clean.npz: the archive cannot be read"),
}


@pytest.mark.parametrize("case", WRONG_PLACES)
def test_wrong_places_are_one_line_and_leave_nothing(server, tmp_path: Path, case: str):
    change, message = WRONG_PLACES[case]
    change(draw_data(tmp_path / "data"))
    fails(server, message, tmp_path / "out", tmp_path / "data")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("argument", "message"), [
    ("--set=hiden=7", "unknown knob 'hiden'; did you mean hidden"), ("--set=epochs=many", "knob 'epochs' takes int"),
    ("--set=epochs", "expected KEY=VALUE"), ("--recipe=best", "unknown recipe 'best'; there are baseline"),
    ("--mode=guess", "knob 'mode' is one of train, predict"), ("--set=lr=-1", "knob 'lr' lies in"),
    ("--set=variants=hiden=3", "unknown knob 'hiden'")])
def test_wrong_arguments_are_one_line(server, data: Path, tmp_path: Path, argument: str, message: str):
    fails(server, message, tmp_path / "out", data, argument)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_was_asked_for_and_is_not_there(server, data: Path, tmp_path: Path):
    fails(server, "asked for, but torch sees no CUDA device", tmp_path / "out", data, "--set=device=cuda")


def test_an_unwritable_output_folder(server, data: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    fails(server, "cannot be written to", tmp_path / "file" / "out", data)
    fails(server, "choose another --output", tmp_path / "file", data)


def test_the_first_failure_of_the_script_itself(tmp_path: Path):
    """Nothing attached, on Kaggle: one line, exit code 2."""
    done = as_script(tmp_path, "--input", tmp_path / "nothing")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("limit", [3_000, 12_000, 30_000, 60_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(kernel, server, data, first, tmp_path: Path, limit: int):
    """No file may grow past the limit: at one size it is the resume state that fails, at others model or csv."""
    output = tmp_path / "out"
    arguments = ("--input", data, "--output", output, *TINY, "--set=checkpoint_every=2")
    ended = server.run(*arguments, file_limit=limit)
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended
    assert "cannot be written" in ended.stderr and "free some space" in ended.stderr
    for path in output.iterdir():  # what is there is whole
        assert path.suffix in (".pth", ".json", ".previous") and path.name != "manifest.json"
        assert kernel.load_torch(path) if path.suffix != ".json" else json.loads(path.read_text())
    assert not server.run(*arguments).returncode
    assert sha256_of(output / SUBMISSION) == sha256_of(first[0] / SUBMISSION)
    check_outputs(kernel, output, checkpoints=(2,))
