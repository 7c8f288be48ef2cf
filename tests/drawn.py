"""A tiny drawn data set in the competition's layout, made in milliseconds: same seed, same bytes.

Captions and photos share a low-rank latent; captions see it bent (so that a network beats a linear map) and noisy,
in their vectors and in their words; photos have a strong common direction and lengths that differ, as the real ones do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TEXT, IMAGE, LATENT = 32, 48, 16
SMALL = [
    "--set=hidden=32",
    "--set=epochs=3",
    "--set=batch=64",
    "--set=min_steps=0",
    "--set=device=cpu",
    "--set=dtype=float32",
    "--set=word_width=16",
]
TINY = ["--recipe=align", *SMALL]
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


def draw_arrays(
    images: int = 240, captions: int = 5, test: int = 100, seed: int = 0, noise: float = 0.2, bend: float = 0.7
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The arrays of train.npz and test.clean.npz by key; the more `bend`, the less a linear map finds."""
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
    return train, {
        **metadata(test, test),
        "captions/ids": np.arange(1, test + 1),
        "captions/text": words[n:],
        "captions/embeddings": text[n:],
    }


def in_words(latent: np.ndarray) -> str:
    """A caption that names the five coordinates that are largest, and their signs."""
    strongest = np.argsort(-np.abs(latent))[:5]
    return "A drawing of " + " ".join(f"{'more' if latent[k] > 0 else 'less'}{k}" for k in strongest) + "."


def metadata(captions: int, images: int) -> dict[str, np.ndarray]:
    values = {"num_captions": captions, "num_images": images, "embedding_dim_text": TEXT, "embedding_dim_image": IMAGE}
    return {f"metadata/{key}": np.array([value]) for key, value in values.items()}


def write_data(root: Path, train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> Path:
    """Both files in the nesting of the unzipped download; a falsy set is left out."""
    for folder, name, arrays in (("train", "train.npz", train), ("test", "test.clean.npz", test)):
        if arrays:
            path = root / folder / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **arrays)
    return root


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
