"""A table of runs, seen to their ends: as many at once as Kaggle admits, or here, one after another.

A failed run is repeated a bounded number of times. Interrupted at any point, the same table goes on: nothing is pushed
twice, nothing that was computed is lost.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import kernel, record
from lib.data import FILES
from lib.jobs import fetch, push
from lib.kaggle_api.client import KaggleClient, connect, split_ref
from lib.kaggle_api.http import KaggleError, Refused
from lib.process import as_arguments
from lib.project import KERNEL, REPO, InputError, ToolError
from lib.runs import Run, check_run, run_logged

BUILD = REPO / "build" / "sweep"
COLUMNS = ("recipe", "seed", "knobs")
IN_COMMON = ("split_seed", "val_fraction", "repulsion")  # images held out; what is done to the blend, once
SESSIONS_FULL = re.compile(r"session count(?: of (\d+))?", re.IGNORECASE)  # a refusal: the one answer with the number
ENDED = ("error", "cancel_acknowledged")


# ------------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Row:
    """One run of the table: s01, s02, ... and what it changes."""

    name: str
    overrides: dict[str, Any]


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a csv with the columns recipe, seed, knobs, any of which may be missing."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not a readable csv ({error})") from None
    unknown = set(reader.fieldnames or ()) - set(COLUMNS)
    if unknown or not rows or any(None in row for row in rows):
        raise InputError(f"{path}: expected a header of {', '.join(COLUMNS)} and at least one row below it")
    return rows


def settings_of(row: dict[str, str | None], common: list[str]) -> list[str]:
    """One row as settings, after those that all rows have in common."""
    named = [f"{key}={row[key]}" for key in ("recipe", "seed") if row.get(key)]
    return [*common, *named, *(row.get("knobs") or "").split()]


def make_rows(arguments: argparse.Namespace) -> list[Row]:
    """The checked table: known recipes and knobs, no run twice, what a blend has once the same in all rows."""
    common = [f"recipe={arguments.recipe}"] * (arguments.recipe is not None) + arguments.set
    if arguments.table is None and (arguments.members is None or arguments.members < 1):
        raise InputError("give --members N, at least 1, or --table CSV")
    table = read_table(arguments.table) if arguments.table else [{"seed": str(k)} for k in range(arguments.members)]
    rows = [Row(f"s{number:02}", dict(map(kernel.parse_setting, settings_of(line, common))))
            for number, line in enumerate(table, 1)]
    knobs = [kernel.resolve_knobs(row.overrides) for row in rows]
    for number, one in enumerate(knobs):
        apart = [key for key in IN_COMMON if getattr(one, key) != getattr(knobs[0], key)]
        if apart or one.mode != "train":
            raise InputError(f"run {rows[number].name}: all runs train, with one {', '.join(apart or IN_COMMON)} "
                             "(--set gives all of them one)")
        if one in knobs[:number]:
            raise InputError(f"run {rows[number].name} is the same as {rows[knobs.index(one)].name}: change its seed")
    return rows


# ------------------------------------------------------------------------------------------- on Kaggle
@dataclass
class Session:
    """One row on its way through Kaggle."""

    row: Row
    order: push.Order
    failures: list[str]
    version: int | None = None
    folder: Path | None = None

    @property
    def ref(self) -> str:
        """owner/slug of the row's kernel."""
        return self.order.staged.ref


