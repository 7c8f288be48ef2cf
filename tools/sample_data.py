"""Draw a small data set in the competition's exact layout: pictures, captions and embeddings, made by code.

    python tools/sample_data.py data                     # 2,000 pictures, 10,000 captions, some ten seconds
    python tools/sample_data.py build/big --full-size    # the competition's size and dtypes, no pictures

Scenes of coloured shapes are drawn with pillow and described in five differently worded captions each. Fixed random
encoders stand in for RoBERTa and DINOv2: hashed words and bigrams through a random two-layer map to 1024-d; pooled
colour and edge filters through a random layer to 1536-d, un-normalised around a strong common direction.
`solution.npz` holds the test images' embeddings: what a competitor never sees, only a grader may read it. As in the
competition, the test has captions and no pictures.
"""
from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from project import InputError, ToolError, run_tool
from tqdm import tqdm

TEXT_DIM, IMAGE_DIM = 1024, 1536
CAPTIONS_PER_IMAGE = 5
N_IMAGES, N_TEST = 2000, 500
FULL_IMAGES, FULL_TEST = 25_000, 1_500
FEWEST, MOST = 20, 100_000

# ------------------------------------------------------------------------------------------- scenes and pictures

WIDTH, HEIGHT = 180, 120

# name: (sky, ground, ways to say it)
SCENERY = {
    "meadow": ((150, 200, 240), (95, 160, 70), ("in a meadow", "on green grass", "over a grassy field")),
    "beach": ((110, 185, 225), (232, 210, 155), ("on a beach", "on the sand by the sea", "at the seaside")),
    "night": ((22, 26, 58), (48, 46, 62), ("at night", "under a dark sky", "in the dark")),
    "snow": ((200, 214, 228), (240, 243, 248), ("in the snow", "on a snowy plain", "in white winter")),
    "dusk": ((240, 150, 110), (110, 70, 90), ("at sunset", "under an orange evening sky", "at dusk")),
    "desert": ((245, 222, 170), (205, 140, 80), ("in the desert", "on a dry dune", "in a hot dry place")),
    "room": ((214, 202, 220), (140, 105, 80), ("in a room", "against a wall", "indoors on a wooden floor")),
    "sea": ((175, 205, 215), (40, 95, 150), ("at sea", "above deep water", "over the waves")),
}
COLOURS = {
    "red": ((215, 35, 40), ("red", "crimson", "scarlet")),
    "orange": ((250, 135, 20), ("orange", "tangerine")),
    "yellow": ((250, 225, 40), ("yellow", "golden")),
    "green": ((30, 130, 60), ("green", "emerald")),
    "blue": ((35, 80, 210), ("blue", "azure", "navy")),
    "purple": ((130, 50, 160), ("purple", "violet")),
    "pink": ((250, 140, 185), ("pink", "rose")),
    "white": ((252, 252, 252), ("white", "pale")),
    "black": ((18, 18, 20), ("black", "dark")),
    "brown": ((120, 75, 40), ("brown", "chocolate")),
}
KINDS = {
    "circle": ("circle", "disc", "ball", "round shape"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "three-sided shape", "wedge"),
    "star": ("star", "five-pointed star", "starry shape"),
    "ring": ("ring", "hoop", '"O"'),
    "cross": ("cross", "plus sign", '"+" sign'),
    "diamond": ("diamond", "rhombus", "tilted square"),
    "bar": ("bar", "beam", "long strip"),
}
SIZES = {  # radius in pixels, ways to say it
    "small": (9, ("small", "little", "tiny")),
    "medium": (15, ("", "", "medium-sized")),
    "large": (23, ("large", "big", "huge")),
}
COLUMNS = {"left": ("on the left", "at the left edge"), "middle": ("in the middle", "at the centre"),
           "right": ("on the right", "at the right edge")}
ROWS = {"high": ("up high", "near the top"), "low": ("down low", "near the bottom")}
COUNTS = {1: ("one shape", "a single shape"), 2: ("two shapes", "a pair of shapes"), 3: ("three shapes", "a trio")}


