"""A table of runs, seen to their ends: as many at once as Kaggle admits, or here, one after another."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lib import kernel, record
from lib.data import FILES
from lib.jobs import fetch, push
from lib.jobs.order import Order, SessionTime, complete_metadata, owned_metadata, source_versions, stage
from lib.jobs.push import QuotaUsedUp
from lib.jobs.session import ENDED, GRACE_SECONDS, QUEUE_SECONDS
from lib.kaggle_api.client import KaggleClient, connect
from lib.kaggle_api.errors import Forbidden, KaggleError, MachineFailed, Refused
from lib.kaggle_api.kernels import Version
from lib.kaggle_api.patience import News, Outage, glance
from lib.process import as_arguments, as_text
from lib.project import KERNEL, REPO, InputError, ToolError, read_json
from lib.runs import ADVICE, RAW, Run, check_run, run_logged

BUILD = REPO / "build" / "sweep"
COLUMNS = ("recipe", "seed", "knobs")
IN_COMMON = ("split_seed", "val_fraction", "repulsion")  # images held out; what is done to the blend, once
SESSIONS_FULL = re.compile(r"session count(?: of (\d+))?", re.IGNORECASE)  # a refusal: the one answer with the number


# ------------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Row:
    """One run of the table: s01, s02, ... and what it changes."""

    name: str
    overrides: dict[str, Any]


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a csv with the columns recipe, seed, knobs, any of which may be missing."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # with the mark that spreadsheets begin a csv with
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not a readable csv ({error})") from None
    unknown = set(reader.fieldnames or ()) - set(COLUMNS)
    if unknown or not rows or any(None in row for row in rows):
        raise InputError(f"{path}: expected a header of {', '.join(COLUMNS)} and at least one row below it")
    return rows


def make_rows(arguments: argparse.Namespace) -> list[Row]:
    """The checked table: every row's own settings after those that all have in common."""
    too_few = arguments.members is not None and arguments.members < 1
    if too_few or (arguments.table is None) == (arguments.members is None):
        raise InputError("give --members N, at least 1, or --table CSV")
    common = kernel.beside(dict(map(kernel.parse_setting, arguments.set)), recipe=arguments.recipe)
    table = read_table(arguments.table) if arguments.table else [{"seed": str(k)} for k in range(arguments.members)]
    rows = []
    for number, line in enumerate(table, 1):
        named = [f"{key}={line[key]}" for key in ("recipe", "seed") if line.get(key)]
        own = map(kernel.parse_setting, [*named, *(line.get("knobs") or "").split()])
        rows.append(Row(f"s{number:02}", {**common, **dict(own)}))
    check_rows(rows)
    return rows


def check_rows(rows: list[Row]) -> None:
    """Known knobs, no run twice, what a blend has once the same in all rows."""
    knobs = [kernel.resolve_knobs(row.overrides) for row in rows]
    for row, one in zip(rows, knobs, strict=True):
        apart = [key for key in IN_COMMON if getattr(one, key) != getattr(knobs[0], key)]
        if apart or one.mode != "train":
            shared = ", ".join(apart or IN_COMMON)
            raise InputError(f"run {row.name}: all runs train, with one {shared} (--set gives all of them one)")
        first = rows[knobs.index(one)]
        if first is not row:
            raise InputError(f"run {row.name} is the same as {first.name}: change its seed")


# ------------------------------------------------------------------------------------------- on Kaggle
@dataclass
class Session:
    """One row on its way through Kaggle."""

    row: Row
    order: Order
    outage: Outage
    failures: dict[str, str]  # mark of a push: why its version counts as failed
    version: Version | None = None  # that runs, or ended well
    folder: Path | None = None  # its verified output
    deadline: float = 0.0  # of the state that it is in, on the clock of the fleet's patience
    state: str = ""
    late: bool = False  # given up as not ending, which says nothing about the version


