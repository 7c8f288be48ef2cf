"""The one seam over the official `kaggle` package (2.2.4 and 2.2.5).

    client = connect()
    client.kernel_status(client.username, "aml-align", 3)

What the package does not do is done here: a lazy import without output or network, credentials checked with a message
that says how to get them, timeouts, bounded retries, typed errors, uploads and downloads that are verified, versions
that are really asked for. A push or a submission is never repeated blindly: after a failure that leaves its outcome
open the client looks first whether it happened. Nothing is printed on stdout; notes on retries go to stderr.
"""
from __future__ import annotations

import contextlib
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin

import requests

from lib.kaggle_api.http import (
    CHUNK,
    Ambiguous,
    Conflict,
    Forbidden,
    KaggleError,
    NotFound,
    Refused,
    ServerError,
    Timeout,
    Timing,
    Transport,
    check_status,
    safe_name,
    translated,
    wait_until,
)
from lib.kaggle_api.login import make_api, sign_in
from lib.project import InputError

if TYPE_CHECKING:
    from kaggle.api.kaggle_api_extended import KaggleApi

T = TypeVar("T")
PAGE = 200
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
    """What the team has submitted and may still submit now."""

    today: int
    total: int
    allowed_now: int


@dataclass(frozen=True)
class KernelVersion:
    """What a push made."""

    ref: str
    url: str
    version: int


@dataclass(frozen=True)
class Quota:
    """Accelerator hours of this week."""

    used_hours: float
    reserved_hours: float
    total_hours: float

    @property
    def left_hours(self) -> float:
        """Hours that a new session may still use."""
        return max(0.0, self.total_hours - self.used_hours - self.reserved_hours)


def same_script(one: str, other: str) -> bool:
    """Whether two texts are one script: line ends and outer blank lines may change on their way through Kaggle."""
    return one.strip().splitlines() == other.strip().splitlines()


@contextlib.contextmanager
def competition_errors(slug: str) -> Iterator[None]:
    """Say what a 403 or a 404 means for a competition, and what to do."""
    try:
        yield
    except NotFound as error:
        raise InputError(f"{error}: is there a competition {slug!r}? Look at {COMPETITIONS}/{slug}") from None
    except Forbidden as error:
        raise Forbidden(f"{error}: accept the rules at {COMPETITIONS}/{slug}/rules, then run this again") from None


def split_ref(ref: str) -> tuple[str, str]:
    """`owner/slug` as a pair."""
    owner, _, slug = ref.partition("/")
    if not owner or not slug or "/" in slug:
        raise InputError(f"{ref!r} is not owner/slug")
    return owner, slug


def connect(timing: Timing | None = None) -> KaggleClient:
    """Sign in and return the client; Unauthorized with what to do when there are no usable credentials."""
    transport = Transport(timing or Timing.from_environment())
    api = make_api(transport)
    sign_in(api, transport)
    return KaggleClient(api, transport)


