"""All measured runs together: a row a recipe, the comparison with the baseline, the table and the plot."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lib.bench.measure import POOLS, SCORES, Measured
from lib.plots import LIGHT, WIDTH, headline, legend_below, recipe_colours, save_png, seconds_axis, themed
from lib.project import figure, format_table, markdown_table, write_file
from lib.runs import RAW

BASELINE = "baseline"
COSTS = {  # header: key of the summary, its unit, how it is written
    "load s": ("load_seconds", 1, ".1f"),
    "train s": ("train_seconds", 1, ".1f"),
    "captions/s": ("captions_per_second", 1, ",.0f"),
    "GFLOP/s": ("flops_per_second", 1e9, ",.0f"),
    "of peak": ("of_peak", 1, ".0%"),
    "peak MiB": ("peak_bytes", 2**20, ",.0f"),
}
HEADER = ["recipe", "seeds", "raw", "+-", "cosine", "+-", "full", "+-", *COSTS]


# ------------------------------------------------------------------------------------------- all runs together
def groups(runs: list[Measured]) -> dict[str, list[Measured]]:
    """Runs by recipe, in the order in which they were made."""
    return {recipe: [run for run in runs if run.recipe == recipe] for recipe in dict.fromkeys(r.recipe for r in runs)}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error over seeds, None with a single one."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), spread


def summarise(runs: list[Measured], peaks: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """One row a recipe: means over its seeds, the highest memory."""
    rows = []
    for recipe, group in groups(runs).items():
        row: dict[str, Any] = {"recipe": recipe, "seeds": len(group)}
        for name in SCORES:
            row[name], row[f"{name}_se"] = mean_and_error([run.scores[name] for run in group])
        seconds = sum(run.train_seconds for run in group)
        stepping = sum(run.step_seconds for run in group)
        rate = sum(run.flops for run in group) / stepping
        row |= {
            "load_seconds": statistics.fmean(run.load_seconds for run in group),
            "train_seconds": seconds / len(group),
            "captions_per_second": sum(r.captions for r in group) / stepping,
            "flops_per_second": rate,
            "of_peak": rate / peaks[group[0].device, group[0].dtype],
            "peak_bytes": max(run.peak_bytes for run in group),
        }
        rows.append(row)
    return rows


def passing_time(run: Measured, score: str, goal: float) -> float | None:
    """Training seconds at which a run first reaches `goal`; None when it never does."""
    return next((seconds for seconds, scores in run.curve if scores[score] >= goal), None)


def passing(group: list[Measured], finals: dict[int, Measured], score: str) -> tuple[float | None, float | None]:
    """(seconds, how many times sooner) of the slowest seed; None where one of them never gets there."""
    seconds, ratios = [], []
    for run in group:
        final = finals[run.seed]
        reached = passing_time(run, score, final.scores[score])
        if reached is None:
            return None, None
        seconds.append(reached)
        ratios.append(final.train_seconds / max(reached, 0.01))
    return max(seconds), min(ratios)


def against_baseline(runs: list[Measured]) -> list[dict[str, Any]]:
    """How much sooner than the baseline each recipe reaches the baseline's final score, the slowest seed counting."""
    finals = {run.seed: run for run in runs if run.recipe == BASELINE}
    if not finals:
        return []
    rows = []
    for recipe, group in groups([run for run in runs if run.recipe != BASELINE]).items():
        row: dict[str, Any] = {"recipe": recipe}
        for score in POOLS:
            row[f"{score}_seconds"], row[f"{score}_ratio"] = passing(group, finals, score)
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------- what is written
def table_rows(rows: list[dict[str, Any]]) -> list[list[object]]:
    """The summary in the columns of HEADER."""
    return [
        [
            row["recipe"],
            row["seeds"],
            *(figure(row[name + end]) for name in SCORES for end in ("", "_se")),
            *(figure(row[key] / unit, pattern) for key, unit, pattern in COSTS.values()),
        ]
        for row in rows
    ]


def passing_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[object]]]:
    """Header and rows of the comparison with the baseline."""
    header = ["baseline's final score passed by", "raw after s", "times sooner", "cosine after s", "times sooner"]
    patterns = {"seconds": ".1f", "ratio": ".0f"}
    return header, [
        [row["recipe"], *(figure(row[f"{score}_{what}"], patterns[what]) for score in POOLS for what in patterns)]
        for row in rows
    ]


def finding(rows: list[dict[str, Any]], passed: list[dict[str, Any]]) -> str:
    """What the picture shows, in one line."""
    best = max(rows, key=lambda row: row[RAW])
    text = f"{best['recipe']} is best: raw MRR {best[RAW]:.3f} after {best['train_seconds']:.0f} s"
    if sooner := [row for row in passed if row[f"{RAW}_ratio"]]:
        first = max(sooner, key=lambda row: row[f"{RAW}_ratio"])
        ratio = f"{first[f'{RAW}_ratio']:.0f}"
        text += f". {first['recipe']} passes the baseline's final score {ratio} times sooner than the baseline"
    return text


def plot(runs: list[Measured], title: str, path: Path) -> None:
    """Validation MRR over training time, a line a run, a colour a recipe; the large dot is the blend's final score."""
    colours = recipe_colours(groups(runs))
    with themed(LIGHT):
        drawing = Figure(figsize=(2 * WIDTH, 4.2), layout="constrained")
        headline(drawing, title)
        panels = drawing.subplots(1, 2, sharex=True)
        for axes, score in zip(panels, POOLS, strict=True):
            for recipe, group in groups(runs).items():
                for run in group:
                    points = [(max(seconds, 0.01), scores[score]) for seconds, scores in run.curve]
                    label = recipe if run is group[0] else None
                    axes.plot(
                        *zip(*points, strict=True), "-o", color=colours[recipe], markersize=3, linewidth=1, label=label
                    )
                    axes.plot(*points[-1], "o", color=colours[recipe], markersize=8)
            seconds_axis(axes, "seconds of training (large dot: final score)")
            axes.set(ylabel=f"MRR in validation, {SCORES[score]}")
        legend_below(drawing, panels[0])
        save_png(drawing, path)


def write_report(runs: list[Measured], peaks: dict[tuple[str, str], float], output: Path) -> dict[str, Any]:
    """Table, markdown and plot; everything as a dictionary."""
    rows, passed = summarise(runs, peaks), against_baseline(runs)
    machine = [
        f"peak of a product: {peak / 1e9:,.0f} GFLOP/s ({device}, {dtype})" for (device, dtype), peak in peaks.items()
    ]
    tables = [(HEADER, table_rows(rows)), *([passing_table(passed)] if passed else [])]
    print("\n\n".join([format_table(*table) for table in tables] + machine), file=sys.stderr)
    write_file(output / "benchmark.md", "\n".join([markdown_table(*table) for table in tables] + machine) + "\n")
    plot(runs, finding(rows, passed), output / "benchmark.png")
    return {
        "output": str(output),
        "recipes": rows,
        "against_baseline": passed,
        "peaks": [{"device": device, "dtype": dtype, "flops_per_second": p} for (device, dtype), p in peaks.items()],
    }
