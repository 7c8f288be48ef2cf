"""Kernels: a push that is made once, its versions' status, output and log, the week's quota."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import requests

from lib.kaggle_api.errors import (
    Ambiguous,
    Forbidden,
    KaggleError,
    NotFound,
    Refused,
    ServerError,
    SourcesRefused,
    Timeout,
)
from lib.kaggle_api.http import Transport, check_status, safe_name, translated
from lib.kaggle_api.login import Login, environment
from lib.kaggle_api.service import Service, fill, split_ref

T = TypeVar("T")
SOURCES = ("dataset", "competition", "kernel", "model")


@dataclass(frozen=True)
class Version:
    """A version of the kernel `ref`; `mark` is a line of its script that no other version has, where it is known."""

    ref: str  # owner/slug
    number: int
    mark: str = ""

    @property
    def owner(self) -> str:
        return split_ref(self.ref)[0]

    @property
    def slug(self) -> str:
        return split_ref(self.ref)[1]

    def __str__(self) -> str:
        return f"{self.ref} version {self.number}"


@dataclass(frozen=True)
class Shown:
    """What Kaggle shows of a kernel: its current version (0: none), the script, the sources that it runs with."""

    number: int
    text: str
    sources: frozenset[str]

    def carries(self, mark: str) -> bool:
        return mark in self.text.splitlines()  # whatever Kaggle makes of line ends

    def lacks(self, metadata: dict) -> tuple[str, ...]:
        """The sources of a push that this version does not run with, as far as Kaggle shows any."""
        if not self.sources:
            return ()
        mounted = {part for source in self.sources for part in source.lower().split("/")}  # with or without prefixes
        asked = [source for kind in SOURCES for source in metadata.get(f"{kind}_sources") or []]
        slugs = {source: source.lower().split("/")[:2][-1] for source in asked}  # of a competition: all of it
        return tuple(source for source, slug in slugs.items() if slug not in mounted)


@dataclass(frozen=True)
class Listed:
    """A kernel of the account, as the list of them has it."""

    version: Version
    last_run: datetime | None  # UTC
    accelerator: bool


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


class Kernels(Service):
    """The service of kernels; every method raises a KaggleError when the thing did not happen."""

    def __init__(self, transport: Transport, login: Login) -> None:
        from kagglesdk.kernels.types import kernels_api_service as types

        super().__init__(transport, login.sdk.kernels.kernels_api_client, types)
        self._session = login.session
        self._labels_refused: set[Version] = set()

    # ---- pushing ----
    def push(self, metadata: dict, text: str, mark: str, *, timeout_seconds: int | None = None) -> Version:
        """Push a kernel given the content of kernel-metadata.json and its script, and run it on Kaggle.

        `mark` is a comment line that this push adds to the script: it is known by it whatever Kaggle does to texts.
        SourcesRefused when Kaggle drops a source, which the official client lets pass, Refused on another error.
        """
        asked, what = Version(metadata["id"], 0, mark), f"push of {metadata['id']}"
        request = self._save_request(metadata, f"{text.rstrip()}\n{mark}\n", timeout_seconds)
        dropped: tuple[str, ...] = ()

        def look() -> Version | None:
            nonlocal dropped
            shown = self.shown(asked.ref)
            dropped = shown.lacks(metadata)
            return replace(asked, number=shown.number) if shown.number and shown.carries(mark) else None

        made = self.once(what, lambda: _made(what, self._api.save_kernel(request), asked), look)
        if dropped:
            raise _without(what, made, dropped)
        return made

    def shown(self, ref: str, version: int | None = None) -> Shown:
        """The current version with its script, or the one asked for; nothing for a kernel that does not exist."""
        request = self._request_of("ApiGetKernelRequest", ref, f"v{version}" if version else None)
        try:
            found = self.call(f"kernel {ref}", self._api.get_kernel, request)
        except (NotFound, Forbidden):  # Kaggle answers either, as for a kernel that it hides
            return Shown(0, "", frozenset())
        about, text = found.metadata, found.blob.source if found.blob else ""
        sources = [source for kind in SOURCES for source in getattr(about, f"{kind}_data_sources", None) or []]
        return Shown((about.current_version_number if about else 0) or 0, text or "", frozenset(sources))

    def _request_of(self, kind: str, ref: str, label: str | None) -> Any:
        owner, slug = split_ref(ref)
        return fill(getattr(self._types, kind)(), user_name=owner, kernel_slug=slug, version_label=label)

    # ---- a version ----
    def status(self, version: Version) -> tuple[str, str]:
        """(queued, running, complete, error, cancel_requested, cancel_acknowledged or new_script; failure message)."""
        ask = partial(self.call, f"status of kernel {version}", self._api.get_kernel_session_status)
        found = self._labelled(version, "ApiGetKernelSessionStatusRequest", ask)
        return found.status.name.lower(), found.failure_message or ""

    def output(self, version: Version) -> tuple[dict[str, str], str]:
        """({name: signed URL} of all pages, the log as text). The URLs expire: ask again when one is refused."""
        ask = partial(self.pages, f"output of kernel {version}", self._api.list_kernel_session_output)
        pages = self._labelled(version, "ApiListKernelSessionOutputRequest", ask)
        log = next((page.log for page in pages if page.log), "")
        urls = {safe_name(file.file_name or ""): file.url for page in pages for file in page.files or []}
        return urls, "".join(_log_texts(log))

    def download(self, url: str, dest: Path, renew: Callable[[], str], expected_bytes: int | None = None) -> None:
        """Fetch a signed URL to `dest`, resuming `dest`.partial; each further attempt asks `renew` for a fresh one."""
        what, known = f"download of {dest.name}", [url]

        def stream(headers: dict) -> requests.Response:
            return self._transport.signed(what, known.pop() if known else renew(), headers)

        self._transport.download(what, stream, dest, expected_bytes)

    def _labelled(self, version: Version, kind: str, ask: Callable[[Any], T]) -> T:
        """`ask` for this very version; by no label where Kaggle takes none and the current version is this one."""
        plain = self._request_of(kind, version.ref, None)
        if version in self._labels_refused or not version.number:
            return ask(plain)
        try:
            return ask(self._request_of(kind, version.ref, f"v{version.number}"))
        except (Refused, NotFound) as error:
            if not self._refuses_labels(version):
                raise
            current = self.shown(version.ref)
            if current.number != version.number or (version.mark and not current.carries(version.mark)):
                hint = f"; and the current version, {current.number}, is not provably version {version.number}"
                raise error.with_hint(hint) from None
        self._labels_refused.add(version)
        return ask(plain)

    def _refuses_labels(self, version: Version) -> bool:
        """Whether Kaggle refuses the label also where only the script is asked for, which every version has."""
        try:
            return not self.shown(version.ref, version.number).text
        except KaggleError as error:
            return isinstance(error, Refused)

    # ---- the log ----
    def log_stream(self, version: Version) -> Iterator[str]:
        """The log of a running or finished kernel, piece by piece; reconnects without repeating what was given."""
        given = failures = 0
        while True:
            seen = 0
            try:
                for seen, text in enumerate(self._log_events(version), 1):
                    if seen > given:
                        given, failures = seen, 0
                        yield text
                return
            except Ambiguous as error:
                if isinstance(error, Timeout) and seen:  # a kernel may well be silent for long
                    continue
                failures += 1
                self._transport.pause(error, failures)

    def _log_events(self, version: Version) -> Iterator[str]:
        from kagglesdk.kaggle_env import KaggleEnv, get_endpoint

        what, where = f"log of kernel {version}", environment()
        base = get_endpoint(where) + ("" if where == KaggleEnv.PROD else "/api")
        with translated(what, self.patience):
            answer = self._session.get(  # as the official command does; the SDK's own call is of sessions
                f"{base}/v1/kernels/logs/stream/{version.ref}",
                params={"versionLabel": f"v{version.number}"},
                # None takes the session's own header away.
                headers={"Accept": "text/event-stream, */*", "Content-Type": None},  # type: ignore[dict-item]
                stream=True,
            )
            with check_status(what, self._transport.follow(what, answer, {}), 200) as response:
                yield from _events_of(what, response)

    # ---- the account ----
    def mine(self) -> list[Listed]:
        """The account's kernels, the latest run first."""
        from kagglesdk.kernels.types.kernels_enums import KernelsListSortType, KernelsListViewType

        order = {"group": KernelsListViewType.PROFILE, "sort_by": KernelsListSortType.DATE_RUN}
        request = fill(self._types.ApiListKernelsRequest(), **order)
        return [
            Listed(
                Version(one.ref.strip("/").removeprefix("code/"), one.current_version_number or 0),
                one.last_run_time,
                bool(one.enable_gpu or one.enable_tpu or one.machine_shape),
            )
            for one in self.items("kernels of the account", self._api.list_kernels, request, "kernels")
        ]

    def quota(self) -> dict[str, Quota]:
        """This week's accelerator hours by kind: "GPU", "TPU"."""
        request = self._types.ApiGetAcceleratorQuotaStatisticsRequest()
        found = self.call("accelerator quota", self._api.get_accelerator_quota_statistics, request)
        hours = {}
        for kind, quota in (("GPU", found.gpu_quota), ("TPU", found.tpu_quota)):
            if quota is not None:
                times = (quota.time_used, quota.time_reserved, quota.total_time_allowed)
                hours[kind] = Quota(*(0.0 if time is None else time.total_seconds() / 3600 for time in times))
        return hours

    def _save_request(self, metadata: dict, text: str, timeout_seconds: int | None) -> Any:
        """A push by the keys of kernel-metadata.json, most of which the API calls the same."""
        others = ("id", "id_no", "title", "code_file", "keywords", *(f"{kind}_sources" for kind in SOURCES))
        request = fill(
            self._types.ApiSaveKernelRequest(),
            slug=metadata["id"],
            new_title=metadata.get("title"),
            text=text,
            category_ids=metadata.get("keywords") or [],
            session_timeout_seconds=timeout_seconds,
            **{key: value for key, value in metadata.items() if key not in others},
        )
        return fill(request, **{f"{kind}_data_sources": metadata.get(f"{kind}_sources") or [] for kind in SOURCES})


