"""The pictures of tools/verify.py: every title states its finding, every colour can be told apart by every eye.

Each function takes numbers and returns a matplotlib figure; widths and letters are chosen for a phone's screen.
"""
from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lib.report.numbers import METRICS

WIDTH = 6.6  # inches; at 150 dots each a phone shows it at a third, which leaves letters readable
BLUE, ORANGE, GREY, GREEN = "#0072B2", "#E69F00", "#777777", "#009E73"
STYLE = {"font.size": 11, "axes.titlesize": 12, "figure.titlesize": 13, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "figure.dpi": 150, "text.parse_math": False}
BINS = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 10), (11, 20), (21, 50), (51, 100))


# --------------------------------------------------------------------------------------------------- photos

@dataclass
class Photos:
    """The validation images' files: which are there, which are not, which cannot be read."""

    paths: dict[int, Path] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def thumbnail(self, index: int) -> np.ndarray | None:
        """Pixels of an image at the size of a tile, None where there is no readable file."""
        path = self.paths.get(index)
        return None if path is None else read_photo(path, 320)

    def warnings(self, folder: Path) -> list[str]:
        """One line a kind of problem."""
        if not self.paths and not self.damaged:
            return [f"No photos below {folder}: the pictures show captions of the images instead"]
        lines = []
        for names, what in ((self.missing, "named in train.npz but missing on disk"), (self.damaged, "damaged")):
            if names:
                lines.append(f"{len(names)} of {self.total} validation photos {what}, skipped; the first: {names[0]}")
        return lines

    @property
    def total(self) -> int:
        return len(self.paths) + len(self.missing) + len(self.damaged)


def read_photo(path: Path, size: int) -> np.ndarray:
    """A photo as RGB no larger than `size`; any damage is an error (a truncated file, too)."""
    with Image.open(path) as image:
        image.draft("RGB", (size, size))  # lets a JPEG be decoded at a fraction of its size
        image.thumbnail((size, size))
        return np.asarray(image.convert("RGB"))


def find_photos(root: Path, names: list[str]) -> Photos:
    """Each name's file in the folders called Images below `root`, opened once to know that it can be."""
    folders, photos = sorted(path for path in root.rglob("[Ii]mages") if path.is_dir()), Photos()
    for index, name in enumerate(names):
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            photos.missing.append(name)
            continue
        try:
            read_photo(path, 64)
            photos.paths[index] = path
        except Exception:  # pillow's decoders fail in many ways, all of which mean the same
            photos.damaged.append(name)
    return photos


def draw_tile(axes: Axes, photos: Photos, index: int, caption: str, width: int = 14) -> None:
    """An image's photo, or one of its captions where there is none."""
    axes.set(xticks=[], yticks=[], facecolor="#f2f2f2")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    pixels = photos.thumbnail(index)
    if pixels is not None:
        axes.imshow(pixels)
    else:
        words = textwrap.shorten(tidy(caption), 4 * width, placeholder="…")
        axes.text(0.5, 0.5, textwrap.fill(words, width), ha="center", va="center", fontsize=7.5,
                  transform=axes.transAxes)


def tidy(caption: str) -> str:
    """A caption without the blanks that the data has before full stops and commas."""
    return " ".join(caption.split()).replace(" .", ".").replace(" ,", ",")


def frame(axes: Axes, colour: str) -> None:
    """A thick frame around a tile."""
    axes.spines[:].set(visible=True, color=colour, linewidth=4)


# -------------------------------------------------------------------------------------------------- figures

