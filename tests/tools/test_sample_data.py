"""The drawn sample has the competition's layout, dtypes and traps; it is repeatable, whole or absent, and learnable."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drawn import read_tree
from forked import Ended, failed, succeeded
from lib.project import InputError
from lib.report.measure import closed_form
from lib.sample.encoders import encode_text
from lib.sample.layout import make_full_size, make_sample
from lib.sample.scenes import HEIGHT, WIDTH

IMAGES, TEST = 300, 100


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sample") / "data"
    make_sample(root, n_images=IMAGES, seed=3, n_test=TEST)
    return root


@pytest.fixture
def draw(tool, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """The tool, quick: with ten test captions."""
    monkeypatch.setattr("lib.sample.layout.make_sample", partial(make_sample, n_test=10))
    return partial(tool, "sample_data")


def test_train_file_has_the_competition_keys_shapes_and_types(sample: Path) -> None:
    train = np.load(sample / "train/train/train.npz")
    n = 5 * IMAGES
    expected = {
        "captions/ids": ("int64", (n,)),
        "captions/embeddings": ("float32", (n, 1024)),
        "captions/label": ("bool", (n, IMAGES)),
        "images/embeddings": ("float32", (IMAGES, 1536)),
    }
    assert {key: (str(train[key].dtype), train[key].shape) for key in expected} == expected
    assert (train["captions/text"].dtype.kind, train["images/names"].dtype.kind) == ("U", "U")
    assert [
        int(train[f"metadata/{key}"][0])
        for key in ("num_captions", "num_images", "embedding_dim_text", "embedding_dim_image")
    ] == [n, IMAGES, 1024, 1536]
    assert (train["captions/label"].argmax(1) == np.arange(n) // 5).all()
    assert (train["captions/label"].sum(1) == 1).all()


def test_test_file_has_ids_from_one_and_no_images(sample: Path) -> None:
    test = np.load(sample / "test/test/test.clean.npz")
    assert test["captions/ids"].tolist() == list(range(1, TEST + 1))
    assert not [key for key in test.files if key.startswith("images") or "label" in key]
    solution = np.load(sample / "solution.npz")
    assert solution["captions/ids"].tolist() == test["captions/ids"].tolist()
    assert solution["images/embeddings"].shape == (TEST, 1536)
    assert not (sample / "test/test/Images").exists()


def test_the_kernel_reads_it(sample: Path, kernel) -> None:
    train = kernel.read_train(kernel.find_file(sample, "train.npz"))
    test = kernel.read_test(kernel.find_file(sample, "test.clean.npz"))
    assert (train.image_of == np.arange(5 * IMAGES) // 5).all()
    assert test.image_dim == train.images.shape[1]


def test_every_name_is_a_picture(sample: Path) -> None:
    names = np.load(sample / "train/train/train.npz")["images/names"].tolist()
    assert sorted(path.name for path in (sample / "train/train/Images").iterdir()) == sorted(names)
    with Image.open(sample / "train/train/Images" / names[0]) as picture:
        assert picture.size == (WIDTH, HEIGHT)


def test_train_captions_are_csv_and_equal_the_npz(sample: Path) -> None:
    train = np.load(sample / "train/train/train.npz")
    with (sample / "train/train/captions.txt").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "caption"]
    assert [row[1] for row in rows[1:]] == train["captions/text"].tolist()
    assert [row[0] for row in rows[1:]] == np.repeat(train["images/names"], 5).tolist()


def test_test_captions_are_cut_and_trap_a_csv_reader(sample: Path) -> None:
    lines = (sample / "test/test/captions.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "id,caption"
    assert [line.partition(",")[0] for line in lines[1:]] == [str(i) for i in range(1, TEST + 1)]
    assert not any("," in line.partition(",")[2] for line in lines[1:])
    assert len(list(csv.reader(lines[1:]))) < TEST
    whole = np.load(sample / "test/test/test.clean.npz")["captions/text"]
    assert any("," in caption for caption in whole)
    assert any('"' in caption for caption in whole)


def test_five_captions_of_an_image_differ(sample: Path) -> None:
    fives = np.load(sample / "train/train/train.npz")["captions/text"].reshape(-1, 5)
    assert np.mean([len(set(five)) == 5 for five in fives]) > 0.99


def test_image_vectors_are_anisotropic_and_not_normalised(sample: Path) -> None:
    vectors = np.load(sample / "train/train/train.npz")["images/embeddings"]
    norms = np.linalg.norm(vectors, axis=1)
    assert 24 < norms.mean() < 28
    assert norms.min() < 24
    assert norms.max() > 29
    unit = vectors / norms[:, None]
    assert 0.5 < (unit[:150] @ unit[150:].T).mean() < 0.75


def test_it_is_learnable_but_not_by_a_linear_map_alone(sample: Path, kernel) -> None:
    knobs = kernel.Knobs(val_fraction=1 / 3)
    sets = kernel.read_train(sample / "train/train/train.npz"), kernel.read_test(sample / "test/test/test.clean.npz")
    problem = kernel.make_problem(*sets, knobs, [], [])
    assert len(problem.val_images) == 100
    found = kernel.evaluate(closed_form(problem), problem.val_vectors)
    assert 0.12 < found["pool100_raw"]["mrr"] < 0.6  # chance is .052


def test_same_seed_same_bytes_other_seed_other_pictures(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_sample(tmp_path / folder, n_images=20, seed=seed, n_test=10)
    one, same, other = (read_tree(tmp_path / folder) for folder in "abc")
    assert one == same
    assert one.keys() != other.keys()


def test_equal_captions_have_equal_vectors() -> None:
    one, other, same = encode_text(["A red star .", "A blue star .", "A red star ."])
    assert (one == same).all()
    assert not np.allclose(one, other)


def test_full_size_has_the_same_layout_without_pictures(tmp_path: Path, kernel) -> None:
    make_full_size(tmp_path / "big", n_images=1200, n_test=50)
    train = kernel.read_train(tmp_path / "big/train/train/train.npz")
    assert train.text.shape == (6000, 1024)
    assert (train.image_of == np.arange(6000) // 5).all()
    assert not list(tmp_path.rglob("*.jpg"))
    assert kernel.read_test(tmp_path / "big/test/test/test.clean.npz").text.shape == (50, 1024)
    norms = np.linalg.norm(train.images, axis=1)
    assert 20 < norms.mean() < 30


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lib.sample.layout.write_test", full)
    done = failed(draw(tmp_path / "new" / "data", "--images", "20"), 1)
    assert "No space left" in done.error
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_folder(tool, tmp_path: Path, number: int) -> None:
    home = tmp_path / "new"
    drawing = tool.start("sample_data", home / "data")
    drawing.wait_for(lambda: list(home.glob(".data.*.part/train/train/Images/*.jpg")), "the first photo")
    drawing.send(number)
    done = drawing.wait()
    assert done.returncode == 128 + number
    assert done.error == "interrupted"
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--images", "3"], "--images 3"), (["--images", "9999999"], "--images 9999999"), (["--seed", "-1"], "--seed -1")],
)
def test_bad_numbers_are_one_line_and_code_two(tool, tmp_path: Path, arguments: list[str], word: str) -> None:
    done = failed(tool("sample_data", tmp_path / "data", *arguments), 2)
    assert done.stderr.count("\n") == 1
    assert word in done.error
    assert not (tmp_path / "data").exists()


def test_a_folder_in_use_and_a_file_in_the_way_are_refused(tool, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for dest in (tmp_path / "used", tmp_path / "file", tmp_path / "file/below"):
        done = failed(tool("sample_data", dest, "--images", "20"), 2)
        assert done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]


def test_the_folder_one_stands_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(InputError, match="exists already"):
        make_sample(Path())


def test_an_empty_folder_is_filled(draw, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    succeeded(draw(tmp_path / "data", "--images", "20"))
    assert (tmp_path / "data/train/train/train.npz").exists()
