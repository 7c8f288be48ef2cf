"""From the repository's state to a score on the leaderboard: package, push, wait, fetch, verify, submit, score.

    python tools/ship.py --recipe align                        train on Kaggle, submit what comes out
    python tools/ship.py --weights runs/mine                   package a run's weights, predict with them on Kaggle
    python tools/ship.py --recipe align --no-submit            everything but the submission
    python tools/ship.py --resume 3                            go on from what the stopped version 3 left

Interrupted at any step, the same command goes on from there: nothing is uploaded, pushed or submitted twice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lib.jobs import ship
from lib.jobs.order import read_overrides
from lib.jobs.push import add_push_options
from lib.kaggle_api.client import connect
from lib.project import DATA, make_parser, run_tool


def parse(argv: list[str] | None) -> argparse.Namespace:
    codes = (
        "0 scored and recorded (--no-submit: fetched and verified), 1 a step failed, 2 wrong input;\n"
        "after any of them, and after an interruption (130), the same command goes on where it stopped"
    )
    parser = make_parser(__doc__, codes, "--recipe", "--set", "--runs", "--json")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, metavar="RUN", help="package this run; the kernel predicts with it")
    about = "package the state that a cancelled or failed version left; the kernel goes on from it"
    source.add_argument("--resume", type=int, metavar="VERSION", help=about)
    parser.add_argument("--no-submit", action="store_true", help="stop when the output is fetched and verified")
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="where the test set is, for its ids")
    add_push_options(parser)
    return parser.parse_args(argv)


def report(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    print(f"{result['kernel']} version {result['version']}: verified output in {result['run']}")
    if "ref" in result:
        validation = "" if result["validation"] is None else f", validation {result['validation']:.4f}"
        print(f"submission {result['ref']}: public score {result['public']}{validation}")


def main(argv: list[str] | None = None) -> None:
    """Every step in order; each finds out by itself whether it was done before."""
    arguments = parse(argv)
    given = read_overrides(arguments.recipe, arguments.set)
    overrides = arguments.time.tell({"mode": "predict", **given} if arguments.weights is not None else given)
    run = ship.chosen_weights(arguments, overrides)
    client = connect()
    if arguments.resume is not None:
        run, overrides = ship.taken_up(client, arguments, given)
    packaged = None if run is None else ship.package_weights(client, run, arguments.runs)
    version, folder = ship.run_on_kaggle(client, arguments, overrides, packaged)
    if packaged is not None:
        ship.check_weights_used(folder, packaged)
    result: dict[str, Any] = {"kernel": version.ref, "version": version.number, "run": str(folder)}
    if not arguments.no_submit:
        candidate = ship.candidate_of(folder, run)
        score = ship.submit_and_score(client, arguments, candidate)
        result |= {"ref": score.ref, "public": score.public_score, "private": score.private_score}
        result["validation"] = candidate.validation
    report(result, arguments.json)


if __name__ == "__main__":
    run_tool(main)
