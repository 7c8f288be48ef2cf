"""Run the kernel on this machine: from the two npz files to a validated, checked submission.

    python tools/run_local.py                                   data/, or the sample data set where data/ is empty
    python tools/run_local.py --recipe baseline --set epochs=5  another recipe, one knob changed
    python tools/run_local.py --data ../proxy --output runs/x   other data, a folder of my own choice

The very file that goes to Kaggle runs as a sub-process from an empty folder. Ctrl-C stops it; the same command with
the same --output goes on. The exit code is the kernel's; 0 only when every output is what its manifest says.
"""
from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from lib import kernel, record
from lib.data import choose_data
from lib.process import STOPPED, run_kernel
from lib.project import RUNS, format_table, run_tool
from lib.runs import FinishedRun, check_run, new_folder

COLUMNS = {"mrr": "MRR", "mrr_se": "+-", "recall@1": "R@1", "recall@5": "R@5", "recall@10": "R@10", "ndcg": "NDCG"}


def kernel_arguments(arguments: argparse.Namespace) -> list[str]:
    """What is handed through to the kernel."""
    given = [f"--set={setting}" for setting in arguments.set]
    return [*(f"--{key}={value}" for key in ("recipe", "mode") if (value := getattr(arguments, key))), *given]


def resolve(arguments: argparse.Namespace) -> Any:
    """The run's knobs: a wrong one is told before any data is drawn or read."""
    named = {key: value for key in ("recipe", "mode") if (value := getattr(arguments, key))}
    return kernel.resolve_knobs(named | dict(map(kernel.parse_setting, arguments.set)))


def validation_table(validation: dict[str, dict[str, float]]) -> str:
    """The honest figures, raw and cosine side by side."""
    rows = [[name, *(f"{row[key]:.4f}" for key in COLUMNS)] for name, row in validation.items()]
    return format_table(["validation", *COLUMNS.values()], rows)


def keep(run: FinishedRun, arguments: argparse.Namespace, data: Path) -> None:
    """The run in the local record."""
    validation = {name: row["mrr"] for name, row in run.metrics.get("validation", {}).items()}
    record.append(arguments.runs, "local_run", run=run.folder.name, recipe=run.manifest["recipe"], set=arguments.set,
                  data=str(data), complete=run.manifest["complete"], seconds=run.total_seconds,
                  validation=validation, **record.git_state())


def report(run: FinishedRun, as_json: bool) -> None:
    """Table, submission, seconds."""
    submission = run.folder / kernel.SUBMISSION
    if as_json:
        print(json.dumps({"run": str(run.folder), "submission": str(submission), "recipe": run.manifest["recipe"],
                          "complete": run.manifest["complete"], "seconds": run.manifest["seconds"],
                          "validation": run.metrics.get("validation")}))
        return
    if run.metrics:
        print(f"\n{validation_table(run.metrics['validation'])}")
    early = "" if run.manifest["complete"] else f", stopped early ({run.manifest.get('stopped')})"
    print(f"\nsubmission: {submission} (checked)\n{run.total_seconds:.1f} s{early}")


def failed(code: int, error: str, output: Path) -> int:
    """One line on stderr; the kernel's code."""
    if code in STOPPED:
        print(f"interrupted; the same command with --output {shlex.quote(str(output))} goes on", file=sys.stderr)
    else:
        print(f"error: {error or f'the kernel ended with code {code}; its last lines are above'}", file=sys.stderr)
    return code


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Run the kernel on this machine, check what it wrote, record it.",
        epilog="example: python tools/run_local.py --recipe baseline --set epochs=5 --output runs/baseline-5\n\n"
        "exit codes: the kernel's (0 only when every output is what its manifest says, 1 failed, 2 wrong input,\n"
        "130 or 143 interrupted: the same command with the same --output goes on)",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR",
                        help="the competition's files lie anywhere below it (default data/, or a drawn sample)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: <runs>/<UTC time>-<recipe>")
    parser.add_argument("--recipe", help="a named set of knobs of the kernel")
    parser.add_argument("--mode", help="train, or predict with weights that lie below --data")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a knob; may be repeated")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs and the record go")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout, the log on stderr")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run, check, record, report."""
    arguments = parse(argv)
    knobs = resolve(arguments)
    data = choose_data(arguments.data)
    output = arguments.output or new_folder(arguments.runs, knobs.recipe)
    stream = sys.stderr if arguments.json else sys.stdout
    ended = run_kernel(data, output, kernel_arguments(arguments), lambda line: print(line, file=stream, flush=True))
    if ended.code:
        return failed(ended.code, ended.error, output)
    run = check_run(output)
    keep(run, arguments, data)
    report(run, arguments.json)
    return 0


if __name__ == "__main__":
    run_tool(main)
