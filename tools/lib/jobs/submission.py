"""A submission: checked with the kernel's own check, made once, seen to its score, recorded.

A file is submitted once: its sha256 stands in the message, so neither an interrupted run nor a lost record submits
it twice.
"""
from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import kernel, record
from lib.kaggle_api.client import KaggleClient, Limits, Submission, split_ref
from lib.kaggle_api.http import Ambiguous, KaggleError, Refused
from lib.project import InputError, ToolError, sha256_of

TEST_FILE = "test.clean.npz"
IMAGE_DIM = 1536  # DINOv2-giant, where the test set is not at hand to tell
MESSAGE = re.compile(r"(?P<run>.+?) \| commit (?P<commit>\w+)(?P<dirty>\+?)(?: \| val MRR (?P<validation>[\d.]+)"
                     r"(?: \+- (?P<validation_se>[\d.]+))?)?(?: \| kernel (?P<kernel>\S+) v(?P<version>\d+))?"
                     r" \| sha256 (?P<sha>[0-9a-f]{12})")


@dataclass(frozen=True)
class Candidate:
    """What is to be submitted, and what is known about it."""

    path: Path
    sha256: str
    run: str
    validation: float | None  # MRR, pools of 100, raw dot product: the board's number
    validation_se: float | None
    kernel: str = ""  # owner/slug, for the output of a kernel version
    version: int | None = None

    def message(self, git: dict[str, Any]) -> str:
        """The submission's description: enough to rebuild a lost record from."""
        parts = [self.run, f"commit {git['commit'] or 'unknown'}{'+' if git['dirty'] else ''}"]
        if self.validation is not None:
            error = "" if self.validation_se is None else f" +- {self.validation_se:.4f}"
            parts.append(f"val MRR {self.validation:.4f}{error}")
        if self.kernel:
            parts.append(f"kernel {self.kernel} v{self.version}")
        return " | ".join([*parts, f"sha256 {self.sha256[:12]}"])


def read_message(description: str) -> dict[str, Any]:
    """What `Candidate.message` wrote; {} for a submission that was made otherwise."""
    found = MESSAGE.search(description)
    if not found:
        return {}
    values = found.groupdict()
    numbers = {key: None if values[key] is None else float(values[key]) for key in ("validation", "validation_se")}
    return values | numbers | {"dirty": values["dirty"] == "+"}


# ---- the candidate and its checks ----

def candidate_of(path: Path, kernel_ref: str = "", version: int | None = None) -> Candidate:
    """The csv (or the one in the folder `path`) with the validation score that lies beside it."""
    path = path / kernel.SUBMISSION if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such file; make one: python kernel/pipeline.py --input data --output runs/NAME")
    digest = sha256_of(path)
    check_manifest(path, digest, kernel.MANIFEST)
    scores = read_json(path.with_name(kernel.METRICS)).get("validation", {}).get("pool100_raw", {})
    return Candidate(path, digest, path.resolve().parent.name, scores.get("mrr"), scores.get("mrr_se"),
                     kernel_ref, version)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object beside the csv, {} when it is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise InputError(f"{path}: not JSON: it is damaged, run the kernel again") from None
    return content if isinstance(content, dict) else {}


def check_manifest(path: Path, digest: str, manifest: str) -> None:
    """A csv that is not what its run wrote must not be submitted under the run's name."""
    listed = read_json(path.with_name(manifest)).get("outputs", {}).get(path.name)
    if listed and listed.get("sha256") != digest:
        raise InputError(f"{path}: differs from {manifest} beside it: it was changed after the run; "
                         "submit it from a folder of its own, or run the kernel again")


def check_csv(path: Path, data: Path) -> None:
    """The kernel's own check, against the test set where it is at hand."""
    if any(data.rglob(TEST_FILE)):
        test = kernel.read_test(kernel.find_file(data, TEST_FILE))
        ids, dim = test.caption_ids, test.image_dim
    else:
        ids, dim = own_ids(path), IMAGE_DIM
        print(f"no {TEST_FILE} below {data}: {path.name} is checked for itself ({len(ids)} ids of its own, {dim} "
              "numbers each); python tools/download_data.py gets the real ids", file=sys.stderr)
    kernel.check_submission(path, ids, dim)


def own_ids(path: Path) -> list[int]:
    """The ids in the csv; the kernel's check finds every other fault."""
    csv.field_size_limit(1 << 30)
    ids = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            next(rows, None)
            ids = [int(row[0]) for row in rows]
    except (ValueError, IndexError, csv.Error):
        raise InputError(f"{path}: line {len(ids) + 2} does not begin with an integer id") from None
    missing = next((want for want, have in enumerate(ids, ids[0] if ids else 0) if have != want), None)
    if missing is not None:
        raise InputError(f"{path}: id {missing} is missing or out of order: the test set's ids are consecutive")
    return ids


