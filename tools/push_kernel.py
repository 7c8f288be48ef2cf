"""Push the kernel to Kaggle, wait for its end, fetch its output and verify every file; exit 0 only then.

    python tools/push_kernel.py --recipe align --set epochs=8      push, wait, fetch into runs/
    python tools/push_kernel.py --dataset aml-alignment-weights --set mode=predict
    python tools/push_kernel.py --dry-run                          show what would be pushed; needs no account
    python tools/push_kernel.py output --version 3                 wait for version 3 and fetch it
    python tools/push_kernel.py list                               sessions of the account: what runs, what holds a slot
    python tools/push_kernel.py --script embed --dataset OWNER/SLUG  photos and captions to pairs (docs/pairs.md)
    python tools/push_kernel.py --init USER                        write your name into the metadata files, once

The same script with the same settings is not pushed twice: an interrupted run goes on with the version that it made.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lib.jobs import fetch, lint, order, push
from lib.jobs.session import sessions
from lib.kaggle_api.client import KaggleClient, connect
from lib.kaggle_api.kernels import Version
from lib.project import InputError, format_table, make_parser, print_table, run_tool


def print_quota(client: KaggleClient, as_json: bool) -> None:
    """This week's accelerator hours."""
    quota = {kind: vars(hours) | {"left_hours": hours.left_hours} for kind, hours in client.kernels.quota().items()}
    rows = [[kind, *(f"{each:.1f}" for each in hours.values())] for kind, hours in quota.items()]
    header = ["accelerator", "used h", "reserved h", "total h", "left h"]
    print(json.dumps(quota) if as_json else format_table(header, rows))


def report(as_json: bool, version: Version, status: str, folder: Path | None = None) -> None:
    """What became of a kernel version, on stdout."""
    if as_json:
        run = folder and str(folder)
        print(json.dumps({"kernel": version.ref, "version": version.number, "status": status, "run": run}))
    else:
        print(f"{version}: {status}" + (f"; verified output in {folder}" if folder else ""))


def look_at_version(client: KaggleClient, arguments: argparse.Namespace) -> None:
    """`status` and `output` of an earlier version."""
    ref = order.owned_metadata(client.username, arguments.script)["id"]
    version = push.chosen_version(client, ref, arguments.version, arguments.runs)
    if arguments.action == "status":
        status, message = client.kernels.status(version)
        report(arguments.json, version, f"{status} ({message})" if message else status)
    elif arguments.only is None:
        folder = fetch.collect(client, version, arguments.runs, arguments.time)
        report(arguments.json, version, "complete", folder)
    else:
        rows = fetch.fetch_partial(client, version, arguments.runs, arguments.only).states(arguments.only)
        print_table(["file", "state"], rows, arguments.json)


def show_staged(staged: order.Order, as_json: bool) -> None:
    print(json.dumps(staged.facts(), indent=None if as_json else 1))
    said = f"dry run: nothing was sent, no account was asked; {staged.ref} would be private and is clean by kaggle_lint"
    if lint.OWNER_PLACEHOLDER in staged.ref:
        said += f"; a push has your account's name in place of {lint.OWNER_PLACEHOLDER}"
    print(said, file=sys.stderr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    codes = (
        "0 the kernel ended well and every output is verified (--no-wait: Kaggle has taken the push),\n"
        "1 it was refused, failed, was cancelled, has no quota or is not done in time, 2 wrong input"
    )
    parser = make_parser(__doc__, codes, "--recipe", "--set", "--runs", "--json")
    about = "status or output of an earlier version, or the list of sessions, instead of a push"
    parser.add_argument("action", nargs="?", default="push", choices=("push", "status", "output", "list"), help=about)
    parser.add_argument("--version", type=int, metavar="N", help="for status and output; the current one by default")
    parser.add_argument("--only", metavar="PATTERN", help="for output: only these files, also of an unfinished run")
    parser.add_argument("--no-wait", action="store_true", help="return once Kaggle has taken the push")
    parser.add_argument("--dry-run", action="store_true", help="stage, lint and show what would be pushed; no network")
    parser.add_argument("--quota", action="store_true", help="show this week's accelerator hours and stop")
    parser.add_argument("--init", metavar="USER", help="write the owner into the metadata files and stop")
    parser.add_argument("--script", choices=order.SCRIPTS, default="pipeline", help="which script of kernel/ to push")
    push.add_push_options(parser)
    arguments = parser.parse_args(argv)
    for option, actions in {"version": ("status", "output"), "only": ("output",)}.items():
        if getattr(arguments, option) is not None and arguments.action not in actions:
            raise InputError(f"--{option} is of what was pushed: say {' or '.join(actions)} before it")
    return arguments


def push_and_fetch(arguments: argparse.Namespace) -> None:
    """Stage, push, wait and fetch, as far as the options say."""
    overrides = arguments.time.tell(order.read_overrides(arguments.recipe, arguments.set, arguments.script))
    client = None if arguments.dry_run else connect()
    staged = order.stage_push(client, arguments, overrides, arguments.script)
    if client is None:
        show_staged(staged, arguments.json)
        return
    version = push.push_staged(client, staged, arguments.runs, arguments.again)
    folder = None if arguments.no_wait else fetch.collect(client, version, arguments.runs, arguments.time)
    report(arguments.json, version, "complete" if folder else "pushed", folder)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.init is not None:
        order.init_owner(arguments.init)
    elif arguments.quota:
        print_quota(connect(), arguments.json)
    elif arguments.action == "push":
        push_and_fetch(arguments)
    elif arguments.action == "list":
        print_table(["kernel", "version", "status", "age h", "holds"], sessions(connect()), arguments.json)
    else:
        look_at_version(connect(), arguments)


if __name__ == "__main__":
    run_tool(main)
