"""Download the data of the competition into data/ and verify it by size and sha256.

    python tools/download_data.py             the three files that training and prediction need (633 MB)
    python tools/download_data.py --images    everything, with the 25,000 photos (3.8 GB)

An interrupted download goes on where it stopped; files that are there and right are not fetched again. Kaggle wants
the rules accepted once, in the browser: https://www.kaggle.com/competitions/aml-competition/rules
"""

from __future__ import annotations

from pathlib import Path

from lib.jobs.download import fetch_all, fetch_needed
from lib.kaggle_api.client import connect
from lib.kaggle_api.competitions import competition_errors
from lib.project import DATA, ToolError, make_parser, run_tool


def main(argv: list[str] | None = None) -> None:
    codes = "0 all files are there and right, 1 a download or a check failed, 2 wrong input or credentials"
    parser = make_parser(__doc__, codes, "--competition")
    parser.add_argument("--data", type=Path, default=DATA, help="where to put it (default: data/ of the repository)")
    parser.add_argument("--images", action="store_true", help="everything, with the photos, not only what is needed")
    parser.add_argument("--force", action="store_true", help="fetch also what is there and right")
    arguments = parser.parse_args(argv)
    client = connect()  # first: without credentials no empty folder is left, which the other tools would take for data
    try:
        arguments.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f"{arguments.data}: cannot be made ({error.strerror})") from None
    with competition_errors(arguments.competition):
        fetch_files = fetch_all if arguments.images else fetch_needed
        fetch_files(client, arguments.competition, arguments.data, arguments.force)


if __name__ == "__main__":
    run_tool(main)
