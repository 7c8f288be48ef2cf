"""Train many members, on Kaggle's own sessions or here, and blend them into one checked submission.

    python tools/sweep.py --members 8                      eight seeds of the default recipe
    python tools/sweep.py --table runs.csv --sessions 1    a row a run: recipe,seed,knobs such as align,3,lr=0.002
    python tools/sweep.py --members 8 --local              the same table on this machine, one after another

As many run at once as Kaggle admits: it tells the number when it refuses one more, and the GPU hours left when asked.
All members hold out the same images, so that the blend is scored on photos that none of them saw. A failed run is
repeated a bounded number of times; what is left is blended. Interrupted at any point, the same command goes on:
nothing is pushed twice, nothing that was computed is lost. Submit the result with python tools/submit.py FOLDER.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lib import kernel
from lib.data import choose_data
from lib.jobs.blend import blend_runs, blended_before
from lib.jobs.fleet import COLUMNS, keep, make_rows, output_of, sweep_kaggle, sweep_local
from lib.jobs.order import add_session_options
from lib.process import as_text
from lib.project import DATA, InputError, figure, format_table, in_turn, make_parser, run_tool
from lib.runs import COSINE, RAW, Run, check_run


def report(run: Run, as_json: bool) -> None:
    """Members, blend, expected score."""
    metrics, submission = run.metrics, str(run.folder / kernel.SUBMISSION)
    members, score = metrics["members"], metrics["validation"][RAW]
    if as_json:
        expected = {"expected_mrr": score["mrr"], "expected_mrr_se": score["mrr_se"]}
        keys = ("validation", "members", "equal_weights_mrr", "fitted_weights_mrr")
        facts = expected | {key: metrics[key] for key in keys}
        print(json.dumps({"run": str(run.folder), "submission": submission, **facts}))
        return
    rows = []
    for one in members:
        scores = [figure(one[key]) if one["run"] else "failed" for key in (RAW, COSINE, "weight")]
        rows.append([one["name"], as_text(one["overrides"]) or "-", *scores])
    rows.append(["blend", "", figure(run.mrr[RAW]), figure(run.mrr[COSINE]), None])
    used = sum(one["run"] is not None for one in members)
    print(format_table(["run", "settings", "raw MRR", "cosine MRR", "weight"], rows))
    print(
        f"\n{used} of {len(members)} runs in one checked submission: {submission}\n"
        f"expected score {score['mrr']:.4f} +- {score['mrr_se']:.4f} (MRR in pools of 100, raw)"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    codes = (
        "0 blended and checked, 1 no run succeeded, no quota or Kaggle refused, 2 wrong input; after any\n"
        "of them, and after an interruption (130 or 143), the same command goes on"
    )
    parser = make_parser(__doc__, codes, "--recipe", "--set", "--data", "--runs", "--json")
    parser.add_argument("--members", type=int, metavar="N", help="so many runs with the seeds 0 to N-1")
    parser.add_argument("--table", type=Path, metavar="CSV", help=f"a row a run; columns {', '.join(COLUMNS)}")
    parser.add_argument("--local", action="store_true", help="run here, one after another, instead of on Kaggle")
    parser.add_argument("--sessions", type=int, metavar="N", help="at most so many at once (default: as Kaggle admits)")
    parser.add_argument("--retries", type=int, default=2, metavar="N", help="repeats of a failed run (default 2)")
    add_session_options(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: a folder in <runs> named by the table")
    arguments = parser.parse_args(argv)
    if (arguments.sessions is not None and arguments.sessions < 1) or arguments.retries < 0:
        raise InputError("--sessions takes at least 1, --retries at least 0")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    rows = make_rows(arguments)
    output = output_of(arguments, rows)
    if arguments.local:
        data = choose_data(arguments.data)
        folders = sweep_local(rows, data, output, arguments.retries)
    else:
        data = choose_data(arguments.data or DATA)
        folders = sweep_kaggle(rows, data, arguments)
    with in_turn(arguments.runs, f"blend of {output.name}"):
        if not blended_before(output, folders, data):
            blend_runs(rows, folders, data, output)
        run = check_run(output)
    keep(run, arguments.runs)
    report(run, arguments.json)


if __name__ == "__main__":
    run_tool(main)
