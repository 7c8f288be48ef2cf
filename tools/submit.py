"""Submit a run's csv to the competition, wait for its score and record it; exit 0 only with the score in the record.

    python tools/submit.py runs/aml-align-v3                                 the csv of a run's folder
    python tools/submit.py runs/aml-align-v3/pipeline_submission.csv         the same, by its file
    python tools/submit.py --kernel USER/aml-align --version 3               the output of a kernel version, on Kaggle

The csv is checked with the kernel's own check first. A file is submitted once: its sha256 stands in the message, so
neither an interruption nor a lost record submits it twice (--again does). The same command goes on after one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lib.jobs import submission
from lib.jobs.fetch import collect
from lib.jobs.order import SessionTime
from lib.jobs.push import chosen_version
from lib.kaggle_api.client import KaggleClient, connect
from lib.kaggle_api.competitions import Limits, Submission, competition_errors
from lib.project import DATA, InputError, make_parser, minutes, run_tool


def find_candidate(client: KaggleClient | None, arguments: argparse.Namespace) -> submission.Candidate:
    """The csv that the arguments name; that of a kernel version is fetched and verified first."""
    if client is None:
        return submission.candidate_of(arguments.csv)
    version = chosen_version(client, arguments.kernel, arguments.version, arguments.runs)
    folder = collect(client, version, arguments.runs, SessionTime())
    return submission.candidate_of(folder, version)


def report(found: Submission, candidate: submission.Candidate, limits: Limits | None, as_json: bool) -> None:
    left = limits.allowed_now if limits else None
    if as_json:
        scores = {"public": found.public_score, "private": found.private_score}
        about = {key: getattr(candidate, key) for key in ("validation", "validation_se", "run", "sha256")}
        print(json.dumps({"ref": found.ref, **scores, **about, "left_today": left}))
        return
    validation = f", validation {candidate.expected}" if candidate.expected else ""
    more = "the submissions left are not known" if left is None else f"{left} submissions left today"
    print(f"submission {found.ref} of {candidate.run}: public score {found.public_score}{validation}; {more}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    codes = (
        "0 submitted, scored and recorded, 1 it failed or none is left today,\n"
        "2 wrong csv, credentials or a file that was submitted before"
    )
    parser = make_parser(__doc__, codes, "--runs", "--json", "--competition")
    parser.add_argument("csv", type=Path, nargs="?", help="the folder of a run, or its csv")
    parser.add_argument("--kernel", metavar="OWNER/SLUG", help="submit the output of a kernel on Kaggle instead")
    parser.add_argument("--version", type=int, help="the version of --kernel")
    parser.add_argument("--again", action="store_true", help="submit although the same bytes were submitted before")
    parser.add_argument("--data", type=Path, default=DATA, help="where the test set is (default: data/)")
    parser.add_argument("--timeout-minutes", type=minutes, default=60.0, help="how long to wait for the score")
    arguments = parser.parse_args(argv)
    if (arguments.csv is None) == (arguments.kernel is None):
        raise InputError("name a run's folder, as in runs/NAME, or its csv, or else --kernel OWNER/SLUG --version N")
    if (arguments.kernel is None) != (arguments.version is None):
        raise InputError("--kernel and --version go together")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    slug = arguments.competition
    client = connect() if arguments.kernel else None
    candidate = find_candidate(client, arguments)
    submission.check_csv(candidate.path, arguments.data, slug)
    entry = submission.Entry(client or connect(), slug, candidate, arguments.runs)
    with competition_errors(slug):
        ref = entry.submit(arguments.again)
    print(f"submission {ref}: waiting for its score", file=sys.stderr)
    found = entry.scored(ref, arguments.timeout_minutes * 60)
    report(found, candidate, entry.limits(), arguments.json)


if __name__ == "__main__":
    run_tool(main)
