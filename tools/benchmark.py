"""Measure the recipes side by side on this machine: quality, time, captions a second, share of the peak, memory.

    python tools/benchmark.py --seeds 0 1 2                  all recipes, three seeds that also change the split
    python tools/benchmark.py --recipes align --full-size    synthetic data of the competition's size, one epoch
    python tools/benchmark.py --scaling                      how time and memory grow; the table and plot of the README

Every run is the kernel itself as a sub-process. The output folder gets benchmark.md, benchmark.png and every run.
"""
from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import sample_data
import scaling
from local_run import FILES, FinishedRun, as_arguments, choose_data, new_folder, run_logged
from project import REPO, RUNS, InputError, atomic_path, format_table, load_kernel, markdown_table, run_tool

FULL_SIZE = REPO / "build" / "full-size"
BASELINE = "baseline"
POOLS = ("pool100_raw", "pool100_cosine")
SCORES = {"pool100_raw": "raw", "pool100_cosine": "cosine", "full_cosine": "full gallery"}
HEADER = ["recipe", "seeds", "raw", "+-", "cosine", "+-", "full", "+-", "load s", "train s", "captions/s", "GFLOP/s",
          "of peak", "peak MiB"]


# ------------------------------------------------------------------------------------------- one run
@dataclass(frozen=True)
class Measured:
    """What one run of a recipe gave."""

    recipe: str
    seed: int
    scores: dict[str, float]  # MRR by the kernel's names
    curve: list[tuple[float, dict[str, float]]]  # (training seconds, scores) at every validation, the final one last
    load_seconds: float
    train_seconds: float  # validations while training included
    step_seconds: float  # without them
    captions: int  # trained on, all epochs and members counted
    flops: float
    device: str
    dtype: str
    peak_bytes: int  # resident; on a GPU the device's own peak


def read_curve(run: FinishedRun, kernel: ModuleType) -> list[tuple[float, dict[str, float]]]:
    """Validation scores over training time; a closed form has only the final ones."""
    with (run.folder / kernel.TRAINING_LOG).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "validate"]
    train = run.metrics["seconds"]["train"]
    begin = max((float(row["seconds"]) for row in rows), default=train) - train
    curve = [(float(row["seconds"]) - begin, {name: float(row[name]) for name in SCORES})
             for row in rows if row["pool100_raw"]]
    return [*curve, (train, final_scores(run))]


def final_scores(run: FinishedRun) -> dict[str, float]:
    """MRR of the run's own validation."""
    return {name: run.metrics["validation"][name]["mrr"] for name in SCORES}


def network_flops(member: dict[str, Any], gallery: int, d_image: int) -> float:
    """One caption, forward and backward: 2 a weight and product, three products a matrix, two with the gallery."""
    matrices = [value.numel() for value in member["state"].values() if value.dim() == 2]
    if member["knobs"]["network"] == "mlp":  # its first layer needs no gradient of its input, and it has no gallery
        return 6 * sum(matrices) - 2 * matrices[0]
    return 6 * sum(matrices) + 4 * gallery * d_image


def solve_flops(captions: int, gallery: int, d_text: int, d_image: int) -> float:
    """The closed form: covariances and residual over the captions, two linear systems."""
    over_captions = 2 * captions * (d_text**2 + d_text * d_image + d_image**2)
    systems = 2 / 3 * (d_text**3 + d_image**3) + 2 * d_text * d_image * (d_text + d_image)
    return over_captions + 2 * gallery * d_text * d_image + systems


def count_work(run: FinishedRun, data: Path, kernel: ModuleType) -> tuple[int, float]:
    """(captions, FLOP) of the validated training, from the members' weights and the epochs they really took."""
    bundle = kernel.load_torch(run.folder / kernel.VALIDATED_MODEL)
    with np.load(kernel.find_file(data, FILES[0])) as npz:
        captions, images = len(npz["captions/ids"]), len(npz["images/names"])
    gallery = images - len(bundle["val_images"])
    captions = round(captions * gallery / images)
    with (run.folder / kernel.TRAINING_LOG).open(newline="") as file:
        epochs = [int(row["member"]) for row in csv.DictReader(file) if row["phase"] == "validate"]
    seen, flops = 0, 0.0
    for number, member in enumerate(bundle["members"]):
        if member["knobs"]["network"] == "linear":
            seen, flops = seen + captions, flops + solve_flops(captions, gallery, *bundle["dims"])
        done = captions * epochs.count(number)
        seen, flops = seen + done, flops + done * network_flops(member, gallery, bundle["dims"][1])
    return seen, flops


