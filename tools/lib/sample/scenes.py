"""Scenes of coloured shapes: drawn with pillow, described in five differently worded captions each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

CAPTIONS_PER_IMAGE = 5

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
COLUMNS = {
    "left": ("on the left", "at the left edge"),
    "middle": ("in the middle", "at the centre"),
    "right": ("on the right", "at the right edge"),
}
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
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def make_scene(rng: np.random.Generator) -> Scene:
    """One to three shapes in different cells of a 3 x 2 grid, so that they seldom hide one another."""
    cells = [(column, row) for column in COLUMNS for row in ROWS]
    count = int(rng.choice([1, 2, 3], p=[0.2, 0.45, 0.35]))
    shapes = []
    for cell in rng.choice(len(cells), size=count, replace=False):
        column, row = cells[cell]
        x = (list(COLUMNS).index(column) + 0.5) * WIDTH / 3 + rng.uniform(-10, 10)
        y = (list(ROWS).index(row) + 0.5) * HEIGHT / 2 + rng.uniform(-9, 9)
        shapes.append(Shape(pick(rng, KINDS), pick(rng, COLOURS), pick(rng, SIZES), column, row, x, y))
    return Scene(pick(rng, SCENERY), float(rng.uniform(0.4, 0.75)), tuple(shapes))


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
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(r * 0.4))
    elif shape.kind == "bar":
        draw.rectangle((x - 1.2 * r, y - 0.3 * r, x + 1.2 * r, y + 0.3 * r), fill=fill)
    elif shape.kind == "cross":
        draw.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=fill)
        draw.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=fill)
    else:
        radii, turn = {
            "square": ([1.2] * 4, np.pi / 4),
            "triangle": ([1.15] * 3, -np.pi / 2),
            "star": ([1.2, 0.5] * 5, -np.pi / 2),
            "diamond": ([1.2, 0.8] * 2, -np.pi / 2),
        }[shape.kind]
        draw.polygon(polygon(x, y, [r * radius for radius in radii], turn), fill=fill)


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene: shaded sky and ground with grain, shapes drawn at twice the size for smooth edges."""
    sky, ground, _ = SCENERY[scene.scenery]
    horizon = int(scene.horizon * HEIGHT)
    rows = np.where(np.arange(HEIGHT)[:, None] < horizon, sky, ground).astype(np.float32)
    rows += np.linspace(-14, 14, HEIGHT)[:, None] + rng.normal(0, 7, 3)
    pixels = rows[:, None] + rng.normal(0, 5, (HEIGHT, WIDTH, 1))
    scenery = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    picture = scenery.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.NEAREST)
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
    if rng.random() < detail + 0.2:
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
        f"{' and '.join(noun(shape, rng, 0.9) for shape in order)} {pick(rng, where)} .",
        f"{noun(first, rng, 0.9)} {side} , {pick(rng, where)} .",
        f"there is {noun(last, rng, 0.8)} {pick(rng, COLUMNS[last.column])} of a picture taken {pick(rng, where)} .",
        f"{pick(rng, COUNTS[len(order)])} {pick(rng, where)} with {noun(first, rng, 0.8)} to see .",
        relation(first, last, rng) if len(order) > 1 else f"{pick(rng, where)} , only {noun(first, rng, 0.8)} .",
    ]
    return [captions[i][0].upper() + captions[i][1:] for i in rng.permutation(CAPTIONS_PER_IMAGE)]


def relation(first: Shape, last: Shape, rng: np.random.Generator) -> str:
    """How two shapes lie to one another."""
    if first.column == last.column:
        word = "above" if first.y < last.y else "below"
    else:
        word = "left of" if first.x < last.x else "right of"
    return f"{noun(first, rng, 0.9)} {word} {noun(last, rng, 0.9)} ."
