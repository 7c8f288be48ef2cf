"""A push of the kernel to Kaggle: made once, found again after an interruption, refused with a reason."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lib import record
from lib.jobs.fetch import run_folder
from lib.jobs.lint import OVERRIDES_LINE
from lib.jobs.order import NO_ACCELERATOR, Order, add_session_options, source_versions
from lib.kaggle_api.client import KaggleClient
from lib.kaggle_api.errors import Ambiguous, Forbidden, KaggleError, SourcesRefused
from lib.kaggle_api.kernels import Version
from lib.kaggle_api.patience import glance
from lib.kaggle_api.service import split_ref
from lib.project import InputError, ToolError, in_turn

FAILED_PUSHES = 3  # so many in a row are no accident
PUSHES = ("push_started", "pushed", "push_refused")  # events of the record


class QuotaUsedUp(ToolError):
    """This week's accelerator hours are gone."""


def check_quota(client: KaggleClient, metadata: dict[str, Any]) -> None:
    """Refuse a push that would only wait for next week's accelerator hours."""
    shape = metadata.get("machine_shape") or ""
    kind = "TPU" if shape.lower().startswith("tpu") or metadata.get("enable_tpu") else "GPU"
    if not shape and not metadata.get("enable_gpu") and kind == "GPU":
        return
    quota = (glance("the quota", client.kernels.quota, None) or {}).get(kind)
    if quota is not None and quota.total_hours > 0 and quota.left_hours <= 0:
        raise QuotaUsedUp(
            f"{kind} quota used up ({quota.used_hours:.1f} of {quota.total_hours:.1f} h, {quota.reserved_hours:.1f} h "
            f"reserved); wait for the weekly refresh or push with --accelerator {NO_ACCELERATOR}"
        )


def record_pushed(runs: Path, order: Order, made: Version) -> None:
    """Keep which version carries out the order, its settings, and the name that its run will have."""
    about = {"kernel": order.ref, "content": order.content, "overrides": order.overrides}
    version = {"made": made.ref, "version": made.number, "mark": made.mark}
    record.append(runs, "pushed", **about, **version, run=run_folder(runs, made).name)


def shown_version(client: KaggleClient, order: Order, mark: str | None) -> Version | None:
    """Kaggle's current version, if a push of this order made it: the push with this `mark`, or any without one."""
    shown = client.kernels.shown(order.ref)
    mark = mark or order.any_mark(shown.text)
    if not (shown.number and mark and shown.carries(mark)) or shown.lacks(order.metadata):
        return None  # another push, or one that Kaggle dropped a source of
    return Version(order.ref, shown.number, mark)


def earlier_version(client: KaggleClient, order: Order, runs: Path, again: bool = False) -> Version | None:
    """The version that an earlier push of this order made, also one that was cut off before it could say so.

    Without a record of it Kaggle's own last version is asked: the record may be lost. `again`: only one cut off.
    """
    events = [entry for entry in record.find(runs, kernel=order.ref, content=order.content) if entry["event"] in PUSHES]
    last = events[-1] if events else {}
    look = partial(shown_version, client, order, last.get("mark"))
    found = None
    if last.get("event") == "push_started":  # it may still be on its way through Kaggle
        found = client.patience.look(look, f"the push of {order.ref} that was begun at {last['time']}")
    elif not (events or again):
        found = glance(f"the last version of {order.ref}", look, None)
    if found is not None:
        record_pushed(runs, order, found)
        return found
    made = [Version(entry["made"], entry["version"], entry["mark"]) for entry in events if entry["event"] == "pushed"]
    return made[-1] if made and not again else None


def push(client: KaggleClient, order: Order, runs: Path, again: bool = False, failed: Collection[str] = ()) -> Version:
    """The version that carries out `order`: the one that an earlier push made, else, or if that `failed`, a new one.

    `failed`: by the marks of their pushes, since a kernel that was made anew counts its versions anew.
    """
    with in_turn(runs, f"push of {order.ref}"):
        found = earlier_version(client, order, runs, again)
        if found is not None and found.mark not in failed:
            print(f"{found} runs this already (--again pushes anew)", file=sys.stderr)
            return found
        check_quota(client, order.metadata)
        made = push_bound(client, order, runs)
        record_pushed(runs, order, made)
    print(f"pushed {made}: https://www.kaggle.com/code/{made.ref}", file=sys.stderr)
    return made


def push_staged(client: KaggleClient, staged: Order, runs: Path, again: bool) -> Version:
    """The same on the current versions of the sources, once these are ready."""
    sources = source_versions(client, staged.metadata, runs)
    return push(client, replace(staged, sources=sources), runs, again)


