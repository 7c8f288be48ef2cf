"""The pictures of tools/verify.py; every title states its finding.

Each function takes numbers and returns a matplotlib figure, drawn in the theme that is in use (lib/plots.py).
"""

from __future__ import annotations

import functools
import glob
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lib.plots import BLUE, GREEN, GREY, ORANGE, SMALL, WIDTH, headline, ink, legend_below, new_figure, note
from lib.report.numbers import METRICS, Pools, interval_in_words, verdict

BINS = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 10), (11, 20), (21, 50), (51, 100))


# --------------------------------------------------------------------------------------------------- photos
@dataclass
class Photos:
    """The validation images' files: which are there, which are not, which cannot be read."""

    paths: dict[int, Path] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def warnings(self, folder: Path) -> list[str]:
        """One line a kind of problem."""
        if not self.paths and not self.damaged:
            return [f"No photos below {folder}: the pictures show captions of the images instead"]
        total = len(self.paths) + len(self.missing) + len(self.damaged)
        problems = {"named in train.npz but missing on disk": self.missing, "damaged": self.damaged}
        return [
            f"{len(names)} of {total} validation photos {what}, skipped; the first: {names[0]}"
            for what, names in problems.items()
            if names
        ]


@functools.lru_cache(maxsize=64)  # each theme draws the same ones
def read_tile(path: Path) -> np.ndarray:
    """A photo at the size of a tile."""
    return read_photo(path, 230)


def read_photo(path: Path, size: int) -> np.ndarray:
    """A photo as RGB no larger than `size`; any damage is an error (a truncated file, too)."""
    with Image.open(path) as image:
        image.draft("RGB", (size, size))  # lets a JPEG be decoded at a fraction of its size
        image.thumbnail((size, size))
        return np.asarray(image.convert("RGB"))


def find_photos(root: Path, names: list[str]) -> Photos:
    """Each name's file in the folders called Images below `root`, opened once to know that it can be."""
    anywhere = f"{glob.escape(str(root))}/**/[Ii]mages/"
    folders = sorted(glob.glob(anywhere, recursive=True))  # noqa: PTH207 - follows links, which rglob does not
    photos = Photos()
    for index, name in enumerate(names):
        path = next((path for folder in folders if (path := Path(folder, name)).is_file()), None)
        if path is None:
            photos.missing.append(name)
            continue
        try:
            read_photo(path, 64)
            photos.paths[index] = path
        except Exception:  # pillow's decoders fail in many ways, all of which mean the same
            photos.damaged.append(name)
    return photos


