"""Does the model map captions to their photos, by how much, and what does it get wrong? In numbers and pictures.

    python tools/verify.py                                   the newest run in runs/, on its own validation images
    python tools/verify.py --run runs/A --against runs/B     is A better than B: sure, or not sure?
    python tools/verify.py --run runs/A --json               the numbers only, for a script
    python tools/verify.py --run runs/A --solution FILE      A's submission against known answers

The weights are those that have never seen the validation images. The output folder (RUN/verify) gets report.html,
one self-contained page, every figure as PNG, and verify.json.

--solution FILE is an npz with two arrays, row for row: captions/ids (n,) whole numbers, the submission's ids in its
order, and images/embeddings (n, d), the vector of each one's photo. --run and --against are then runs or csv files,
and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lib import kernel
from lib.data import choose_data
from lib.project import InputError, format_table, make_parser, run_tool
from lib.report import contents, solution
from lib.report.figures import find_photos
from lib.report.measure import disagreement, measure, model_of, other_run
from lib.runs import newest_run
from lib.weights import held_out, load_run


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def verify(run: Path, data: Path, output: Path, against: Path | None) -> dict[str, Any]:
    """Everything about one run; returns the numbers."""
    bundle, notes = load_run(run)
    say(f"reading {data}")
    held = held_out(bundle, data)
    ours = model_of(run, bundle, held)
    say(f"{ours.name}: {len(held.names)} validation images, {len(held.captions)} captions each")
    theirs, more = other_run(against, bundle, held) if against else (None, [])
    results = {"run": str(run), "data": str(data), **measure(bundle, held, ours, theirs)}
    photos = find_photos(data, held.names)
    results["warnings"] = notes + more + disagreement(results["baselines"]) + photos.warnings(data)
    results["photos"] = {
        "shown_from": len(photos.paths),
        "missing": len(photos.missing),
        "damaged": len(photos.damaged),
    }
    say("drawing")
    contents.write_outputs(output, results, contents.draw_all(results, ours.predictions, held, photos))
    return results


def parse(argv: list[str] | None) -> argparse.Namespace:
    codes = "0 measured (and written), 1 the report could not be written, 2 wrong input"
    parser = make_parser(__doc__, codes, "--runs", "--data", "--json")
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run's folder (default: the newest in --runs)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write to (default: RUN/verify)")
    parser.add_argument("--against", type=Path, metavar="RUN", help="another run on the same split, for a paired test")
    parser.add_argument("--solution", type=Path, metavar="FILE", help="score a submission against these answers (npz)")
    given = parser.parse_args(argv)
    if given.solution and (given.data or given.output):
        raise InputError("--solution reads no data and writes no report: leave out --data and --output")
    return given


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    if given.solution:
        result = solution.score(given.run or newest_run(given.runs, kernel.SUBMISSION), given.solution, given.against)
        lines = [format_table(*solution.score_table(result)), *solution.score_lines(result)]
        print(json.dumps(result, indent=1) if given.json else "\n".join(lines))
        return 0
    run = given.run or newest_run(given.runs, kernel.VALIDATED_MODEL)
    output = given.output or run / "verify"
    results = verify(run, choose_data(given.data), output, given.against)
    for warning in results["warnings"]:
        say(f"warning: {warning}")
    if given.json:
        print(json.dumps(results | {"report": str(output / "report.html")}, indent=1))
        return 0
    print(
        format_table(*contents.official_table(results)),
        "\n".join([*contents.verdicts(results), *contents.choice_in_words(results["baselines"]), contents.CLOSED_FORM]),
        format_table(*contents.baseline_table(results)),
        format_table(*contents.distance_table(results)),
        "\n".join([*results["distance_notes"], f"report: {output / 'report.html'}"]),
        sep="\n\n",
    )
    return 0


if __name__ == "__main__":
    run_tool(main)