class Fleet:
    """All rows as kernels of one owner, as many at once as the account may run."""

    def __init__(self, client: KaggleClient, rows: list[Row], arguments: argparse.Namespace) -> None:
        self.client, self.runs, self.retries = client, arguments.runs, arguments.retries
        self.patience = client.patience
        self.limit = arguments.sessions or len(rows)  # until Kaggle names a lower one
        self.time: SessionTime = arguments.time
        self.metadata = owned_metadata(client.username)
        complete_metadata(self.metadata, arguments.accelerator)
        self.sources = source_versions(client, self.metadata, self.runs)
        self.sessions = [self.take_up(row) for row in rows]
        self.blocked = ""  # why nothing more can be pushed this week
        self.full_until = 0.0  # Kaggle said that the account's sessions are taken: not asked again before

    def take_up(self, row: Row) -> Session:
        """A row as an order for a kernel of its own, and where an earlier sweep left it."""
        ref, title = self.metadata["id"], self.metadata["title"]
        metadata = self.metadata | {"id": f"{ref}-{row.name}", "title": f"{title} {row.name}"}
        staged = stage(metadata, self.time.tell(row.overrides), BUILD / row.name, self.time)
        order = replace(staged, sources=self.sources)
        events = record.find(self.runs, event="run_failed", kernel=order.ref, content=order.content)
        found = Session(row, order, Outage(self.patience), {entry.get("mark", ""): entry["reason"] for entry in events})
        version = push.earlier_version(self.client, order, self.runs)
        if version is not None and version.mark not in found.failures:
            found.version = version
        return found

    @property
    def running(self) -> list[Session]:
        """Pushed, and not known to have ended."""
        return [one for one in self.sessions if one.version is not None and one.folder is None and not one.late]

    @property
    def waiting(self) -> list[Session]:
        """Not pushed yet, or to be pushed again."""
        return [one for one in self.sessions if one.version is None and len(one.failures) <= self.retries]

    def run(self) -> dict[str, Path]:
        """See every row to its end; the verified folders of those that succeeded."""
        news, before, begin, pause = News(), "", self.patience.now(), self.patience.poll_seconds
        while True:
            for one in self.running:
                self.bear(one, self.look)
            self.start()
            if not self.running and (not self.waiting or self.blocked):
                break
            news.tell(f"{self.state()} ({(self.patience.now() - begin) // 60:.0f} min)")
            pause = min(1.5 * pause, self.patience.poll_limit_seconds)
            if self.state() != before:  # there may soon be more of it
                before, pause = self.state(), self.patience.poll_seconds
            self.patience.sleep(pause)
        if self.waiting:
            raise ToolError(f"{self.blocked}; {self.state()}; the same command goes on later")
        return {one.row.name: one.folder for one in self.sessions if one.folder}

    def state(self) -> str:
        done = sum(one.folder is not None for one in self.sessions)
        failed = len(self.sessions) - done - len(self.running) - len(self.waiting)
        return f"{done} done, {len(self.running)} running, {len(self.waiting)} waiting, {failed} failed"

    def bear(self, one: Session, act: Callable[[Session], None]) -> None:
        """Do something for a row; a failure of Kaggle that may pass holds up neither the others nor the sweep."""
        try:
            act(one)
            one.outage.over()
        except KaggleError as error:
            one.outage.bear(error)

    def start(self) -> None:
        """Push waiting rows as long as there are sessions and accelerator hours."""
        self.blocked = ""
        for one in self.waiting:
            if self.blocked or len(self.running) >= self.limit or self.patience.now() < self.full_until:
                return
            self.bear(one, self.push)

    def push(self, one: Session) -> None:
        """Push a row, unless that was done before; a refusal ends the sweep, full sessions and quota only wait."""
        try:
            one.version = push.push(self.client, one.order, self.runs, failed=one.failures)
            one.state = ""
        except (Refused, Forbidden) as error:
            found = SESSIONS_FULL.search(str(error))
            if not found:
                raise ToolError(str(error)) from None
            self.limit = min(self.limit, max(1, int(found[1] or self.limit)))
            self.full_until = self.patience.now() + 5 * self.patience.poll_limit_seconds
            print(f"{error}; waiting for a free session", file=sys.stderr)
        except QuotaUsedUp as error:  # what runs may end, nothing more begins
            self.blocked = str(error)

    def look(self, one: Session) -> None:
        """Poll a running row; fetch it when it is complete, note its failure when it is not."""
        version = one.version
        if version is None:
            return
        status, message = self.client.kernels.status(version)
        if status == "complete":
            self.take_in(one, version)
        elif status in ENDED:
            fetched = partial(fetch.fetch_partial, self.client, version, self.runs)
            left = glance(f"what {version} has left", fetched, None)
            self.fail(one, version, (message or status) + (f" (what it left lies in {left.folder})" if left else ""))
        else:
            self.keep_time(one, "queued" if status == "queued" else "running")
            return
        self.full_until = 0.0

    def keep_time(self, one: Session, state: str) -> None:
        """Give up on a row that stays queued, or running, for longer than a session can."""
        if state != one.state and one.state != "running":  # a status that nobody knows counts as queued
            seconds = QUEUE_SECONDS if state == "queued" else self.time.wait_seconds + GRACE_SECONDS
            one.state, one.deadline = state, self.patience.now() + seconds
        if self.patience.now() > one.deadline:
            one.late = True
            told = f"{one.version} is {state} for longer than a session can be: going on without it"
            print(f"{told}; the same command looks again", file=sys.stderr)

    def take_in(self, one: Session, version: Version) -> None:
        """Fetch a complete run; output that is not what its manifest says is a failure of the run."""
        try:
            folder = fetch.fetch(self.client, version, self.runs)
            fetch.check_finished(folder, version)
            one.folder = folder
        except (KaggleError, MachineFailed):
            raise
        except ToolError as error:
            self.fail(one, version, str(error))

    def fail(self, one: Session, version: Version, reason: str) -> None:
        """Note that this version failed, so that no later sweep waits for it."""
        facts = {"kernel": one.order.ref, "content": one.order.content, "version": version.number}
        record.append(self.runs, "run_failed", **facts, mark=version.mark, reason=reason)
        one.failures[version.mark] = reason
        again = "pushing it again" if len(one.failures) <= self.retries else "giving it up"
        print(f"{version} failed: {reason}; {again}", file=sys.stderr)
        one.version = None


