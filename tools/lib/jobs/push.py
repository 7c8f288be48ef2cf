"""A push of the kernel to Kaggle: staged, sent once, waited for, collected.

The same script with the same settings is not pushed twice: an interrupted run goes on with the version that it made.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import kernel, record
from lib.jobs.dataset import READY_MINUTES, recorded_version, wait_ready
from lib.jobs.fetch import check_finished, fetch, run_folder
from lib.jobs.lint import (
    DATASET_METADATA,
    KERNEL_METADATA,
    OVERRIDES_LINE,
    OWNER_PLACEHOLDER,
    lint_kernel_metadata,
    lint_script,
    lint_secrets,
    read_metadata,
    refuse,
)
from lib.kaggle_api.client import KaggleClient, split_ref
from lib.kaggle_api.http import Forbidden, KaggleError, NotFound, Refused, Timeout, wait_until
from lib.project import REPO, RUNS, InputError, ToolError, atomic_path

BUILD = REPO / "build" / "kernel"
SESSION_LIMIT_MINUTES = 720.0  # Kaggle ends a session after 12 hours
NO_ACCELERATOR = "none"
LOG_LINES = 20


# ---------------------------------------------------------------------------------------------- staging
@dataclass(frozen=True)
class Staged:
    """What a push sends: the metadata and the one script."""

    folder: Path
    metadata: dict[str, Any]
    text: str

    @property
    def ref(self) -> str:
        """owner/slug of the kernel."""
        return self.metadata["id"]


def literal(value: Any) -> str:
    """A knob's value as Python reads it, texts in the double quotes of the rest of the script."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def with_overrides(text: str, overrides: dict[str, Any]) -> str:
    """The script with its OVERRIDES line carrying `overrides`, as a readable literal."""
    pairs = [f"{json.dumps(key)}: {literal(value)}" for key, value in overrides.items()]
    line = f"OVERRIDES: dict = {{{', '.join(pairs)}}}"
    return OVERRIDES_LINE.sub(lambda _: line, text)


def read_overrides(recipe: str | None, settings: list[str]) -> dict[str, Any]:
    """`--recipe` and `--set` as typed values, checked by the kernel itself before anything is pushed."""
    overrides = dict(kernel.parse_setting(setting) for setting in settings)
    if recipe is not None:
        overrides = {"recipe": recipe, **overrides}
    kernel.resolve_knobs(overrides)
    return overrides


def staged_metadata(
    owner: str, accelerator: str | None = None, datasets: Sequence[str] = (), kernels: Sequence[str] = ()
) -> dict[str, Any]:
    """kernel-metadata.json with the owner filled in and the sources of this push added."""
    metadata = read_metadata(KERNEL_METADATA)
    metadata["id"] = str(metadata.get("id", "")).replace(OWNER_PLACEHOLDER, owner)
    for key, added in (("dataset_sources", datasets), ("kernel_sources", kernels)):
        full = [ref if "/" in ref else f"{owner}/{ref}" for ref in added]
        metadata[key] = [*(metadata.get(key) or []), *full]
    if accelerator == NO_ACCELERATOR:
        metadata["enable_gpu"] = False
        metadata.pop("machine_shape", None)
    elif accelerator is not None:
        metadata["machine_shape"] = accelerator
    return metadata


def stage(metadata: dict[str, Any], overrides: dict[str, Any], folder: Path) -> Staged:
    """Write and lint the folder that is pushed: the metadata and a copy of the script with its overrides."""
    refuse(lint_kernel_metadata(KERNEL_METADATA))
    source = KERNEL_METADATA.parent / metadata["code_file"]
    refuse(lint_script(source))
    text = with_overrides(source.read_text(encoding="utf-8"), overrides)
    script = folder / metadata["code_file"]
    with atomic_path(script) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with atomic_path(folder / KERNEL_METADATA.name) as temporary:
        temporary.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    refuse(lint_kernel_metadata(folder / KERNEL_METADATA.name, staged=True) + lint_secrets(script))
    return Staged(folder, metadata, text)


def init_owner(user: str) -> None:
    """Write the owner into both metadata files, for those who push by hand."""
    if not user.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"--init {user!r}: not a Kaggle user name; it is the last part of your profile's address")
    for path in (KERNEL_METADATA, DATASET_METADATA):
        text = path.read_text(encoding="utf-8")
        if OWNER_PLACEHOLDER not in text:
            owner = read_metadata(path)["id"].partition("/")[0]
            raise InputError(f"{path.name}: the owner is {owner} already; edit the file to change it")
    for path in (KERNEL_METADATA, DATASET_METADATA):
        with atomic_path(path) as temporary:
            temporary.write_text(path.read_text(encoding="utf-8").replace(OWNER_PLACEHOLDER, user), encoding="utf-8")
        print(f"{path.name}: owner {user}")


