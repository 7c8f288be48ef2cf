"""Train many members, on Kaggle's own sessions or here, and blend them into one checked submission.

    python tools/sweep.py --members 8                      eight seeds of the default recipe
    python tools/sweep.py --table runs.csv --sessions 1    a row a run: recipe,seed,knobs such as align,3,lr=0.002
    python tools/sweep.py --members 8 --local              the same table on this machine, one after another

As many run at once as Kaggle admits: it tells the number when it refuses one more, and the GPU hours left when asked.
All members hold out the same images, so that the blend is scored on photos that none of them saw. A failed run is
repeated a bounded number of times; what is left is blended. Interrupted at any point, the same command goes on:
nothing is pushed twice, nothing that was computed is lost. Submit the result with python tools/submit.py FOLDER.
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
from types import ModuleType
from typing import Any

import blend
import numpy as np
import push_kernel
import record
from kaggle_client import KaggleClient, KaggleError, Refused, connect, split_ref
from local_run import FILES, FinishedRun, as_arguments, check_run, choose_data, run_logged
from project import DATA, KERNEL, REPO, RUNS, InputError, ToolError, format_table, load_kernel, run_tool

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


def make_rows(arguments: argparse.Namespace, kernel: ModuleType) -> list[Row]:
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
    order: push_kernel.Order
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
        seconds = push_kernel.read_timeout(arguments.timeout_minutes)[1]
        self.sessions = [self.take_up(row, self.order(row, arguments.accelerator, seconds)) for row in rows]
        self.blocked = ""  # why nothing more can be pushed this week
        self.full_until = 0.0  # Kaggle said that the account's sessions are taken: not asked again before

    def order(self, row: Row, accelerator: str | None, seconds: int | None) -> push_kernel.Order:
        """The push of a row: the kernel under a slug and with overrides of its own."""
        metadata = push_kernel.staged_metadata(self.client.username, accelerator)
        metadata |= {"id": f"{metadata['id']}-{row.name}", "title": f"{metadata['title']} {row.name}"}
        return push_kernel.Order(push_kernel.stage(metadata, row.overrides, BUILD / row.name), {}, seconds)

    def take_up(self, row: Row, order: push_kernel.Order) -> Session:
        """Where an earlier sweep left this row."""
        ref = order.staged.ref
        version = push_kernel.earlier_version(self.client, order, self.runs)
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
                one.version = push_kernel.push(self.client, one.order, self.runs, again=bool(one.failures))
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
        if push_kernel.run_folder(self.runs, slug, one.version).exists():
            push_kernel.fetch(self.client, owner, slug, one.version, self.runs)  # damage since then is not the run's
        try:
            folder = push_kernel.fetch(self.client, owner, slug, one.version, self.runs)
            push_kernel.check_finished(folder, one.ref)
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


def sweep_kaggle(rows: list[Row], data: Path, arguments: argparse.Namespace, kernel: ModuleType) -> dict[str, Path]:
    """The finished runs of the table on Kaggle's sessions; needs the data here, to score the blend."""
    for name in FILES:
        kernel.find_file(data, name)
    fleet = Fleet(connect(), rows, arguments)
    done = fleet.run()
    if not done:
        raise ToolError(f"every run failed, the first one: {fleet.sessions[0].failures[-1]}")
    return done


# ------------------------------------------------------------------------------------------- here
def sweep_local(rows: list[Row], data: Path, output: Path, retries: int, kernel: ModuleType) -> dict[str, Path]:
    """The finished runs of the table on this machine, one after another."""
    done, reason = {}, ""
    for row in rows:
        for _ in range(1 + retries):
            try:
                done[row.name] = run_here(row, data, output / row.name, kernel).folder
                break
            except InputError:
                raise
            except ToolError as error:
                reason = str(error)
                print(reason, file=sys.stderr)
    if not done:
        raise ToolError(f"every run failed, the last one: {reason}")
    return done


def run_here(row: Row, data: Path, folder: Path, kernel: ModuleType) -> FinishedRun:
    """A run that was finished before, else a new one; the kernel itself goes on with an unfinished one."""
    if (folder / kernel.MANIFEST).exists() and not (folder / kernel.RESUME_RUN).exists():
        return check_run(folder, kernel)
    print(f"{row.name}: {' '.join(f'{key}={value}' for key, value in row.overrides.items())}", file=sys.stderr)
    return run_logged(data, folder, as_arguments(row.overrides), kernel)


# ------------------------------------------------------------------------------------------- the blend
def blend_runs(rows: list[Row], folders: dict[str, Path], data: Path, output: Path, kernel: ModuleType) -> None:
    """One checked submission of all finished runs, with its validation beside it; the manifest comes last."""
    start = time.monotonic()
    (output / kernel.MANIFEST).unlink(missing_ok=True)  # of a blend of fewer runs
    runs = {name: check_run(folder, kernel) for name, folder in folders.items()}
    exam, inputs = blend.open_exam(data, runs, kernel)
    validated, final = zip(*(blend.answers(run, exam, kernel) for run in runs.values()), strict=True)
    found = blend.weigh(np.stack(validated), exam.gallery, exam.bundle, kernel)
    output.mkdir(parents=True, exist_ok=True)
    submission = output / kernel.SUBMISSION
    predictions = blend.finished(np.tensordot(found.weights, np.stack(final), 1), exam.bundle, kernel)
    kernel.write_submission(submission, exam.test_ids, predictions)
    kernel.check_submission(submission, exam.test_ids, predictions.shape[1])
    members = [member_facts(row, runs.get(row.name), dict(zip(runs, found.weights, strict=True))) for row in rows]
    seconds = {"total": round(time.monotonic() - start, 2)}
    kernel.write_json(output / kernel.METRICS, {
        "recipe": "sweep", "device": "cpu", "dtype": "float32", "seconds": seconds, "validation": found.validation,
        "members": members, "equal_weights_mrr": found.equal, "fitted_weights_mrr": found.held_out})
    kernel.finish(output, {"recipe": "sweep", "device": "cpu", "dtype": "float32", "seconds": seconds,
                           "inputs": inputs, "knobs": {}, "members": {n: run.folder.name for n, run in runs.items()}})


