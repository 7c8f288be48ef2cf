"""The history of submissions: local validation beside the public and private score, the place on the leaderboard.

    python tools/scores.py               table, and runs/scores.png
    python tools/scores.py --json        the same for a script
    python tools/scores.py --offline     from the local record alone

Kaggle's history is joined with the local record by the submission's ref. Each submission's message carries run,
commit and validation score, so a lost record costs nothing; what Kaggle shows is kept in the record for offline use.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from lib import record
from lib.jobs.history import Attempt, Place, best_of, from_kaggle, join, place_of, plot, table
from lib.kaggle_api.client import connect
from lib.kaggle_api.competitions import competition_errors
from lib.kaggle_api.errors import Ambiguous
from lib.project import InputError, make_parser, run_tool


def show(rows: list[Attempt], best: Attempt | None, place: Place | None) -> None:
    """The table and what follows from it."""
    if not rows:
        print("no submissions yet: python tools/submit.py RUN makes one")
        return
    print(table(rows, best))
    if best is not None:
        print(f"\nbest public score {best.public:.5f}: submission {best.ref} of {best.run} (*)")
    if place is not None:
        behind = f"{place.gap:.5f} behind the first ({place.first:.5f})"
        print(f"place {place.rank} of {place.teams} on the leaderboard, {behind}")


def gather(arguments: argparse.Namespace) -> tuple[str, list[Attempt], list[float]]:
    """(source, rows, scores of the leaderboard): from Kaggle, or from the record without a network or by --offline."""
    if not arguments.offline:
        try:
            with competition_errors(arguments.competition):
                return "kaggle", *from_kaggle(connect(), arguments.runs, arguments.competition)
        except Ambiguous as error:  # silence, a broken line, a server error: not wrong credentials
            if not record.read(arguments.runs):
                raise
            print(f"{error}; showing the local record instead", file=sys.stderr)
    return "record", join([], arguments.runs, arguments.competition), []


def parse(argv: list[str] | None) -> argparse.Namespace:
    codes = "0 shown (also from the local record), 1 Kaggle refused, 2 wrong competition or credentials"
    parser = make_parser(__doc__, codes, "--runs", "--json", "--competition")
    parser.add_argument("--plot", type=Path, help="where the plot goes (default: scores.png below --runs)")
    parser.add_argument("--offline", action="store_true", help="show the local record, without asking Kaggle")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.plot is not None and arguments.plot.suffix != ".png":
        raise InputError(f"--plot {arguments.plot}: the plot is a .png")
    source, rows, board = gather(arguments)
    best = best_of(rows)
    place = place_of(best, board)
    if arguments.json:
        ends = {"best": best and asdict(best), "place": place and asdict(place)}
        print(json.dumps({"source": source, "submissions": [asdict(row) for row in rows], **ends}, indent=1))
    else:
        show(rows, best, place)
    if rows:
        path = arguments.plot or arguments.runs / "scores.png"
        plot(rows, best, path)
        print(f"plot: {path}", file=sys.stderr)


if __name__ == "__main__":
    run_tool(main)