class KaggleClient:
    """Kaggle as the tools need it; every method raises a KaggleError when the thing did not happen."""

    def __init__(self, api: KaggleApi, transport: Transport) -> None:
        self.username: str = api.config_values[api.CONFIG_NAME_USER]
        self.timing = transport.timing
        self._transport = transport
        self._sdk = api.build_kaggle_client()
        self._competitions = self._sdk.competitions.competition_api_client
        self._datasets = self._sdk.datasets.dataset_api_client
        self._kernels = self._sdk.kernels.kernels_api_client

    # ---- competitions ----

    def download_competition_file(self, slug: str, name: str, dest: Path, expected_bytes: int | None = None) -> None:
        """Fetch one file to `dest`, resuming `dest`.partial; unpacks it where Kaggle serves it zipped."""
        from kagglesdk.competitions.types.competition_api_service import ApiDownloadDataFileRequest

        request = _fill(ApiDownloadDataFileRequest(), competition_name=slug, file_name=name)
        self._download(f"download of {name}", self._competitions.download_data_file, request, dest)
        if expected_bytes is not None and dest.stat().st_size != expected_bytes:
            _unpack_single(dest, name, expected_bytes)

    def download_competition_archive(self, slug: str, dest: Path) -> None:
        """Fetch the whole competition as one zip to `dest`, resuming `dest`.partial."""
        from kagglesdk.competitions.types.competition_api_service import ApiDownloadDataFilesRequest

        request = _fill(ApiDownloadDataFilesRequest(), competition_name=slug)
        self._download(f"download of {slug}", self._competitions.download_data_files, request, dest)

    def _download(self, what: str, method: Callable, request: Any, dest: Path) -> None:
        self._transport.download(what, lambda headers: self._follow(method(request), headers), dest)

    def _follow(self, response: requests.Response, headers: dict) -> requests.Response:
        """The stream behind a redirect to a signed URL; `response` itself where there is none."""
        if not response.is_redirect:
            return response
        response.close()
        url = urljoin(response.url, response.headers["Location"])
        return self._transport.plain.get(url, headers=headers, stream=True)

    def submission_limits(self, slug: str) -> Limits:
        """How many submissions are left now."""
        from kagglesdk.competitions.types.competition_api_service import ApiGetSubmissionLimitsRequest as Request

        found = self._call(f"submission limits of {slug}", self._competitions.get_submission_limits,
                           _fill(Request(), competition_name=slug))
        return Limits(found.num_today, found.num_total, found.num_allowed_now)

    def submissions(self, slug: str) -> list[Submission]:
        """The whole history, newest first as Kaggle sends it."""
        from kagglesdk.competitions.types.competition_api_service import ApiListSubmissionsRequest as Request

        found = self._pages(f"submissions to {slug}", self._competitions.list_submissions, Request,
                            lambda page: page.submissions, competition_name=slug)
        return [_submission(item) for item in found]

    def submission(self, ref: int) -> Submission:
        """One submission; NotFound also for a moment just after it was made."""
        from kagglesdk.competitions.types.competition_api_service import ApiGetSubmissionRequest

        return _submission(self._call(f"submission {ref}", self._competitions.get_submission,
                                      _fill(ApiGetSubmissionRequest(), ref=ref)))

    def submit_file(self, slug: str, path: Path, message: str) -> int:
        """Upload and submit a csv; the submission's ref."""
        from kagglesdk.competitions.types.competition_api_service import (
            ApiCreateSubmissionRequest,
            ApiStartSubmissionUploadRequest,
        )

        stat = path.stat()
        start = _fill(ApiStartSubmissionUploadRequest(), competition_name=slug, file_name=path.name,
                      content_length=stat.st_size, last_modified_epoch_seconds=int(stat.st_mtime))
        token = self._upload(path, self._competitions.start_submission_upload, start)
        request = _fill(ApiCreateSubmissionRequest(), competition_name=slug, blob_file_tokens=token,
                        submission_description=message)
        return self._submit(slug, message, self._competitions.create_submission, request)

    def submit_kernel(self, slug: str, owner: str, kernel_slug: str, version: int, file_name: str,
                      message: str) -> int:
        """Submit an output file of a kernel version; the submission's ref."""
        from kagglesdk.competitions.types.competition_api_service import ApiCreateCodeSubmissionRequest

        request = _fill(ApiCreateCodeSubmissionRequest(), competition_name=slug, kernel_owner=owner,
                        kernel_slug=kernel_slug, kernel_version=version, file_name=file_name,
                        submission_description=message)
        return self._submit(slug, message, self._competitions.create_code_submission, request)

    def _submit(self, slug: str, message: str, method: Callable, request: Any) -> int:
        known = {item.ref for item in self.submissions(slug)}

        def look() -> int | None:
            new = [item.ref for item in self.submissions(slug) if item.ref not in known and item.description == message]
            return max(new, default=None)

        what = f"submission to {slug}"
        ref = self._once(what, lambda: method(request).ref, look) or self.look(look)
        if not ref:
            raise ServerError(f"{what}: Kaggle accepted it without giving a reference and does not list it")
        return ref

    def wait_for_score(self, ref: int, deadline_seconds: float = 3600.0) -> Submission:
        """Poll until the submission is scored; Refused with Kaggle's words when scoring it failed."""
        def check() -> Submission | None:
            try:
                found = self.submission(ref)
            except NotFound:  # it takes a moment until a new one can be read
                return None
            return None if found.status == "pending" else found

        found = wait_until(check, f"score of submission {ref}", self.timing, deadline_seconds)
        if found.status == "error":
            raise Refused(f"submission {ref}: scoring failed: {found.error or 'Kaggle gives no reason'}")
        return found

    def leaderboard(self, slug: str) -> list[tuple[int, str, float | None]]:
        """(rank, team, score) of every team, best first."""
        from kagglesdk.competitions.types.competition_api_service import ApiGetLeaderboardRequest as Request

        rows = self._pages(f"leaderboard of {slug}", self._competitions.get_leaderboard, Request,
                           lambda page: page.submissions, competition_name=slug)
        return [(rank, row.team_name or "", _score(row.score)) for rank, row in enumerate(rows, 1)]

    # ---- datasets ----

    def upload_blob(self, path: Path) -> str:
        """Upload a file for a dataset; the token that stands for it, once every byte was acknowledged."""
        from kagglesdk.blobs.types.blob_api_service import ApiBlobType, ApiStartBlobUploadRequest

        stat = path.stat()
        start = _fill(ApiStartBlobUploadRequest(), type=ApiBlobType.DATASET, name=path.name,
                      content_length=stat.st_size, last_modified_epoch_seconds=int(stat.st_mtime))
        return self._upload(path, self._sdk.blobs.blob_api_client.start_blob_upload, start)

    def create_dataset(self, owner: str, slug: str, title: str, license_name: str, files: list[Path], *,
                       subtitle: str = "", description: str = "", private: bool = True) -> int:
        """Upload `files` as a new dataset; the version it will have (1). Conflict when the name is in use."""
        from kagglesdk.datasets.types.dataset_api_service import ApiCreateDatasetRequest

        request = _fill(ApiCreateDatasetRequest(), owner_slug=owner, slug=slug, title=title, license_name=license_name,
                        is_private=private, files=self._new_files(files), subtitle=subtitle, description=description)

        def look() -> int | None:
            try:
                return self._dataset_version(owner, slug) or 1
            except (NotFound, Forbidden):
                return None

        what = f"creating dataset {owner}/{slug}"
        self._once(what, lambda: _dataset_answer(what, self._datasets.create_dataset(request)), look)
        return 1

    def create_dataset_version(self, owner: str, slug: str, notes: str, files: list[Path], *,
                               subtitle: str = "", description: str = "") -> int:
        """Upload `files` as the next version (they replace all earlier ones); the number it will have."""
        from kagglesdk.datasets.types.dataset_api_service import (
            ApiCreateDatasetVersionRequest,
            ApiCreateDatasetVersionRequestBody,
        )

        status, before = self.dataset_status(owner, slug)
        body = _fill(ApiCreateDatasetVersionRequestBody(), version_notes=notes, files=self._new_files(files),
                     subtitle=subtitle, description=description)
        request = _fill(ApiCreateDatasetVersionRequest(), owner_slug=owner, dataset_slug=slug, body=body)

        def look() -> int | None:
            now, version = self.dataset_status(owner, slug)
            return before + 1 if version > before or (status == "ready" and now != "ready") else None

        what = f"new version of dataset {owner}/{slug}"
        self._once(what, lambda: _dataset_answer(what, self._datasets.create_dataset_version(request)), look)
        return before + 1

    def dataset_status(self, owner: str, slug: str) -> tuple[str, int]:
        """(status in lower case, current version; 0 while the first is being processed).

        NotFound or Forbidden when it does not exist: Kaggle hides the names of others.
        """
        from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetStatusRequest

        found = self._call(f"status of dataset {owner}/{slug}", self._datasets.get_dataset_status,
                           _fill(ApiGetDatasetStatusRequest(), owner_slug=owner, dataset_slug=slug))
        return found.status.name.lower(), self._dataset_version(owner, slug)

    def _dataset_version(self, owner: str, slug: str) -> int:
        from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

        found = self._call(f"dataset {owner}/{slug}", self._datasets.get_dataset,
                           _fill(ApiGetDatasetRequest(), owner_slug=owner, dataset_slug=slug))
        return found.current_version_number or 0

    def dataset_files(self, owner: str, slug: str, version: int | None = None) -> dict[str, int]:
        """Every file of a dataset (of its current version unless one is named) with its size, all pages."""
        from kagglesdk.datasets.types.dataset_api_service import ApiListDatasetFilesRequest as Request

        files = self._pages(f"files of dataset {owner}/{slug}", self._datasets.list_dataset_files, Request,
                            lambda page: page.dataset_files, owner_slug=owner, dataset_slug=slug,
                            dataset_version_number=version)
        return {safe_name(file.name or ""): file.total_bytes for file in files}

    def _new_files(self, paths: list[Path]) -> list:
        from kagglesdk.datasets.types.dataset_api_service import ApiDatasetNewFile

        return [_fill(ApiDatasetNewFile(), token=self.upload_blob(path)) for path in paths]

    # ---- kernels ----

    def save_kernel(self, metadata: dict, text: str, *, timeout_seconds: int | None = None) -> KernelVersion:
        """Push a kernel given the content of kernel-metadata.json and its script; runs it on Kaggle.

        Refused on an error or on any source that Kaggle does not know, which the official client lets pass.
        """
        request = _kernel_request(metadata, text, timeout_seconds)
        owner, slug = split_ref(metadata["id"])
        before = self.kernel_version(owner, slug) or 0

        def look() -> Any:
            version, source = self.kernel_source(owner, slug)
            return _Saved(f"{owner}/{slug}", version) if version > before and same_script(source, text) else None

        what = f"push of {owner}/{slug}"
        answer = self._once(what, lambda: self._kernels.save_kernel(request), look)
        _check_push(what, answer)
        version = answer.version_number or getattr(self.look(look), "version_number", None)
        if not version:
            raise ServerError(f"{what}: Kaggle accepted it without naming a version, and shows none")
        ref = answer.ref.strip("/").removeprefix("code/") or f"{owner}/{slug}"
        return KernelVersion(ref, answer.url or f"https://www.kaggle.com/code/{ref}", version)

    def kernel_version(self, owner: str, slug: str) -> int | None:
        """The current version of a kernel, None when there is none (Kaggle answers 403 then, as for a hidden one)."""
        return self.kernel_source(owner, slug)[0] or None

    def kernel_source(self, owner: str, slug: str) -> tuple[int, str]:
        """(current version, its script); (0, "") when there is none."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

        try:
            found = self._call(f"kernel {owner}/{slug}", self._kernels.get_kernel,
                               _fill(ApiGetKernelRequest(), user_name=owner, kernel_slug=slug))
        except (NotFound, Forbidden):
            return 0, ""
        return found.metadata.current_version_number or 0, found.blob.source if found.blob else ""

    def kernel_status(self, owner: str, slug: str, version: int | None = None) -> tuple[str, str]:
        """(queued, running, complete, error, cancel_requested, cancel_acknowledged or new_script; failure message)."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelSessionStatusRequest

        found = self._call(f"status of kernel {_label(owner, slug, version)}", self._kernels.get_kernel_session_status,
                           _fill(ApiGetKernelSessionStatusRequest(), user_name=owner, kernel_slug=slug,
                                 version_label=_version_label(version)))
        return found.status.name.lower(), found.failure_message or ""

    def kernel_output(self, owner: str, slug: str, version: int | None = None) -> tuple[list[tuple[str, str]], str]:
        """([(name, signed URL)] of all pages, the log as text). The URLs expire: ask again when one is refused."""
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest as Request

        logs: list[str] = []

        def items(page: Any) -> list:
            logs.append(page.log or "")
            return page.files

        files = self._pages(f"output of kernel {_label(owner, slug, version)}",
                            self._kernels.list_kernel_session_output, Request, items, user_name=owner,
                            kernel_slug=slug, version_label=_version_label(version))
        log = next((log for log in logs if log), "")
        return [(safe_name(file.file_name or ""), file.url) for file in files], "".join(_log_texts(log))

    def download_url(self, url: str, dest: Path, expected_bytes: int | None = None,
                     renew: Callable[[], str] | None = None) -> None:
        """Fetch a signed URL to `dest`, resuming `dest`.partial; `renew` gives a fresh URL when it has expired."""
        what = f"download of {dest.name}"
        current = [url]

        def open_stream(headers: dict) -> requests.Response:
            response = self._transport.plain.get(current[0], headers=headers, stream=True)
            if response.status_code in (400, 401, 403, 404, 410) and renew is not None:
                response.close()
                current[0] = self._transport.retry(what, renew)
                response = self._transport.plain.get(current[0], headers=headers, stream=True)
            return response

        self._transport.download(what, open_stream, dest, expected_bytes)

    def kernel_log_stream(self, owner: str, slug: str, version: int | None = None) -> Iterator[str]:
        """The log of a running or finished kernel, piece by piece; reconnects without repeating what was given."""
        given = failures = 0
        while True:
            seen = 0
            try:
                for seen, text in enumerate(self._log_events(owner, slug, version), 1):
                    if seen > given:
                        given, failures = seen, 0
                        yield text
                return
            except Ambiguous as error:
                if isinstance(error, Timeout) and seen:  # a kernel may well be silent for long
                    continue
                failures += 1
                if failures >= self.timing.tries:
                    raise
                self._transport.pause(error, failures)

    def _log_events(self, owner: str, slug: str, version: int | None) -> Iterator[str]:
        what = f"log of kernel {_label(owner, slug, version)}"
        http = self._sdk.http_client()
        url = http._get_request_url("kernels", "logs").removesuffix("/kernels/logs")
        with translated(what, self.timing):
            answer = http._session.get(f"{url}/kernels/logs/stream/{owner}/{slug}", stream=True,
                                       params={"versionLabel": _version_label(version)},
                                       headers={"Accept": "text/event-stream, */*", "Content-Type": None})
            with check_status(what, self._follow(answer, {}), 200) as response:
                response.encoding = "utf-8"  # requests takes text without a charset for Latin-1
                if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                    yield from _log_texts(response.text)
                    return
                for line in response.iter_lines(decode_unicode=True):
                    if line == "data: END_OF_LOG":
                        return
                    if line.startswith("data:"):
                        yield from _log_texts(f"[{line[5:].strip()}]")
                raise ServerError(f"{what}: the stream ended before the log did")

    def quota(self) -> dict[str, Quota]:
        """This week's accelerator hours by kind: "GPU", "TPU"."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetAcceleratorQuotaStatisticsRequest

        found = self._call("accelerator quota", self._kernels.get_accelerator_quota_statistics,
                           ApiGetAcceleratorQuotaStatisticsRequest())
        kinds = {"GPU": found.gpu_quota, "TPU": found.tpu_quota}
        return {kind: Quota(*(_hours(value) for value in (quota.time_used, quota.time_reserved,
                                                          quota.total_time_allowed)))
                for kind, quota in kinds.items() if quota is not None}

    # ---- how calls are made ----

    def _call(self, what: str, method: Callable, request: Any) -> Any:
        return self._transport.retry(what, lambda: method(request))

    def _pages(self, what: str, method: Callable, request_class: type, items: Callable[[Any], list],
               **values: Any) -> list:
        """The items of every page."""
        found: list = []
        token, seen = "", set()
        while True:
            request = _fill(request_class(), page_size=PAGE, page_token=token or None, **values)
            page = self._call(what, method, request)
            found += items(page) or []
            token = page.next_page_token
            if not token:
                return found
            if token in seen:
                raise ServerError(f"{what}: Kaggle repeats a page for ever")
            seen.add(token)

    def _upload(self, path: Path, method: Callable, request: Any) -> str:
        what = f"upload of {path.name}"

        def start() -> tuple[str, str]:
            session = self._call(what, method, request)
            return session.token, session.create_url

        return self._transport.upload(what, path, start)

    def _once(self, what: str, act: Callable[[], T], look: Callable[[], T | None]) -> T:
        """`act`, never repeated blindly: after a failure that leaves its outcome open, `look` whether it happened."""
        try:
            return self._transport.retry(what, act, repeat=False)
        except Ambiguous as error:
            print(f"{error}; looking whether it happened", file=sys.stderr)
            try:
                found = self.look(look)
            except KaggleError as second:
                raise type(error)(f"{error}; nor could it be looked up ({second}): look again before you repeat it") \
                    from None
            if found is None:
                raise type(error)(f"{error}; it did not happen as far as Kaggle shows, so running this again is safe") \
                    from None
            return found

    def look(self, check: Callable[[], T | None]) -> T | None:
        """`check`'s first result that is not None, in a few looks: what just happened may not show at once."""
        for number in range(self.timing.looks):
            if number:
                time.sleep(self.timing.look_seconds)
            if (found := check()) is not None:
                return found
        return None


