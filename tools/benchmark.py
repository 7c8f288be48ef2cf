"""Measure the recipes side by side on this machine: quality, time, captions a second, share of the peak, memory.

    python tools/benchmark.py --seeds 0 1 2                  all recipes, three seeds that also change the split
    python tools/benchmark.py --recipes align --full-size    synthetic data of the competition's size, one epoch
    python tools/benchmark.py --scaling                      how time and memory grow; the table and plot of the README

Every run is the kernel itself as a sub-process. The output folder gets benchmark.md, benchmark.png and every run.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

from lib import kernel
from lib.bench import scaling
from lib.bench.measure import full_size_data, matmul_peak, run_all
from lib.bench.table import write_report
from lib.data import choose_data
from lib.project import RUNS, InputError, run_tool
from lib.runs import new_folder


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


def check(arguments: argparse.Namespace) -> None:
    """Wrong recipes and knobs are told before the first run."""
    arguments.recipes = arguments.recipes or list(kernel.RECIPES)
    for recipe in arguments.recipes:
        kernel.resolve_knobs({"recipe": recipe} | dict(map(kernel.parse_setting, arguments.set)))
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
        raise InputError(f"--seeds {' '.join(map(str, arguments.seeds))}: give different numbers from 0 on")


def main(argv: list[str] | None = None) -> int:
    """Run, measure, write."""
    arguments = parse(argv)
    check(arguments)
    output = arguments.output or new_folder(arguments.runs, "scaling" if arguments.scaling else "benchmark")
    if arguments.scaling:
        result = scaling.study(output, arguments.set)
    else:
        data = full_size_data() if arguments.full_size else choose_data(arguments.data)
        runs = list(run_all(arguments, data, output))
        peaks = {key: matmul_peak(*key) for key in dict.fromkeys((run.device, run.dtype) for run in runs)}
        result = write_report(runs, peaks, output)
    print(json.dumps(result) if arguments.json else f"written: {output}")
    return 0


if __name__ == "__main__":
    run_tool(main)