def push_bound(client: KaggleClient, order: Order, runs: Path) -> Version:
    """A push, made anew for a while where Kaggle drops a source that is ready: it may not have bound it yet."""
    end = client.patience.now() + client.patience.binding_seconds
    while True:
        try:
            return push_new(client, order, runs)
        except SourcesRefused as error:
            if not set(error.sources) <= order.sources.keys() or client.patience.now() >= end:
                raise
            print(f"{error}; it is there, Kaggle may not have bound it yet: trying again", file=sys.stderr)
            client.patience.sleep(client.patience.poll_limit_seconds / 2)


def push_new(client: KaggleClient, order: Order, runs: Path) -> Version:
    """One push, with the intent recorded before it: the next run looks whether it happened."""
    facts = {"kernel": order.ref, "content": order.content}
    mark = order.new_mark()
    record.append(runs, "push_started", **facts, mark=mark)
    try:
        return client.kernels.push(order.metadata, order.text, mark, timeout_seconds=order.session_seconds)
    except Ambiguous as error:
        raise error.with_hint(broken_sources(order, runs)) from None
    except KaggleError as error:  # there may be a version without a source: no later run must take it
        record.append(runs, "push_refused", **facts)
        raise error.with_hint(likely_cause(client, order, error)) from None


def likely_cause(client: KaggleClient, order: Order, error: KaggleError) -> str:
    """What to change where Kaggle refuses a push, as far as its answer tells."""
    if isinstance(error, Forbidden):
        owner = split_ref(order.ref)[0]
        return (
            f"; either {owner} is not the signed-in user {client.username} (id in kernel-metadata.json), or the "
            "account has to be verified by phone"
        )
    said = str(error).lower()
    return "; change title and id in kernel-metadata.json" if "title" in said and "in use" in said else ""


def broken_sources(order: Order, runs: Path) -> str:
    """What to try when every push of an order with datasets fails: one that was made anew can not be attached."""
    events = [entry["event"] for entry in record.find(runs, kernel=order.ref, content=order.content)]
    datasets = order.metadata.get("dataset_sources")
    if not datasets or events[-FAILED_PUSHES:] != ["push_started"] * FAILED_PUSHES:
        return ""
    return (
        f"; that was push number {FAILED_PUSHES} to fail: if {' or '.join(datasets)} was deleted and made anew, no "
        "kernel can attach it; package it under another title and id (kaggle_dataset/dataset-metadata.json)"
    )


# -------------------------------------------------------------------------------------------- earlier pushes
def chosen_version(client: KaggleClient, ref: str, number: int | None, runs: Path) -> Version:
    """The version asked for, else the current one; with its mark where the record has it."""
    marks = {entry["version"]: entry["mark"] for entry in record.find(runs, event="pushed", made=ref)}
    if number is None or number not in marks:
        current = client.kernels.shown(ref).number
        if not current:
            raise InputError(f"kernel {ref} does not exist for {client.username}; push it first")
        if number is not None and not 1 <= number <= current:
            raise InputError(f"kernel {ref} has no version {number}: the current one is {current}")
        number = number or current
    return Version(ref, number, marks.get(number, ""))


def settings_of(client: KaggleClient, version: Version, runs: Path) -> dict[str, Any]:
    """The overrides that a version was pushed with: by the record, else by its script on Kaggle."""
    events = record.find(runs, event="pushed", made=version.ref, version=version.number)
    if events:
        return events[-1]["overrides"]
    found = OVERRIDES_LINE.search(client.kernels.shown(version.ref, version.number).text)
    try:
        return dict(ast.literal_eval(found[1] if found else ""))
    except (ValueError, TypeError, SyntaxError):
        raise ToolError(
            f"{version}: its settings are not known here and its script can not be read: repeat them "
            "with --recipe and --set"
        ) from None


# -------------------------------------------------------------------------------------------- the options
def add_push_options(parser: argparse.ArgumentParser) -> None:
    """The options that push_kernel.py and ship.py share, beside those of every tool."""
    parser.add_argument("--dataset", action="append", default=[], metavar="REF", help="attach a dataset, [owner/]slug")
    about = "attach the output of a kernel, [owner/]slug: an unfinished run to go on with, or pairs"
    parser.add_argument("--kernel-source", action="append", default=[], metavar="REF", help=about)
    parser.add_argument("--again", action="store_true", help="push even if the same content was pushed before")
    add_session_options(parser)
