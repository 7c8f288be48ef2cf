"""Run the kernel on this machine: from the two npz files to a validated, checked submission.

    python tools/run_local.py                                   data/, or a drawn sample where there is no data/
    python tools/run_local.py --recipe baseline --set epochs=5  another recipe, one knob changed
    python tools/run_local.py --data ../proxy --output runs/x   other data, a folder of my own choice
    python tools/run_local.py --weights runs/x                  no training: predict with the weights of a run
    python tools/run_local.py --list                            recipes and knobs, with their reasons

The very file that goes to Kaggle runs as a sub-process from an empty folder. Ctrl-C stops it; the same command with
the same --output goes on. The exit code is the kernel's; 0 only when every output is what its manifest says.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from lib import kernel, record
from lib.data import choose_data
from lib.jobs import local
from lib.kernel import recipe_names
from lib.process import STOPPED, as_arguments, run_kernel
from lib.project import figure, format_table, make_parser, run_tool
from lib.runs import Run, check_run, left_if_used, named_folder, new_folder

COLUMNS = {"mrr": "MRR", "mrr_se": "+-", "recall@1": "R@1", "recall@5": "R@5", "recall@10": "R@10", "ndcg": "NDCG"}


def report(run: Run, as_json: bool) -> None:
    """The honest figures, raw and cosine side by side; submission, seconds."""
    submission = run.folder / kernel.SUBMISSION
    if as_json:
        shown = {"run": str(run.folder), "submission": str(submission), "recipe": run.recipe, "complete": run.complete}
        print(json.dumps({**shown, "seconds": run.manifest["seconds"], "validation": run.scores or None}))
        return
    if run.scores:
        pool = str(run.metrics.get("pool", kernel.POOL))  # smaller where fewer images are held out
        named = {name.replace(str(kernel.POOL), pool): row for name, row in run.scores.items()}
        rows = [[name, *(figure(row[key]) for key in COLUMNS)] for name, row in named.items()]
        print("\n" + format_table(["validation", *COLUMNS.values()], rows))
    early = run.manifest.get("stopped")
    print(f"\nsubmission: {submission} (checked)\n{run.total_seconds:.1f} s" + (f", ended by {early}" if early else ""))


def failed(code: int, error: str, output: Path) -> int:
    """One line on stderr; the kernel's code."""
    if code in STOPPED:
        so_far = "it has a submission; " if (output / kernel.MANIFEST).exists() else ""
        again = f"the same command with --output {shlex.quote(str(output))} goes on"
        print(f"interrupted; {so_far}{again}", file=sys.stderr)
    else:
        print(f"error: {error or f'the kernel ended with code {code}; its last lines are above'}", file=sys.stderr)
    return code


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


def run(arguments: argparse.Namespace) -> int:
    knobs = local.asked_for(arguments.recipe, arguments.mode, arguments.set, arguments.weights)
    weights = local.weights_of(arguments.weights) if arguments.weights else None
    data = choose_data(arguments.data)
    record.prepare(arguments.runs)
    if arguments.output is not None:
        output = named_folder(arguments.output, arguments.again)
    else:
        output = new_folder(arguments.runs, local.name_of(knobs, data, weights))
    stream = sys.stderr if arguments.json else sys.stdout
    with left_if_used(output), local.input_of(data, weights) as source:
        ended = run_kernel(source, output, as_arguments(knobs), lambda line: print(line, file=stream, flush=True))
    if ended.code:
        return failed(ended.code, ended.error, output)
    finished = check_run(output)
    local.keep(finished, arguments.runs, knobs, data, weights)
    report(finished, arguments.json)
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.list:
        print(local.catalogue())
        return 0
    return run(arguments)


if __name__ == "__main__":
    run_tool(main)
