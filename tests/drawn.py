"""A tiny drawn data set in the competition's layout, made in milliseconds: same seed, same bytes.

Captions and photos share a low-rank latent; captions see it bent (so that a network beats a linear map) and noisy,
in their vectors and in their words; photos have a strong common direction and lengths that differ, as the real ones do.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np

TEXT, IMAGE, LATENT = 32, 48, 16
TRAIN, TEST = "train/train/train.npz", "test/test/test.clean.npz"  # as the download is nested
KNOBS = {
    "hidden": 32,
    "epochs": 3,
    "batch": 64,
    "min_steps": 0,
    "device": "cpu",
    "dtype": "float32",
    "word_width": 16,
}  # of a network that trains in no time
SMALL = [f"--set={name}={value}" for name, value in KNOBS.items()]
TINY = ["--recipe=align", *SMALL]
CLOSED = ["--recipe=closed_form", *SMALL]
# Data on which networks beat the closed form within a second, and knobs for it (a later --set wins).
BENT = {"bend": 1.5}
LEARNING = [
    *SMALL,
    "--set=hidden=64",
    "--set=epochs=8",
    "--set=batch=128",
    "--set=lr=6e-3",
    "--set=dropout=0.1",
    "--set=input_dropout=0",
    "--set=val_fraction=0.4",
]
JOINED = ["--recipe=align", *LEARNING]  # the closed form, and a network of vector and words that beats it


Arrays = dict[str, np.ndarray]


def draw_arrays(**size: Any) -> tuple[Arrays, Arrays]:
    """The arrays of train.npz and test.clean.npz by key, which are the caller's to change."""
    train, test, _ = draw_with_answers(**size)
    return tuple({key: array.copy() for key, array in arrays.items()} for arrays in (train, test))


@functools.cache
def draw_with_answers(
    images: int = 240, captions: int = 5, test: int = 100, seed: int = 0, noise: float = 0.2, bend: float = 0.7
) -> tuple[Arrays, Arrays, Arrays]:
    """train.npz, test.clean.npz and the answers to the latter; the more `bend`, the less a linear map finds."""
    draw = np.random.default_rng(seed)
    latent = draw.normal(size=(images + test, LATENT))
    bent, to_text = draw.normal(size=(LATENT, TEXT)), draw.normal(size=(TEXT, TEXT))
    vectors = 12 * draw.normal(size=IMAGE) / IMAGE**0.5 + latent @ draw.normal(size=(LATENT, IMAGE)) / LATENT**0.5
    vectors = (vectors + 0.1 * draw.normal(size=vectors.shape)) * draw.uniform(0.95, 1.05, size=(len(vectors), 1))
    image_of = np.concatenate([np.repeat(np.arange(images), captions), np.arange(images, images + test)])
    seen = latent[image_of] + noise * draw.normal(size=(len(image_of), LATENT))
    text = np.sin(bend * seen @ bent / LATENT**0.5 + draw.normal(size=TEXT)) @ to_text / TEXT**0.5
    words = np.array([in_words(row) for row in seen])
    n, text, vectors = images * captions, text.astype(np.float32), vectors.astype(np.float32)
    train = {
        **metadata(n, images),
        "captions/ids": np.arange(1, n + 1),
        "captions/text": words[:n],
        "captions/embeddings": text[:n],
        "captions/label": image_of[:n, None] == np.arange(images),
        "images/names": np.array([f"{1000 + i}.jpg" for i in range(images)]),
        "images/embeddings": vectors[:images],
    }
    asked = {
        **metadata(test, test),
        "captions/ids": np.arange(1, test + 1),
        "captions/text": words[n:],
        "captions/embeddings": text[n:],
    }
    return train, asked, {"captions/ids": asked["captions/ids"], "images/embeddings": vectors[images:]}


def in_words(latent: np.ndarray) -> str:
    """A caption that names the five coordinates that are largest, and their signs."""
    strongest = np.argsort(-np.abs(latent))[:5]
    return "A drawing of " + " ".join(f"{'more' if latent[k] > 0 else 'less'}{k}" for k in strongest) + "."


def metadata(captions: int, images: int) -> Arrays:
    values = {"num_captions": captions, "num_images": images, "embedding_dim_text": TEXT, "embedding_dim_image": IMAGE}
    return {f"metadata/{key}": np.array([value]) for key, value in values.items()}


def as_npz(arrays: Arrays) -> bytes:
    """The bytes of an npz."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    """Files below a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_data(root: Path, train: Arrays, test: Arrays) -> Path:
    """Both files in the nesting of the unzipped download; a falsy set is left out."""
    return write_tree(root, {name: as_npz(arrays) for name, arrays in ((TRAIN, train), (TEST, test)) if arrays})


@functools.cache
def drawn_competition() -> tuple[dict[str, bytes], dict[int, list[float]]]:
    """The competition's files as its server has them, and its solution: test id to image vector."""
    train, test, answers = draw_with_answers()
    vectors = dict(zip(answers["captions/ids"].tolist(), answers["images/embeddings"].tolist(), strict=True))
    return {TRAIN: as_npz(train), TEST: as_npz(test)}, vectors


def draw_data(
    root: Path, change_train: dict[str, Any] | None = None, change_test: dict[str, Any] | None = None, **size: Any
) -> Path:
    """A drawn data set below `root`; a changed array is a value, a function of the old one, or None to omit it."""
    sets = []
    for arrays, changes in zip(draw_arrays(**size), (change_train, change_test), strict=True):
        for key, change in (changes or {}).items():
            arrays[key] = change(arrays[key].copy()) if callable(change) else change
        sets.append({key: array for key, array in arrays.items() if array is not None})
    return write_data(root, *sets)
