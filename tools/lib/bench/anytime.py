"""Quality against time: every recipe with several time budgets; anytime.md and quality_time.png.

Each point is a run of its own, with its refit and its submission: what a user who has that time gets. A run that was
stopped half-way would be another one, as a learning rate ends at zero with the budget.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.plots import quality_plot
from lib.process import as_arguments
from lib.project import format_table, markdown_table, write_file
from lib.runs import COSINE, RAW, Run, run_logged

USED = 0.8  # a run that needs less of its budget than this, and leaves nothing out, would be the same with a larger one
HEADER = ["recipe", "minutes", "seconds", "raw", "+-", "cosine", "trained", "on all photos", "left out"]


@dataclass(frozen=True)
class Point:
    """One run: the time it was given, the time it took from its start to its end, and what it gave."""

    recipe: str
    minutes: float
    seconds: float
    scores: dict[str, float]
    error: float  # standard error of the raw score, over images
    candidates: int  # that were trained
    refitted: int  # of these, how many once more on all photos
    left_out: int  # trainings of either kind for which there was no time

    @classmethod
    def of(cls, run: Run, minutes: float) -> Point:
        members, left_out = run.metrics["members"], len(run.metrics["left_out"])
        refitted = sum(one["refitted"] for one in members)
        error = run.scores[RAW]["mrr_se"]
        return cls(run.recipe, minutes, run.total_seconds, run.mrr, error, len(members), refitted, left_out)

    def cells(self) -> list[object]:
        """The point in the columns of HEADER."""
        time = [f"{self.minutes:g}", f"{self.seconds:.0f}"]
        quality = [f"{value:.4f}" for value in (self.scores[RAW], self.error, self.scores[COSINE])]
        return [self.recipe, *time, *quality, self.candidates, self.refitted, self.left_out]


def measure(recipes: list[str], minutes: list[float], data: Path, output: Path, settings: list[str]) -> list[Point]:
    """Every recipe with every budget, the shortest first; a recipe that has all it needs gets no more."""
    points = []
    for recipe in recipes:
        for budget in sorted(minutes):
            arguments = as_arguments({"recipe": recipe, "max_minutes": budget}, settings)
            point = Point.of(run_logged(data, output / f"{recipe}-{budget:g}min", arguments), budget)
            points.append(point)
            print(f"{recipe}, {budget:g} min: {point.seconds:.0f} s, raw {point.scores[RAW]:.4f}", file=sys.stderr)
            if point.seconds < USED * 60 * budget and not point.left_out:
                break
    return points


def finding(points: list[Point]) -> str:
    """What the picture shows, in one line: the first point, and the earliest that is as good as the best one."""
    by_time = sorted(points, key=lambda point: point.seconds)
    best = max(round(point.scores[RAW], 3) for point in points)  # as it is written
    first, top = by_time[0], next(point for point in by_time if round(point.scores[RAW], 3) == best)
    named = [first] if top is first else [first, top]
    return "Raw MRR " + ", ".join(f"{one.scores[RAW]:.3f} after {one.seconds:.0f} s ({one.recipe})" for one in named)


def plot(points: list[Point], path: Path) -> None:
    """Raw MRR over the whole run's time, a curve a recipe."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for point in points:
        curves.setdefault(point.recipe, []).append((point.seconds, point.scores[RAW], point.error))
    quality_plot(finding(points), curves, "o-", path)


def study(recipes: list[str], minutes: list[float], data: Path, output: Path, settings: list[str]) -> dict[str, Any]:
    """Measure, write the table and the picture; everything as a dictionary."""
    points = measure(recipes, minutes, data, output, settings)
    table = HEADER, [point.cells() for point in points]
    print(format_table(*table), file=sys.stderr)
    write_file(output / "anytime.md", markdown_table(*table))
    plot(points, output / "quality_time.png")
    return {"output": str(output), "points": [vars(point) for point in points]}
