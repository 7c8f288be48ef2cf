"""Reading the two files: what is right is read exactly and in little memory, what is wrong is one clear line."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drawn import IMAGE, TEST, TRAIN, draw_arrays, draw_data


# ---------------------------------------------------------------------------------------------- finding
@pytest.mark.parametrize("place", ["", "train", "competitions/aml-competition/train/train", "a/b/c/d/e"])
def test_a_file_is_found_by_name_in_any_layout(kernel, tmp_path: Path, place: str):
    path = tmp_path / "root" / place / "train.npz"
    path.parent.mkdir(parents=True)
    path.touch()
    assert kernel.find_file(tmp_path / "root", "train.npz") == path


def test_one_file_shown_twice_by_a_link_is_one_file(kernel, tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "train.npz").touch()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path)  # a loop
    assert kernel.find_file(tmp_path, "train.npz").resolve() == tmp_path / "real" / "train.npz"


def test_two_candidates_are_an_error_that_names_both(kernel, tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.npz").touch()
    with pytest.raises(kernel.UserError) as error:
        kernel.find_file(tmp_path, "train.npz")
    assert f"{tmp_path}/a/train.npz" in str(error.value)
    assert f"{tmp_path}/b/train.npz" in str(error.value)


def test_nothing_found_says_what_is_there(kernel, tmp_path: Path):
    with pytest.raises(kernel.UserError, match="no such input folder"):
        kernel.find_file(tmp_path / "missing", "train.npz")
    (tmp_path / "photos").mkdir()
    with pytest.raises(kernel.UserError, match=r"no train\.npz below it \(it holds .*photos"):
        kernel.find_file(tmp_path, "train.npz")


# ---------------------------------------------------------------------------------------------- reading
def test_what_was_written_is_read(kernel, tmp_path: Path):
    root, (train, test) = draw_data(tmp_path), draw_arrays()
    found = kernel.read_train(root / TRAIN)
    assert (found.caption_ids == train["captions/ids"]).all()
    assert found.captions == train["captions/text"].tolist()
    assert (found.text == train["captions/embeddings"]).all()
    assert (found.images == train["images/embeddings"]).all()
    assert found.text.dtype == found.images.dtype == np.float32
    assert found.image_of.dtype == np.int64
    assert (found.image_of == np.repeat(np.arange(240), 5)).all()
    assert found.image_names[7] == "1007.jpg"
    found = kernel.read_test(root / TEST)
    assert (found.caption_ids == test["captions/ids"]).all()
    assert found.captions == test["captions/text"].tolist()
    assert (found.text == test["captions/embeddings"]).all()
    assert found.image_dim == IMAGE


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("images", [7, 240, 3000])  # one block, many rows a block, few rows a block
def test_the_label_stream_equals_the_matrix(kernel, tmp_path: Path, write: Any, images: int):
    """Captions in any order, unequal in number: the label is the contract, not the position."""
    draw = np.random.default_rng(images)
    image_of = draw.permutation(np.concatenate([np.arange(images), draw.integers(images, size=2 * images + 11)]))
    label = image_of[:, None] == np.arange(images)
    write(tmp_path / "train.npz", **{"captions/label": label})
    found = kernel.Npz(tmp_path / "train.npz").label(len(image_of), images)
    assert (found == np.argmax(label, axis=1)).all()
    assert (found == image_of).all()


def test_a_shuffled_label_reaches_the_training_set(kernel, tmp_path: Path):
    order = np.random.default_rng(3).permutation(1200)
    root = draw_data(tmp_path, {"captions/label": lambda label: label[order]})
    assert (kernel.read_train(root / TRAIN).image_of == np.repeat(np.arange(240), 5)[order]).all()


def test_without_a_label_nothing_is_guessed(kernel, tmp_path: Path, capsys):
    path = draw_data(tmp_path, {"captions/label": None}) / TRAIN
    with pytest.raises(kernel.UserError, match="captions/label: this key is missing; --set consecutive_captions=true"):
        kernel.read_train(path)
    assert (kernel.read_train(path, consecutive=True).image_of == np.repeat(np.arange(240), 5)).all()
    assert "no captions/label; taking 5 consecutive captions" in capsys.readouterr().out


@pytest.mark.parametrize("captions", [7, 240])
def test_runs_of_captions_that_are_not_equal_are_refused(kernel, tmp_path: Path, captions: int):
    names = np.array(["a.jpg"] * 11) if captions == 7 else np.array([], "U3")
    changes = {key: lambda array: array[:captions] for key in ("captions/ids", "captions/text", "captions/embeddings")}
    path = draw_data(tmp_path, {**changes, "captions/label": None, "images/names": names}) / TRAIN
    with pytest.raises(kernel.UserError, match=r"captions/label: is missing, and .* do not divide"):
        kernel.read_train(path, consecutive=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["f2", "f8", ">f4", ">f8"])
def test_other_number_types_become_float32(kernel, tmp_path: Path, kind: str):
    root = draw_data(tmp_path, {"captions/embeddings": lambda array: array.astype(kind)})
    text = kernel.read_train(root / TRAIN).text
    assert text.dtype == np.float32
    assert text.dtype.isnative
    assert np.allclose(text, draw_arrays()[0]["captions/embeddings"], atol=2e-2)


MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from lib.kernel import load_kernel
kernel = load_kernel()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = kernel.read_train(Path(sys.argv[2]))
print(found.image_of.sum(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_the_label_is_never_held(tmp_path: Path):
    """A label of 128 MB is read within 30 MB."""
    captions, images = 16_000, 8_000
    path, image_of = tmp_path / "train.npz", np.arange(captions) // 4
    arrays = {
        "captions/ids": np.arange(captions),
        "captions/text": np.array(["a"] * captions),
        "captions/embeddings": np.ones((captions, 8), np.float32),
        "images/names": np.array(["b"] * images),
        "images/embeddings": np.ones((images, 8), np.float32),
    }
    np.savez_compressed(path, **arrays)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|b1", "fortran_order": False, "shape": (captions, images)})
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("captions/label.npy", "w") as stream,
    ):
        stream.write(header.getvalue())
        for start in range(0, captions, 1000):
            stream.write((image_of[start : start + 1000, None] == np.arange(images)).tobytes())
    tools = Path(__file__).resolve().parent.parent.parent / "tools"
    done = subprocess.run([sys.executable, "-c", MEMORY, tools, path], capture_output=True, text=True, check=True)
    total, grown = map(int, done.stdout.splitlines()[-1].split())
    assert total == image_of.sum()
    assert grown < 30 << 20


# ------------------------------------------------------------------------------------------- wrong input
def with_value(row: int, value: float) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array[row] = value
        return array

    return change


def double(label: np.ndarray) -> np.ndarray:
    label[17] |= label[-1]
    return label


def pickled(array: np.ndarray) -> np.ndarray:
    return array.astype(object)


WRONG_TRAIN = {
    "key missing": ({"captions/embeddings": None}, "captions/embeddings: this key is missing"),
    "names missing": ({"images/names": None}, "images/names: this key is missing"),
    "text NaN": ({"captions/embeddings": with_value(411, np.nan)}, "captions/embeddings: row 411 holds NaN"),
    "image infinite": ({"images/embeddings": with_value(9, np.inf)}, "images/embeddings: row 9 holds NaN, infinity or"),
    "label empty row": ({"captions/label": with_value(1199, False)}, "captions/label: row 1199 names 0 images"),
    "label double row": ({"captions/label": double}, "captions/label: row 17 names 2 images"),
    "label short": ({"captions/label": lambda label: label[:-1]}, "captions/label: is bool of shape (1199, 240)"),
    "label no bool": ({"captions/label": lambda label: label.astype(np.float32)}, "captions/label: is float32"),
    "rows disagree": ({"captions/embeddings": lambda text: text[:-1]}, "captions/embeddings: is float32 of shape"),
    "images disagree": ({"images/embeddings": lambda images: images[1:]}, "images/embeddings: is float32 of shape"),
    "texts disagree": ({"captions/text": lambda text: text[1:]}, "captions/text: is <U"),
    "one-dimensional": ({"captions/embeddings": np.ravel}, "captions/embeddings: is float32 of shape (38400,)"),
    "no width": ({"captions/embeddings": lambda text: text[:, :0]}, "captions/embeddings: is empty"),
    "integers": ({"images/embeddings": lambda images: images.astype(int)}, "images/embeddings: is int64"),
    "id twice": ({"captions/ids": with_value(30, 4)}, "captions/ids: row 30: id 4 was there before"),
    "ids are text": ({"captions/ids": lambda ids: ids.astype(str)}, "captions/ids: is <U"),
    "object label": ({"captions/label": pickled}, "captions/label"),
    "no label": ({"captions/label": None}, "captions/label: this key is missing"),
    "label of no images": ({"captions/label": np.ones((1200, 0), bool), "images/names": np.array([], "U3")}, "label"),
}


@pytest.mark.parametrize("case", WRONG_TRAIN)
def test_wrong_training_data_is_named_with_file_key_and_row(kernel, tmp_path: Path, case: str):
    changes, message = WRONG_TRAIN[case]
    path = draw_data(tmp_path, changes) / TRAIN
    with pytest.raises(kernel.UserError) as error:
        kernel.read_train(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


WRONG_TEST = {
    "no rows": (dict.fromkeys(("captions/ids", "captions/text", "captions/embeddings"), lambda a: a[:0]), "no rows"),
    "id twice": ({"captions/ids": with_value(99, 1)}, "row 99: id 1 was there before"),
    "NaN": ({"captions/embeddings": with_value(0, np.nan)}, "row 0 holds NaN"),
    "no width given": ({"metadata/embedding_dim_image": None}, "this key is missing"),
    "object": ({"captions/text": pickled}, "captions/text"),
}


@pytest.mark.parametrize("case", WRONG_TEST)
def test_wrong_test_data_is_named(kernel, tmp_path: Path, case: str):
    changes, message = WRONG_TEST[case]
    path = draw_data(tmp_path, None, changes) / TEST
    with pytest.raises(kernel.UserError) as error:
        kernel.read_test(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive at all", b"\x93NUMPY\x01\x00", b"\x80\x04N."])
def test_a_file_that_is_no_archive(kernel, tmp_path: Path, content: bytes):
    path = tmp_path / "train.npz"
    path.write_bytes(content)
    with pytest.raises(kernel.UserError, match="cannot be read"):
        kernel.read_train(path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numpy leaves its own file open
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_archive(kernel, tmp_path: Path, share: float):
    path = draw_data(tmp_path) / TRAIN
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(kernel.UserError, match=r"train\.npz: the archive cannot be read"):
        kernel.read_train(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("key", ["captions/embeddings", "images/embeddings", "captions/label"])
def test_legal_values_of_changed_bytes_fail_the_checksum(kernel, tmp_path: Path, key: str, method: int):
    """Other numbers, another image: legal to look at, but not what was written."""
    right = draw_arrays()[0][key]
    wrong = right.copy()
    wrong[-1] = wrong[0]
    path = draw_data(tmp_path, {key: None}) / TRAIN
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr(f"{key}.npy", npy_bytes(wrong))
        archive.getinfo(f"{key}.npy").CRC = zlib.crc32(npy_bytes(right))  # the directory is written at the end
    with pytest.raises(kernel.UserError, match=rf"{key} cannot be read \(Bad CRC-32"):
        kernel.read_train(path)


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