def member_facts(row: Row, run: FinishedRun | None, weights: dict[str, float]) -> dict[str, Any]:
    """A row of the result: its own scores and its weight; a failed run has none."""
    facts: dict[str, Any] = {"name": row.name, "overrides": row.overrides, "run": None}
    if run is not None:
        scores = {key: run.metrics["validation"][key]["mrr"] for key in ("pool100_raw", "pool100_cosine")}
        facts |= {"run": str(run.folder), "weight": round(float(weights[row.name]), 4), **scores}
    return facts


def blended_before(output: Path, folders: dict[str, Path], kernel: ModuleType) -> bool:
    """Whether the folder holds the verified blend of just these runs."""
    if not (output / kernel.MANIFEST).exists():
        return False
    members = check_run(output, kernel).manifest.get("members")
    return members == {name: folder.name for name, folder in folders.items()}


def keep(run: FinishedRun, runs: Path, kernel: ModuleType) -> None:
    """The sweep in the local record, once for each submission that it made."""
    facts = {"event": "sweep", "run": run.folder.name, "sha256": run.manifest["outputs"][kernel.SUBMISSION]["sha256"]}
    if not record.find(runs, **facts):
        score = run.metrics["validation"]["pool100_raw"]
        record.append(runs, **facts, members=run.metrics["members"], validation=score["mrr"],
                      validation_se=score["mrr_se"], **record.git_state())


# ------------------------------------------------------------------------------------------- command line
def report(run: FinishedRun, kernel: ModuleType, as_json: bool) -> None:
    """Members, blend, expected score."""
    metrics, submission = run.metrics, run.folder / kernel.SUBMISSION
    score = metrics["validation"]["pool100_raw"]
    members = metrics["members"]
    if as_json:
        print(json.dumps({"run": str(run.folder), "submission": str(submission), "expected_mrr": score["mrr"],
                          "expected_mrr_se": score["mrr_se"], **{key: metrics[key] for key in (
                              "validation", "members", "equal_weights_mrr", "fitted_weights_mrr")}}))
        return
    keys = ("pool100_raw", "pool100_cosine", "weight")
    rows = [[one["name"], " ".join(f"{k}={v}" for k, v in one["overrides"].items()) or "-",
             *(f"{one[key]:.4f}" if one["run"] else "failed" for key in keys)] for one in members]
    rows.append(["blend", "", *(f"{metrics['validation'][key]['mrr']:.4f}" for key in keys[:2]), None])
    used = sum(one["run"] is not None for one in members)
    print(format_table(["run", "settings", "raw MRR", "cosine MRR", "weight"], rows))
    print(f"\n{used} of {len(members)} runs in one checked submission: {submission}\n"
          f"expected score {score['mrr']:.4f} +- {score['mrr_se']:.4f} (MRR in pools of 100, raw)")


def default_output(arguments: argparse.Namespace, rows: list[Row]) -> Path:
    """The same folder for the same table, script and place, so that a sweep goes on."""
    parts = [arguments.local, [[row.name, row.overrides] for row in rows], KERNEL.read_text(encoding="utf-8")]
    return arguments.runs / f"sweep-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train many members on Kaggle's sessions, or here, and blend them into one submission.",
        epilog="example: python tools/sweep.py --members 8 --recipe align --set epochs=16\n\n"
        "exit codes: 0 blended and checked, 1 no run succeeded, no quota or Kaggle refused, 2 wrong input; after any\n"
        "of them, and after an interruption (130 or 143), the same command goes on",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, metavar="N", help="so many runs with the seeds 0 to N-1")
    parser.add_argument("--table", type=Path, metavar="CSV", help=f"a row a run; columns {', '.join(COLUMNS)}")
    parser.add_argument("--recipe", help="of every run that names none")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a knob of every run")
    parser.add_argument("--local", action="store_true", help="run here, one after another, instead of on Kaggle")
    parser.add_argument("--sessions", type=int, metavar="N", help="at most so many at once (default: as Kaggle admits)")
    parser.add_argument("--retries", type=int, default=2, metavar="N", help="repeats of a failed run (default 2)")
    parser.add_argument("--accelerator", metavar="NAME", help="instead of the metadata's; none: CPU only")
    parser.add_argument("--timeout-minutes", type=float, metavar="M", help="end of a session (default and at most 720)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="default data/ (--local: or a drawn sample)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: a folder in <runs> named by the table")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where outputs and the record go")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    arguments = parser.parse_args(argv)
    if (arguments.sessions is not None and arguments.sessions < 1) or arguments.retries < 0:
        raise InputError("--sessions takes at least 1, --retries at least 0")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the table, blend what succeeded, record, report."""
    arguments = parse(argv)
    kernel = load_kernel()
    rows = make_rows(arguments, kernel)
    output = arguments.output or default_output(arguments, rows)
    if arguments.local:
        data = choose_data(arguments.data)
        folders = sweep_local(rows, data, output, arguments.retries, kernel)
    else:
        data = arguments.data or DATA
        folders = sweep_kaggle(rows, data, arguments, kernel)
    if not blended_before(output, folders, kernel):
        blend_runs(rows, folders, data, output, kernel)
    run = check_run(output, kernel)
    keep(run, arguments.runs, kernel)
    report(run, kernel, arguments.json)
    return 0


if __name__ == "__main__":
    run_tool(main)
