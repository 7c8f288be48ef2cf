"""The transport under the client: timeouts, bounded retries, typed errors, resumable downloads and uploads.

The official client has no timeout, retries next to nothing, saves error pages as data and leaves out files whose
upload failed. Everything that crosses the network goes through `Transport`, where each failure has a name.
"""
from __future__ import annotations

import email.utils
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import TypeVar

import requests
import urllib3
from tqdm import tqdm

from lib.project import InputError, ToolError

T = TypeVar("T")
CHUNK = 1 << 16  # what a broken download loses at most
SETTINGS_PAGE = "https://www.kaggle.com/settings/api"


class KaggleError(ToolError):
    """Kaggle did not do what was asked; the sub-class says in which way."""


class Unauthorized(KaggleError, InputError):
    """401, or no usable credentials at all."""


class Forbidden(KaggleError):
    """403: no permission, rules not accepted, or a name that Kaggle hides."""


class NotFound(KaggleError):
    """404."""


class Conflict(KaggleError):
    """409, or a name that is already in use."""


class Refused(KaggleError):
    """Kaggle understood and said no: HTTP 200 with an error in it, or another 4xx."""


class RateLimited(KaggleError):
    """429; the request was not carried out, so it may always be repeated."""

    retry_after: float | None = None


class Ambiguous(KaggleError):
    """A failure after which nobody knows whether the request was carried out."""


class ServerError(Ambiguous):
    """5xx, or an answer that is not what the API sends (an error page)."""


class Timeout(Ambiguous):
    """The server stayed silent."""


class ConnectionFailed(Ambiguous):
    """No connection, or it broke."""


BY_STATUS: dict[int, type[KaggleError]] = {401: Unauthorized, 403: Forbidden, 404: NotFound, 409: Conflict,
                                           429: RateLimited}


@dataclass(frozen=True)
class Timing:
    """How long to wait for what, in seconds. ALIGN_<NAME> in the environment overrides a field (slow lines)."""

    connect_seconds: float = 15.0
    timeout_seconds: float = 60.0  # of silence, not of the whole transfer
    tries: int = 5
    retry_seconds: float = 1.0  # first pause between tries, doubled each time
    retry_limit_seconds: float = 60.0
    retry_after_limit_seconds: float = 300.0  # a longer Retry-After is told to the user instead of slept
    look_seconds: float = 5.0  # between looks whether an ambiguous request happened
    looks: int = 4
    poll_seconds: float = 5.0  # first pause while waiting for Kaggle's work, grows by half each time
    poll_limit_seconds: float = 60.0

    @classmethod
    def from_environment(cls) -> Timing:
        """The defaults, with ALIGN_TIMEOUT_SECONDS, ALIGN_RETRY_SECONDS, ... taken from the environment.

        Not KAGGLE_*: the official client takes every such variable for a configuration value.
        """
        values = {}
        for field in fields(cls):
            name = f"ALIGN_{field.name.upper()}"
            if name in os.environ:
                try:
                    values[field.name] = type(field.default)(os.environ[name])
                except ValueError:
                    raise InputError(f"{name}={os.environ[name]!r} is not a number") from None
        return cls(**values)


def wait_until(check: Callable[[], T | None], what: str, timing: Timing, deadline_seconds: float) -> T:
    """Poll `check` with growing pauses until it returns something other than None; Timeout after the deadline."""
    end, pause = time.monotonic() + deadline_seconds, timing.poll_seconds
    while (found := check()) is None:
        left = end - time.monotonic()
        if left <= 0:
            raise Timeout(f"{what}: not done after {deadline_seconds / 60:.3g} minutes; Kaggle may still be at it")
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, timing.poll_limit_seconds)
    return found