@dataclass
class _Saved:
    """The answer to a push, put together from what Kaggle shows afterwards."""

    ref: str
    version_number: int
    url: str = ""
    error: str = ""


def _fill(request: Any, **values: Any) -> Any:
    """An SDK request with its fields set; None and "" mean: not given."""
    for name, value in values.items():
        if value is not None and value != "":
            setattr(request, name, value)
    return request


def _kernel_request(metadata: dict, text: str, timeout_seconds: int | None) -> Any:
    from kagglesdk.kernels.types.kernels_api_service import ApiSaveKernelRequest

    known = {key: metadata.get(key) for key in ("language", "kernel_type", "is_private", "enable_gpu", "enable_tpu",
                                                "enable_internet", "docker_image_pinning_type", "docker_image",
                                                "machine_shape")}
    sources = {f"{kind}_data_sources": metadata.get(f"{kind}_sources") or []
               for kind in ("dataset", "competition", "kernel", "model")}
    return _fill(ApiSaveKernelRequest(), slug=metadata["id"], new_title=metadata.get("title"), text=text,
                 category_ids=metadata.get("keywords") or [], session_timeout_seconds=timeout_seconds,
                 **known, **sources)


def _check_push(what: str, answer: Any) -> None:
    if answer.error:
        raise Refused(f"{what}: {answer.error}")
    for kind in ("dataset", "competition", "kernel", "model"):
        if unknown := getattr(answer, f"invalid_{kind}_sources", None):
            raise Refused(f"{what}: Kaggle does not know the {kind} source {', '.join(unknown)} and dropped it; "
                          f"version {answer.version_number} runs without it: check {kind}_sources and push again")
    if tags := getattr(answer, "invalid_tags", None):
        print(f"{what}: unknown keywords were dropped: {', '.join(tags)}", file=sys.stderr)