# ------------------------------------------------------------------------------------------------- push
def check_quota(client: KaggleClient, metadata: dict[str, Any]) -> None:
    """Refuse a push that would only wait for next week's accelerator hours."""
    shape = metadata.get("machine_shape") or ""
    kind = "TPU" if shape.lower().startswith("tpu") or metadata.get("enable_tpu") else "GPU"
    if not shape and not metadata.get("enable_gpu") and kind == "GPU":
        return
    try:
        quota = client.quota().get(kind)
    except KaggleError as error:  # a push that has no hours left is refused by Kaggle as well, only less clearly
        print(f"the quota is not known: {error}", file=sys.stderr)
        return
    if quota is not None and quota.total_hours > 0 and quota.left_hours <= 0:
        raise ToolError(
            f"{kind} quota used up ({quota.used_hours:.1f} of {quota.total_hours:.1f} h, {quota.reserved_hours:.1f} h "
            f"reserved); wait for the weekly refresh or push with --accelerator {NO_ACCELERATOR}"
        )


def wait_for_datasets(client: KaggleClient, metadata: dict[str, Any], runs: Path) -> dict[str, int]:
    """Versions of our own datasets, each ready in the recorded version: else a kernel takes the one before."""
    versions = {}
    for source in metadata.get("dataset_sources", []):
        owner, slug = source.split("/")[:2]
        wanted = recorded_version(runs, f"{owner}/{slug}")
        if owner != client.username and not wanted:
            continue
        try:
            versions[source] = wait_ready(client, owner, slug, wanted, {}, 60 * READY_MINUTES)
        except (NotFound, Forbidden):
            raise InputError(
                f"dataset {owner}/{slug} does not exist; make it with python tools/package_dataset.py --run RUN"
            ) from None
    return versions


@dataclass(frozen=True)
class Order:
    """A push as the record knows it: what is sent, on which data; the same order is not carried out twice."""

    staged: Staged
    dataset_versions: dict[str, int]
    session_seconds: int | None

    @property
    def content(self) -> str:
        """One hash of all that makes a difference to the run."""
        parts = [self.staged.metadata, self.staged.text, self.dataset_versions, self.session_seconds]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def record_pushed(runs: Path, order: Order, version: int) -> None:
    """Keep which version carries out the order, and the name that its run will have."""
    ref = order.staged.ref
    run = run_folder(runs, split_ref(ref)[1], version).name
    record.append(runs, "pushed", kernel=ref, content=order.content, version=version, run=run)


def earlier_version(client: KaggleClient, order: Order, runs: Path) -> int | None:
    """The version that an earlier push of this order made, also one that was cut off before it could say so."""
    events = record.find(runs, kernel=order.staged.ref, content=order.content)
    if not events or events[-1]["event"] == "push_refused":
        return None
    if events[-1]["event"] == "pushed":
        return events[-1]["version"]
    owner, slug = split_ref(order.staged.ref)

    def look() -> int | None:
        version, source = client.kernel_source(owner, slug)
        return version if version > events[-1]["before"] and source == order.staged.text else None

    version = client.look(look)  # the push may still be on its way through Kaggle
    if version is not None:
        record_pushed(runs, order, version)
    return version


def push(client: KaggleClient, order: Order, runs: Path, again: bool = False) -> int:
    """The version that carries out `order`: the one that an earlier push made, else a new one."""
    ref = order.staged.ref
    if not again and (version := earlier_version(client, order, runs)) is not None:
        print(f"{ref} version {version} runs this already (--again pushes anew)", file=sys.stderr)
        return version
    check_quota(client, order.staged.metadata)
    before = client.kernel_version(*split_ref(ref)) or 0
    record.append(runs, "push_started", kernel=ref, content=order.content, before=before)
    try:
        made = client.save_kernel(order.staged.metadata, order.staged.text, timeout_seconds=order.session_seconds)
    except Refused:  # may have made a version that lacks a source: a later run must not take it for its own
        record.append(runs, "push_refused", kernel=ref, content=order.content)
        raise
    record_pushed(runs, order, made.version)
    print(f"pushed {made.ref} version {made.version}: {made.url}", file=sys.stderr)
    return made.version


