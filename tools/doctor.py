"""Look at everything that the tools need, on one page: what is there, what is not, and the command that mends it.

    python tools/doctor.py
    python tools/doctor.py --json

Python and packages, disk, GPU, data, credentials, rules, quota and the submissions that are left.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from lib.jobs.doctor import Check, check_up
from lib.project import DATA, make_parser, run_tool

GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"


def show(check: Check) -> None:
    """One line, green or red on a terminal; what to do below a red one."""
    word = "ok " if check.ok else "NOT"
    if sys.stdout.isatty():
        word = f"{GREEN if check.ok else RED}{word}{PLAIN}"
    print(f"{word}  {check.name:12} {check.found}", flush=True)
    if not check.ok:
        print(f"     {'':12} -> {check.next}")


def main(argv: list[str] | None = None) -> int:
    """Show every check as it comes."""
    parser = make_parser(__doc__, "0 all is green, 1 something is red", "--competition", "--json")
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="where the data is (default: data/)")
    arguments = parser.parse_args(argv)
    checks = []
    for check in check_up(arguments.data, arguments.competition):
        checks.append(check)
        if not arguments.json:
            show(check)
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    run_tool(main)