def draw_tile(axes: Axes, photos: Photos, index: int, caption: str) -> None:
    """An image's photo, or one of its captions where there is none."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if index in photos.paths:
        axes.imshow(read_tile(photos.paths[index]))
    else:
        axes.spines[:].set(visible=True, color=GREY, linewidth=0.5)
        words = textwrap.shorten(tidy(caption), 48, placeholder="…")
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL, "clip_on": True}
        axes.text(0.5, 0.5, textwrap.fill(words, 13), transform=axes.transAxes, **style)


def tidy(caption: str) -> str:
    """A caption without the blanks that the data has before full stops and commas."""
    return " ".join(caption.split()).replace(" .", ".").replace(" ,", ",")


# ------------------------------------------------------------------------------------------------- retrieval
def span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}-{high}"


def rank_figure(ranks: np.ndarray, pools: Pools) -> Figure:
    """How often the own photo comes first, second, ... in its pool."""
    figure, axes = new_figure(
        f"{(ranks == 1).mean():.0%} of captions find their photo first, "
        f"{(ranks <= 10).mean():.0%} within the first ten of {pools.size}"
    )
    bins = [(low, min(high, pools.size)) for low, high in BINS if low <= pools.size]
    shares = [100 * ((ranks >= low) & (ranks <= high)).mean() for low, high in bins]
    chance = [100 * (high - low + 1) / pools.size for low, high in bins]
    axes.bar(range(len(bins)), shares, color=BLUE, label="captions")
    axes.plot(range(len(bins)), chance, "_", color=ORANGE, markersize=24, markeredgewidth=2.5, label="by chance")
    behind = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 0.5}  # so that no mark crosses a number
    for place, share in enumerate(shares):
        note(axes, f"{share:.0f}", (place, share), (0, 3), ha="center", bbox=behind)
    axes.set_xticks(range(len(bins)), [span(low, high) for low, high in bins])
    axes.grid(False, axis="x")
    axes.set(xlabel=f"rank of the own photo among {pools.size}", ylabel="captions (%)")
    legend_below(figure, axes)
    return figure


def baseline_title(results: dict[str, Any]) -> str:
    """Against the other run where there is one, else against the closed form."""
    ours, other, *_, chance = results["baselines"]
    if results["against"]:
        row = results["against"]["raw"]
        return f"{verdict(row, other['model'])} ({interval_in_words(row, 'raw')})"
    times = [ours["raw"] / row["raw"] for row in (other, chance)]
    return f"The raw MRR is {times[0]:.2f} times that of the closed form, {times[1]:.0f} times that of chance"


def baseline_figure(results: dict[str, Any]) -> Figure:
    """MRR of the run beside every baseline; each model's name stands above its bars, where no margin cuts it."""
    rows = results["baselines"]
    figure, axes = new_figure(baseline_title(results), 1.4 + 0.72 * len(rows))
    for offset, name, colour in ((-0.14, "raw", BLUE), (0.14, "cosine", ORANGE)):
        places = np.arange(len(rows)) + offset
        values, errors = ([row[key] for row in rows] for key in (name, f"{name}_se"))
        axes.barh(places, values, height=0.26, color=colour, label=name, xerr=errors, ecolor=ink(), capsize=2)
        for place, value, error in zip(places, values, errors, strict=True):
            note(axes, f"{value:.3f}", (value + error, place), (5, 0), va="center")
    for place, row in enumerate(rows):
        axes.text(0, place - 0.31, textwrap.shorten(row["model"], 48, placeholder="…"), va="bottom", fontsize=10)
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.65, -0.7)
    axes.margins(x=0.12)
    axes.set(xlabel=f"MRR in {results['pools']} (bars: standard error)")
    legend_below(figure, axes)
    return figure


def pool_figure(rows: list[dict[str, float]]) -> Figure:
    """MRR against the number of photos to choose from."""
    first, last = rows[0], rows[-1]
    figure, axes = new_figure(
        f"MRR falls from {first['raw']:.2f} among {first['pool']} photos to {last['raw']:.2f} "
        f"among {last['pool']} ({last['raw'] / last['chance']:.0f} times chance)"
    )
    sizes = [row["pool"] for row in rows]
    for name, colour, mark, width in (("raw", BLUE, "o-", 5), ("cosine", ORANGE, "s-", 1.5), ("chance", GREY, "--", 1)):
        axes.plot(sizes, [row[name] for row in rows], mark, markersize=4, linewidth=width, color=colour, label=name)
    axes.set(xscale="log", xlabel="photos to choose from", ylabel="MRR", ylim=(0, None))
    shown = [size for size in sizes if size == sizes[-1] or 1.5 * size < sizes[-1]]
    axes.set_xticks(shown, [f"{size:,}" for size in shown])
    axes.minorticks_off()
    legend_below(figure, axes)
    return figure


def length_figure(rows: list[dict[str, Any]], pools: Pools) -> Figure:
    """MRR by the number of words in a caption."""
    short, long = rows[0], rows[-1]
    gap, error = long["mrr"] - short["mrr"], np.hypot(short["mrr_se"], long["mrr_se"])
    said = "The length of a caption hardly matters"
    if abs(gap) > 2 * error:
        said = f"Long captions do {'better' if gap > 0 else 'worse'}"
    figure, axes = new_figure(
        f"{said}: MRR {short['mrr']:.2f} up to {short['to']} words, {long['mrr']:.2f} from {long['from']} words on"
    )
    values, errors = ([row[key] for row in rows] for key in ("mrr", "mrr_se"))
    axes.errorbar(range(len(rows)), values, yerr=errors, fmt="o-", color=BLUE, capsize=4)
    axes.set_xticks(range(len(rows)), [f"{span(row['from'], row['to'])}\nn={row['captions']}" for row in rows])
    axes.set(xlabel="words in the caption", ylabel=f"raw MRR in {pools}", ylim=(0, None))
    return figure


