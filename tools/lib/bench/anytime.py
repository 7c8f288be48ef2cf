"""Quality against time: every recipe with several time budgets; anytime.md and quality_time.png.

Each point is a run of its own, with its refit and its submission: what a user who has that time gets. A run that was
stopped half-way would be another one, as a learning rate ends at zero with the budget.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.bench.measure import SCORES
from lib.plots import CYCLE, LIGHT, legend_below, new_figure, save_png, seconds_axis, themed
from lib.process import as_arguments
from lib.project import atomic_path, format_table, markdown_table
from lib.runs import COSINE, RAW, Run, run_logged

USED = 0.8  # a run that needs less of its budget than this, and leaves nothing out, would be the same with a larger one
HEADER = ["recipe", "minutes", "seconds", "raw", "+-", "cosine", "candidates", "left out"]


@dataclass(frozen=True)
class Point:
    """One run: the time it was given, the time it took from its start to its end, and what it gave."""

    recipe: str
    minutes: float
    seconds: float
    scores: dict[str, float]
    error: float  # standard error of the raw score, over images
    candidates: int
    left_out: int

    @classmethod
    def of(cls, run: Run, minutes: float) -> Point:
        """What a finished run tells."""
        scores = {name: run.scores[name]["mrr"] for name in SCORES}
        return cls(
            run.recipe,
            minutes,
            run.total_seconds,
            scores,
            run.scores[RAW]["mrr_se"],
            len(run.metrics["members"]),
            len(run.metrics["left_out"]),
        )

    def cells(self) -> list[object]:
        """The point in the columns of HEADER."""
        return [
            self.recipe,
            f"{self.minutes:g}",
            f"{self.seconds:.0f}",
            f"{self.scores[RAW]:.4f}",
            f"{self.error:.4f}",
            f"{self.scores[COSINE]:.4f}",
            self.candidates,
            self.left_out,
        ]


def measure(recipes: list[str], minutes: list[float], data: Path, output: Path, settings: list[str]) -> list[Point]:
    """Every recipe with every budget, the shortest first; a recipe that has all it needs gets no more."""
    points = []
    for recipe in recipes:
        for budget in sorted(minutes):
            arguments = [
                "--recipe",
                recipe,
                *as_arguments({"max_minutes": budget}),
                *(f"--set={setting}" for setting in settings),
            ]
            point = Point.of(run_logged(data, output / f"{recipe}-{budget:g}min", arguments), budget)
            points.append(point)
            print(f"{recipe}, {budget:g} min: {point.seconds:.0f} s, raw {point.scores[RAW]:.4f}", file=sys.stderr)
            if point.seconds < USED * 60 * budget and not point.left_out:
                break
    return points


def finding(points: list[Point]) -> str:
    """What the picture shows, in one line."""
    best = max(points, key=lambda point: point.scores[RAW])
    first = min(points, key=lambda point: point.seconds)
    return (
        f"Raw MRR {first.scores[RAW]:.3f} after {first.seconds:.0f} s ({first.recipe}), "
        f"{best.scores[RAW]:.3f} after {best.seconds:.0f} s ({best.recipe})"
    )


def plot(points: list[Point], path: Path) -> None:
    """Raw MRR over the whole run's time, a curve a recipe."""
    with themed(LIGHT):
        figure, axes = new_figure(finding(points), 3.9, 6.6)
        for colour, recipe in zip(CYCLE, dict.fromkeys(point.recipe for point in points), strict=False):
            own = [point for point in points if point.recipe == recipe]
            axes.errorbar(
                [point.seconds for point in own],
                [point.scores[RAW] for point in own],
                yerr=[point.error for point in own],
                fmt="o-",
                markersize=5,
                capsize=3,
                color=colour,
                label=recipe,
            )
        seconds_axis(axes, "seconds from start to submission")
        axes.set(ylabel="validation MRR, raw (+- s.e.)")
        legend_below(figure, axes)
        save_png(figure, path)


def study(recipes: list[str], minutes: list[float], data: Path, output: Path, settings: list[str]) -> dict[str, Any]:
    """Measure, write the table and the picture; everything as a dictionary."""
    points = measure(recipes, minutes, data, output, settings)
    table = HEADER, [point.cells() for point in points]
    print(format_table(*table), file=sys.stderr)
    with atomic_path(output / "anytime.md") as temporary:
        temporary.write_text(markdown_table(*table), encoding="utf-8")
    plot(points, output / "quality_time.png")
    return {"output": str(output), "points": [vars(point) for point in points]}
