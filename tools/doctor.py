"""Look at everything that the tools need, on one page: what is there, what is not, and the command that mends it.

python tools/doctor.py
python tools/doctor.py --json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from lib.data import COMPETITION
from lib.jobs.doctor import Check, check_up
from lib.project import DATA, run_tool

GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"


def show(check: Check) -> None:
    """One line, green or red on a terminal; what to do below a red one."""
    word = "ok " if check.ok else "NOT"
    if sys.stdout.isatty():
        word = f"{GREEN if check.ok else RED}{word}{PLAIN}"
    print(f"{word}  {check.name:12} {check.found}", flush=True)
    if not check.ok:
        print(f"     {'':12} -> {check.next}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Check Python, packages, disk, GPU, data, credentials, rules, quota and submissions left.",
        epilog="example: python tools/doctor.py --json\n\nexit codes: 0 all is green, 1 something is red",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="where the data is (default: data/)")
    parser.add_argument("--competition", default=COMPETITION, help="its slug (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the checks as a JSON list on stdout")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Show every check as it comes."""
    arguments = parse(argv)
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
