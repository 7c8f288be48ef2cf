"""From the repository's state to a score on the leaderboard: package, push, wait, fetch, verify, submit, score.

    python tools/ship.py --recipe align                        train on Kaggle, submit what comes out
    python tools/ship.py --weights runs/mine                   package a run's weights, predict with them on Kaggle
    python tools/ship.py --recipe align --no-submit            everything but the submission

Interrupted at any step, the same command goes on from there: nothing is uploaded, pushed or submitted twice.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import package_dataset
import push_kernel
import submit
from download_data import COMPETITION
from kaggle_client import KaggleClient, Submission, competition_errors, connect
from project import DATA, ToolError, load_kernel, run_tool

SCORE_MINUTES = 60.0


def step(text: str) -> None:
    """Say what comes now."""
    print(f"== {text}", file=sys.stderr, flush=True)


def chosen_weights(arguments: argparse.Namespace, overrides: dict[str, Any]) -> Path | None:
    """The run whose weights the kernel needs: the one named, the newest where the settings ask for weights, or none."""
    if arguments.weights is not None:
        return arguments.weights
    if arguments.dataset or not (overrides.get("mode") == "predict" or overrides.get("warm_start")):
        return None
    return package_dataset.newest_run(arguments.runs, load_kernel().FINAL_MODEL)


def package_weights(client: KaggleClient, run: Path, runs: Path) -> package_dataset.Staged:
    """The run's weights as a ready dataset."""
    step(f"package {run}")
    staged = package_dataset.stage(run, package_dataset.BUILD, client.username)
    version = package_dataset.package(client, staged, runs)
    print(f"{staged.metadata['id']} version {version} is ready", file=sys.stderr)
    return staged


def run_on_kaggle(
    client: KaggleClient, arguments: argparse.Namespace, overrides: dict[str, Any], datasets: list[str]
) -> tuple[str, int, Path]:
    """Push, wait, fetch and verify: the kernel, its version and the folder with its output."""
    deadline_seconds, session_seconds = push_kernel.read_timeout(arguments.timeout_minutes)
    metadata = push_kernel.staged_metadata(client.username, arguments.accelerator, datasets, arguments.kernel_source)
    staged = push_kernel.stage(metadata, overrides, push_kernel.BUILD)
    step(f"push {staged.ref}")
    versions = push_kernel.wait_for_datasets(client, metadata, arguments.runs)
    order = push_kernel.Order(staged, versions, session_seconds)
    version = push_kernel.push(client, order, arguments.runs, arguments.again)
    step(f"wait for version {version} and fetch its output")
    return staged.ref, version, push_kernel.collect(client, staged.ref, version, arguments.runs, deadline_seconds)


def check_weights_used(folder: Path, packaged: package_dataset.Staged) -> None:
    """A kernel that saw an older version of the dataset would have predicted with other weights."""
    kernel = load_kernel()
    used = json.loads((folder / kernel.MANIFEST).read_text(encoding="utf-8"))["inputs"].get(kernel.FINAL_MODEL)
    if used is not None and used != packaged.files.get(kernel.FINAL_MODEL):
        ref = packaged.metadata["id"]
        raise ToolError(f"{folder}: predicted with other weights than {ref} holds now; push it anew with --again")


def candidate_of(folder: Path, packaged: package_dataset.Staged | None) -> submit.Candidate:
    """The fetched csv; a kernel that only predicted has no validation of its own but that of its weights."""
    kernel = load_kernel()
    candidate = submit.candidate_of(folder, kernel)
    if packaged is None or candidate.validation is not None:
        return candidate
    scores = submit.read_json(packaged.folder / kernel.METRICS).get("validation", {}).get("pool100_raw", {})
    return replace(candidate, validation=scores.get("mrr"), validation_se=scores.get("mrr_se"))


def submit_and_score(
    client: KaggleClient, arguments: argparse.Namespace, candidate: submit.Candidate
) -> Submission:
    """The submission of the csv with its score: a new one, or the one that was made of the same bytes."""
    slug = COMPETITION
    step(f"submit {candidate.path}")
    submit.check_csv(candidate.path, arguments.data, load_kernel())
    with competition_errors(slug):
        made = [] if arguments.again else submit.made_before(client, slug, candidate, arguments.runs)
        number = made[-1] if made else submit.submit(client, slug, candidate, arguments.runs, arguments.again)
    step(f"wait for the score of submission {number}")
    return submit.scored(client, slug, number, candidate, arguments.runs, 60 * SCORE_MINUTES)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="From the repository's state to a score on the leaderboard, in one command that can be repeated.",
        epilog="example: python tools/ship.py --recipe align --set epochs=8\n\n"
        "exit codes: 0 scored and recorded (--no-submit: fetched and verified), 1 a step failed, 2 wrong input;\n"
        "after any of them, and after an interruption (130), the same command goes on where it stopped",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, metavar="RUN", help="package this run; the kernel predicts with it")
    parser.add_argument("--no-submit", action="store_true", help="stop when the output is fetched and verified")
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="where the test set is, for its ids")
    push_kernel.add_push_options(parser)
    return parser.parse_args(argv)


def report(result: dict[str, Any], as_json: bool) -> None:
    """The end of it, on stdout."""
    if as_json:
        print(json.dumps(result))
        return
    print(f"{result['kernel']} version {result['version']}: verified output in {result['run']}")
    if "ref" in result:
        validation = "" if result["validation"] is None else f", validation {result['validation']:.4f}"
        print(f"submission {result['ref']}: public score {result['public']}{validation}")


def main(argv: list[str] | None = None) -> int | None:
    """Every step in order; each finds out by itself whether it was done before."""
    arguments = parse(argv)
    given = push_kernel.read_overrides(arguments.recipe, arguments.set)
    overrides = {"mode": "predict", **given} if arguments.weights is not None and "warm_start" not in given else given
    run = chosen_weights(arguments, overrides)
    client = connect()
    packaged = None if run is None else package_weights(client, run, arguments.runs)
    datasets = [*arguments.dataset, *([] if packaged is None else [packaged.metadata["id"]])]
    ref, version, folder = run_on_kaggle(client, arguments, overrides, datasets)
    if packaged is not None:
        check_weights_used(folder, packaged)
    result: dict[str, Any] = {"kernel": ref, "version": version, "run": str(folder)}
    if not arguments.no_submit:
        candidate = candidate_of(folder, packaged)
        score = submit_and_score(client, arguments, candidate)
        result |= {"ref": score.ref, "public": score.public_score, "private": score.private_score,
                   "validation": candidate.validation}
    report(result, arguments.json)
    return 0


if __name__ == "__main__":
    run_tool(main)
