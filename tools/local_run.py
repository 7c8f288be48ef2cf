"""Run the kernel on this machine as a sub-process and vouch for what it wrote: what local tools share.

    ended = run_kernel(data, output, ["--recipe", "align"], log=print)
    run = check_run(output, load_kernel())
"""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import sample_data
from package_dataset import damaged_files, read_run_json
from project import DATA, KERNEL, REPO, InputError, ToolError

SAMPLE = REPO / "build" / "sample"  # not below data/: the kernel would find two candidates once the real data is there
FILES = ("train.npz", "test.clean.npz")
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class Ended:
    """How the kernel ended: its exit code (128 + n after signal n) and its own one line where it failed."""

    code: int
    error: str


@dataclass(frozen=True)
class FinishedRun:
    """A run whose outputs are what its manifest says."""

    folder: Path
    manifest: dict[str, Any]
    metrics: dict[str, Any]  # {} where nothing was trained (mode=predict)

    @property
    def total_seconds(self) -> float:
        """Seconds from the script's start to its end."""
        return self.manifest["seconds"]["total"]

    @property
    def step_seconds(self) -> float:
        """Seconds of the training steps alone, without the validations in between."""
        return max(self.metrics["seconds"]["train"] - self.metrics["validate_seconds"], 0.01)


def choose_data(given: Path | None) -> Path:
    """The folder with the competition's files: the one given, else data/, else the sample data set, drawn once."""
    if given is not None:
        if not given.is_dir():
            raise InputError(f"--data {given}: no such folder; python tools/download_data.py fetches the real data")
        return given
    if DATA.is_dir() and any(next(DATA.rglob(name), None) for name in FILES):
        return DATA
    drawn = SAMPLE.exists()  # all of it or nothing
    print(f"no data in {DATA}: {'using' if drawn else 'drawing'} the sample data set in {SAMPLE}; "
          "python tools/download_data.py fetches the real data", file=sys.stderr)
    if not drawn:
        sample_data.make_sample(SAMPLE)
    return SAMPLE


def new_folder(runs: Path, name: str) -> Path:
    """`runs`/<UTC time>-<name>, which sorts by time."""
    return runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"


def run_kernel(data: Path, output: Path, arguments: list[str], log: Callable[[str], None]) -> Ended:
    """The script itself, from an empty folder, its log line by line; an interrupt stops it and is waited for."""
    command = [sys.executable, str(KERNEL), "--input", str(data.resolve()), "--output", str(output.resolve())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    error = ""
    with tempfile.TemporaryDirectory() as empty, subprocess.Popen(
        command + arguments, cwd=empty, env=environment | {"PYTHONUNBUFFERED": "1"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        process_group=0,  # Ctrl-C reaches a terminal's whole group: it must reach the kernel once, from here
    ) as process, forwarded_signals(process):
        for line in process.stdout or ():
            if line.startswith("error: "):
                error = line.removeprefix("error: ").strip()
            else:
                log(line.rstrip("\n"))
    code = process.returncode
    return Ended(128 - code if code < 0 else code, error)


@contextlib.contextmanager
def forwarded_signals(process: subprocess.Popen) -> Iterator[None]:
    """SIGINT and SIGTERM go to `process` while the block lasts; whatever else ends the block ends it, too."""
    def forward(number: int, frame: object) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # its helpers as well
        raise
    finally:
        process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def check_run(folder: Path, kernel: ModuleType) -> FinishedRun:
    """The run in `folder`, once every output is what the manifest says."""
    manifest = read_run_json(folder, kernel.MANIFEST)
    outputs = manifest.get("outputs") or {}
    problems = damaged_files(folder, outputs)
    if kernel.SUBMISSION not in outputs:
        problems.append(f"{kernel.MANIFEST} names no {kernel.SUBMISSION}")
    if problems:
        raise ToolError(f"{folder}: {problems[0]}; run it again with another --output")
    metrics = read_run_json(folder, kernel.METRICS) if kernel.METRICS in outputs else {}
    return FinishedRun(folder, manifest, metrics)


def run_logged(data: Path, output: Path, arguments: list[str], kernel: ModuleType) -> FinishedRun:
    """One run of several: its log goes to run.log in its folder; a failure names the run and the reason."""
    output.mkdir(parents=True, exist_ok=True)
    path, last = output / "run.log", ""
    with path.open("a", encoding="utf-8") as file:
        def log(line: str) -> None:
            nonlocal last
            last = line.strip() or last
            print(line, file=file, flush=True)

        ended = run_kernel(data, output, arguments, log)
    if ended.code in STOPPED:
        print("interrupted", file=sys.stderr)
        sys.exit(ended.code)
    if ended.code:
        failure = InputError if ended.code == InputError.exit_code else ToolError
        raise failure(f"run {output.name}: {ended.error or last or 'no output'} (its log: {path})")
    return check_run(output, kernel)


def as_arguments(knobs: dict[str, Any]) -> list[str]:
    """Knobs as the kernel's command line."""
    return [f"--set={key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in knobs.items()]