def collect(client: KaggleClient, ref: str, version: int, runs: Path, deadline_seconds: float) -> Path:
    """Wait for a kernel version's end and fetch its verified output; the folder it lies in."""
    owner, slug = split_ref(ref)
    wait_for_end(client, owner, slug, version, deadline_seconds)
    folder = fetch(client, owner, slug, version, runs)
    check_finished(folder, ref)
    return folder


# ------------------------------------------------------------------------------------------------- wait
def follow_log(client: KaggleClient, owner: str, slug: str, version: int) -> None:
    """Copy the running kernel's log to stderr; where Kaggle gives no stream the log comes at the end."""
    try:
        for text in client.kernel_log_stream(owner, slug, version):
            print(text, end="" if text.endswith("\n") else "\n", file=sys.stderr, flush=True)
    except KaggleError as error:
        print(f"no live log ({error}); it comes with the output", file=sys.stderr)


def wait_for_end(client: KaggleClient, owner: str, slug: str, version: int, deadline_seconds: float) -> None:
    """Poll this very version to its end; anything but complete is an error with the log's last lines."""
    shown, start = ("", 0), time.monotonic()
    follower = threading.Thread(target=follow_log, args=(client, owner, slug, version), daemon=True)

    def check() -> tuple[str, str] | None:
        nonlocal shown
        status, message = client.kernel_status(owner, slug, version)
        minutes = int((time.monotonic() - start) / 60)
        if (status, minutes) != shown:
            print(f"{owner}/{slug} version {version}: {status} ({minutes} min)", file=sys.stderr, flush=True)
            shown = (status, minutes)
        if status == "running" and not follower.is_alive() and follower.ident is None:
            follower.start()
        return (status, message) if status in ("complete", "error", "cancel_acknowledged") else None

    what = f"kernel {owner}/{slug} version {version}"
    try:
        status, message = wait_until(check, what, client.timing, deadline_seconds)
    except Timeout as error:
        raise Timeout(f"{error}; go on with python tools/push_kernel.py output --version {version}") from None
    if follower.ident is not None:
        follower.join(client.timing.poll_seconds)
    if status == "cancel_acknowledged":
        raise ToolError(f"{what} was cancelled; push it again with --again")
    if status == "error":
        show_log_end(client, owner, slug, version)
        reason = message or "no reason given"
        raise ToolError(f"{what} failed: {reason}; the end of its log is above, --again pushes anew")


def show_log_end(client: KaggleClient, owner: str, slug: str, version: int) -> None:
    """The last lines of a failed kernel's log on stderr."""
    try:
        log = client.kernel_output(owner, slug, version)[1]
    except KaggleError as error:
        print(f"its log cannot be read: {error}", file=sys.stderr)
        return
    for line in log.splitlines()[-LOG_LINES:]:
        print(f"  | {line}", file=sys.stderr)


def add_push_options(parser: argparse.ArgumentParser) -> None:
    """The options that push_kernel.py and ship.py share."""
    parser.add_argument("--recipe", help="a recipe of the kernel")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a knob; may be repeated")
    parser.add_argument("--dataset", action="append", default=[], metavar="REF", help="attach a dataset, [owner/]slug")
    parser.add_argument("--kernel-source", action="append", default=[], metavar="REF",
                        help="attach the output of a kernel, [owner/]slug, to resume from it")
    parser.add_argument("--accelerator", metavar="NAME", help=f"instead of the metadata's; {NO_ACCELERATOR}: CPU only")
    parser.add_argument("--again", action="store_true", help="push even if the same content was pushed before")
    parser.add_argument("--timeout-minutes", type=float, metavar="M",
                        help="end of the session and of the wait for it (default and at most 720)")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where outputs and the record go")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def read_timeout(minutes: float | None) -> tuple[float, int | None]:
    """Seconds to wait for a kernel, and Kaggle's own limit for the session where one was asked for."""
    if minutes is None:
        return 60 * SESSION_LIMIT_MINUTES, None
    if not 0 < minutes <= SESSION_LIMIT_MINUTES:
        raise InputError(f"--timeout-minutes {minutes:g}: give more than 0 and at most {SESSION_LIMIT_MINUTES:g}")
    return 60 * minutes, max(1, round(60 * minutes))


def chosen_version(client: KaggleClient, ref: str, version: int | None) -> int:
    """The version asked for, else the current one."""
    found = version or client.kernel_version(*split_ref(ref))
    if found is None:
        raise InputError(f"kernel {ref} does not exist for {client.username}; push it first")
    return found
