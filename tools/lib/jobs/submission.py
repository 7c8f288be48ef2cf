"""A submission: checked with the kernel's own check, made once, seen to its score, recorded.

A file is submitted once: its sha256 stands in the message, before all else because Kaggle may cut what is long, so
neither an interrupted run nor a lost record submits it twice.
"""

from __future__ import annotations

import contextlib
import csv
import re
import secrets
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lib import kernel, record
from lib.data import FILES, KNOWN, missing
from lib.kaggle_api.client import KaggleClient
from lib.kaggle_api.competitions import COMPETITIONS, Limits, Submission
from lib.kaggle_api.errors import Ambiguous, KaggleError, NotDone
from lib.kaggle_api.kernels import Version
from lib.kaggle_api.patience import glance
from lib.project import COMPETITION, InputError, ToolError, as_command, in_turn, read_json, sha256_of
from lib.runs import RAW

TEST_FILE = FILES[1]
IMAGE_DIM = 1536  # DINOv2-giant, where the test set is not at hand to tell
MESSAGE = re.compile(  # each part may be missing: messages are cut
    r"sha256 (?P<sha>[0-9a-f]{12})\S*(?: \| (?P<run>[^|]*[^| ]))?(?: \| commit (?P<commit>\w+)(?P<dirty>\+?))?"
    r"(?: \| val MRR (?P<validation>\d\.\d+)(?: \+- (?P<validation_se>\d\.\d+))?)?"
    r"(?: \| kernel (?P<kernel>\S+) v(?P<version>\d+))?"
)


@dataclass(frozen=True)
class Candidate:
    """What is to be submitted, and what is known about it."""

    path: Path
    sha256: str
    run: str
    validation: float | None  # MRR, pools of 100, raw dot product: the board's number
    validation_se: float | None
    made_by: Version | None = None  # the kernel version whose output it is, where it is to be submitted as such

    @property
    def expected(self) -> str:
        """The validation with its error, as a text; "" where there is none."""
        error = "" if self.validation_se is None else f" +- {self.validation_se:.4f}"
        return "" if self.validation is None else f"{self.validation:.4f}{error}"

    @property
    def digest(self) -> str:
        """What every submission of these bytes has in its message."""
        return f"sha256 {self.sha256[:12]}"

    def new_mark(self) -> str:
        """The beginning of one submission's message, by which it is known again."""
        return f"{self.digest}.{secrets.token_hex(3)}"

    def message(self, git: dict[str, Any], mark: str) -> str:
        """The submission's description: enough to rebuild a lost record from."""
        parts = [mark, self.run, f"commit {git['commit'] or 'unknown'}{'+' if git['dirty'] else ''}"]
        if self.expected:
            parts.append(f"val MRR {self.expected}")
        if self.made_by:
            parts.append(f"kernel {self.made_by.ref} v{self.made_by.number}")
        return " | ".join(parts)


def read_message(description: str) -> dict[str, Any]:
    """What `Candidate.message` wrote; {} for a submission that was made otherwise."""
    found = MESSAGE.search(description)
    if not found:
        return {}
    values = found.groupdict()
    numbers = {key: None if values[key] is None else float(values[key]) for key in ("validation", "validation_se")}
    return values | numbers | {"dirty": values["dirty"] == "+"}


# ------------------------------------------------------------------------ the candidate and its checks
def candidate_of(path: Path, made_by: Version | None = None) -> Candidate:
    """The csv (or the one in the folder `path`) with the validation score that lies beside it."""
    path = path / kernel.SUBMISSION if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such file; make one: python tools/run_local.py --output runs/NAME")
    digest = sha256_of(path)
    check_manifest(path, digest)
    scores = board_score(path)
    return Candidate(path, digest, path.resolve().parent.name, scores.get("mrr"), scores.get("mrr_se"), made_by)


def board_score(path: Path) -> dict[str, float]:
    """The validation of the csv's run by the board's rule, {} where it has none."""
    return beside(path, kernel.METRICS, "validation", RAW)


def beside(path: Path, name: str, *keys: str) -> dict[str, Any]:
    """What stands under `keys` in a JSON file of the csv's run; {} where the csv lies alone, or beside other files."""
    found = read_json(path.with_name(name), "it is damaged: make or fetch the run again", optional=True)
    for key in keys:
        found = found[key] if isinstance(found.get(key), dict) else {}
    return found