def sweep_kaggle(rows: list[Row], data: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """The finished runs of the table on Kaggle's sessions; needs the data here, to score the blend."""
    for name in FILES:
        kernel.find_file(data, name)
    fleet = Fleet(connect(), rows, arguments)
    done = fleet.run()
    if not done:
        reasons = [reason for one in fleet.sessions for reason in one.failures.values()]
        raise ToolError(f"every run failed, the first one: {(reasons or ['it did not end in time'])[0]}")
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
    if (folder / kernel.MANIFEST).exists() and (run := check_run(folder)).complete:
        knobs = kernel.fixed(kernel.resolve_knobs(row.overrides))
        if not knobs.items() <= run.manifest["knobs"].items():
            raise InputError(f"{folder}: holds a finished run of other settings; name another --output")
        return run
    print(f"{row.name}: {as_text(row.overrides)}", file=sys.stderr)
    return run_logged(data, folder, as_arguments(row.overrides))


def keep(run: Run, runs: Path) -> None:
    """The sweep in the local record, once for each submission that it made."""
    facts = {"event": "sweep", "run": run.folder.name, "sha256": run.manifest["outputs"][kernel.SUBMISSION]["sha256"]}
    if not record.find(runs, **facts):
        score = run.scores[RAW]
        made = {"members": run.metrics["members"], "validation": score["mrr"], "validation_se": score["mrr_se"]}
        record.append(runs, **facts, **made, **record.git_state())


def output_of(arguments: argparse.Namespace, rows: list[Row]) -> Path:
    """The folder named; else the same one for the same table, script and place, so that a sweep goes on."""
    if arguments.output is not None:
        there = read_json(arguments.output / kernel.MANIFEST, ADVICE, optional=True)
        if there and "members" not in there:
            raise InputError(f"{arguments.output}: holds a run that is no sweep's; name another --output")
        return arguments.output
    parts = [arguments.local, [[row.name, row.overrides] for row in rows], KERNEL.read_text(encoding="utf-8")]
    return arguments.runs / f"sweep-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"
