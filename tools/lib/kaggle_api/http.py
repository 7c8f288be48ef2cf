"""The transport under the services: timeouts, bounded retries, typed errors, resumable downloads and uploads.

The official client has no timeout, retries next to nothing, saves error pages as data and leaves out files whose
upload failed. Everything that crosses the network goes through `Transport`, where each failure has a name.
"""

from __future__ import annotations

import email.utils
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urljoin

import requests
import urllib3
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from lib.kaggle_api.errors import (
    BY_STATUS,
    Ambiguous,
    ConnectionFailed,
    Expired,
    KaggleError,
    MachineFailed,
    NotFound,
    RateLimited,
    Refused,
    ServerError,
    Timeout,
)
from lib.kaggle_api.patience import Patience

T = TypeVar("T")
CHUNK = 1 << 16  # what a broken download loses at most
SETTINGS_PAGE = "https://www.kaggle.com/settings/api"


def safe_name(name: str) -> str:
    """`name` if it is a relative path that stays below its folder; names from the server are not trusted."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise Refused(f"Kaggle sent the file name {name!r}, which would leave its folder: nothing was written")
    return name


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def retry_after(response: requests.Response) -> float | None:
    """Seconds that the server asks to wait; a date is read against the server's own clock."""
    value, date = response.headers.get("Retry-After", "").strip(), response.headers.get("Date")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        now = email.utils.parsedate_to_datetime(date).timestamp() if date else time.time()
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (TypeError, ValueError):
        return None


def error_of(what: str, response: requests.Response) -> KaggleError:
    """The typed error for an HTTP answer; `code` in the body counts more than the status of the answer."""
    try:
        body = dict(response.json())
        status = int(body.get("code") or response.status_code)
    except (ValueError, TypeError, requests.RequestException):  # an error page, a stream that broke
        body, status = {}, response.status_code
    said = " ".join(str(body.get("message") or response.reason or "").split())[:300]
    kind = ServerError if status >= 500 or status < 400 else BY_STATUS.get(status, Refused)
    hint = f": the credentials were refused, make new ones at {SETTINGS_PAGE}" if status == 401 else ""
    error = kind(f"{what}: Kaggle answered {status} ({said}){hint}")
    error.status, error.retry_after = status, retry_after(response)
    return error


def check_status(what: str, response: requests.Response, *good: int) -> requests.Response:
    """`response` if its status is one of `good`; otherwise its typed error."""
    if response.status_code in good:
        return response
    with response:
        raise error_of(what, response)


@contextmanager
def translated(what: str, patience: Patience) -> Iterator[None]:
    """Turn what requests, urllib3 and the SDK raise into the typed errors."""
    try:
        yield
    except requests.HTTPError as error:
        raise (error_of(what, error.response) if error.response is not None else Refused(f"{what}: {error}")) from None
    except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError) as error:
        raise _timeout(what, patience, error) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or none that the SDK can read
        raise ServerError(f"{what}: Kaggle's answer is not what its API sends ({_short(error)})") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError) as error:
        if "timed out" in str(error).lower():  # a stream that falls silent comes as a ConnectionError
            raise _timeout(what, patience, error) from None
        raise ConnectionFailed(f"{what}: no connection to Kaggle ({_short(error)})") from None
    except OSError as error:
        raise MachineFailed(f"{what}: {error}") from None


def _timeout(what: str, patience: Patience, error: Exception) -> Timeout:
    seconds = patience.connect_seconds if isinstance(error, requests.ConnectTimeout) else patience.timeout_seconds
    return Timeout(f"{what}: Kaggle was silent for {seconds:g} s (on a slow line set ALIGN_TIMEOUT_SECONDS)")


def _short(error: BaseException) -> str:
    """The innermost reason, without the object addresses that urllib3 wraps around it."""
    causes = (getattr(error, "reason", None), *error.args)
    inner = next((cause for cause in causes if isinstance(cause, BaseException)), None)
    return " ".join(str(error).split())[-160:] if inner is None else _short(inner)


Edit = Callable[[requests.Response], requests.Response]


class _Adapter(requests.adapters.HTTPAdapter):
    """Gives every request a timeout, as neither requests nor the SDK does; `edit` sees each answer first."""

    def __init__(self, patience: Patience, edit: Edit) -> None:
        self._timeout, self._edit = (patience.connect_seconds, patience.timeout_seconds), edit
        super().__init__()

    def send(self, request, stream=False, timeout=None, **options):  # type: ignore[no-untyped-def]
        return self._edit(super().send(request, stream=stream, timeout=timeout or self._timeout, **options))


class Progress(tqdm):
    """Bytes moved: a bar on a terminal, a plain line every ten seconds elsewhere; always on stderr."""

    def __init__(self, label: str, total: int | None, done: int = 0) -> None:
        self.label, self.next = label, time.monotonic() + 10
        bar = {"desc": label, "unit": "B", "unit_scale": True, "leave": False, "delay": 2}
        super().__init__(total=total, initial=done, disable=not sys.stderr.isatty(), **bar)

    def update(self, n: int = 1) -> None:
        super().update(n)
        if not self.disable:
            return
        self.n += n
        if time.monotonic() > self.next:
            self.next = time.monotonic() + 10
            of = f" of {self.total / 1e6:,.1f}" if self.total else ""
            print(f"{self.label}: {self.n / 1e6:,.1f}{of} MB", file=sys.stderr)


