"""What the services of the stand-in share: faults, habits, the clock, errors and answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

NOW = "2026-11-23T12:00:00.000Z"
PACE = 0.002  # seconds here for a second of Kaggle's time, unless a test sets another; the tools get it as ALIGN_PACE


@dataclass
class Fault:
    """One thing that goes wrong in one call; see the fields."""

    status: int = 0  # answer this status ...
    message: str = "injected"  # ... with this message (200 with `code` in the body if as_code)
    as_code: bool = False
    retry_after: str = ""  # header of the answer
    date: str = ""  # header of the answer: the server's clock
    html: bool = False  # an HTML page instead of JSON; with status 0: HTTP 200
    xml: bool = False  # the XML error page of the storage
    json: dict | None = None  # HTTP 200 with this body
    drop: str = ""  # "before" or "after" the effect: close the connection without an answer
    after: bool = False  # take effect, then answer as said above
    silent: float = 0.0  # say nothing for so many seconds (of the wall clock), then drop the connection
    truncate: int | None = None  # announce the whole body, send so many bytes of it, close
    keep: int = 0  # PUT blob: bytes of the body that arrive before the fault


@dataclass
class Habits:
    """How the server misbehaves throughout; times in seconds of Kaggle's time."""

    history_lag: float = 0  # until a new submission shows in ListSubmissions (GetSubmission knows it at once)
    kernel_lag: float = 0  # until a new version shows in GetKernel and ListKernels
    session_lag: float = 0  # until a new version has a session: its status is a 404 before
    output_lag: float = 0  # until a complete version lists its output: an empty list before
    manifest_lag: float = 0  # until manifest.json is in that list
    dataset_lag: float = 0  # until a new dataset, or its next version, is known at all
    files_lag: float = 0  # until a READY version lists its files: those of the version before meanwhile
    binding: float = 0  # after READY, in which a push drops the dataset and makes a version without it
    absent_kernel: int = 403  # what GetKernel answers for one that does not exist; 500 until a first push
    absent_dataset: int = 403
    refuse_labels: int = 0  # the status that every call with a versionLabel is answered with
    renames_to: str = ""  # the slug that SaveKernel makes instead of the one asked for
    stores: Callable[[str], str] = lambda text: text  # what becomes of a script's text
    description_limit: int | None = None  # longer descriptions of submissions are cut
    url_bytes: int | None = None  # a signed URL expires when it has served so many bytes
    no_metadata: bool = False  # GetKernel leaves it out
    empty_log: bool = False  # the output's log is empty although the run had one; the stream has it
    empty_version_answer: bool = False  # CreateDatasetVersion answers {} and makes nothing
    broken_datasets: set[str] = field(default_factory=set)  # deleted and made anew: every push with one is a 500
    taken_titles: set[str] = field(default_factory=set)


class Clock:
    """Kaggle's time, which runs faster than the wall's."""

    pace = PACE

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic() / self.pace

    def older(self, made: float, seconds: float) -> bool:
        """Whether what was made then is visible after a lag of so many seconds."""
        return not seconds or self.now() - made >= seconds


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class Redirect:
    url: str


@dataclass
class Answer:
    status: int
    body: bytes
    kind: str
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # announce the whole body, send so many bytes of it, close

    @classmethod
    def json(cls, status: int, body: object) -> Answer:
        return cls(status, json.dumps(body).encode(), "application/json")


def page_of(items: list, body: dict, default: int = 20) -> tuple[list, dict]:
    """One page of a list, and the token of the next."""
    start, size = int(body.get("pageToken") or 0), int(body.get("pageSize") or default)
    rest = {"nextPageToken": str(start + size)} if start + size < len(items) else {}
    return items[start : start + size], rest