def measure(recipe: str, seed: int, data: Path, output: Path, settings: list[str], kernel: ModuleType) -> Measured:
    """Run one recipe with one seed (of training and of the split) and read off what it did."""
    knobs = {"seed": seed, "split_seed": seed, "refit": False}
    arguments = ["--recipe", recipe, *as_arguments(knobs), *(f"--set={setting}" for setting in settings)]
    run = run_logged(data, output / f"{recipe}-seed{seed}", arguments, kernel)
    captions, flops = count_work(run, data, kernel)
    metrics = run.metrics
    return Measured(recipe, seed, final_scores(run), read_curve(run, kernel), metrics["seconds"]["load"],
                    metrics["seconds"]["train"], run.step_seconds, captions, flops, metrics["device"], metrics["dtype"],
                    metrics.get("peak_device_bytes") or metrics["peak_rss_bytes"])


# ------------------------------------------------------------------------------------------- this machine
def matmul_peak(device: str, dtype: str, seconds: float = 1.0) -> float:
    """FLOP/s that large products of a number type sustain here: the best size's mean over a second of products."""
    import torch

    place, best = "cpu" if device == "cpu" else "cuda", 0.0
    for size in (1024, 1536, 2048, 4096, 8192):
        work = 2 * size**3
        if work > best * seconds > 0:  # not one product of this size in that time
            break
        matrix = torch.randn(size, size, device=place).to(getattr(torch, dtype))
        product, done = matrix @ matrix, 0
        product[0, 0].item()  # waits for a GPU
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            for _ in range(10 if place == "cuda" else 1):
                torch.mm(matrix, matrix, out=product)
                done += 1
            product[0, 0].item()
        best = max(best, work * done / spent)
    return best


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
        row |= {"load_seconds": statistics.fmean(run.load_seconds for run in group),
                "train_seconds": seconds / len(group), "captions_per_second": sum(r.captions for r in group) / stepping,
                "flops_per_second": rate, "of_peak": rate / peaks[group[0].device, group[0].dtype],
                "peak_bytes": max(run.peak_bytes for run in group)}
        rows.append(row)
    return rows


def passing_time(run: Measured, score: str, goal: float) -> float | None:
    """Training seconds at which a run first reaches `goal`; None when it never does."""
    return next((seconds for seconds, scores in run.curve if scores[score] >= goal), None)


def against_baseline(runs: list[Measured]) -> list[dict[str, Any]]:
    """How much sooner than the baseline each recipe reaches the baseline's final score, the slowest seed counting."""
    finals = {run.seed: run for run in runs if run.recipe == BASELINE}
    rows = []
    for recipe, group in groups([run for run in runs if finals and run.recipe != BASELINE]).items():
        row: dict[str, Any] = {"recipe": recipe}
        for score in POOLS:
            times = [passing_time(run, score, finals[run.seed].scores[score]) for run in group]
            ratios = [finals[run.seed].train_seconds / max(t, 0.01) for run, t in zip(group, times, strict=True) if t]
            passed = None not in times
            row[f"{score}_seconds"] = max(times) if passed else None
            row[f"{score}_ratio"] = min(ratios) if passed else None
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------- what is written
def cell(value: float | None, pattern: str = ".4f") -> str | None:
    """A figure of a table."""
    return None if value is None else format(value, pattern)


def table_rows(rows: list[dict[str, Any]]) -> list[list[object]]:
    """The summary in the columns of HEADER."""
    return [[row["recipe"], row["seeds"],
             *(cell(row[name + end]) for name in SCORES for end in ("", "_se")),
             cell(row["load_seconds"], ".1f"), cell(row["train_seconds"], ".1f"),
             cell(row["captions_per_second"], ",.0f"), cell(row["flops_per_second"] / 1e9, ",.0f"),
             cell(row["of_peak"], ".0%"), cell(row["peak_bytes"] / 2**20, ",.0f")] for row in rows]


def passing_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[object]]]:
    """Header and rows of the comparison with the baseline."""
    header = ["baseline's final score passed by", "raw after s", "times sooner", "cosine after s", "times sooner"]
    return header, [[row["recipe"], *(cell(row[f"{score}_{what}"], pattern) for score in POOLS
                                      for what, pattern in (("seconds", ".1f"), ("ratio", ".0f")))] for row in rows]


def finding(rows: list[dict[str, Any]], passed: list[dict[str, Any]]) -> str:
    """What the picture shows, in one line."""
    best = max(rows, key=lambda row: row["pool100_raw"])
    text = f"{best['recipe']} is best: raw MRR {best['pool100_raw']:.3f} after {best['train_seconds']:.0f} s"
    sooner = [row for row in passed if row["pool100_raw_ratio"]]
    if sooner:
        fast = max(sooner, key=lambda row: row["pool100_raw_ratio"])
        text += (f"\n{fast['recipe']} passes the baseline's final score {fast['pool100_raw_ratio']:.0f} times sooner "
                 "than the baseline")
    return text


