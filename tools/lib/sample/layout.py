"""The drawn data sets in the competition's exact layout: all of a folder or nothing."""

from __future__ import annotations

import csv
import secrets
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.project import InputError, ToolError
from lib.sample.encoders import IMAGE_DIM, TEXT_DIM, encode_pictures, encode_text, picture_features
from lib.sample.scenes import CAPTIONS_PER_IMAGE, describe, draw_scene, make_scene

N_IMAGES, N_TEST = 2000, 500
FULL_IMAGES, FULL_TEST = 25_000, 1_500
FEWEST, MOST = 20, 100_000


# ------------------------------------------------------------------------------------------------------- writing
class Blocks:
    """An array that is written block by block and never held as a whole."""

    def __init__(self, dtype: type, shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> None:
        self.dtype, self.shape, self.blocks = np.dtype(dtype), shape, blocks


def write_npz(path: Path, arrays: Mapping[str, np.ndarray | Blocks]) -> None:
    """A compressed .npz, at the fastest level: embeddings hardly shrink, one-hot labels shrink at any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for key, array in arrays.items():
            header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
            with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for block in array.blocks if isinstance(array, Blocks) else [array]:
                    entry.write(np.ascontiguousarray(block).data)


def one_hot(images: int) -> Blocks:
    """The label of five consecutive captions an image, as a stream."""
    captions, rows = images * CAPTIONS_PER_IMAGE, 500

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, captions, rows):
            block = np.zeros((min(rows, captions - start), images), bool)
            block[np.arange(len(block)), np.arange(start, start + len(block)) // CAPTIONS_PER_IMAGE] = True
            yield block

    return Blocks(np.bool_, (captions, images), blocks())


def metadata(captions: int, images: int) -> dict[str, np.ndarray]:
    """The keys that both files begin with."""
    sizes = {
        "num_captions": captions,
        "num_images": images,
        "embedding_dim_text": TEXT_DIM,
        "embedding_dim_image": IMAGE_DIM,
    }
    return {f"metadata/{key}": np.array([size]) for key, size in sizes.items()}


def write_train(
    root: Path, names: list[str], captions: list[str], text: np.ndarray | Blocks, images: np.ndarray
) -> None:
    """train.npz and captions.txt, where the unzipped competition has them."""
    write_npz(
        root / "train/train/train.npz",
        {
            **metadata(len(captions), len(names)),
            "captions/ids": np.arange(len(captions)),
            "captions/text": np.array(captions),
            "captions/embeddings": text,
            "captions/label": one_hot(len(names)),
            "images/names": np.array(names),
            "images/embeddings": images,
        },
    )
    with (root / "train/train/captions.txt").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "caption"])
        writer.writerows((names[i // CAPTIONS_PER_IMAGE], caption) for i, caption in enumerate(captions))


def write_test(root: Path, captions: list[str], text: np.ndarray, images: np.ndarray) -> None:
    """test.clean.npz and captions.txt, and outside of them what only a grader reads."""
    ids = np.arange(1, len(captions) + 1)
    write_npz(
        root / "test/test/test.clean.npz",
        metadata(len(captions), len(captions))
        | {"captions/ids": ids, "captions/text": np.array(captions), "captions/embeddings": text},
    )
    with (root / "test/test/captions.txt").open("w", encoding="utf-8") as file:
        file.write("id,caption\n")
        file.writelines(f"{number},{cut_caption(caption)}\n" for number, caption in zip(ids, captions, strict=True))
    write_npz(root / "solution.npz", {"captions/ids": ids, "images/embeddings": images})


def cut_caption(caption: str) -> str:
    """As the competition's file has it: cut at the first comma, which leaves the quotes of a csv cell open."""
    if "," not in caption:
        return caption
    quoted = caption.replace('"', '""')
    return f'"""{quoted}"""'.partition(",")[0]


@contextmanager
def whole_folder(dest: Path) -> Iterator[Path]:
    """A temporary folder that becomes `dest` when the block succeeds and vanishes when it does not."""
    empty = dest.is_dir() and not any(dest.iterdir())
    if dest.exists() and not (empty and dest.name):  # "." has none: nothing can take its place
        raise InputError(f"{dest}: exists already; remove it or name another folder")
    try:
        temporary = dest.with_name(f".{dest.name}.{secrets.token_hex(4)}.part")
        temporary.mkdir(parents=True)  # with the rights that the user's umask gives a folder
    except OSError as error:
        raise InputError(f"{dest}: cannot be made ({error.strerror}); name another folder") from error
    try:
        yield temporary
        temporary.replace(dest)
    except OSError as error:
        raise ToolError(f"{dest}: cannot be written ({error.strerror}); free some space or name another one") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def progress(items: Iterable, what: str) -> Iterable:
    """A bar on a terminal, a line where the output is kept."""
    if sys.stderr.isatty():
        return tqdm(items, desc=what, leave=False)
    print(what, file=sys.stderr, flush=True)
    return items


# ------------------------------------------------------------------------------------------------- the two sets
def draw_set(n: int, rng: np.random.Generator, photos: list[Path], what: str) -> tuple[list[list[str]], np.ndarray]:
    """Captions and embeddings of `n` new scenes; the pictures are kept as `photos`, if there are any."""
    captions, features, block = [], [], 100
    for start in progress(range(0, n, block), what):
        scenes = [make_scene(rng) for _ in range(start, min(start + block, n))]
        captions += [describe(scene, rng) for scene in scenes]
        pictures = [draw_scene(scene, rng) for scene in scenes]
        features.append(picture_features(pictures))
        for path, picture in zip(photos[start:], pictures, strict=False):
            picture.save(path, quality=88)
    return captions, encode_pictures(np.concatenate(features))


def picture_names(n: int, rng: np.random.Generator) -> list[str]:
    """Flickr-like file names, all different, in the order of their digits."""
    return [f"{number}.jpg" for number in np.cumsum(rng.integers(1, 4_000_000, size=n)) + 1_000_000_000]


def make_sample(dest: Path, n_images: int = N_IMAGES, seed: int = 0, n_test: int = N_TEST) -> None:
    """Draw the sample data set into the new folder `dest`: all of it or nothing."""
    rng = np.random.default_rng(seed)
    with whole_folder(dest) as root:
        names, folder = picture_names(n_images, rng), root / "train/train/Images"
        folder.mkdir(parents=True)
        photos = [folder / name for name in names]
        fives, images = draw_set(n_images, rng, photos, f"drawing {n_images} pictures")
        captions = [caption for five in fives for caption in five]
        write_train(root, names, captions, encode_text(captions), images)
        fives, images = draw_set(n_test, rng, [], f"drawing {n_test} test scenes")
        test_captions = [five[0] for five in fives]
        write_test(root, test_captions, encode_text(test_captions), images)


def make_full_size(dest: Path, n_images: int = FULL_IMAGES, seed: int = 0, n_test: int = FULL_TEST) -> None:
    """Synthetic data of the competition's size and dtypes in `dest`: a shared latent plus noise, no pictures."""
    rng = np.random.default_rng(seed)
    to_text, to_image = (rng.normal(size=(48, dim)).astype(np.float32) for dim in (TEXT_DIM, IMAGE_DIM))
    common = rng.normal(size=IMAGE_DIM).astype(np.float32)
    latent = rng.normal(size=(n_images + n_test, 48)).astype(np.float32)
    images = rng.standard_normal((len(latent), IMAGE_DIM), np.float32) * np.float32(0.1)
    images += latent @ to_image / np.float32(20) + common / 2
    images *= np.exp(rng.normal(0.05, 0.08, size=(len(latent), 1))).astype(np.float32)

    def captions_of(rows: np.ndarray) -> np.ndarray:
        seen = np.tanh(latent[rows] + rng.standard_normal((len(rows), 48), np.float32) * np.float32(0.5))
        return seen @ to_text / 16 + rng.standard_normal((len(rows), TEXT_DIM), np.float32) * np.float32(0.1)

    n, step = n_images * CAPTIONS_PER_IMAGE, 5000
    starts = progress(range(0, n, step), f"writing {n} captions of {n_images} images")
    blocks = (captions_of(np.arange(start, min(start + step, n)) // CAPTIONS_PER_IMAGE) for start in starts)
    with whole_folder(dest) as root:
        names = picture_names(n_images, rng)
        captions = [
            f"Synthetic caption {i % CAPTIONS_PER_IMAGE + 1} of {names[i // CAPTIONS_PER_IMAGE]} ." for i in range(n)
        ]
        write_train(root, names, captions, Blocks(np.float32, (n, TEXT_DIM), blocks), images[:n_images])
        write_test(
            root,
            [f"Synthetic test caption {i + 1} ." for i in range(n_test)],
            captions_of(np.arange(n_images, len(latent))),
            images[n_images:],
        )