# ---------------------------------------------------------------------------------------- hubs, calibration
def hub_figure(hubs: dict[str, Any]) -> Figure:
    """How often each image is retrieved, in bins of whole numbers."""
    counts, worst = np.array(hubs["counts"]), hubs["worst"][0]["lists"]
    figure, axes = new_figure(
        f"The largest hub comes among the first {hubs['k']} for {worst} captions, where {hubs['expected']:.0f} "
        f"would be fair; {hubs['never']:.0%} of photos never do"
    )
    width = -(-(worst + 1) // 30)
    axes.hist(counts, bins=[edge - 0.5 for edge in range(0, worst + width + 1, width)], color=BLUE, log=True)
    axes.axvline(hubs["expected"], color=ORANGE, linewidth=2, label=f"fair share: {hubs['expected']:.0f}")
    axes.set(xlabel=f"captions that have a photo among their first {hubs['k']} of {len(counts):,}", ylabel="photos")
    axes.yaxis.set_major_formatter("{x:g}")  # the default would be mathematics, which is not parsed
    legend_below(figure, axes)
    return figure


def calibration_title(shown: dict[str, Any], learnt: bool) -> str:
    """The widest gap of a well-filled bin decides: a mean gap of nothing can hide errors both ways."""
    worst, which = shown["worst"], f"At the {'learnt' if learnt else 'best'} temperature the model"
    if worst is None or abs(worst["confidence"] - worst["right"]) < 0.05:
        return f"{which} is well calibrated: right as often as it says, within 5 points (mean gap {shown['ece']:.2f})"
    word = "over" if worst["confidence"] > worst["right"] else "under"
    said, true = f"{worst['confidence']:.0%}", f"{worst['right']:.0%}"
    return f"{which} is {word}-confident: where it says {said}, {true} are right (mean gap {shown['ece']:.2f})"


def calibration_figure(learnt: dict[str, Any] | None, best: dict[str, Any]) -> Figure:
    """A reliability diagram: what the softmax over a pool promises against what comes true."""
    figure, axes = new_figure(calibration_title(learnt or best, bool(learnt)), 4.9)
    axes.plot([0, 1], [0, 1], color=ink(), linewidth=1, label="perfect: right as often as it says")
    for result, name, colour, mark in ((learnt, "learnt", BLUE, "o-"), (best, "best on these photos", ORANGE, "s--")):
        if result:
            promised, true = ([row[key] for row in result["curve"]] for key in ("confidence", "right"))
            label = f"temperature {result['temperature']:.3f}, {name}"
            axes.plot(promised, true, mark, markersize=5, color=colour, label=label, clip_on=False)
    note(axes, "under-confident", (0, 1), (6, -6), va="top")
    note(axes, "over-confident", (1, 0), (-6, 6), ha="right")
    axes.set(xlabel="confidence: probability of the first photo", ylabel="captions whose first photo is right")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    legend_below(figure, axes)
    return figure


# ----------------------------------------------------------------------------------------- distances, examples
def distance_figure(
    measured: dict[str, tuple[np.ndarray, np.ndarray]], summary: dict[str, dict], photos: Photos, captions: list[str]
) -> Figure:
    """The original's picture: sample photos, true against random distance, bars of improvement."""
    best = max(METRICS, key=lambda metric: summary[metric]["nearer_to_own"])
    figure = Figure(figsize=(WIDTH, 7.0), layout="constrained")
    headline(
        figure,
        f"{summary[best]['nearer_to_own']:.1%} of captions are nearer to their own photo than to a random "
        f"one ({best} distance)",
    )
    top, panels = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 5)))
    top.suptitle(f"some of the {len(captions)} held-out photos", fontsize=SMALL)
    samples = sorted(photos.paths) or range(len(captions))
    samples = [samples[i] for i in np.linspace(0, len(samples) - 1, min(4, len(samples))).astype(int)]
    for axes, index in zip(np.ravel(top.subplots(1, len(samples))), samples, strict=True):
        draw_tile(axes, photos, index, captions[index])
    *dots, bars = panels.subplots(2, 2).ravel()
    for axes, metric in zip(dots, METRICS, strict=True):
        scatter(axes, *measured[metric], summary[metric]["nearer_to_own"], metric)
    improvement_bars(bars, summary)
    legend_below(figure, dots[0])
    return figure


