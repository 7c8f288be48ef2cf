"""How the cost of training grows with the work: `python tools/benchmark.py --scaling` writes scaling.md and .png.

One thing grows at a time, over two decades, on random data; every point is the kernel itself as a sub-process.
The exponent is the slope of the upper decade in logarithms: below it a step costs what starting it costs.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lib.bench.measure import step_seconds
from lib.plots import CYCLE, LIGHT, WIDTH, headline, legend_below, save_png, themed
from lib.process import as_arguments
from lib.project import figure, format_table, markdown_table, write_file
from lib.runs import run_logged

EPOCHS = 2
TESTS = 100
SMALLEST_MIB = 16  # less than this above an idle process may be chance: what the allocator happens to keep


@dataclass(frozen=True)
class Problem:
    captions: int
    gallery: int
    dimension: int  # of text, images and the hidden layer


IDLE = Problem(captions=1000, gallery=200, dimension=24)  # all that a training of any size needs
AXES: dict[str, list[Problem]] = {
    "captions": [Problem(captions=n, gallery=200, dimension=256) for n in (600, 2000, 6000, 20_000, 60_000)],
    "gallery": [Problem(captions=20_000, gallery=m, dimension=256) for m in (200, 500, 2000, 5000, 20_000)],
    "dimension": [Problem(captions=2000, gallery=400, dimension=d) for d in (24, 80, 240, 800, 2400)],
}


@dataclass(frozen=True)
class Point:
    size: int
    epoch_seconds: float
    mebibytes: float  # above the idle process


def draw_problem(folder: Path, problem: Problem) -> None:
    """Random data of a size; without the one-hot label the captions of an image are consecutive."""
    draw = np.random.default_rng(0)

    def arrays(captions: int, images: int) -> dict[str, Any]:
        return {
            "captions/ids": np.arange(captions),
            "captions/text": np.full(captions, "drawn"),
            "captions/embeddings": draw.standard_normal((captions, problem.dimension), np.float32),
            "images/names": np.arange(images).astype(str),
            "images/embeddings": draw.standard_normal((images, problem.dimension), np.float32),
            "metadata/embedding_dim_image": np.array([problem.dimension]),
        }

    np.savez(folder / "train.npz", **arrays(problem.captions, problem.gallery))
    np.savez(folder / "test.clean.npz", **arrays(TESTS, 1))


def train(problem: Problem, settings: list[str], folder: Path) -> tuple[float, float]:
    """(seconds an epoch, peak MiB) of the kernel's network on such a problem."""
    knobs = {  # the recipe of a single candidate, which is made a network
        "recipe": "closed_form",
        "network": "align",
        "hidden": problem.dimension,
        "min_steps": 0,
        "refit": False,
        "epochs": EPOCHS,
        "eval_every": EPOCHS,
        "val_fraction": 0.02,
        "consecutive_captions": True,
    }
    with tempfile.TemporaryDirectory() as data:
        draw_problem(Path(data), problem)
        run = run_logged(Path(data), folder, as_arguments(knobs, settings))
    return step_seconds(run) / EPOCHS, run.metrics["peak_rss_bytes"] / 2**20


def exponent(sizes: list[int], values: list[float]) -> float | None:
    """Slope in logarithms over the upper decade; None where nothing measurable grows."""
    chosen = [(size, value) for size, value in zip(sizes, values, strict=True) if 10 * size >= sizes[-1] and value > 0]
    if len(chosen) < 2:
        return None
    x, y = np.log(np.array(chosen)).T
    return float(np.polyfit(x, y, 1)[0])


def measure(output: Path, settings: list[str]) -> dict[str, list[Point]]:
    """Every axis, point by point."""
    idle = train(IDLE, settings, output / "idle")[1]
    found: dict[str, list[Point]] = {}
    for axis, problems in AXES.items():
        found[axis] = []
        for problem in problems:
            size = getattr(problem, axis)
            seconds, peak = train(problem, settings, output / f"{axis}-{size}")
            found[axis].append(Point(size, seconds, max(0.0, peak - idle)))
            print(f"{axis} {size}: {seconds:.2f} s an epoch, {peak - idle:.0f} MiB above {idle:.0f}", file=sys.stderr)
    return found


def exponents(points: list[Point]) -> dict[str, float | None]:
    """Growth of time and memory along one axis."""
    sizes = [point.size for point in points]
    memory = [point.mebibytes if point.mebibytes >= SMALLEST_MIB else 0 for point in points]
    return {"time": exponent(sizes, [point.epoch_seconds for point in points]), "memory": exponent(sizes, memory)}


def study(output: Path, settings: list[str]) -> dict[str, Any]:
    """Measure, fit, write scaling.md and scaling.png; everything as a dictionary."""
    found = measure(output, settings)
    fitted = {axis: exponents(points) for axis, points in found.items()}
    rows = []
    for axis, points in found.items():
        growth = [figure(value, "z.2f") for value in fitted[axis].values()]
        rows.append([axis, f"{points[0].size:,} to {points[-1].size:,}", *growth])
    header = ["what grows", "from, to", "time ~ size^", "memory ~ size^"]
    print(format_table(header, rows), file=sys.stderr)
    tables = [markdown_table(header, rows)]
    for axis, points in found.items():
        details = [[f"{p.size:,}", f"{p.epoch_seconds:.2f}", f"{p.mebibytes:.0f}"] for p in points]
        tables.append(markdown_table([axis, "s an epoch", "MiB above idle"], details))
    write_file(output / "scaling.md", "\n".join(tables))
    plot(found, fitted, output / "scaling.png")
    return {
        "output": str(output),
        "exponents": fitted,
        "points": {axis: [vars(point) for point in points] for axis, points in found.items()},
    }


def plot(found: dict[str, list[Point]], fitted: dict[str, dict[str, float | None]], path: Path) -> None:
    """Time and memory against size, both relative to the smallest size of the axis."""
    worst = max(fitted, key=lambda axis: fitted[axis]["time"] or 0)
    with themed(LIGHT):
        drawing = Figure(figsize=(2 * WIDTH, 4.4), layout="constrained")
        rate = figure(fitted[worst]["time"], "z.2f")
        headline(drawing, f"Time grows fastest with {worst}: exponent {rate} over the upper decade")
        time, memory = drawing.subplots(1, 2)
        for colour, (axis, points) in zip(CYCLE, found.items(), strict=False):
            sizes = [point.size / points[0].size for point in points]
            grows = {what: figure(value, "z.2f") or "-" for what, value in fitted[axis].items()}
            label = f"{axis}: time ^{grows['time']}, memory ^{grows['memory']}"
            time.plot(sizes, [point.epoch_seconds for point in points], "-o", color=colour, label=label)
            memory.plot(sizes, [max(point.mebibytes, 1) for point in points], "-o", color=colour)
        time.set(ylabel="seconds an epoch")
        memory.set(ylabel="MiB above an idle process")
        for axes in (time, memory):
            axes.set(xscale="log", yscale="log", xlabel="size, relative to the smallest of its kind")
            for scale in (axes.xaxis, axes.yaxis):
                scale.set_major_formatter("{x:g}")
        legend_below(drawing, time)
        save_png(drawing, path)