def _made(what: str, answer: Any, asked: Version) -> Version:
    """The version that a push made, under the name that Kaggle gave it; an error where it is not what was asked for."""
    if answer.error:
        raise Refused(f"{what}: {answer.error}")
    made = replace(asked, number=answer.version_number or 0)
    for kind in SOURCES:
        if unknown := getattr(answer, f"invalid_{kind}_sources", None):
            raise _without(what, made, tuple(unknown), f"{kind} ")
    if not made.number:
        raise ServerError(f"{what}: Kaggle accepted it without naming a version")
    if tags := answer.invalid_tags:
        print(f"{what}: unknown keywords were dropped: {', '.join(tags)}", file=sys.stderr)
    named = re.fullmatch(r"/?(?:code/)?([\w-]+/[\w-]+)/?", answer.ref or "")
    if named is None or named[1].lower() == asked.ref.lower():
        return made
    told = f"{what}: Kaggle calls it {named[1]}, which is followed from here"
    print(f"{told}; make title and id of kernel-metadata.json agree with it", file=sys.stderr)
    return replace(made, ref=named[1])


def _without(what: str, version: Version, sources: tuple[str, ...], kind: str = "") -> SourcesRefused:
    """The error of a push whose version runs without some of its sources."""
    error = SourcesRefused(
        f"{what}: Kaggle does not know the {kind}source {', '.join(sources)} and dropped it; "
        f"version {version.number} runs without it: check its name and push again"
    )
    error.sources = sources
    return error


def _events_of(what: str, response: requests.Response) -> Iterator[str]:
    """The texts of a log: of the finished file, or of the stream until it says that the log has ended."""
    response.encoding = "utf-8"  # requests takes text without a charset for Latin-1
    if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
        yield from _log_texts(response.text)
        return
    for each in response.iter_lines():
        line = each.decode("utf-8", "replace")
        if line == "data: END_OF_LOG":
            return
        if line.startswith("data:"):
            yield from _log_texts(f"[{line[5:].strip()}]")
    raise ServerError(f"{what}: the stream ended before the log did")


def _log_texts(log: str) -> list[str]:
    """The texts of Kaggle's JSON log `[{stream_name, time, data}]`; anything else as it is."""
    try:
        events = json.loads(log)
    except ValueError:
        return [log] if log else []
    if not isinstance(events, list):
        return [log]
    return [str(event.get("data", "")) for event in events if isinstance(event, dict)]
