"""Does the model map captions to their photos, by how much, and what does it get wrong? In numbers and pictures.

    python tools/verify.py                                   the newest run in runs/, on its own validation images
    python tools/verify.py --run runs/A --against runs/B     a paired test of A's MRR against B's as well
    python tools/verify.py --run runs/A --json               the numbers only, for a script

The weights are those that have never seen the validation images. The output folder (RUN/verify) gets report.html,
one self-contained page, every figure as PNG, and verify.json.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lib.data import choose_data
from lib.project import RUNS, format_table, run_tool
from lib.report import figures as draw
from lib.report import numbers
from lib.report.contents import (
    against_lines,
    all_figures,
    baseline_table,
    distance_table,
    retrieval_table,
    write_outputs,
)
from lib.report.measure import disagreement, held_out, load_run, measure, newest_run, other_run, predict


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def verify(run: Path, data: Path, output: Path, against: Path | None) -> dict[str, Any]:
    """Everything about one run; returns the numbers."""
    bundle, notes = load_run(run)
    say(f"reading {data}")
    held = held_out(bundle, data)
    say(f"{run.name}: {len(held.names)} validation images, {len(held.captions)} captions each")
    predictions = predict(bundle, held)
    other = other_run(against, bundle, held) if against else None
    measured = numbers.distances(predictions, held.images)
    results = {"run": str(run), "data": str(data), **measure(bundle, held, predictions, other, measured)}
    photos = draw.find_photos(data, held.names)
    notes += disagreement(run, results) + photos.warnings(data)
    results["warnings"] = notes + results["warnings"]
    results["photos"] = {"shown_from": len(photos.paths), "missing": len(photos.missing),
                         "damaged": len(photos.damaged)}
    say("drawing")
    write_outputs(output, results, all_figures(results, predictions, held, measured, photos))
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Verify a run on its own validation images: distances, baselines, retrieval, pictures, a report.",
        epilog="example: python tools/verify.py --run runs/20260102-120000-align --against runs/20260101-120000-base")
    parser.add_argument("--run", type=Path, help="a run's folder (default: the newest with weights in --runs)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs are (default: runs/)")
    parser.add_argument("--data", type=Path, help="the run's data (default: data/, else the drawn sample)")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN/verify)")
    parser.add_argument("--against", type=Path, metavar="RUN", help="another run on the same split, for a paired test")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    given = parser.parse_args(argv)
    run = given.run or newest_run(given.runs)
    output = given.output or run / "verify"
    results = verify(run, choose_data(given.data), output, given.against)
    for warning in results["warnings"]:
        say(f"warning: {warning}")
    if given.json:
        print(json.dumps(results | {"report": str(output / "report.html")}, indent=1))
        return 0
    tables = [format_table(*table(results)) for table in (distance_table, baseline_table, retrieval_table)]
    print("\n\n".join(tables), *against_lines(results), f"report: {output / 'report.html'}", sep="\n")
    return 0


if __name__ == "__main__":
    run_tool(main)