def safe_name(name: str) -> str:
    """`name` if it is a relative path that stays below its folder; names from the server are not trusted."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise Refused(f"Kaggle sent the file name {name!r}, which would leave its folder: nothing was written")
    return name


def _retry_after(response: requests.Response) -> float | None:
    value = response.headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _body_of(response: requests.Response) -> dict:
    """The JSON object of an answer, {} for anything else (an error page, a stream that broke)."""
    try:
        body = response.json()
    except (ValueError, requests.RequestException):
        return {}
    return body if isinstance(body, dict) else {}


def error_of(what: str, response: requests.Response) -> KaggleError:
    """The typed error for an HTTP answer; `code` in the body counts more than the status of the answer."""
    body = _body_of(response)
    status = int(body.get("code") or response.status_code)
    said = " ".join(str(body.get("message") or response.reason or "").split())[:300]
    kind = ServerError if status >= 500 or status < 400 else BY_STATUS.get(status, Refused)
    hint = f": the credentials were refused, make new ones at {SETTINGS_PAGE}" if status == 401 else ""
    error = kind(f"{what}: Kaggle answered {status} ({said}){hint}")
    if isinstance(error, RateLimited):
        error.retry_after = _retry_after(response)
    return error


def check_status(what: str, response: requests.Response, *good: int) -> requests.Response:
    """`response` if its status is one of `good`; otherwise its typed error."""
    if response.status_code in good:
        return response
    with response:
        raise error_of(what, response)


@contextmanager
def translated(what: str, timing: Timing) -> Iterator[None]:
    """Turn what requests, urllib3 and the SDK raise into the typed errors above."""
    try:
        yield
    except requests.HTTPError as error:
        raise (error_of(what, error.response) if error.response is not None else Refused(f"{what}: {error}")) from None
    except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError) as error:
        raise _timeout(what, timing, error) from None
    except ValueError as error:  # JSON that is none
        raise ServerError(f"{what}: Kaggle's answer is not what its API sends ({_short(error)})") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError) as error:
        if "timed out" in str(error).lower():  # a stream that falls silent comes as a ConnectionError
            raise _timeout(what, timing, error) from None
        raise ConnectionFailed(f"{what}: no connection to Kaggle ({_short(error)})") from None
    except OSError as error:  # this machine's: disk full, no permission
        raise ToolError(f"{what}: {error}") from None
    except KeyError as error:  # the SDK's answer to an enum value that it does not know
        raise Refused(f"{what}: Kaggle sent the value {error}, which this client does not know: "
                      f"pip install -U kaggle") from None


def _timeout(what: str, timing: Timing, error: Exception) -> Timeout:
    seconds = timing.connect_seconds if isinstance(error, requests.ConnectTimeout) else timing.timeout_seconds
    return Timeout(f"{what}: Kaggle was silent for {seconds:g} s (on a slow line set ALIGN_TIMEOUT_SECONDS)")


def _short(error: BaseException) -> str:
    """The innermost reason, without the object addresses that urllib3 wraps around it."""
    causes = (getattr(error, "reason", None), *error.args)
    inner = next((cause for cause in causes if isinstance(cause, BaseException)), None)
    return " ".join(str(error).split())[-160:] if inner is None else _short(inner)


class _TimeoutAdapter(requests.adapters.HTTPAdapter):
    """Gives every request a timeout: neither requests nor the SDK has one."""

    def __init__(self, timing: Timing) -> None:
        self._timeout = (timing.connect_seconds, timing.timeout_seconds)
        super().__init__()

    def send(self, request, stream=False, timeout=None, **options):  # type: ignore[no-untyped-def]
        return super().send(request, stream=stream, timeout=timeout or self._timeout, **options)


class Progress:
    """Bytes moved: a bar on a terminal, a plain line every ten seconds elsewhere; always on stderr."""

    def __init__(self, label: str, total: int | None, done: int = 0) -> None:
        self._label, self._total, self._done, self._next = label, total, done, time.monotonic() + 10
        self._bar = tqdm(total=total, initial=done, desc=label, unit="B", unit_scale=True, leave=False,
                         delay=2) if sys.stderr.isatty() else None

    def add(self, count: int) -> None:
        """Count `count` more bytes."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() > self._next:
            self._next = time.monotonic() + 10
            of = f" of {self._total / 1e6:,.1f}" if self._total else ""
            print(f"{self._label}: {self._done / 1e6:,.1f}{of} MB", file=sys.stderr)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


class _UploadBody:
    """The rest of an open file as a request body that reports its progress."""

    def __init__(self, file: io.BufferedReader, size: int, progress: Progress) -> None:
        self._file, self._size, self._progress = file, size, progress

    def __len__(self) -> int:
        return self._size

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count)
        self._progress.add(len(data))
        return data