def plot(runs: list[Measured], title: str, path: Path) -> None:
    """Validation MRR over training time, a line a run, a colour a recipe."""
    import matplotlib.pyplot as plt  # the kernel, loaded before, has chosen the backend

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True, layout="constrained")
    for axes, score in zip(panels, POOLS, strict=True):
        for colour, (recipe, group) in zip(scaling.COLOURS, groups(runs).items(), strict=False):
            for run in group:
                points = [(max(seconds, 0.01), scores[score]) for seconds, scores in run.curve]
                axes.plot(*zip(*points, strict=True), "-o", color=colour, markersize=3, linewidth=1,
                          label=recipe if run is group[0] else None)
                axes.plot(*points[-1], "o", color=colour, markersize=8)
        axes.set(xscale="log", xlabel="seconds of training", ylabel=f"validation MRR, pools of 100, {SCORES[score]}")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), title="large dot: final score")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def write_report(runs: list[Measured], peaks: dict[tuple[str, str], float], output: Path) -> dict[str, Any]:
    """Table, markdown and plot; everything as a dictionary."""
    rows, passed = summarise(runs, peaks), against_baseline(runs)
    machine = [f"peak of a product: {peak / 1e9:,.0f} GFLOP/s ({device}, {dtype})" for (device, dtype), peak
               in peaks.items()]
    tables = [(HEADER, table_rows(rows)), *([passing_table(passed)] if passed else [])]
    print("\n\n".join([format_table(*table) for table in tables] + machine), file=sys.stderr)
    with atomic_path(output / "benchmark.md") as temporary:
        temporary.write_text("\n".join([markdown_table(*table) for table in tables] + machine) + "\n", encoding="utf-8")
    plot(runs, finding(rows, passed), output / "benchmark.png")
    return {"output": str(output), "recipes": rows, "against_baseline": passed,
            "peaks": [{"device": device, "dtype": dtype, "flops_per_second": peak}
                      for (device, dtype), peak in peaks.items()]}


# ------------------------------------------------------------------------------------------- command line
def full_size_data() -> Path:
    """Synthetic data of the competition's size, made once."""
    if not all(any(FULL_SIZE.rglob(name)) for name in FILES):
        print(f"making data of the competition's size in {FULL_SIZE}", file=sys.stderr)
        sample_data.make_full_size(FULL_SIZE)
    return FULL_SIZE


def run_all(arguments: argparse.Namespace, data: Path, output: Path, kernel: ModuleType) -> Iterator[Measured]:
    """Every recipe with every seed, one after another, so that none disturbs another's time."""
    table = [(recipe, seed) for recipe in arguments.recipes for seed in arguments.seeds]
    settings = (["epochs=1"] if arguments.full_size else []) + arguments.set
    for number, (recipe, seed) in enumerate(table, 1):
        print(f"run {number} of {len(table)}: {recipe}, seed {seed}", file=sys.stderr)
        run = measure(recipe, seed, data, output, settings, kernel)
        scores = ", ".join(f"{label} {run.scores[name]:.4f}" for name, label in SCORES.items())
        print(f"  {run.train_seconds:.1f} s of training, MRR {scores}", file=sys.stderr)
        yield run


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure the recipes side by side: quality, time, share of the machine's peak, memory.",
        epilog="example: python tools/benchmark.py --recipes baseline align --seeds 0 1 2 --data data\n\n"
        "exit codes: 0 measured and written, 1 a run failed, 2 wrong input, 130 or 143 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="default: all of the kernel's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of training and split")
    parser.add_argument("--data", type=Path, metavar="DIR", help="default data/, or a drawn sample")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a knob of every run")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: <runs>/<UTC time>-benchmark")
    parser.add_argument("--full-size", action="store_true", help="synthetic data of the competition's size, one epoch")
    parser.add_argument("--scaling", action="store_true", help="how time and memory grow with the work")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where the output folder goes")
    parser.add_argument("--json", action="store_true", help="the figures as JSON on stdout")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace, kernel: ModuleType) -> None:
    """Wrong recipes and knobs are told before the first run."""
    arguments.recipes = arguments.recipes or list(kernel.RECIPES)
    for recipe in arguments.recipes:
        kernel.resolve_knobs({"recipe": recipe} | dict(map(kernel.parse_setting, arguments.set)))
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
        raise InputError(f"--seeds {' '.join(map(str, arguments.seeds))}: give different numbers from 0 on")


def main(argv: list[str] | None = None) -> int:
    """Run, measure, write."""
    arguments = parse(argv)
    kernel = load_kernel()
    check(arguments, kernel)
    output = arguments.output or new_folder(arguments.runs, "scaling" if arguments.scaling else "benchmark")
    if arguments.scaling:
        result = scaling.study(output, arguments.set, kernel)
    else:
        data = full_size_data() if arguments.full_size else choose_data(arguments.data)
        runs = list(run_all(arguments, data, output, kernel))
        peaks = {key: matmul_peak(*key) for key in dict.fromkeys((run.device, run.dtype) for run in runs)}
        result = write_report(runs, peaks, output)
    print(json.dumps(result) if arguments.json else f"written: {output}")
    return 0


if __name__ == "__main__":
    run_tool(main)