def scatter(axes: Axes, own: np.ndarray, others: np.ndarray, share: float, metric: str) -> None:
    """Own against random distance, a dot a caption; below the diagonal the own image is nearer."""
    x, y = others[..., 0].ravel(), own.ravel()
    some = np.random.default_rng(0).permutation(len(x))[:1000]
    near = y[some] < x[some]
    words = ("a caption below the line: its own photo is nearer (good)", "above it: a random photo is nearer")
    for inside, colour, label in ((near, BLUE, words[0]), (~near, ORANGE, words[1])):
        axes.scatter(x[some][inside], y[some][inside], s=4, alpha=0.5, color=colour, linewidths=0)
        axes.plot([], [], "o", markersize=5, color=colour, label=label)  # the dots are too small for a legend
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color=ink(), linewidth=1)
    axes.set_title(f"{metric}: {share:.0%} below", fontsize=10)
    axes.set_xlabel("distance to a random photo", fontsize=SMALL)
    axes.set_ylabel("distance to the own photo", fontsize=SMALL)
    axes.locator_params(nbins=4)


def improvement_bars(axes: Axes, summary: dict[str, dict]) -> None:
    """Own distance below random distance in percent, with the bootstrap's 95% interval."""
    parts = ("improvement_low", "improvement_percent", "improvement_high")
    low, values, high = np.array([[summary[metric][part] for metric in METRICS] for part in parts])
    errors = np.maximum([values - low, high - values], 0)
    axes.bar(range(len(METRICS)), values, yerr=errors, color=BLUE, ecolor=ink(), capsize=4, width=0.6)
    for place, value in enumerate(values):
        note(axes, f"{value:.0f}%", (place, max(high[place], 0)), (0, 3), ha="center")
    axes.set_xticks(range(len(METRICS)), [metric[:6] + "." * (len(metric) > 6) for metric in METRICS])
    axes.grid(False, axis="x")
    axes.margins(y=0.2)
    axes.set_title("own photo nearer by", fontsize=10)
    axes.set_ylabel("% on average (95% interval)", fontsize=SMALL)


TILE, TEXT, HEAD, COLUMNS = 1.2, 0.42, 0.6, 3  # inches: height of a tile, of a caption, of the title


def contact_figure(title: str, rows: list[dict[str, Any]], photos: Photos, captions: list[str]) -> Figure:
    """A block a caption: the true image, then the five best retrieved, the true one framed among them."""
    lines = -(-(1 + len(rows[0]["retrieved"])) // COLUMNS)
    block = TEXT + lines * TILE
    height = HEAD + block * len(rows)
    figure = Figure(figsize=(WIDTH, height))
    headline(figure, title)
    for number, row in enumerate(rows):
        top = height - HEAD - number * block
        figure.text(0.02, (top - 0.05) / height, caption_lines(row), fontsize=10, va="top")
        tiles = [("true", row["image"]), *((str(place), index) for place, index in enumerate(row["retrieved"], 1))]
        for place, (name, index) in enumerate(tiles):
            line, column = divmod(place, COLUMNS)
            bottom = top - TEXT - (line + 1) * TILE + 0.04
            axes = figure.add_axes(
                (0.02 + column * 0.98 / COLUMNS, bottom / height, 0.94 / COLUMNS, (TILE - 0.24) / height)
            )
            draw_tile(axes, photos, index, captions[index])
            right = index == row["image"]
            axes.set_title(name, fontsize=SMALL, color=GREEN if right else ink(), pad=3)
            if right:
                axes.spines[:].set(visible=True, color=GREEN, linewidth=3)
    return figure


def caption_lines(row: dict[str, Any]) -> str:
    """Rank and caption in two lines at most."""
    words = textwrap.shorten(f"Rank {row['rank']}: “{tidy(row['caption'])}”", 100, placeholder="…”")
    return textwrap.fill(words, 58)