class Transport:
    """Retries, transfers and a plain session (no credentials) for signed URLs."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.plain = self.mount(requests.Session())
        self.plain.auth = lambda request: request  # a ~/.netrc must not reach a signed URL

    def mount(self, session: requests.Session, edit: Edit = lambda response: response) -> requests.Session:
        """Give `session` the timeouts, and `edit` every answer before anybody else reads it."""
        for scheme in ("http://", "https://"):
            session.mount(scheme, _Adapter(self.patience, edit))
        return session

    def retry(self, what: str, call: Callable[[], T], repeat: bool = True) -> T:
        """`call`'s result; failures that may pass are tried again, ambiguous ones only if `repeat`."""
        attempt = 0
        while True:
            attempt += 1
            try:
                with translated(what, self.patience):
                    return call()
            except (Ambiguous, RateLimited) as error:
                if not (repeat or isinstance(error, RateLimited)):
                    raise
                self.pause(error, attempt)

    def pause(self, error: KaggleError, attempt: int) -> None:
        """Sleep before try `attempt` + 1: Retry-After where the server sent one, else doubling from retry_seconds.

        Raises the error when that was the last try.
        """
        if attempt >= self.patience.tries:
            raise error
        seconds = min(self.patience.retry_seconds * 2 ** (attempt - 1), self.patience.retry_limit_seconds)
        if error.retry_after is not None:
            if error.retry_after > self.patience.retry_after_limit_seconds:
                minutes = error.retry_after / 60
                raise error.with_hint(f": it asks to wait {minutes:.0f} minutes, run this again then") from None
            seconds = error.retry_after
        print(f"{error}; try {attempt + 1} of {self.patience.tries} in {seconds:.3g} s", file=sys.stderr)
        self.patience.sleep(seconds)

    def signed(self, what: str, url: str, headers: dict) -> requests.Response:
        """The stream behind a signed URL; Expired when the storage does not take it (any more)."""
        response = self.plain.get(url, headers=headers, stream=True)
        if response.status_code in (400, 401, 403, 404, 410):
            response.close()
            raise Expired(f"{what}: the signed URL has expired (the storage answered {response.status_code})")
        return response

    def follow(self, what: str, response: requests.Response, headers: dict) -> requests.Response:
        """The stream behind a redirect to a signed URL; `response` itself where there is none."""
        if not response.is_redirect:
            return response
        response.close()
        return self.signed(what, urljoin(response.url, response.headers["Location"]), headers)

    def download(
        self, what: str, open_stream: Callable[[dict], requests.Response], dest: Path, expected_bytes: int | None = None
    ) -> None:
        """Stream to `dest`.partial, resume by Range after a break, verify the size, then rename to `dest`."""
        dest.parent.mkdir(parents=True, exist_ok=True)
        partial = dest.with_name(dest.name + ".partial")
        if expected_bytes is not None and size_of(partial) > expected_bytes:
            partial.unlink()
        failures = 0
        while True:
            before = size_of(partial)
            try:
                with translated(what, self.patience):
                    total = self._receive(what, open_stream, partial, expected_bytes)
                break
            except (Ambiguous, RateLimited) as error:
                failures = 1 if size_of(partial) > before else failures + 1
                self.pause(error, failures)
        size, wanted = size_of(partial), total if expected_bytes is None else expected_bytes
        if wanted is not None and size != wanted:
            partial.unlink()
            raise ServerError(f"{what}: {size:,} bytes came instead of {wanted:,}; nothing was kept")
        partial.replace(dest)

    def _receive(
        self, what: str, open_stream: Callable[[dict], requests.Response], partial: Path, expected: int | None
    ) -> int | None:
        """Append one response to `partial`; the total size as far as the server says it."""
        offset = size_of(partial)
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
            mode, begin = ("ab", offset) if response.status_code == 206 else ("wb", 0)
            packed = response.headers.get("Content-Encoding", "identity") != "identity"
            length = None if packed else response.headers.get("Content-Length")
            total = int(length) + begin if length else None
            with partial.open(mode) as file, Progress(partial.stem, total, begin) as progress:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    progress.update(len(chunk))
        return total

    def upload(self, what: str, path: Path, start: Callable[[], tuple[str, str]]) -> str:
        """Send `path` to the URL of the session that `start` opens; its token, once every byte was acknowledged.

        After a break the session is asked what it has and gets the rest; an expired one is opened again.
        """
        size, failures, broken = path.stat().st_size, 0, False
        token, url = start()
        sent: int | None = 0
        while sent is not None:
            try:
                with translated(what, self.patience):
                    if broken:
                        sent = self._put(what, url, b"", {"Content-Range": f"bytes */{size}"})
                    while sent is not None:
                        sent = self._put_rest(what, url, path, sent, size)
            except (Ambiguous, RateLimited, NotFound) as error:
                failures += 1
                self.pause(error, failures)
                broken = not isinstance(error, NotFound)
                if not broken:
                    (token, url), sent = start(), 0
        return token

    def _put_rest(self, what: str, url: str, path: Path, sent: int, size: int) -> int | None:
        """Send the file from byte `sent` on: the number of bytes that have come by now, None for all of them."""
        headers = {"Content-Range": f"bytes {sent}-{size - 1}/{size}"} if sent else {}
        with path.open("rb") as file, Progress(path.name, size, sent) as progress:
            file.seek(sent)
            kept = self._put(what, url, CallbackIOWrapper(progress.update, file) if size else b"", headers)
        if kept is not None and kept <= sent:
            raise ServerError(f"{what}: Kaggle has no more than {kept:,} of {size:,} bytes after all were sent")
        return kept

    def _put(self, what: str, url: str, body: Any, headers: dict) -> int | None:
        """Send to an upload session: the number of bytes that it has by now, None once it has all of them."""
        response = self.plain.put(url, data=body, headers=headers)
        if response.status_code == 410:
            raise NotFound(f"{what}: the upload session has expired")
        if check_status(what, response, 200, 201, 308).status_code != 308:
            return None
        last = response.headers.get("Range", "").rpartition("-")[2]
        return int(last) + 1 if last.isdigit() else 0