def wrapped(title: str, width: int = 60) -> str:
    """A title in as few lines as its length needs, all of about one length."""
    lines = -(-len(title) // width)
    return textwrap.fill(title, min(width, len(title) // lines + 8))


def span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}-{high}"


def new_figure(title: str, height: float = 3.9) -> tuple[Figure, Axes]:
    """One panel with its finding above it."""
    figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(wrapped(title))
    return figure, axes


def distance_figure(measured: dict[str, tuple[np.ndarray, np.ndarray]], summary: dict[str, dict], photos: Photos,
                    captions: list[str]) -> Figure:
    """The original's picture: sample photos, true against random distance, bars of improvement."""
    best = max(METRICS, key=lambda metric: summary[metric]["nearer_to_own"])
    figure = plt.figure(figsize=(WIDTH, 7.2), layout="constrained")
    figure.suptitle(wrapped(f"{summary[best]['nearer_to_own']:.1%} of captions are nearer to their own photo than to a "
                            f"random one ({best} distance)"))
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(0.9, 2.6, 1.8))
    samples = sorted(photos.paths) or range(len(captions))
    samples = [samples[i] for i in np.linspace(0, len(samples) - 1, min(5, len(samples))).astype(int)]
    for axes, index in zip(np.ravel(top.subplots(1, len(samples))), samples, strict=True):
        draw_tile(axes, photos, index, captions[index])
    for axes, metric in zip(middle.subplots(1, 3), METRICS, strict=True):
        scatter(axes, *measured[metric], summary[metric]["nearer_to_own"], metric)
    improvement_bars(bottom.subplots(), summary)
    return figure


def scatter(axes: Axes, own: np.ndarray, others: np.ndarray, share: float, metric: str) -> None:
    """Own against random distance, a dot a caption; below the diagonal the own image is nearer."""
    x, y = others[..., 0].ravel(), own.ravel()
    some = np.random.default_rng(0).permutation(len(x))[:1500]
    near = y[some] < x[some]
    for inside, colour in ((near, BLUE), (~near, ORANGE)):
        axes.scatter(x[some][inside], y[some][inside], s=4, alpha=0.5, color=colour, linewidths=0, rasterized=True)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.set_title(f"{metric}\n{share:.1%} nearer", fontsize=11)
    axes.set_xlabel("distance to a random one", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(nbins=4)
    if metric == METRICS[0]:
        axes.set_ylabel("distance to the own image", fontsize=10)


def improvement_bars(axes: Axes, summary: dict[str, dict]) -> None:
    """Own distance below random distance in percent, with the bootstrap's 95% interval."""
    values = [summary[metric]["improvement_percent"] for metric in METRICS]
    errors = [[value - summary[m]["improvement_low"] for value, m in zip(values, METRICS, strict=True)],
              [summary[m]["improvement_high"] - value for value, m in zip(values, METRICS, strict=True)]]
    axes.barh(METRICS, values, xerr=np.maximum(errors, 0), color=BLUE, ecolor="black", capsize=4, height=0.6)
    for row, value in enumerate(values):
        axes.annotate(f"{value:.1f}%", (max(value + errors[1][row], 0), row), xytext=(6, 0), va="center",
                      textcoords="offset points")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(xlabel="own distance below random distance (%; bars: 95% interval)")
    axes.set_title(f"Cosine distance is {values[2]:.0f}% below that to random images", fontsize=11)


def baseline_figure(rows: list[dict[str, Any]]) -> Figure:
    """MRR of the run beside every baseline."""
    ours, ridge = rows[0], next(row for row in rows if row["model"] == "ridge")
    chance = next(row for row in rows if row["model"] == "random permutation")
    figure, axes = new_figure(f"{ours['model']}: MRR {ours['raw']:.3f} in pools of 100, "
                              f"{ours['raw'] / ridge['raw']:.2f} times ridge, {ours['raw'] / chance['raw']:.0f} times "
                              "chance", 1.9 + 0.5 * len(rows))
    for offset, name, colour in ((-0.2, "raw", BLUE), (0.2, "cosine", ORANGE)):
        places = np.arange(len(rows)) + offset
        axes.barh(places, [row[name] for row in rows], height=0.38, color=colour, label=name, ecolor="black", capsize=3,
                  xerr=[row[f"{name}_se"] for row in rows])
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="MRR in pools of 100 (bars: standard error over images)")
    axes.legend(loc="lower right")
    return figure


def pool_figure(rows: list[dict[str, float]]) -> Figure:
    """MRR against the number of photos to choose from."""
    first, last = rows[0], rows[-1]
    figure, axes = new_figure(f"MRR falls from {first['raw']:.2f} among {first['pool']} photos to {last['raw']:.2f} "
                              f"among {last['pool']} ({last['raw'] / last['chance']:.0f} times chance)")
    sizes = [row["pool"] for row in rows]
    for name, colour, mark in (("raw", BLUE, "o-"), ("cosine", ORANGE, "s-"), ("chance", GREY, "--")):
        axes.plot(sizes, [row[name] for row in rows], mark, color=colour, label=name)
    axes.set(xscale="log", xlabel="photos in a pool", ylabel="MRR", ylim=(0, None))
    axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
    axes.minorticks_off()
    axes.legend()
    return figure


def rank_figure(ranks: np.ndarray) -> Figure:
    """How often the own photo comes first, second, ... in a pool of 100."""
    figure, axes = new_figure(f"{(ranks == 1).mean():.0%} of captions find their photo first, "
                              f"{(ranks <= 10).mean():.0%} within the first ten of 100")
    shares = [100 * ((ranks >= low) & (ranks <= high)).mean() for low, high in BINS]
    bars = axes.bar(range(len(BINS)), shares, color=BLUE, label="model")
    axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.plot(range(len(BINS)), [high - low + 1 for low, high in BINS], "D", color=ORANGE, label="chance")
    axes.set_xticks(range(len(BINS)), [span(low, high) for low, high in BINS])
    axes.set(xlabel="rank of the own photo in its pool of 100", ylabel="captions (%)")
    axes.legend(loc="upper center")
    return figure


def length_figure(rows: list[dict[str, float]]) -> Figure:
    """MRR by the number of words in a caption."""
    short, long = rows[0], rows[-1]
    gap, error = long["mrr"] - short["mrr"], np.hypot(short["mrr_se"], long["mrr_se"])
    said = "Long captions do better" if gap > 2 * error else "Long captions do worse" if gap < -2 * error else \
        "The length of a caption hardly matters"
    figure, axes = new_figure(f"{said}: MRR {short['mrr']:.2f} up to {short['to']} words, {long['mrr']:.2f} from "
                              f"{long['from']} words on")
    axes.errorbar(range(len(rows)), [row["mrr"] for row in rows], yerr=[row["mrr_se"] for row in rows], fmt="o-",
                  color=BLUE, capsize=4)
    axes.set_xticks(range(len(rows)), [f"{span(row['from'], row['to'])}\nn={row['captions']}" for row in rows])
    axes.set(xlabel="words in the caption", ylabel="MRR in pools of 100 (raw; +- s.e.)", ylim=(0, None))
    return figure


def hub_figure(hubs: dict[str, Any]) -> Figure:
    """How often each image is retrieved."""
    counts, worst = np.array(hubs["counts"]), hubs["worst"][0]["lists"]
    figure, axes = new_figure(f"The worst hub is in {worst} lists of ten where {hubs['expected']:.0f} are fair; "
                              f"{hubs['never']:.0%} of photos are in none (skew {hubs['skew']:.1f})")
    axes.hist(counts, bins=min(40, counts.max() + 1), color=BLUE, log=True)
    axes.axvline(hubs["expected"], color=ORANGE, linewidth=2, label=f"fair share: {hubs['expected']:.0f}")
    axes.set(xlabel=f"captions with the photo among their first {hubs['k']} of all {len(counts)}", ylabel="photos")
    axes.legend()
    return figure


def calibration_figure(learnt: dict[str, Any] | None, best: dict[str, Any]) -> Figure:
    """What the softmax over a pool promises against what comes true."""
    shown = learnt or best
    gap = shown["says"] - shown["right"]
    word = "is too sure" if gap > 0.03 else "is not sure enough" if gap < -0.03 else "is well calibrated"
    figure, axes = new_figure(f"{'Learnt' if learnt else 'Fitted'} temperature {shown['temperature']:.3f} {word}: it "
                              f"says {shown['says']:.0%}, {shown['right']:.0%} come true (ECE {shown['ece']:.2f})", 4.6)
    axes.plot([0, 1], [0, 1], color="black", linewidth=1, label="perfect")
    for result, name, colour, mark in ((learnt, "learnt", BLUE, "o-"), (best, "best here", ORANGE, "s--")):
        if result:
            axes.plot([row["confidence"] for row in result["curve"]], [row["right"] for row in result["curve"]], mark,
                      color=colour, label=f"{name}: {result['temperature']:.3f}")
    axes.set(xlabel="probability of the first photo of a pool", ylabel="share of first photos that are right",
             xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    return figure


def contact_figure(title: str, rows: list[dict[str, Any]], photos: Photos, captions: list[str]) -> Figure:
    """A row a caption: the true image, then the five best retrieved with the true one framed."""
    figure = plt.figure(figsize=(WIDTH, 0.5 + 1.45 * len(rows)), layout="constrained")
    figure.suptitle(wrapped(title))
    for part, row in zip(np.ravel(figure.subfigures(len(rows), 1)), rows, strict=True):
        part.suptitle(textwrap.fill(f"Rank {row['rank']}: “{tidy(row['caption'])}”", 80), fontsize=9.5, x=0.01,
                      ha="left")
        tiles = part.subplots(1, 1 + len(row["retrieved"]), width_ratios=[1.15] + [1] * len(row["retrieved"]))
        draw_tile(tiles[0], photos, row["image"], captions[row["image"]])
        frame(tiles[0], GREEN)
        tiles[0].set_title("true", fontsize=9, color=GREEN, pad=3)
        for place, (axes, index) in enumerate(zip(tiles[1:], row["retrieved"], strict=True), 1):
            draw_tile(axes, photos, index, captions[index])
            axes.set_title(str(place), fontsize=9, pad=3)
            if index == row["image"]:
                frame(axes, GREEN)
    return figure