def check_manifest(path: Path, digest: str) -> None:
    """A csv that is not what its run wrote must not be submitted under the run's name."""
    outputs = beside(path, kernel.MANIFEST, "outputs")
    if outputs and digest not in [facts["sha256"] for facts in outputs.values()]:
        raise InputError(
            f"{path}: is no output of the run, by {kernel.MANIFEST} beside it, or was changed after the run; "
            "submit it from a folder of its own, or run the kernel again"
        )


def check_origin(path: Path, slug: str) -> None:
    """A csv belongs to the competition whose test captions it answers: its run has kept their digest."""
    answered = beside(path, kernel.MANIFEST, "inputs", TEST_FILE).get("sha256")
    asked = next(known.sha256 for name, known in KNOWN.items() if name.endswith(TEST_FILE))
    if slug == COMPETITION and answered not in (None, asked):
        raise InputError(
            f"{path}: answers other test captions than those of {slug} (the drawn sample's, perhaps); "
            "python tools/download_data.py fetches these, then make the run on them"
        )


def check_csv(path: Path, data: Path, slug: str) -> None:
    """The kernel's own check, against the test set where it is at hand; for the competition whose data it answers."""
    check_origin(path, slug)
    if reason := missing(data, TEST_FILE):
        ids, dim = np.array(own_ids(path)), IMAGE_DIM
        print(
            f"{reason}: {path.name} is checked for itself ({len(ids)} ids of its own, {dim} numbers each); "
            "python tools/download_data.py gets the real ids",
            file=sys.stderr,
        )
    else:
        with contextlib.redirect_stdout(sys.stderr):  # what the kernel says of odd data: stdout is the tool's own
            test = kernel.read_test(kernel.find_file(data, TEST_FILE))
        ids, dim = test.caption_ids, test.image_dim
    kernel.check_submission(path, ids, dim)
    if not len(ids):
        raise InputError(f"{path}: has no rows")


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
    gap = next((want for want, have in enumerate(ids, ids[0] if ids else 0) if have != want), None)
    if gap is not None:
        raise InputError(f"{path}: id {gap} is missing or out of order: the test set's ids are consecutive")
    return ids


