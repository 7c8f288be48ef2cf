"""Run the kernel on this machine: from the two npz files to a validated, checked submission.

    python tools/run_local.py                                   data/, or a drawn sample where there is no data/
    python tools/run_local.py --recipe baseline --set epochs=5  another recipe, one knob changed
    python tools/run_local.py --data ../proxy --output runs/x   other data, a folder of my own choice
    python tools/run_local.py --weights runs/x                  no training: predict with the weights of a run
    python tools/run_local.py --list                            recipes and knobs, with their reasons

The very file that goes to Kaggle runs as a sub-process from an empty folder. Ctrl-C stops it and prints the command
that goes on. The exit code is the kernel's; 0 only when every output is what its manifest says.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from lib import kernel, record
from lib.data import choose_data
from lib.jobs import local
from lib.kernel import recipe_names
from lib.process import STOPPED, Ended, as_arguments, run_kernel
from lib.project import RUNS, InputError, as_command, make_parser, run_tool
from lib.runs import Run, check_run, left_if_used, named_folder, new_folder


def report(run: Run, seconds: float, data: Path, arguments: argparse.Namespace) -> None:
    """The submission and the next command, below the kernel's scores. `seconds`: of this part of the run."""
    submission = run.folder / kernel.SUBMISSION
    if arguments.json:
        shown = {"run": str(run.folder), "submission": str(submission), "recipe": run.recipe, "complete": run.complete}
        print(json.dumps({**shown, "seconds": run.manifest["seconds"], "validation": run.scores or None}))
        return
    if run.total_seconds > seconds:  # it went on from an earlier one
        print(f"{run.total_seconds:.1f} s, all parts of the run together")
    early = run.manifest.get("stopped")
    print(f"submission: {submission} (checked" + (f"; ended by {early})" if early else ")"))
    if command := local.next_command(run, data, places(arguments)):
        print(f"next: {command}")


def failed(ended: Ended, output: Path, arguments: argparse.Namespace) -> int:
    """One line on stderr; the kernel's code."""
    kept = (output / kernel.RESUME_RUN).exists()
    to_go_on = f"; to go on: {command_again(arguments, output)}" if kept else ""
    if ended.code not in STOPPED:
        reason = ended.error or f"the kernel ended with code {ended.code}; its last lines are above"
        again = "" if ended.code == InputError.exit_code else to_go_on  # wrong input stays wrong
        print(f"error: {reason}{again}", file=sys.stderr)
    elif kept:
        so_far = "; it has a submission" if (output / kernel.MANIFEST).exists() else ""
        print(f"interrupted{so_far}{to_go_on}", file=sys.stderr)
    else:
        print("interrupted; nothing kept yet; run it again", file=sys.stderr)
    return ended.code


def command_again(arguments: argparse.Namespace, output: Path) -> str:
    """The whole command that goes on with a run in `output`."""
    asked = {"--recipe": arguments.recipe, "--mode": arguments.mode, "--weights": arguments.weights}
    return as_command("run_local", asked | {"--set": arguments.set} | places(arguments) | {"--output": output})


def places(arguments: argparse.Namespace) -> dict[str, Path | None]:
    """Data and runs as options of the next command, where they are not the usual ones."""
    return {"--data": arguments.data, "--runs": None if arguments.runs == RUNS else arguments.runs}


def parse(argv: list[str] | None) -> argparse.Namespace:
    codes = (
        "the kernel's (0 only when every output is what its manifest says, 1 failed, 2 wrong input,\n"
        "129, 130 or 143 interrupted: the same command with the same --output goes on)"
    )
    parser = make_parser(__doc__, codes, "--data", "--runs", "--set", "--json")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: <runs>/<UTC time>-<recipe>")
    parser.add_argument("--again", action="store_true", help="keep a finished run in --output aside and run anew")
    parser.add_argument("--recipe", metavar="NAME", help=f"a named set of knobs: {', '.join(recipe_names())}")
    parser.add_argument("--mode", help="train, or predict with weights that lie below --data")
    parser.add_argument("--weights", type=Path, metavar="RUN", help="predict with the weights of this run")
    parser.add_argument("--list", action="store_true", help="print recipes and knobs with their reasons and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.list:
        print(local.catalogue())
        return 0
    knobs = local.asked_for(arguments.recipe, arguments.mode, arguments.set, arguments.weights)
    weights = local.weights_of(arguments.weights, arguments.output) if arguments.weights else None
    data = choose_data(arguments.data)
    record.prepare(arguments.runs)
    if arguments.output is not None:
        output = named_folder(arguments.output, arguments.again)
    else:
        output = new_folder(arguments.runs, local.name_of(knobs, data, weights))
    stream = sys.stderr if arguments.json else sys.stdout
    start = time.monotonic()
    with left_if_used(output), local.input_of(data, weights) as source:
        ended = run_kernel(source, output, as_arguments(knobs), lambda line: print(line, file=stream, flush=True))
    seconds = time.monotonic() - start
    if ended.code:
        return failed(ended, output, arguments)
    finished = check_run(output)
    local.keep(finished, arguments.runs, knobs, data, weights)
    report(finished, seconds, data, arguments)
    return 0


if __name__ == "__main__":
    run_tool(main)