def _dataset_answer(what: str, answer: Any) -> int:
    if answer.error or (answer.status or "").lower() == "error":
        said = answer.error or "no reason given"
        raise (Conflict if "in use" in said else Refused)(f"{what}: {said}")
    return 1


def _version_label(version: int | None) -> str | None:
    """Kaggle wants "v3"; a bare "3" is a 404."""
    return None if version is None else f"v{version}"


def _label(owner: str, slug: str, version: int | None) -> str:
    return f"{owner}/{slug}" + ("" if version is None else f" version {version}")


def _log_texts(log: str) -> list[str]:
    """The texts of Kaggle's JSON log `[{stream_name, time, data}]`; anything else as it is."""
    try:
        events = json.loads(log)
    except ValueError:
        return [log] if log else []
    if not isinstance(events, list):
        return [log]
    return [str(event.get("data", "")) for event in events if isinstance(event, dict)]


def _hours(duration: Any) -> float:
    return duration.total_seconds() / 3600 if duration is not None else 0.0


def _score(text: str | None) -> float | None:
    """Scores are strings, empty while pending."""
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _submission(item: Any) -> Submission:
    return Submission(ref=item.ref, file_name=item.file_name or "", date=item.date.isoformat() if item.date else "",
                      description=item.description or "", status=item.status.name.lower(),
                      public_score=_score(item.public_score), private_score=_score(item.private_score),
                      error=item.error_description or "")


def _unpack_single(path: Path, name: str, expected_bytes: int) -> None:
    """Replace `path`, a zip with the one file `name` in it, by that file; anything else is an error."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if [Path(safe_name(member.filename)).name for member in members] != [Path(name).name]:
                raise zipfile.BadZipFile
            partial = path.with_name(path.name + ".unpacking")
            with archive.open(members[0]) as source, partial.open("wb") as target:
                while chunk := source.read(CHUNK):
                    target.write(chunk)
    except (zipfile.BadZipFile, KaggleError):
        size = path.stat().st_size
        path.unlink()
        raise ServerError(f"download of {name}: {size:,} bytes came instead of {expected_bytes:,}; "
                          "nothing was kept: run this again") from None
    size = partial.stat().st_size
    if size != expected_bytes:
        partial.unlink()
        path.unlink()
        raise ServerError(f"download of {name}: {size:,} bytes after unpacking instead of {expected_bytes:,}")
    partial.replace(path)