# ---- submitting once ----

def made_before(client: KaggleClient, slug: str, candidate: Candidate, runs: Path) -> list[int]:
    """Refs under which these bytes were submitted, by Kaggle's history and by the record, oldest first."""
    shown = [item.ref for item in client.submissions(slug)
             if read_message(item.description).get("sha") == candidate.sha256[:12]]
    recorded = [entry["ref"] for entry in record.find(runs, event="submitted", sha256=candidate.sha256,
                                                      competition=slug)]
    return sorted({*shown, *recorded})


def interrupted(client: KaggleClient, slug: str, candidate: Candidate, runs: Path) -> int | None:
    """The ref of a submission of this file that was begun here and not seen to its score."""
    events = [entry for entry in record.find(runs, sha256=candidate.sha256, competition=slug)
              if entry["event"] in ("submitting", "submitted", "scored", "score_failed", "not_submitted")]
    if not events or events[-1]["event"] in ("scored", "score_failed", "not_submitted"):
        return None
    if events[-1]["event"] == "submitted":
        return events[-1]["ref"]
    known = set(events[-1]["known"])

    def check() -> int | None:
        return max(set(made_before(client, slug, candidate, runs)) - known, default=None)

    return client.look(check)


def check_limits(limits: Limits, slug: str) -> None:
    """Say how many submissions are left; stop when there is none."""
    print(f"{slug}: {limits.allowed_now} submissions left today, {limits.today} made", file=sys.stderr)
    if limits.allowed_now <= 0 and limits.total > 0:  # all zero: a team that has not submitted yet
        raise ToolError(f"{slug}: no submissions left today ({limits.today} made): run this again after 00:00 UTC")


def submit_new(client: KaggleClient, slug: str, candidate: Candidate, runs: Path, known: list[int]) -> int:
    """Submit, with the intent recorded before and the ref after; the ref."""
    check_limits(client.submission_limits(slug), slug)
    git = record.git_state()
    message = candidate.message(git)
    facts = {"sha256": candidate.sha256, "competition": slug}
    record.append(runs, "submitting", **facts, known=known)
    try:
        if candidate.kernel:
            ref = client.submit_kernel(slug, *split_ref(candidate.kernel), candidate.version or 0,
                                       candidate.path.name, message)
        else:
            print(f"uploading {candidate.path} ({candidate.path.stat().st_size / 1e6:,.1f} MB)", file=sys.stderr)
            ref = client.submit_file(slug, candidate.path, message)
    except Ambiguous:  # the next run looks first whether it happened
        raise
    except KaggleError as error:
        record.append(runs, "not_submitted", **facts)
        hint = f"; submit its csv instead: python tools/submit.py {candidate.path}" if candidate.kernel else ""
        raise type(error)(f"{error}{hint}") from None
    record_submitted(runs, slug, candidate, ref, message, git)
    return ref


def record_submitted(runs: Path, slug: str, candidate: Candidate, ref: int, message: str, git: dict[str, Any]) -> None:
    """Keep everything that is known about a submission."""
    record.append(runs, "submitted", ref=ref, sha256=candidate.sha256, competition=slug, run=candidate.run,
                  file=candidate.path.name, message=message, **git, validation=candidate.validation,
                  validation_se=candidate.validation_se, kernel=candidate.kernel or None, version=candidate.version)


def submit(client: KaggleClient, slug: str, candidate: Candidate, runs: Path, again: bool = False) -> int:
    """The ref of the one submission of `candidate`: an interrupted one is taken up, a finished one is refused."""
    ref = interrupted(client, slug, candidate, runs)
    if ref is not None:
        print(f"submission {ref} of this file was begun here before: going on with it", file=sys.stderr)
        if not record.find(runs, event="submitted", ref=ref):
            git = record.git_state()
            record_submitted(runs, slug, candidate, ref, candidate.message(git), git)
        return ref
    known = made_before(client, slug, candidate, runs)
    if known and not again:
        raise InputError(f"{candidate.path}: submitted before as {', '.join(map(str, known))} "
                         "(python tools/scores.py shows it); --again submits the same bytes anew")
    return submit_new(client, slug, candidate, runs, known)


def scored(client: KaggleClient, slug: str, ref: int, candidate: Candidate, runs: Path,
           deadline_seconds: float) -> Submission:
    """Wait for the score of `ref` and record it."""
    facts = {"ref": ref, "sha256": candidate.sha256, "competition": slug}
    try:
        found = client.wait_for_score(ref, deadline_seconds)
    except Refused as error:
        record.append(runs, "score_failed", **facts, error=str(error))
        raise
    record.append(runs, "scored", **facts, date=found.date, message=found.description,
                  public=found.public_score, private=found.private_score)
    return found
