"""Inputs that are legal but unusual are read; values that no training can use are refused or told with counts."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drawn import TEST, TRAIN, draw_arrays, draw_data

IMAGE_OF = np.repeat(np.arange(240), 5)


def with_member(root: Path, key: str, array: np.ndarray, version: tuple[int, int]) -> Path:
    """train.npz whose array `key` has a header of `version`."""
    path, buffer = draw_data(root, {key: None}) / TRAIN, io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{key}.npy", buffer.getvalue())
    return path


# ------------------------------------------------------------------------------------------------- labels
LABELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uint8": lambda label: label.astype(np.uint8),
    "fortran": np.asfortranarray,
    "fortran uint8": lambda label: np.asfortranarray(label.astype(np.uint8)),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_labels_of_any_order_and_header(kernel, tmp_path: Path, kind: str, version: tuple[int, int]):
    path = with_member(tmp_path, "captions/label", LABELS[kind](draw_arrays()[0]["captions/label"]), version)
    assert (kernel.read_train(path).image_of == IMAGE_OF).all()


@pytest.mark.parametrize("order", [np.ascontiguousarray, np.asfortranarray])
@pytest.mark.parametrize(
    ("row", "value", "message"),
    [(7, 0, "row 7 names 0 images"), (7, 1, "row 7 names 240 images"), (7, 2, "holds 2, expected 0 or 1")],
)
def test_wrong_labels_of_either_order(kernel, tmp_path: Path, order: Callable, row: int, value: int, message: str):
    label = draw_arrays()[0]["captions/label"].astype(np.uint8)
    label[row] = value
    path = draw_data(tmp_path, {"captions/label": order(label)}) / TRAIN
    with pytest.raises(kernel.UserError, match=message):
        kernel.read_train(path)


def test_images_without_a_caption_are_left_out_and_named(kernel, tmp_path: Path, capsys):
    def without(label: np.ndarray) -> np.ndarray:
        label[10:20] = False
        label[10:20, 50] = True  # the captions of images 2 and 3 go to image 50
        return label

    train = draw_arrays()[0]
    found = kernel.read_train(draw_data(tmp_path, {"captions/label": without}) / TRAIN)
    kept = np.setdiff1d(np.arange(240), [2, 3])
    assert len(found.images) == len(found.image_names) == 238
    assert set(found.image_of) == set(range(238))
    assert (found.images == train["images/embeddings"][kept]).all()
    assert found.image_names == train["images/names"][kept].tolist()
    names = np.array(found.image_names)[found.image_of]
    assert set(names[10:20]) == {"1050.jpg"}
    assert (names[:10] == train["images/names"][IMAGE_OF[:10]]).all()
    said = capsys.readouterr().out
    assert "2 images without a caption are left out: 1002.jpg, 1003.jpg" in said
    assert said.count("\n") == 1


# ---------------------------------------------------------------------------------------- ids and metadata
def test_scalar_metadata_is_read(kernel, tmp_path: Path):
    root = draw_data(tmp_path, None, {"metadata/embedding_dim_image": np.array(48)})
    assert kernel.read_test(root / TEST).image_dim == 48


@pytest.mark.parametrize("value", [np.array([48, 48]), np.array([48.0]), np.array("48")])
def test_other_metadata_is_refused(kernel, tmp_path: Path, value: np.ndarray):
    root = draw_data(tmp_path, None, {"metadata/embedding_dim_image": value})
    with pytest.raises(kernel.UserError, match="metadata/embedding_dim_image: is "):
        kernel.read_test(root / TEST)


def test_ids_beyond_64_bits_are_refused_and_small_unsigned_ones_read(kernel, tmp_path: Path):
    root = draw_data(tmp_path / "small", {"captions/ids": lambda ids: ids.astype(np.uint64)})
    assert (kernel.read_train(root / TRAIN).caption_ids == np.arange(1, 1201)).all()
    root = draw_data(tmp_path / "large", {"captions/ids": lambda ids: ids.astype(np.uint64) + np.uint64(2**63 - 5)})
    with pytest.raises(kernel.UserError, match=r"captions/ids: row 1199: id 92233\d+ is beyond 64-bit integers"):
        kernel.read_train(root / TRAIN)


# ------------------------------------------------------------------------------------------- text and objects
OBJECTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "captions as objects": ("captions/text", lambda text: text.astype(object)),
    "names as objects": ("images/names", lambda names: names.astype(object)),
    "vectors as objects": ("images/embeddings", lambda vectors: vectors.astype(object)),
    "captions as StringDType": ("captions/text", lambda text: text.astype(np.dtypes.StringDType())),
}


@pytest.mark.filterwarnings("ignore:Custom dtypes are saved as python objects")
@pytest.mark.parametrize("case", OBJECTS)
def test_python_objects_are_refused_with_the_way_to_save_them(kernel, tmp_path: Path, case: str):
    key, change = OBJECTS[case]
    path = draw_data(tmp_path, {key: change}) / TRAIN
    with pytest.raises(kernel.UserError) as error:
        kernel.read_train(path)
    assert f"{path}: {key}" in str(error.value)
    assert "\n" not in str(error.value)
    assert "save text as array.astype('U') and vectors as float32" in str(error.value)


def test_characters_that_do_not_exist_are_refused(kernel, tmp_path: Path):
    def broken(text: np.ndarray) -> np.ndarray:
        text.view(np.uint32).reshape(len(text), -1)[3, 2] = 0x7FFFFFFF
        return text

    with pytest.raises(kernel.UserError, match="captions/text"):
        kernel.read_test(draw_data(tmp_path, None, {"captions/text": broken}) / TEST)


# ---------------------------------------------------------------------------------------------------- values
def at_row(row: int, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float64)
        array[row] = value
        return array

    return change


@pytest.mark.parametrize("key", ["captions/embeddings", "images/embeddings"])
@pytest.mark.parametrize("value", [1e20, -1e20, 1e300])
def test_values_beyond_products_in_float32_are_refused(kernel, tmp_path: Path, key: str, value: float):
    path = draw_data(tmp_path, {key: at_row(31, value)}) / TRAIN
    with pytest.raises(kernel.UserError, match=rf"{key}: row 31 holds .*a number that no embedding has: -?1e"):
        kernel.read_train(path)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_zero_and_constant_vectors_are_told_with_their_number(kernel, tmp_path: Path, capsys, value: float):
    path = draw_data(tmp_path, {"captions/embeddings": at_row(slice(5, 8), value)}) / TRAIN
    kernel.read_train(path)
    said = capsys.readouterr().out
    assert said.startswith("warning: "), said
    assert "captions/embeddings" in said, said
    assert " 3 " in said.replace("of 1200", ""), said


def test_many_equal_vectors_are_told(kernel, tmp_path: Path, capsys):
    def repeated(vectors: np.ndarray) -> np.ndarray:
        vectors[100:200] = vectors[:100]
        return vectors

    kernel.read_train(draw_data(tmp_path, {"images/embeddings": repeated}) / TRAIN)
    said = capsys.readouterr().out
    assert "images/embeddings" in said
    assert "100 repeat another" in said


def test_right_data_is_read_without_a_word(kernel, tmp_path: Path, capsys):
    root = draw_data(tmp_path)
    kernel.read_train(root / TRAIN)
    kernel.read_test(root / TEST)
    assert not capsys.readouterr().out


# ----------------------------------------------------------------------------------- values that training meets
def test_an_offset_of_all_texts_is_harmless(kernel, lab):
    """Centred before the products of the closed form and before a network's normalisation."""

    def moved(train: dict) -> None:
        train["captions/embeddings"] = train["captions/embeddings"] + np.float32(1e3)

    plain, shifted = lab.problem(bend=0.7), lab.problem(moved, bend=0.7)
    scores = []
    for problem in (plain, shifted):
        fitted = kernel.fit_candidate(lab.task(problem), lab.knobs(network="linear"))
        scores.append(lab.score(problem, fitted, network="linear"))
    assert scores[0] > 0.9
    assert scores[1] == pytest.approx(scores[0], abs=0.02)
    knobs = {"epochs": 6, "hidden": 64, "lr": 4e-3, "dropout": 0.1, "input_dropout": 0.0}
    scores = [lab.score(problem, lab.train(problem, **knobs), **knobs) for problem in (plain, shifted)]
    assert scores[0] > 0.5
    assert scores[1] == pytest.approx(scores[0], abs=0.05)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_texts_beyond_half_precision_are_learnt(lab, dtype: str):
    def scaled(train: dict) -> None:
        train["captions/embeddings"] = train["captions/embeddings"] * np.float32(1e6)

    problem = lab.problem(scaled, bend=0.7)
    knobs = {"epochs": 6, "hidden": 64, "lr": 4e-3, "dropout": 0.1, "input_dropout": 0.0}
    assert lab.score(problem, lab.train(problem, dtype, **knobs), **knobs) > 0.4