@dataclass(frozen=True)
class Shape:
    """One coloured shape of a scene, with its place in pixels."""

    kind: str
    colour: str
    size: str
    column: str
    row: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows and its captions describe."""

    scenery: str
    horizon: float
    shapes: tuple[Shape, ...]


def pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    """One of the options, at random."""
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def make_scene(rng: np.random.Generator) -> Scene:
    """One to three shapes in different cells of a 3 x 2 grid, so that they seldom hide one another."""
    cells = [(column, row) for column in COLUMNS for row in ROWS]
    count = int(rng.choice([1, 2, 3], p=[.2, .45, .35]))
    shapes = []
    for cell in rng.choice(len(cells), size=count, replace=False):
        column, row = cells[cell]
        x = (list(COLUMNS).index(column) + .5) * WIDTH / 3 + rng.uniform(-10, 10)
        y = (list(ROWS).index(row) + .5) * HEIGHT / 2 + rng.uniform(-9, 9)
        shapes.append(Shape(pick(rng, KINDS), pick(rng, COLOURS), pick(rng, SIZES), column, row, x, y))
    return Scene(pick(rng, SCENERY), float(rng.uniform(.4, .75)), tuple(shapes))


def polygon(x: float, y: float, radii: Iterable[float], turn: float) -> list[tuple[float, float]]:
    """Corners at equal angles with the given radii, from `turn` radians on."""
    radii = list(radii)
    angles = turn + np.arange(len(radii)) * 2 * np.pi / len(radii)
    return [(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]


def draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, scale: int) -> None:
    """Fill one shape, at `scale` times its size."""
    x, y, r = shape.x * scale, shape.y * scale, SIZES[shape.size][0] * scale
    fill = COLOURS[shape.colour][0]
    if shape.kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.kind == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(r * .4))
    elif shape.kind == "bar":
        draw.rectangle((x - 1.2 * r, y - .3 * r, x + 1.2 * r, y + .3 * r), fill=fill)
    elif shape.kind == "cross":
        draw.rectangle((x - r, y - .3 * r, x + r, y + .3 * r), fill=fill)
        draw.rectangle((x - .3 * r, y - r, x + .3 * r, y + r), fill=fill)
    else:
        radii, turn = {"square": ([1.2] * 4, np.pi / 4), "triangle": ([1.15] * 3, -np.pi / 2),
                       "star": ([1.2, .5] * 5, -np.pi / 2), "diamond": ([1.2, .8] * 2, -np.pi / 2)}[shape.kind]
        draw.polygon(polygon(x, y, [r * radius for radius in radii], turn), fill=fill)


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene: shaded sky and ground with grain, shapes drawn at twice the size for smooth edges."""
    sky, ground, _ = SCENERY[scene.scenery]
    horizon = int(scene.horizon * HEIGHT)
    rows = np.where(np.arange(HEIGHT)[:, None] < horizon, sky, ground).astype(np.float32)
    rows += np.linspace(-14, 14, HEIGHT)[:, None] + rng.normal(0, 7, 3)
    pixels = rows[:, None] + rng.normal(0, 5, (HEIGHT, WIDTH, 1))
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize((2 * WIDTH, 2 * HEIGHT), Image.NEAREST)
    draw = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        draw_shape(draw, shape, 2)
    return picture.reduce(2)


# ------------------------------------------------------------------------------------------------------ captions


def noun(shape: Shape, rng: np.random.Generator, detail: float) -> str:
    """A shape in words; each of size and colour is said with probability `detail`, the colour a little more often."""
    words = []
    if rng.random() < detail:
        words.append(pick(rng, SIZES[shape.size][1]))
    if rng.random() < detail + .2:
        words.append(pick(rng, COLOURS[shape.colour][1]))
    words.append(pick(rng, KINDS[shape.kind]))
    phrase = " ".join(word for word in words if word)
    return ("an " if phrase.startswith(("a", "e", "i", "o", '"O')) else "a ") + phrase


