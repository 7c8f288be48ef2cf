"""Measure the recipes side by side on this machine: quality, time, captions a second, share of the peak, memory.

    python tools/benchmark.py --seeds 0 1 2                  the recipes, three seeds that also change the split
    python tools/benchmark.py --minutes 0.5 1 2 4            quality against time: each recipe with each budget
    python tools/benchmark.py --recipes align --full-size    synthetic data of the competition's size, one epoch
    python tools/benchmark.py --scaling                      how time and memory grow (docs/scaling.md)

Every run is the kernel itself as a sub-process. The output folder gets a table, a picture and every run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lib import kernel
from lib.bench import anytime, scaling
from lib.bench.measure import matmul_peak, run_all
from lib.bench.table import write_report
from lib.data import choose_data, drawn_once
from lib.project import REPO, InputError, make_parser, run_tool
from lib.runs import left_if_used, new_folder
from lib.sample.layout import make_full_size

FULL_SIZE = REPO / "build" / "full-size"
ENDLESS = "search"  # goes on for as long as it may
UNUSED = {"minutes": ["seeds"], "full_size": ["data"], "scaling": ["data", "recipes", "seeds"]}  # by a study


def parse(argv: list[str] | None) -> argparse.Namespace:
    codes = "0 measured and written, 1 a run failed, 2 wrong input, 128 + n ended by signal n"
    parser = make_parser(__doc__, codes, "--data", "--set", "--runs", "--json")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help=f"default: all but {ENDLESS}")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="of training and split (default 0)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: <runs>/<UTC time>-benchmark")
    study = parser.add_mutually_exclusive_group()
    study.add_argument("--minutes", nargs="+", type=float, metavar="M", help="time budgets, for quality against time")
    study.add_argument("--full-size", action="store_true", help="synthetic data of the competition's size, one epoch")
    study.add_argument("--scaling", action="store_true", help="how time and memory grow with the work")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """Wrong options, recipes, knobs and numbers are told before the first run."""
    for study, options in UNUSED.items():
        for option in options:
            if getattr(arguments, study) and getattr(arguments, option):
                raise InputError(f"--{study.replace('_', '-')} makes no use of --{option}: leave it out")
    arguments.seeds = arguments.seeds or [0]
    arguments.recipes = arguments.recipes or [name for name in kernel.RECIPES if name != ENDLESS]
    settings = dict(map(kernel.parse_setting, arguments.set))
    for recipe in arguments.recipes:
        kernel.resolve_candidates({"recipe": recipe} | settings)
    for seed in arguments.seeds:
        kernel.parse_setting(f"seed={seed}")
    for minutes in arguments.minutes or []:
        kernel.parse_setting(f"max_minutes={minutes}")
    if ENDLESS in arguments.recipes and not arguments.minutes and "max_minutes" not in settings:
        raise InputError(f"{ENDLESS} takes all the time that it may: give --minutes, or --set max_minutes=M")
    for option in ("recipes", "seeds", "minutes"):
        given = getattr(arguments, option) or []
        if len(set(given)) < len(given):  # its runs would share a folder, and one would count as two
            raise InputError(f"--{option} {' '.join(map(str, given))}: give each of them once")


def measure(arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    """The study that was asked for."""
    if arguments.scaling:
        return scaling.study(output, arguments.set)
    data = drawn_once(FULL_SIZE, make_full_size) if arguments.full_size else choose_data(arguments.data)
    if arguments.minutes:
        return anytime.study(arguments.recipes, arguments.minutes, data, output, arguments.set)
    settings = (["epochs=1"] if arguments.full_size else []) + arguments.set
    runs = list(run_all(arguments.recipes, arguments.seeds, data, output, settings))
    peaks = {key: matmul_peak(*key) for key in dict.fromkeys((run.device, run.dtype) for run in runs)}
    return write_report(runs, peaks, output)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    check(arguments)
    what = "scaling" if arguments.scaling else "quality-time" if arguments.minutes else "benchmark"
    output = arguments.output or new_folder(arguments.runs, what)
    with left_if_used(output):
        result = measure(arguments, output)
    print(json.dumps(result) if arguments.json else f"written: {output}")
    return 0


if __name__ == "__main__":
    run_tool(main)
