"""Wrong data, places and arguments: one line that names the thing, exit code 2, nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drawn import BENT, SMALL, TEST, TINY, TRAIN, draw_data
from forked import succeeded
from lib.project import sha256_of
from outputs import SUBMISSION, fails


def with_nan(array: np.ndarray) -> np.ndarray:
    array[6, 2] = np.nan
    return array


WRONG_DATA: dict[str, tuple[dict | None, dict | None, str]] = {
    "missing key": ({"images/embeddings": None}, None, "images/embeddings: this key is missing; there are"),
    "text dimension": (None, {"captions/embeddings": lambda text: text[:, :-1]}, "31 dimensions, but"),
    "image dimension": (None, {"metadata/embedding_dim_image": np.array([47])}, "47 dimensions, but"),
    "NaN in test": (None, {"captions/embeddings": with_nan}, "test.clean.npz: captions/embeddings: row 6 holds NaN"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data_is_one_line_and_leaves_nothing(server, tmp_path: Path, case: str):
    change_train, change_test, message = WRONG_DATA[case]
    root = draw_data(tmp_path / "data", change_train, change_test)
    fails(server, message, tmp_path / "out", root, *TINY)
    assert not (tmp_path / "out").exists()


def test_consecutive_captions_are_taken_where_that_is_asked_for(server, data: Path, tmp_path: Path):
    root = draw_data(tmp_path / "data", {"captions/label": None}, **BENT)
    shas = []
    for source in (root, data):
        output = tmp_path / source.name / "out"
        settings = ("--recipe=closed_form", *SMALL, "--set=consecutive_captions=true")
        ended = succeeded(server.run("--input", source, "--output", output, *settings))
        assert ("consecutive captions an image" in ended.stdout) == (source is root)
        shas.append(sha256_of(output / SUBMISSION))
    assert shas[0] == shas[1]


WRONG_PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing folder": (shutil.rmtree, "no such input folder; name the one that holds the data"),
    "a file for a folder": (lambda root: (shutil.rmtree(root), root.touch()), "no such input folder"),
    "no test": (lambda root: (root / TEST).unlink(), "no test.clean.npz below it"),
    "truncated": (lambda root: (root / TRAIN).write_bytes((root / TRAIN).read_bytes()[:9000]), "cannot be read"),
}


@pytest.mark.parametrize("case", WRONG_PLACES)
def test_wrong_places_are_one_line_and_leave_nothing(server, tmp_path: Path, case: str):
    change, message = WRONG_PLACES[case]
    change(draw_data(tmp_path / "data"))
    fails(server, message, tmp_path / "out", tmp_path / "data", *TINY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--set=hiden=7", "unknown knob 'hiden'; did you mean hidden"),
        ("--set=epochs", "expected KEY=VALUE"),
        ("--recipe=best", "unknown recipe 'best'; there are baseline"),
        ("--mode=guess", "knob 'mode' is one of train, predict"),
    ],
)
def test_wrong_arguments_are_one_line(server, data: Path, tmp_path: Path, argument: str, message: str):
    fails(server, message, tmp_path / "out", data, *TINY, argument)


def test_an_unwritable_output_folder(server, data: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    fails(server, "cannot be written to", tmp_path / "file" / "out", data, *TINY)
    fails(server, "choose another --output", tmp_path / "file", data, *TINY)
