"""The steps from the repository's state to a score on the leaderboard; each finds out whether it was done before."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib import kernel
from lib.jobs import dataset, fetch, order, push, submission
from lib.kaggle_api.client import KaggleClient
from lib.kaggle_api.competitions import Submission, competition_errors
from lib.kaggle_api.kernels import Version
from lib.project import COMPETITION, InputError, ToolError
from lib.runs import newest_run, open_run, payload_of

SCORE_MINUTES = 60.0


def step(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def chosen_weights(arguments: argparse.Namespace, overrides: dict[str, Any]) -> Path | None:
    """The run whose weights the kernel needs: the one named, the newest where the settings ask for weights, or none."""
    if arguments.weights is not None:
        if "recipe" in overrides or overrides["mode"] != "predict":
            raise InputError("--weights predicts with the run's own recipe: leave --recipe and mode away")
        if kernel.FINAL_MODEL not in payload_of(arguments.weights):
            raise InputError(f"{arguments.weights}: not finished, there is no {kernel.FINAL_MODEL} to predict with")
        return arguments.weights
    if arguments.dataset or overrides.get("mode") != "predict":
        return None
    return newest_run(arguments.runs, kernel.FINAL_MODEL, complete=True)


def package_weights(client: KaggleClient, run: Path, runs: Path) -> dataset.Package:
    """The run's weights as a ready dataset."""
    step(f"package {run}")
    staged, version = dataset.publish(client, run, dataset.BUILD, runs)
    print(f"{staged.ref} version {version} is ready", file=sys.stderr)
    return staged


def taken_up(client: KaggleClient, arguments: argparse.Namespace, given: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The state that an unfinished version left, and the settings that it was pushed with below those `given`."""
    ref = order.owned_metadata(client.username)["id"]
    version = push.chosen_version(client, ref, arguments.resume, arguments.runs)
    step(f"take up version {version.number}")
    folder = fetch.state_of(client, version, arguments.runs)
    settings = push.settings_of(client, version, arguments.runs)
    settings.pop("max_minutes", None)  # of the session that it had
    return folder, arguments.time.tell({**settings, **given})


def run_on_kaggle(
    client: KaggleClient, arguments: argparse.Namespace, overrides: dict[str, Any], packaged: dataset.Package | None
) -> tuple[Version, Path]:
    """Push, wait, fetch and verify: the kernel's version and the folder with its output."""
    staged = order.stage_push(client, arguments, overrides, "pipeline", [packaged.ref] if packaged else [])
    step(f"push {staged.ref}")
    version = push.push_staged(client, staged, arguments.runs, arguments.again)
    step(f"wait for version {version.number} and fetch its output")
    return version, fetch.collect(client, version, arguments.runs, arguments.time)


def check_weights_used(folder: Path, packaged: dataset.Package) -> None:
    """A kernel that saw an older version of the dataset would have predicted with other weights."""
    used = open_run(folder).manifest["inputs"].get(kernel.FINAL_MODEL)
    wanted = packaged.files.get(kernel.FINAL_MODEL)  # None: a state to go on from, not weights
    if None not in (used, wanted) and used != wanted:
        raise ToolError(
            f"{folder}: predicted with other weights than {packaged.ref} holds now; push it anew with --again"
        )


def candidate_of(folder: Path, run: Path | None) -> submission.Candidate:
    """The fetched csv; a kernel that only predicted has no validation of its own but that of the `run` packaged."""
    candidate = submission.candidate_of(folder)
    if run is None or candidate.validation is not None:
        return candidate
    scores = submission.board_score(run / kernel.SUBMISSION)
    return replace(candidate, validation=scores.get("mrr"), validation_se=scores.get("mrr_se"))


def submit_and_score(
    client: KaggleClient, arguments: argparse.Namespace, candidate: submission.Candidate
) -> Submission:
    """The submission of the csv with its score: a new one, or the one that was made of the same bytes."""
    step(f"submit {candidate.path}")
    submission.check_csv(candidate.path, arguments.data, COMPETITION)
    entry = submission.Entry(client, COMPETITION, candidate, arguments.runs)
    with competition_errors(COMPETITION):
        made = entry.made_before()
        ref = made[-1] if made else entry.submit()
    step(f"wait for the score of submission {ref}")
    return entry.scored(ref, 60 * SCORE_MINUTES)