class Transport:
    """Retries, transfers and a plain session (no credentials) for signed URLs."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.plain = self.mount(requests.Session())
        self.plain.auth = lambda request: request  # a ~/.netrc must not reach a signed URL

    def mount(self, session: requests.Session) -> requests.Session:
        """Give `session` the timeouts."""
        for scheme in ("http://", "https://"):
            session.mount(scheme, _TimeoutAdapter(self.timing))
        return session

    def retry(self, what: str, call: Callable[[], T], repeat: bool = True) -> T:
        """`call`'s result; failures that may pass are tried again, ambiguous ones only if `repeat`."""
        for attempt in range(1, self.timing.tries + 1):
            try:
                with translated(what, self.timing):
                    return call()
            except (Ambiguous, RateLimited) as error:
                if attempt == self.timing.tries or not (repeat or isinstance(error, RateLimited)):
                    raise
                self.pause(error, attempt)
        raise AssertionError("unreachable: the last try returns or raises")

    def pause(self, error: KaggleError, attempt: int) -> None:
        """Sleep before try `attempt` + 1: Retry-After where the server sent one, else doubling from retry_seconds."""
        seconds = min(self.timing.retry_seconds * 2 ** (attempt - 1), self.timing.retry_limit_seconds)
        asked = getattr(error, "retry_after", None)
        if asked is not None:
            if asked > self.timing.retry_after_limit_seconds:
                raise RateLimited(f"{error}: it asks to wait {asked / 60:.0f} minutes, run this again then") from None
            seconds = asked
        print(f"{error}; try {attempt + 1} of {self.timing.tries} in {seconds:.3g} s", file=sys.stderr)
        time.sleep(seconds)

    def download(self, what: str, open_stream: Callable[[dict], requests.Response], dest: Path,
                 expected_bytes: int | None = None) -> None:
        """Stream to `dest`.partial, resume by Range after a break, verify the size, then rename to `dest`."""
        dest.parent.mkdir(parents=True, exist_ok=True)
        partial = dest.with_name(dest.name + ".partial")
        if expected_bytes is not None and partial.exists() and partial.stat().st_size > expected_bytes:
            partial.unlink()
        failures = 0
        while True:
            before = partial.stat().st_size if partial.exists() else 0
            try:
                with translated(what, self.timing):
                    total = self._receive(what, open_stream, partial, expected_bytes)
                break
            except (Ambiguous, RateLimited) as error:
                moved = partial.exists() and partial.stat().st_size > before
                failures = 1 if moved else failures + 1
                if failures >= self.timing.tries:
                    raise
                self.pause(error, failures)
        self._accept(what, partial, dest, total if expected_bytes is None else expected_bytes)

    def _receive(self, what: str, open_stream: Callable[[dict], requests.Response], partial: Path,
                 expected: int | None) -> int | None:
        """Append one response to `partial`; the total size as far as the server says it."""
        offset = partial.stat().st_size if partial.exists() else 0
        if offset and offset == expected:
            return expected
        # identity: a transparently unpacked body has another length than the one announced
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        with open_stream(headers) as response:
            if response.status_code == 416:  # the partial file is not a beginning of this one
                partial.unlink(missing_ok=True)
                raise ServerError(f"{what}: the server cannot resume at byte {offset}")
            check_status(what, response, 200, 206)
            if response.headers.get("Content-Type", "").startswith("text/html") and ".html" not in partial.name:
                raise ServerError(f"{what}: Kaggle sent a web page instead of the file")
            resumed = response.status_code == 206
            packed = response.headers.get("Content-Encoding", "identity") != "identity"
            length = None if packed else response.headers.get("Content-Length")
            total = int(length) + (offset if resumed else 0) if length else None
            self._write(response, partial, resumed, Progress(partial.stem, total, offset if resumed else 0))
        return total

    def _write(self, response: requests.Response, partial: Path, resumed: bool, progress: Progress) -> None:
        try:
            with partial.open("ab" if resumed else "wb") as file:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    progress.add(len(chunk))
        finally:
            progress.close()

    def _accept(self, what: str, partial: Path, dest: Path, expected: int | None) -> None:
        size = partial.stat().st_size
        if expected is not None and size != expected:
            partial.unlink()
            raise ServerError(f"{what}: {size:,} bytes came instead of {expected:,}; nothing was kept")
        partial.replace(dest)

    def upload(self, what: str, path: Path, start: Callable[[], tuple[str, str]]) -> str:
        """Send `path` to the URL of the session that `start` opens; its token, once every byte was acknowledged.

        After a break the session is asked what it has and gets the rest; an expired one is opened again.
        """
        size = path.stat().st_size
        token, url = start()
        sent, failures = 0, 0
        while True:
            try:
                with translated(what, self.timing):
                    if self._put(what, url, path, sent, size):
                        return token
                    position = self._acknowledged(what, url, size)
            except (Ambiguous, RateLimited, NotFound) as error:
                failures += 1
                if failures >= self.timing.tries:
                    raise
                self.pause(error, failures)
                position = self._after_break(what, url, size, error)
            if position == size and size:
                return token
            if position is None:
                token, url = start()
            sent = position or 0

    def _put(self, what: str, url: str, path: Path, sent: int, size: int) -> bool:
        """Send the file from byte `sent` on; False if the server wants more."""
        headers = {"Content-Range": f"bytes {sent}-{size - 1}/{size}"} if sent else {}
        progress = Progress(path.name, size, sent)
        with path.open("rb") as file:
            file.seek(sent)
            body = _UploadBody(file, size - sent, progress) if size else b""
            try:
                response = self.plain.put(url, data=body, headers=headers)
            finally:
                progress.close()
        if response.status_code == 410:
            raise NotFound(f"{what}: the upload session has expired")
        return check_status(what, response, 200, 201, 308).status_code != 308

    def _after_break(self, what: str, url: str, size: int, error: KaggleError) -> int | None:
        """How far the session got, None if it has to be opened again; 0 while the server does not say."""
        if isinstance(error, NotFound):
            return None
        try:
            with translated(what, self.timing):
                return self._acknowledged(what, url, size)
        except NotFound:
            return None
        except (Ambiguous, RateLimited):
            return 0

    def _acknowledged(self, what: str, url: str, size: int) -> int:
        """Bytes that the upload session has (all of them: `size`)."""
        response = self.plain.put(url, headers={"Content-Range": f"bytes */{size}"})
        if response.status_code == 410:
            raise NotFound(f"{what}: the upload session has expired")
        if check_status(what, response, 200, 201, 308).status_code != 308:
            return size
        last = response.headers.get("Range", "").rpartition("-")[2]
        return int(last) + 1 if last.isdigit() else 0
