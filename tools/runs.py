"""All runs side by side, as people keep them in a spreadsheet: what each was, its validation, what the board said.

    python tools/runs.py                            every run below runs/, local, from Kaggle and of sweeps
    python tools/runs.py --recipe align --last 10   the ten newest of a recipe
    python tools/runs.py --sort raw                 the best first
    python tools/runs.py --compare runs/A runs/B    the knobs that differ, and the difference with its interval

Quality against time of all runs is drawn to runs.png in the folder of the runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lib import kernel
from lib.data import choose_data
from lib.jobs import ledger
from lib.project import InputError, figure, format_table, make_parser, run_tool
from lib.report.numbers import difference_in_words
from lib.runs import Run, open_trained


def differences(one: Run, other: Run, data: Path | None) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """(measured, differences of the MRR): paired where both runs can predict the same held-out images here.

    `measured` is a row a run, with its own record; where that cannot be, there is none, and the records are compared.
    """
    from lib.report.measure import paired  # torch and matplotlib: not for the table

    print("predicting the held-out images with both runs' validated weights", file=sys.stderr, flush=True)
    try:
        return paired(one, other, choose_data(data, draw=False))
    except (InputError, kernel.UserError) as error:
        print(f"not paired: {error}", file=sys.stderr)
        return [], ledger.unpaired(one, other)


def show_measured(rows: list[dict[str, Any]]) -> None:
    """Each run's own record beside what is measured here, and why they differ."""
    from lib.report.contents import choice_in_words

    cells = [[row["model"], *(figure(row[key]) for key in ("recorded", "raw", "raw_se"))] for row in rows]
    print(format_table(["raw MRR", "its record", "measured here", "+-"], cells))
    print("\n".join([*choice_in_words(rows), ""]))


def compare(folders: list[Path], data: Path | None, as_json: bool) -> None:
    """What two runs differ in, and by how much."""
    one, other = map(open_trained, folders)
    knobs = ledger.different_knobs(one, other)
    measured, found = differences(one, other, data)
    if as_json:
        shown = {"runs": list(map(str, folders)), "knobs": knobs, "how": "paired" if measured else "unpaired"}
        print(json.dumps({**shown, "measured": measured, "mrr": found}, indent=1))
        return
    rows = [[key, *values, ledger.reason_of(key)] for key, values in knobs.items()]
    print(format_table(["knob", one.name, other.name, "why"], rows, texts=(0, 1, 2, 3)) if rows else "no knob differs")
    print()
    if measured:
        show_measured(measured)
    for name, difference in found.items():
        print(difference_in_words(difference, other.name, name))
    if not found:
        print("no validation to compare")


def parse(argv: list[str] | None) -> argparse.Namespace:
    codes = "0 shown, 1 the plot could not be written, 2 wrong input"
    parser = make_parser(__doc__, codes, "--runs", "--recipe", "--json")
    parser.add_argument("--last", type=int, metavar="N", help="only the N newest")
    parser.add_argument(
        "--sort",
        choices=ledger.SORTS,
        default="date",
        help="the best first (date: the newest last; full: all held-out)",
    )
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two runs' folders")
    parser.add_argument("--data", type=Path, metavar="DIR", help="for --compare: the data of the runs (default data/)")
    arguments = parser.parse_args(argv)
    if arguments.last is not None and arguments.last < 1:
        raise InputError(f"--last {arguments.last}: give at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.compare:
        compare(arguments.compare, arguments.data, arguments.json)
        return 0
    entries = ledger.read_ledger(arguments.runs)
    shown = ledger.arranged(entries, arguments.recipe, arguments.last, arguments.sort)
    if arguments.json:
        print(json.dumps([asdict(entry) for entry in shown], indent=1))
    else:
        recipe = f" --recipe {arguments.recipe}" if arguments.recipe else ""
        print(ledger.table(shown) if shown else f"no such runs yet: python tools/run_local.py{recipe} makes one")
    if any(entry.raw and entry.seconds for entry in shown):
        ledger.plot(shown, arguments.runs / "runs.png")
        print(f"plot: {arguments.runs / 'runs.png'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_tool(main)
