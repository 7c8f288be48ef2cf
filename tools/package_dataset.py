"""Package a run as a private Kaggle dataset: code, weights, manifest and a card made from its metrics.

    python tools/package_dataset.py --run runs/mine --dry-run     stage, check and show what would go
    python tools/package_dataset.py --run runs/mine               upload, wait until every file is there
    python tools/package_dataset.py --run runs/aml-embed-pairs-v1  the pairs that kernel/embed.py made, as another one

A kernel that attaches the dataset predicts with the weights, or goes on with a run that was stopped. A version that
already holds the same content is not uploaded again. Nothing but the known files goes: a secret or a foreign file
stops everything.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lib import kernel
from lib.jobs.dataset import BUILD, READY_MINUTES, Package, publish, stage
from lib.jobs.lint import OWNER_PLACEHOLDER
from lib.kaggle_api.client import connect
from lib.project import format_table, in_turn, make_parser, minutes, run_tool
from lib.runs import newest_run


def show(run: Path, staged: Package, as_json: bool, version: int | None) -> None:
    """What goes, or went, to Kaggle."""
    if as_json:
        shown = {"run": str(run), "dataset": staged.ref, "version": version, "content": staged.content}
        print(json.dumps({**shown, "folder": str(staged.folder), "files": staged.files}))
        return
    print(f"run: {run}")
    rows = [[name, f"{facts['bytes']:,}", facts["sha256"][:16]] for name, facts in staged.files.items()]
    print(format_table(["file", "bytes", "sha256"], rows))
    if version is None:
        nothing = "dry run: nothing was sent, no account was asked"
        print(f"{nothing}; {staged.ref} would be private; staged in {staged.folder}")
    else:
        print(f"{staged.ref} version {version}: private, ready, every file listed with its size")


def parse(argv: list[str] | None) -> argparse.Namespace:
    codes = (
        "0 the version is ready with every file (--dry-run: nothing is wrong with the folder),\n"
        "1 Kaggle did not take it or is not done in time, 2 wrong input: a secret, a foreign file, a damaged run"
    )
    parser = make_parser(__doc__, codes, "--runs", "--json")
    parser.add_argument("--run", type=Path, metavar="DIR", help="the run (default: the one with the newest weights)")
    parser.add_argument("--folder", type=Path, default=BUILD, metavar="DIR", help="build folder")
    parser.add_argument("--dry-run", action="store_true", help="stage, check and show what would go; no network")
    parser.add_argument("--again", action="store_true", help="upload although a version holds the same content")
    parser.add_argument("--timeout-minutes", type=minutes, default=READY_MINUTES, metavar="M", help="wait for Kaggle")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    run = arguments.run or newest_run(arguments.runs, kernel.FINAL_MODEL, complete=True)
    if arguments.dry_run:
        with in_turn(arguments.folder.parent, arguments.folder.name):  # nothing is staged anew while it is sent
            show(run, stage(run, arguments.folder, OWNER_PLACEHOLDER), arguments.json, None)
        return
    seconds = 60 * arguments.timeout_minutes
    staged, version = publish(connect(), run, arguments.folder, arguments.runs, seconds, arguments.again)
    show(run, staged, arguments.json, version)


if __name__ == "__main__":
    run_tool(main)
