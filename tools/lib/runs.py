"""Runs as folders: made by the kernel, opened only once every output is what the manifest says.

    run = check_run(output)
    run.metrics["validation"]["pool100_raw"]["mrr"]
"""
from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import kernel
from lib.process import STOPPED, run_kernel
from lib.project import InputError, ToolError, sha256_of

RESUME_STATES = "resume_*.pth"


def read_run_json(run: Path, name: str) -> dict[str, Any]:
    """A JSON file of a run; a missing or broken one is the user's error."""
    try:
        content = json.loads((run / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{run}: no readable {name}; give a finished run (tools/run_local.py makes one)") from None
    if not isinstance(content, dict):
        raise InputError(f"{run / name}: not a JSON object; make the run again")
    return content


def damaged_files(folder: Path, expected: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the files of a manifest: missing, other size or other sha256."""
    problems = []
    for name, facts in expected.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}")
        elif sha256_of(path) != facts["sha256"]:
            problems.append(f"{name} has another sha256 than the manifest says")
    return problems


def newest_run(runs: Path, weights: str) -> Path:
    """The run below `runs` whose weights are the newest."""
    found = sorted(runs.glob(f"[!.]*/{weights}"), key=lambda path: path.stat().st_mtime)  # not those half fetched
    if not found:
        raise InputError(f"{runs}: no run with {weights}; make one with python tools/run_local.py")
    return found[-1].parent


def payload_of(run: Path) -> list[str]:
    """The files of a run that a kernel can use: its verified weights, or the state of an unfinished run."""
    if (run / kernel.RESUME_RUN).is_file():
        return [kernel.RESUME_RUN, *sorted(path.name for path in run.glob(RESUME_STATES))]
    manifest = read_run_json(run, kernel.MANIFEST)
    outputs = manifest.get("outputs", {})
    if not manifest.get("complete") or kernel.FINAL_MODEL not in outputs:
        raise InputError(f"{run}: not a complete run with weights; give another one with --run")
    names = [name for name in (kernel.FINAL_MODEL, kernel.VALIDATED_MODEL, kernel.METRICS) if name in outputs]
    problems = damaged_files(run, {name: outputs[name] for name in names})
    if problems:
        raise InputError(f"{run}: {problems[0]}; the run is damaged: make or fetch it again")
    return names


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


def new_folder(runs: Path, name: str) -> Path:
    """`runs`/<UTC time>-<name>, which sorts by time."""
    return runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"


def check_run(folder: Path) -> FinishedRun:
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


def run_logged(data: Path, output: Path, arguments: list[str]) -> FinishedRun:
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
    return check_run(output)