# ------------------------------------------------------------------------------------- submitting once
@dataclass(frozen=True)
class Entry:
    """A csv for a competition: submitted once, seen to its score, all of it in the record."""

    client: KaggleClient
    slug: str
    candidate: Candidate
    runs: Path

    @property
    def facts(self) -> dict[str, str]:
        """What the record knows it by."""
        return {"sha256": self.candidate.sha256, "competition": self.slug}

    def submit(self, again: bool = False) -> int:
        """The ref of its one submission: an interrupted one goes on, a finished one is refused."""
        with in_turn(self.runs, f"submission of {self.candidate.digest}"):
            ref = self.interrupted(again)
            if ref is not None:
                print(f"submission {ref} of this file was begun here before: going on with it", file=sys.stderr)
                if not record.find(self.runs, event="submitted", ref=ref):
                    git = record.git_state()
                    self.record_submitted(ref, self.candidate.message(git, self.candidate.digest), git)
                return ref
            known = self.made_before()
            if known and not again:
                raise InputError(
                    f"{self.candidate.path}: submitted before as {', '.join(map(str, known))} "
                    "(python tools/scores.py shows it); --again submits the same bytes anew"
                )
            return self.submit_new()

    def made_before(self) -> list[int]:
        """Refs under which these bytes were submitted, by Kaggle's history and by the record, oldest first."""
        found = {entry["ref"] for entry in record.find(self.runs, event="submitted", **self.facts)}
        for item in self.client.competitions.history(self.slug):
            if read_message(item.description).get("sha") == self.candidate.sha256[:12]:
                found.add(item.ref)
        return sorted(found)

    def interrupted(self, again: bool) -> int | None:
        """The ref of a submission that was begun here and not seen to its score.

        None when there was none, or when it provably never reached Kaggle; without such a proof `again` has to say so.
        """
        events = record.find(self.runs, **self.facts)
        begun = events[-1] if events else {}
        if begun.get("event") == "submitted":
            return begun["ref"]
        if begun.get("event") != "submitting":
            return None
        look = partial(self.client.competitions.marked, self.slug, begun["mark"])
        found = self.client.patience.look(look, f"the submission that was begun at {begun['time']}")
        if found is None and self.counted_unseen(begun):
            print(f"{self.slug}: Kaggle counts a submission that its history does not show; waiting", file=sys.stderr)
            with contextlib.suppress(NotDone):
                found = self.client.patience.wait_for(look, "the submission", self.client.patience.outage_seconds)
        if found is None and not again and self.counted_unseen(begun):
            raise ToolError(
                f"{self.candidate.path}: a submission of it was begun here at {begun['time']}, and Kaggle may have it "
                f"without showing it: look at {COMPETITIONS}/{self.slug}/submissions; "
                f"{as_command('submit', {}, self.candidate.path)} --again submits it anew"
            )
        return found

    def counted_unseen(self, begun: dict[str, Any]) -> bool:
        """Whether Kaggle counts more than its history shows, now or since this was begun; also where it tells none."""
        limits = self.limits()
        if limits is None:
            return True
        unseen = limits.total - len(self.client.competitions.history(self.slug))
        before = 0 if begun["counted"] is None else begun["counted"] - begun["listed"]
        return unseen > min(0, before)

    def limits(self) -> Limits | None:
        """What may still be submitted, None where Kaggle does not tell."""
        return glance("the submissions left", lambda: self.client.competitions.limits(self.slug), None)

    def submit_new(self) -> int:
        """Submit, with the intent recorded before and the ref after; the ref."""
        limits = self.limits()
        if limits is not None:
            check_limits(limits, self.slug)
        git, mark = record.git_state(), self.candidate.new_mark()
        message = self.candidate.message(git, mark)
        listed, counted = len(self.client.competitions.history(self.slug)), limits.total if limits else None
        record.append(self.runs, "submitting", **self.facts, mark=mark, listed=listed, counted=counted)
        try:
            ref = self.send(message, mark)
        except Ambiguous:  # the next run looks first whether it happened
            raise
        except KaggleError as error:
            record.append(self.runs, "not_submitted", **self.facts)
            instead = f"; submit its csv instead: {as_command('submit', {}, self.candidate.path)}"
            raise error.with_hint(instead if self.candidate.made_by else "") from None
        self.record_submitted(ref, message, git)
        return ref

    def send(self, message: str, mark: str) -> int:
        """The file itself, or the order to take a kernel's; the ref."""
        path, made_by = self.candidate.path, self.candidate.made_by
        if made_by:
            return self.client.competitions.submit_kernel(self.slug, made_by, path.name, message, mark)
        if sha256_of(path) != self.candidate.sha256:  # a search, say, has found better weights meanwhile
            raise InputError(f"{path}: was changed after its check; run this again")
        print(f"uploading {path} ({path.stat().st_size / 1e6:,.1f} MB)", file=sys.stderr)
        return self.client.competitions.submit_file(self.slug, path, message, mark)

    def record_submitted(self, ref: int, message: str, git: dict[str, Any]) -> None:
        """Keep everything that is known about a submission."""
        about = {key: getattr(self.candidate, key) for key in ("run", "validation", "validation_se")}
        made_by = self.candidate.made_by
        about |= {"kernel": made_by and made_by.ref, "version": made_by and made_by.number}
        about |= {"file": self.candidate.path.name, "message": message}
        record.append(self.runs, "submitted", ref=ref, **self.facts, **about, **git)

    def scored(self, ref: int, seconds: float) -> Submission:
        """Wait for the score of `ref` and record it."""
        found = self.client.competitions.wait_for_score(ref, seconds)
        if found.status == "error":
            reason = f"submission {ref}: scoring failed: {found.error or 'Kaggle gives no reason'}"
            record.append(self.runs, "score_failed", ref=ref, **self.facts, error=reason)
            raise ToolError(reason)
        record_scored(self.runs, found, **self.facts)
        return found


def check_limits(limits: Limits, slug: str) -> None:
    """Say how many submissions are left; stop when there is none."""
    print(f"{slug}: {limits.allowed_now} submissions left today, {limits.today} made", file=sys.stderr)
    if limits.used_up:
        if limits.by_total:
            raise ToolError(f"{slug}: the competition's total number of submissions is used up ({limits.total} made)")
        raise ToolError(f"{slug}: no submissions left today ({limits.today} made): run this again after 00:00 UTC")


def record_scored(runs: Path, found: Submission, competition: str, sha256: str | None = None) -> None:
    """Keep a score; the sha256 of what it is of, where it was made here."""
    scores = {"public": found.public_score, "private": found.private_score}
    about = {"ref": found.ref, "sha256": sha256, "competition": competition, "date": found.date}
    record.append(runs, "scored", **about, message=found.description, **scores)