class Fleet:
    """All rows as kernels of one owner, as many at once as the account may run."""

    def __init__(self, client: KaggleClient, rows: list[Row], arguments: argparse.Namespace) -> None:
        self.client, self.runs, self.retries = client, arguments.runs, arguments.retries
        self.limit = arguments.sessions or len(rows)  # until Kaggle names a lower one
        seconds = push.read_timeout(arguments.timeout_minutes)[1]
        self.sessions = [self.take_up(row, self.order(row, arguments.accelerator, seconds)) for row in rows]
        self.blocked = ""  # why nothing more can be pushed this week
        self.full_until = 0.0  # Kaggle said that the account's sessions are taken: not asked again before

    def order(self, row: Row, accelerator: str | None, seconds: int | None) -> push.Order:
        """The push of a row: the kernel under a slug and with overrides of its own."""
        metadata = push.staged_metadata(self.client.username, accelerator)
        metadata |= {"id": f"{metadata['id']}-{row.name}", "title": f"{metadata['title']} {row.name}"}
        return push.Order(push.stage(metadata, row.overrides, BUILD / row.name), {}, seconds)

    def take_up(self, row: Row, order: push.Order) -> Session:
        """Where an earlier sweep left this row."""
        ref = order.staged.ref
        version = push.earlier_version(self.client, order, self.runs)
        ours = {entry["version"] for entry in record.find(self.runs, event="pushed", kernel=ref, content=order.content)}
        failed = {entry["version"]: entry["reason"] for entry in record.find(self.runs, event="run_failed", kernel=ref)
                  if entry["version"] in ours}
        return Session(row, order, list(failed.values()), None if version in failed else version)

    @property
    def running(self) -> list[Session]:
        """Pushed, and not known to have ended."""
        return [one for one in self.sessions if one.version is not None and one.folder is None]

    @property
    def waiting(self) -> list[Session]:
        """Not pushed yet, or to be pushed again."""
        return [one for one in self.sessions if one.version is None and len(one.failures) <= self.retries]

    def run(self) -> dict[str, Path]:
        """See every row to its end; the verified folders of those that succeeded."""
        pause, shown = self.client.timing.poll_seconds, ("", 0)
        begin = time.monotonic()
        while True:
            for one in self.running:
                self.look(one)
            self.start()
            if not self.running and (not self.waiting or self.blocked):
                break
            minutes = int((time.monotonic() - begin) / 60)
            if (self.state(), minutes) != shown:
                pause = self.client.timing.poll_seconds if self.state() != shown[0] else pause
                shown = (self.state(), minutes)
                print(f"{self.state()} ({minutes} min)", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(1.5 * pause, self.client.timing.poll_limit_seconds)
        if self.waiting:
            raise ToolError(f"{self.blocked}; {self.state()}; the same command goes on later")
        return {one.row.name: one.folder for one in self.sessions if one.folder}

    def state(self) -> str:
        """How far the sweep is."""
        done = sum(one.folder is not None for one in self.sessions)
        failed = len(self.sessions) - done - len(self.running) - len(self.waiting)
        return f"{done} done, {len(self.running)} running, {len(self.waiting)} waiting, {failed} failed"

    def start(self) -> None:
        """Push waiting rows as long as there are sessions and accelerator hours."""
        self.blocked = ""
        for one in self.waiting:
            if len(self.running) >= self.limit or time.monotonic() < self.full_until:
                return
            try:
                one.version = push.push(self.client, one.order, self.runs, again=bool(one.failures))
            except Refused as error:
                found = SESSIONS_FULL.search(str(error))
                if not found:
                    raise
                self.limit = min(self.limit, max(1, int(found[1] or self.limit)))
                self.full_until = time.monotonic() + 5 * self.client.timing.poll_limit_seconds
                print(f"{error}; waiting for a free session", file=sys.stderr)
                return
            except KaggleError:
                raise
            except ToolError as error:  # the quota is used up: what runs may end, nothing more begins
                self.blocked = str(error)
                return

    def look(self, one: Session) -> None:
        """Poll a running row; fetch it when it is complete, note its failure when it is not."""
        owner, slug = split_ref(one.ref)
        status, message = self.client.kernel_status(owner, slug, one.version)
        if status in ENDED:
            self.fail(one, message or status)
            self.full_until = 0.0
        elif status == "complete":
            self.full_until = 0.0
            self.take_in(one)

    def take_in(self, one: Session) -> None:
        """Fetch a complete run; output that is not what its manifest says is a failure of the run."""
        owner, slug = split_ref(one.ref)
        if fetch.run_folder(self.runs, slug, one.version).exists():
            fetch.fetch(self.client, owner, slug, one.version, self.runs)  # damage since then is not the run's
        try:
            folder = fetch.fetch(self.client, owner, slug, one.version, self.runs)
            fetch.check_finished(folder, one.ref)
            one.folder = folder
        except KaggleError:
            raise
        except ToolError as error:
            self.fail(one, str(error))

    def fail(self, one: Session, reason: str) -> None:
        """Note that this version failed, so that no later sweep waits for it."""
        record.append(self.runs, "run_failed", kernel=one.ref, version=one.version, reason=reason)
        one.failures.append(reason)
        again = "pushing it again" if len(one.failures) <= self.retries else "giving it up"
        print(f"{one.ref} version {one.version} failed: {reason}; {again}", file=sys.stderr)
        one.version = None


def sweep_kaggle(rows: list[Row], data: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """The finished runs of the table on Kaggle's sessions; needs the data here, to score the blend."""
    for name in FILES:
        kernel.find_file(data, name)
    fleet = Fleet(connect(), rows, arguments)
    done = fleet.run()
    if not done:
        raise ToolError(f"every run failed, the first one: {fleet.sessions[0].failures[-1]}")
    return done


# ------------------------------------------------------------------------------------------- here
def sweep_local(rows: list[Row], data: Path, output: Path, retries: int) -> dict[str, Path]:
    """The finished runs of the table on this machine, one after another."""
    done, reason = {}, ""
    for row in rows:
        for _ in range(1 + retries):
            try:
                done[row.name] = run_here(row, data, output / row.name).folder
                break
            except InputError:
                raise
            except ToolError as error:
                reason = str(error)
                print(reason, file=sys.stderr)
    if not done:
        raise ToolError(f"every run failed, the last one: {reason}")
    return done


def run_here(row: Row, data: Path, folder: Path) -> Run:
    """A run that was finished before, else a new one; the kernel itself goes on with an unfinished one."""
    if (folder / kernel.MANIFEST).exists() and not (folder / kernel.RESUME_RUN).exists():
        return check_run(folder)
    print(f"{row.name}: {' '.join(f'{key}={value}' for key, value in row.overrides.items())}", file=sys.stderr)
    return run_logged(data, folder, as_arguments(row.overrides))


def keep(run: Run, runs: Path) -> None:
    """The sweep in the local record, once for each submission that it made."""
    facts = {"event": "sweep", "run": run.folder.name, "sha256": run.manifest["outputs"][kernel.SUBMISSION]["sha256"]}
    if not record.find(runs, **facts):
        score = run.metrics["validation"]["pool100_raw"]
        record.append(runs, **facts, members=run.metrics["members"], validation=score["mrr"],
                      validation_se=score["mrr_se"], **record.git_state())


def default_output(arguments: argparse.Namespace, rows: list[Row]) -> Path:
    """The same folder for the same table, script and place, so that a sweep goes on."""
    parts = [arguments.local, [[row.name, row.overrides] for row in rows], KERNEL.read_text(encoding="utf-8")]
    return arguments.runs / f"sweep-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"