def describe(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five captions of a scene: each with another focus, order, wording and share of what there is to say."""
    order = [scene.shapes[i] for i in rng.permutation(len(scene.shapes))]
    first, last = order[0], order[-1]
    where, side = SCENERY[scene.scenery][2], f"{pick(rng, COLUMNS[first.column])} {pick(rng, ROWS[first.row])}"
    captions = [
        f"{' and '.join(noun(shape, rng, .9) for shape in order)} {pick(rng, where)} .",
        f"{noun(first, rng, .9)} {side} , {pick(rng, where)} .",
        f"there is {noun(last, rng, .8)} {pick(rng, COLUMNS[last.column])} of a picture taken {pick(rng, where)} .",
        f"{pick(rng, COUNTS[len(order)])} {pick(rng, where)} with {noun(first, rng, .8)} to see .",
        relation(first, last, rng) if len(order) > 1 else f"{pick(rng, where)} , only {noun(first, rng, .8)} .",
    ]
    return [captions[i][0].upper() + captions[i][1:] for i in rng.permutation(CAPTIONS_PER_IMAGE)]


def relation(first: Shape, last: Shape, rng: np.random.Generator) -> str:
    """How two shapes lie to one another."""
    if first.column == last.column:
        word = "above" if first.y < last.y else "below"
    else:
        word = "left of" if first.x < last.x else "right of"
    return f"{noun(first, rng, .9)} {word} {noun(last, rng, .9)} ."


# ------------------------------------------------------------------------------------------------------ encoders

ENCODER_SEED = 20251  # the encoders are fixed: only the scenes and the wording follow --seed
BUCKETS = 4096
FUNCTION_WORDS = frozenset(["a", "an", ".", ",", "of", "the", "and", "is", "there", "in", "on", "at", "with", "to",
                            "see", "taken", "picture"])
COLOUR_FILTERS, EDGE_FILTERS = 64, 24
GRID = (2, 3)
SHRINK = 3  # the encoder sees pictures at a third of their size: less to compute, shapes still to be told apart


def encode_text(captions: list[str]) -> np.ndarray:
    """(n, 1024) float32: hashed words and bigrams, function words muted, through a random two-layer map."""
    rng = np.random.default_rng(ENCODER_SEED)
    table = rng.normal(size=(BUCKETS, TEXT_DIM)).astype(np.float32)
    mix = rng.normal(size=(TEXT_DIM, TEXT_DIM)).astype(np.float32) / np.float32(TEXT_DIM ** .5)
    common = rng.normal(size=TEXT_DIM).astype(np.float32)
    sums = np.empty((len(captions), TEXT_DIM), np.float32)
    for row, caption in zip(sums, captions, strict=True):
        words = caption.lower().split()
        tokens = [*((word,) for word in words), *pairwise(words)]
        weights = np.array([.1 if FUNCTION_WORDS.issuperset(token) else 1 for token in tokens], np.float32)
        rows = [zlib.crc32(" ".join(token).encode()) % BUCKETS for token in tokens]
        row[:] = weights @ table[rows] / np.linalg.norm(weights)
    return np.float32(.5) * (np.tanh(np.tanh(sums) @ mix) + np.float32(.4) * common)


def picture_features(pictures: list[Image.Image]) -> np.ndarray:
    """(n, filters, 1 + cells) pooled responses of random colour and edge filters, over the whole and over each cell."""
    rng = np.random.default_rng(ENCODER_SEED + 1)
    tints = rng.uniform(0, 1, size=(3, COLOUR_FILTERS)).astype(np.float32)
    angles = rng.uniform(0, 2 * np.pi, EDGE_FILTERS).astype(np.float32)
    pixels = np.stack([np.asarray(picture.reduce(SHRINK), np.float32) for picture in pictures]) / 255
    distance = (pixels ** 2).sum(-1, keepdims=True) - 2 * pixels @ tints + (tints ** 2).sum(0)
    down, across = np.gradient(pixels.mean(-1), axis=(1, 2))
    edges = across[..., None] * np.cos(angles) + down[..., None] * np.sin(angles)
    responses = np.concatenate([np.exp(-25 * distance), np.maximum(4 * edges - .15, 0)], -1)
    n, height, width, filters = responses.shape
    cells = responses.reshape(n, GRID[0], height // GRID[0], GRID[1], width // GRID[1], filters).mean((2, 4))
    cells = cells.reshape(n, -1, filters)
    # the root keeps a small shape visible beside a large background
    return np.concatenate([cells.mean(1, keepdims=True), cells], 1).transpose(0, 2, 1) ** .25


def encode_pictures(features: np.ndarray) -> np.ndarray:
    """(n, 1536) float32 around one strong common direction; pictures with more to see are longer vectors."""
    rng = np.random.default_rng(ENCODER_SEED + 2)
    detail = features[:, COLOUR_FILTERS:].mean((1, 2))
    weights = np.array([3] + [1] * (features.shape[2] - 1), np.float32)  # what is seen counts more than where
    flat = ((features - .4) * weights).reshape(len(features), -1)
    mix = rng.normal(size=(flat.shape[1], IMAGE_DIM)).astype(np.float32) / np.float32(flat.shape[1] ** .5)
    common = rng.normal(size=IMAGE_DIM).astype(np.float32)
    vectors = np.tanh(3 * flat @ mix) + np.float32(.3) * common
    return (vectors * .93 * np.exp(1.6 * (detail - .17))[:, None]).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- writing

class Blocks:
    """An array that is written block by block and never held as a whole."""

    def __init__(self, dtype: type, shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> None:
        self.dtype, self.shape, self.blocks = np.dtype(dtype), shape, blocks


def write_npz(path: Path, arrays: dict[str, np.ndarray | Blocks]) -> None:
    """A compressed .npz, at the fastest level: embeddings hardly shrink, one-hot labels shrink at any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for key, array in arrays.items():
            header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
            with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for block in array.blocks if isinstance(array, Blocks) else [array]:
                    entry.write(np.ascontiguousarray(block).data)


def one_hot(images: int, rows: int = 500) -> Blocks:
    """The label of five consecutive captions an image, as a stream."""
    captions = images * CAPTIONS_PER_IMAGE

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, captions, rows):
            block = np.zeros((min(rows, captions - start), images), bool)
            block[np.arange(len(block)), np.arange(start, start + len(block)) // CAPTIONS_PER_IMAGE] = True
            yield block

    return Blocks(np.bool_, (captions, images), blocks())


def metadata(captions: int, images: int) -> dict[str, np.ndarray]:
    """The keys that both files begin with."""
    sizes = {"num_captions": captions, "num_images": images, "embedding_dim_text": TEXT_DIM,
             "embedding_dim_image": IMAGE_DIM}
    return {f"metadata/{key}": np.array([size]) for key, size in sizes.items()}


def write_train(root: Path, names: list[str], captions: list[str], text: np.ndarray | Blocks,
                images: np.ndarray) -> None:
    """train.npz and captions.txt, where the unzipped competition has them."""
    write_npz(root / "train/train/train.npz", metadata(len(captions), len(names)) | {
        "captions/ids": np.arange(len(captions)), "captions/text": np.array(captions), "captions/embeddings": text,
        "captions/label": one_hot(len(names)), "images/names": np.array(names), "images/embeddings": images})
    with (root / "train/train/captions.txt").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "caption"])
        writer.writerows((names[i // CAPTIONS_PER_IMAGE], caption) for i, caption in enumerate(captions))


def write_test(root: Path, captions: list[str], text: np.ndarray, images: np.ndarray) -> None:
    """test.clean.npz and captions.txt, and outside of them what only a grader reads."""
    ids = np.arange(1, len(captions) + 1)
    write_npz(root / "test/test/test.clean.npz", metadata(len(captions), len(captions)) | {
        "captions/ids": ids, "captions/text": np.array(captions), "captions/embeddings": text})
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
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise InputError(f"{dest}: exists already; remove it or name another folder")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    except OSError as error:
        raise InputError(f"{dest}: cannot be made ({error.strerror}); name another folder") from error
    try:
        yield temporary
        temporary.chmod(0o755)
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

def draw_set(n: int, rng: np.random.Generator, names: list[str] | None, folder: Path,
             what: str) -> tuple[list[list[str]], np.ndarray]:
    """Captions and embeddings of `n` new scenes; the pictures are kept in `folder` under `names`, if there are any."""
    captions, features, block = [], [], 100
    for start in progress(range(0, n, block), what):
        scenes = [make_scene(rng) for _ in range(start, min(start + block, n))]
        captions += [describe(scene, rng) for scene in scenes]
        pictures = [draw_scene(scene, rng) for scene in scenes]
        features.append(picture_features(pictures))
        for name, picture in zip((names or [])[start:], pictures, strict=False):
            picture.save(folder / name, quality=88)
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
        fives, images = draw_set(n_images, rng, names, folder, f"drawing {n_images} pictures")
        captions = [caption for five in fives for caption in five]
        write_train(root, names, captions, encode_text(captions), images)
        fives, images = draw_set(n_test, rng, None, folder, f"drawing {n_test} test scenes")
        test_captions = [five[0] for five in fives]
        write_test(root, test_captions, encode_text(test_captions), images)


def make_full_size(dest: Path, n_images: int = FULL_IMAGES, seed: int = 0, n_test: int = FULL_TEST) -> None:
    """Synthetic data of the competition's size and dtypes in `dest`: a shared latent plus noise, no pictures."""
    rng = np.random.default_rng(seed)
    to_text, to_image = (rng.normal(size=(48, dim)).astype(np.float32) for dim in (TEXT_DIM, IMAGE_DIM))
    common = rng.normal(size=IMAGE_DIM).astype(np.float32)
    latent = rng.normal(size=(n_images + n_test, 48)).astype(np.float32)
    images = rng.standard_normal((len(latent), IMAGE_DIM), np.float32) * np.float32(.1)
    images += latent @ to_image / np.float32(20) + common / 2
    images *= np.exp(rng.normal(.05, .08, size=(len(latent), 1))).astype(np.float32)

    def captions_of(rows: np.ndarray) -> np.ndarray:
        seen = np.tanh(latent[rows] + rng.standard_normal((len(rows), 48), np.float32) * np.float32(.5))
        return seen @ to_text / 16 + rng.standard_normal((len(rows), TEXT_DIM), np.float32) * np.float32(.1)

    n, step = n_images * CAPTIONS_PER_IMAGE, 5000
    starts = progress(range(0, n, step), f"writing {n} captions of {n_images} images")
    blocks = (captions_of(np.arange(start, min(start + step, n)) // CAPTIONS_PER_IMAGE) for start in starts)
    with whole_folder(dest) as root:
        names = picture_names(n_images, rng)
        captions = [f"Synthetic caption {i % CAPTIONS_PER_IMAGE + 1} of {names[i // CAPTIONS_PER_IMAGE]} ."
                    for i in range(n)]
        write_train(root, names, captions, Blocks(np.float32, (n, TEXT_DIM), blocks), images[:n_images])
        write_test(root, [f"Synthetic test caption {i + 1} ." for i in range(n_test)],
                   captions_of(np.arange(n_images, len(latent))), images[n_images:])


# -------------------------------------------------------------------------------------------------- command line

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Draw a small data set in the competition's layout (pictures, captions, embeddings).",
        epilog="example: python tools/sample_data.py data && python tools/run_local.py")
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder to make; it appears complete or not at all")
    parser.add_argument("--images", type=int, help=f"training images (default {N_IMAGES}; full size {FULL_IMAGES})")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (default 0)")
    parser.add_argument("--full-size", action="store_true",
                        help="synthetic arrays of the competition's size instead, without pictures")
    given = parser.parse_args(argv)
    make, default = (make_full_size, FULL_IMAGES) if given.full_size else (make_sample, N_IMAGES)
    images = default if given.images is None else given.images
    if not FEWEST <= images <= MOST:
        raise InputError(f"--images {images}: give {FEWEST} to {MOST}")
    if given.seed < 0:
        raise InputError(f"--seed {given.seed}: give 0 or more")
    make(given.dest, images, given.seed)
    size = sum(path.stat().st_size for path in given.dest.rglob("*") if path.is_file())
    print(f"{given.dest}: {images} images, {images * CAPTIONS_PER_IMAGE} captions, {size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    run_tool(main)
