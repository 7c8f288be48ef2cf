"""Competitions: data files, submissions that are made once, their scores, limits and the public leaderboard."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.kaggle_api.errors import Forbidden, NotFound, Refused, ServerError
from lib.kaggle_api.http import Transport
from lib.kaggle_api.kernels import Version
from lib.kaggle_api.login import Login
from lib.kaggle_api.service import Service, fill
from lib.project import InputError

COMPETITIONS = "https://www.kaggle.com/competitions"


@dataclass(frozen=True)
class Submission:
    """One submission; `status` is pending, complete or error; a score is None until there is one."""

    ref: int
    file_name: str
    date: str
    description: str
    status: str
    public_score: float | None
    private_score: float | None
    error: str


@dataclass(frozen=True)
class Limits:
    """What the team has submitted and may still submit now; `by_total`: the competition's total is the limit."""

    today: int
    total: int
    allowed_now: int
    by_total: bool = False

    @property
    def used_up(self) -> bool:
        """Whether nothing may be submitted now; all zero is a team that has not submitted yet."""
        return self.allowed_now <= 0 and self.total > 0


@contextlib.contextmanager
def competition_errors(slug: str) -> Iterator[None]:
    """Say what a 400, a 403 or a 404 means for a competition, and what to do."""
    rules = f"{COMPETITIONS}/{slug}/rules"
    try:
        yield
    except NotFound as error:
        raise InputError(f"{error}: is there a competition {slug!r}? Look at {COMPETITIONS}/{slug}") from None
    except Forbidden as error:
        raise error.with_hint(f": accept the rules at {rules}, then run this again") from None
    except Refused as error:
        if error.status != 400:
            raise
        raise error.with_hint(
            f"; where Kaggle gives no reason, mostly the rules are not accepted ({rules}) or the competition has closed"
        ) from None


class Competitions(Service):
    """The service of competitions; every method raises a KaggleError when the thing did not happen."""

    def __init__(self, transport: Transport, login: Login) -> None:
        from kagglesdk.competitions.types import competition_api_service as types

        super().__init__(transport, login.sdk.competitions.competition_api_client, types)

    # ---- data ----
    def download_file(self, slug: str, name: str, dest: Path) -> None:
        """Fetch one file to `dest`, resuming `dest`.partial."""
        request = fill(self._types.ApiDownloadDataFileRequest(), competition_name=slug, file_name=name)
        self._download(f"download of {name}", self._api.download_data_file, request, dest)

    def download_archive(self, slug: str, dest: Path) -> None:
        """Fetch the whole competition as one zip to `dest`, resuming `dest`.partial."""
        request = fill(self._types.ApiDownloadDataFilesRequest(), competition_name=slug)
        self._download(f"download of {slug}", self._api.download_data_files, request, dest)

    def _download(self, what: str, method: Callable, request: Any, dest: Path) -> None:
        self._transport.download(what, lambda headers: self._transport.follow(what, method(request), headers), dest)

    def open_file(self, slug: str, name: str) -> None:
        """Ask for a file without fetching it; Forbidden where the rules are not accepted."""
        request = fill(self._types.ApiDownloadDataFileRequest(), competition_name=slug, file_name=name)
        self.call(name, self._api.download_data_file, request).close()

    # ---- submissions ----
    def limits(self, slug: str) -> Limits:
        request = fill(self._types.ApiGetSubmissionLimitsRequest(), competition_name=slug)
        found = self.call(f"submission limits of {slug}", self._api.get_submission_limits, request)
        return Limits(found.num_today, found.num_total, found.num_allowed_now, found.limited_by_total)

    def history(self, slug: str) -> list[Submission]:
        """Every submission, newest first as Kaggle sends it."""
        request = fill(self._types.ApiListSubmissionsRequest(), competition_name=slug)
        made = self.items(f"submissions to {slug}", self._api.list_submissions, request, "submissions")
        return [_submission(item) for item in made]

    def marked(self, slug: str, mark: str) -> int | None:
        """The ref of the submission whose description holds `mark`, None while the history shows none."""
        return max((one.ref for one in self.history(slug) if mark in one.description), default=None)

    def submit_file(self, slug: str, path: Path, message: str, mark: str) -> int:
        """Upload and submit a csv; the submission's ref. `mark` is what only this submission's message holds."""
        start = fill(self._types.ApiStartSubmissionUploadRequest(), competition_name=slug, file_name=path.name)
        request = self._types.ApiCreateSubmissionRequest()
        fill(request, blob_file_tokens=self.upload(path, self._api.start_submission_upload, start))
        return self._submit(slug, message, mark, self._api.create_submission, request)

    def submit_kernel(self, slug: str, version: Version, file_name: str, message: str, mark: str) -> int:
        """Submit an output file of a kernel version; the submission's ref."""
        made_by = {"kernel_owner": version.owner, "kernel_slug": version.slug, "kernel_version": version.number}
        request = fill(self._types.ApiCreateCodeSubmissionRequest(), file_name=file_name, **made_by)
        return self._submit(slug, message, mark, self._api.create_code_submission, request)

    def _submit(self, slug: str, message: str, mark: str, method: Callable, request: Any) -> int:
        what = f"submission to {slug}"
        fill(request, competition_name=slug, submission_description=message)

        def act() -> int:
            ref = method(request).ref
            if not ref:
                raise ServerError(f"{what}: Kaggle accepted it without giving a reference")
            return ref

        return self.once(what, act, lambda: self.marked(slug, mark))

    def wait_for_score(self, ref: int, seconds: float) -> Submission:
        """Poll until the submission has ended: with a score, or with Kaggle's error in it."""
        request = fill(self._types.ApiGetSubmissionRequest(), ref=ref)

        def check() -> Submission | None:
            found = _submission(self.call(f"submission {ref}", self._api.get_submission, request))
            scored = found.status == "error" or found.public_score is not None
            return found if found.status != "pending" and scored else None

        return self.patience.wait_for(check, f"score of submission {ref}", seconds)

    def leaderboard(self, slug: str) -> list[float]:
        """The scores on the public board, best first, also when the private one is open."""
        request = fill(self._types.ApiGetLeaderboardRequest(), competition_name=slug, override_public=True)
        rows = self.items(f"leaderboard of {slug}", self._api.get_leaderboard, request, "submissions")
        return [score for row in rows if (score := _score(row.score)) is not None]


def _score(text: str | None) -> float | None:
    """Scores are strings, empty while pending; NaN is none."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _submission(item: Any) -> Submission:
    return Submission(
        ref=item.ref,
        file_name=item.file_name or "",
        date=item.date.isoformat() if item.date else "",
        description=item.description or "",
        status=item.status.name.lower(),
        public_score=_score(item.public_score),
        private_score=_score(item.private_score),
        error=item.error_description or "",
    )
