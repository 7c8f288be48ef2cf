"""Push the kernel to Kaggle, wait for its end, fetch its output and verify every file; exit 0 only then.

    python tools/push_kernel.py --recipe align --set epochs=8      push, wait, fetch into runs/
    python tools/push_kernel.py --dataset aml-alignment-weights --set mode=predict
    python tools/push_kernel.py --no-wait                          push only
    python tools/push_kernel.py output --version 3                 wait for version 3 and fetch it
    python tools/push_kernel.py --init USER                        write your name into both metadata files, once

The same script with the same settings is not pushed twice: an interrupted run goes on with the version that it made.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

from lib.jobs import push
from lib.kaggle_api.client import KaggleClient, connect, split_ref
from lib.project import format_table, run_tool


def print_quota(client: KaggleClient, as_json: bool) -> None:
    """This week's accelerator hours."""
    quota = client.quota()
    if as_json:
        print(json.dumps({kind: {**vars(hours), "left_hours": hours.left_hours} for kind, hours in quota.items()}))
        return
    rows = [[kind, f"{hours.used_hours:.1f}", f"{hours.reserved_hours:.1f}", f"{hours.total_hours:.1f}",
             f"{hours.left_hours:.1f}"] for kind, hours in quota.items()]
    print(format_table(["accelerator", "used h", "reserved h", "total h", "left h"], rows))


def report(as_json: bool, ref: str, version: int, status: str, folder: Path | None = None) -> None:
    """What became of a kernel version, on stdout."""
    if as_json:
        run = None if folder is None else str(folder)
        print(json.dumps({"kernel": ref, "version": version, "status": status, "run": run}))
    else:
        print(f"{ref} version {version}: {status}" + ("" if folder is None else f"; verified output in {folder}"))


def look_at_version(client: KaggleClient, arguments: argparse.Namespace, deadline_seconds: float) -> None:
    """`status` and `output` of an earlier version."""
    ref = push.staged_metadata(client.username)["id"]
    version = push.chosen_version(client, ref, arguments.version)
    if arguments.action == "output":
        folder = push.collect(client, ref, version, arguments.runs, deadline_seconds)
        report(arguments.json, ref, version, "complete", folder)
        return
    status, message = client.kernel_status(*split_ref(ref), version)
    report(arguments.json, ref, version, f"{status} ({message})" if message else status)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Push the kernel to Kaggle, wait for its end, fetch its output and verify every file.",
        epilog="example: python tools/push_kernel.py --recipe align --set epochs=8 --timeout-minutes 60\n\n"
        "exit codes: 0 the kernel ended well and every output is verified (--no-wait: Kaggle has taken the push),\n"
        "1 it was refused, failed, was cancelled, has no quota or is not done in time, 2 wrong input",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", nargs="?", default="push", choices=("push", "status", "output"),
                        help="status or output of an earlier version instead of a push")
    parser.add_argument("--version", type=int, metavar="N", help="for status and output; the current one by default")
    parser.add_argument("--no-wait", action="store_true", help="return once Kaggle has taken the push")
    parser.add_argument("--quota", action="store_true", help="show this week's accelerator hours and stop")
    parser.add_argument("--init", metavar="USER", help="write the owner into both metadata files and stop")
    push.add_push_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int | None:
    """Push, or look at an earlier version, or show the quota, or write the owner."""
    arguments = parse(argv)
    if arguments.init is not None:
        push.init_owner(arguments.init)
        return 0
    deadline_seconds, session_seconds = push.read_timeout(arguments.timeout_minutes)
    overrides = push.read_overrides(arguments.recipe, arguments.set)
    client = connect()
    if arguments.quota:
        print_quota(client, arguments.json)
        return 0
    if arguments.action != "push":
        look_at_version(client, arguments, deadline_seconds)
        return 0
    metadata = push.staged_metadata(client.username, arguments.accelerator, arguments.dataset, arguments.kernel_source)
    staged = push.stage(metadata, overrides, push.BUILD)
    versions = push.wait_for_datasets(client, metadata, arguments.runs)
    version = push.push(client, push.Order(staged, versions, session_seconds), arguments.runs, arguments.again)
    if arguments.no_wait:
        report(arguments.json, staged.ref, version, "pushed")
        return 0
    folder = push.collect(client, staged.ref, version, arguments.runs, deadline_seconds)
    report(arguments.json, staged.ref, version, "complete", folder)
    return 0


if __name__ == "__main__":
    run_tool(main)
