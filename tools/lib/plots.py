"""How every picture of the tools looks: one palette, light and dark, and letters that a phone shows large enough.

with themed(LIGHT):
    figure, axes = new_figure("What the picture shows, in one sentence")
    axes.plot(times, scores, color=BLUE, label="raw")
    legend_below(figure, axes)
    data = png_of(figure)
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from lib.kernel import recipe_names
from lib.project import write_file

WIDTH = 4.6  # inches: 358 points of a phone's screen then show 9-point letters at 10 pixels
DPI = 160
SMALL = 9  # points; nothing is written smaller

# Colours by their place in the theme's cycle: told apart by every eye (Okabe and Ito), each theme has its own shades.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = CYCLE = tuple(f"C{place}" for place in range(7))


@dataclass(frozen=True)
class Theme:
    page: str
    ink: str
    line: str
    soft: str
    warn: str
    colours: tuple[str, ...]  # in the order of CYCLE


LIGHT = Theme(
    "#ffffff",
    "#1b1b1b",
    "#d5d5d5",
    "#f1f1f1",
    "#fff4d6",
    ("#0072B2", "#D98A00", "#009E73", "#D55E00", "#B0568F", "#56B4E9", "#777777"),
)
DARK = Theme(
    "#16181b",
    "#e8e8e8",
    "#3b3f45",
    "#25292e",
    "#40361a",
    ("#4AA8E0", "#E9A820", "#2DBB8F", "#F0824A", "#D98ABB", "#A5D8F7", "#9a9a9a"),
)


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """What is drawn inside has the theme's colours."""
    letters = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    lines = ("axes.edgecolor", "patch.edgecolor", "lines.color")
    grounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    colours = dict.fromkeys(letters + lines, theme.ink) | dict.fromkeys(grounds, theme.page)
    style: dict[Any, Any] = {
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.labelsize": 10,
        "figure.titlesize": 12,
        "legend.fontsize": 10,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.6,
        "text.parse_math": False,
        "axes.prop_cycle": cycler(color=theme.colours),
    }
    with matplotlib.rc_context(style | colours):
        yield


def ink() -> str:
    """The colour of letters and reference lines in the theme that is in use."""
    return str(matplotlib.rcParams["text.color"])


def new_figure(title: str, height: float = 3.4, width: float = WIDTH) -> tuple[Figure, Axes]:
    """One panel with its finding above it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    headline(figure, title)
    return figure, figure.subplots()


def headline(figure: Figure, title: str) -> None:
    """The finding, at the left above the panels, in as few lines as fit, of about one length."""
    fits = int(9.6 * figure.get_figwidth())  # letters a line

    def lines(width: int) -> list[str]:
        return textwrap.wrap(title, width, break_on_hyphens=False, break_long_words=False)

    narrowest = next(width for width in range(1, fits + 1) if len(lines(width)) <= len(lines(fits)))
    figure.suptitle("\n".join(lines(narrowest)), x=0.02, ha="left")


def seconds_axis(axes: Axes, label: str) -> None:
    """A logarithmic axis of time whose ticks are read as they stand: 1, 2, 5, 10, ..."""
    axes.set(xscale="log", xlabel=label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:,g}")
    axes.xaxis.set_minor_locator(NullLocator())


def recipe_colours(shown: Iterable[str]) -> dict[str, str]:
    """Each recipe's colour, the same in every picture: by its place in the kernel; others come after these."""
    names = dict.fromkeys([*recipe_names(), *shown])
    return {name: CYCLE[place % len(CYCLE)] for place, name in enumerate(names)}


def quality_plot(title: str, groups: dict[str, list[tuple[float, float, float]]], mark: str, path: Path) -> None:
    """(seconds, MRR, its standard error) of runs by their recipes, as a file."""
    colours = recipe_colours(groups)
    with themed(LIGHT):
        figure, axes = new_figure(title, 3.9, 6.8)
        for name, points in groups.items():
            seconds, scores, errors = zip(*points, strict=True)
            axes.errorbar(seconds, scores, errors, fmt=mark, markersize=4, capsize=3, color=colours[name], label=name)
        seconds_axis(axes, "seconds from start to submission")
        axes.set(ylabel="raw MRR in validation (+- s.e.)")
        legend_below(figure, axes)
        save_png(figure, path)


def legend_below(figure: Figure, axes: Axes) -> None:
    """The legend under the panel, where it hides no line, in as many columns as its words leave room for."""
    handles, labels = axes.get_legend_handles_labels()
    widest = max(map(len, labels), default=0) + 8  # letters; the line before them counts
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, int(11 * figure.get_figwidth()) // widest))


def note(axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], **style: Any) -> None:
    """A small text beside a point of the picture, `shift` in points away from it."""
    axes.annotate(text, at, xytext=shift, textcoords="offset points", fontsize=SMALL, **style)


def png_of(figure: Figure) -> bytes:
    """The picture as a file's content, in 256 colours, a third of the bytes; to be called within its theme."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    buffer = io.BytesIO()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    pixels.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "png")
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """The picture as a file that is never half there."""
    write_file(path, png_of(figure))
