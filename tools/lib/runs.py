"""A run as one object: a folder that the kernel works in, with what its manifest and its metrics say of it.

folder = new_folder(RUNS, "align")            # made, and nobody else's
run = check_run(folder)                       # opened, once every output is what the manifest says
run.scores[RAW]["mrr"]
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import kernel
from lib.process import STOPPED, locked, run_kernel
from lib.project import InputError, ToolError, damage, read_json

RESUME_STATES = "resume_*.pth"
RAW, COSINE, FULL = "pool100_raw", "pool100_cosine", "full_cosine"  # tables of a validation: pools twice, the gallery
ADVICE = "give a finished run (python tools/run_local.py makes one)"


@dataclass(frozen=True)
class Run:
    """A folder with a manifest. Its `metrics` are {} where nothing was trained (mode=predict)."""

    folder: Path
    manifest: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.resolve().name  # "." has none

    @property
    def complete(self) -> bool:
        """Whether it came to its end, be it that of its time budget; else it can go on, and has what it had."""
        return bool(self.manifest.get("complete"))

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        """sha256 and bytes of every output by its name."""
        return self.manifest.get("outputs") or {}

    @property
    def recipe(self) -> str:
        """The recipe of what predicted."""
        return str(self.manifest.get("recipe", "unknown"))

    @property
    def weights(self) -> str | None:
        """sha256 of the weights that predicted the submission: its own, or those that it was given."""
        made = self.outputs.get(kernel.FINAL_MODEL) or self.manifest.get("inputs", {}).get(kernel.FINAL_MODEL)
        return made["sha256"] if made else None

    @property
    def only_predicts(self) -> bool:
        """Whether it trained nothing: its weights are another run's, and so is what validation says of them."""
        return bool(self.weights) and kernel.FINAL_MODEL not in self.outputs

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The tables of the validation by their names, RAW and so on; {} where nothing was validated."""
        return self.metrics.get("validation") or {}

    @property
    def mrr(self) -> dict[str, float]:
        """The MRR of each of these tables."""
        return {name: table["mrr"] for name, table in self.scores.items()}

    @property
    def total_seconds(self) -> float:
        """Seconds from the script's start to its end."""
        return self.manifest["seconds"]["total"]

    @property
    def ended(self) -> datetime:
        """When its manifest was written (UTC)."""
        return datetime.fromtimestamp((self.folder / kernel.MANIFEST).stat().st_mtime, UTC)


# ------------------------------------------------------------------------------------------------ opened, verified
def read_run_json(run: Path, name: str) -> dict[str, Any]:
    """A JSON file of a run; a missing or broken one is the user's error."""
    return read_json(run / name, ADVICE)


def open_run(folder: Path) -> Run:
    """The run in `folder` as it says it is, finished or not."""
    manifest = read_run_json(folder, kernel.MANIFEST)
    trained = kernel.METRICS in (manifest.get("outputs") or {})
    return Run(folder, manifest, read_run_json(folder, kernel.METRICS) if trained else {})


def damaged_files(folder: Path, expected: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the files of a manifest: missing, other size or other sha256."""
    found = {name: damage(folder / name, facts["sha256"], facts["bytes"]) for name, facts in expected.items()}
    return [f"{name} {problem}" for name, problem in found.items() if problem]


def check_run(folder: Path) -> Run:
    """The run in `folder`, once every output is what the manifest says."""
    manifest = read_run_json(folder, kernel.MANIFEST)
    outputs = manifest.get("outputs") or {}
    problems = damaged_files(folder, outputs)
    if kernel.SUBMISSION not in outputs:
        problems.append(f"{kernel.MANIFEST} names no {kernel.SUBMISSION}")
    if problems:
        raise ToolError(f"{folder}: {problems[0]}; run it again with another --output")
    return open_run(folder)


def payload_of(folder: Path) -> list[str]:
    """The files of a run that a kernel can use: verified weights, or what an unfinished run goes on from."""
    unfinished = (folder / kernel.RESUME_RUN).is_file()
    run = Run(folder, read_json(folder / kernel.MANIFEST, ADVICE, optional=unfinished), {})
    if unfinished and not run.complete:
        return [kernel.RESUME_RUN, *sorted(path.name for path in folder.glob(RESUME_STATES))]
    if not run.complete or kernel.FINAL_MODEL not in run.outputs:
        raise InputError(f"{folder}: not a complete run with weights; give another one with --run")
    names = [name for name in (kernel.FINAL_MODEL, kernel.VALIDATED_MODEL, kernel.METRICS) if name in run.outputs]
    if problems := damaged_files(folder, {name: run.outputs[name] for name in names}):
        raise InputError(f"{folder}: {problems[0]}; the run is damaged: make or fetch it again")
    return names


# ------------------------------------------------------------------------------------------------------ looked for
def visible(paths: Iterable[Path], runs: Path) -> list[Path]:
    """Those that lie in no dot folder: it holds what is only half fetched."""
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(runs).parts)]


def is_complete(folder: Path) -> bool:
    return bool(read_json(folder / kernel.MANIFEST, ADVICE, optional=True).get("complete"))


def newest_run(runs: Path, name: str, complete: bool = False) -> Path:
    """The run below `runs` whose file of this name is the newest; `complete`: of those that came to their end."""
    found = [path for path in visible(runs.glob(f"*/{name}"), runs) if not complete or is_complete(path.parent)]
    if not found:
        kind = "finished run" if complete else "run"
        raise InputError(f"{runs}: no {kind} with {name}; make one with python tools/run_local.py")
    return max(found, key=lambda path: (path.stat().st_mtime, path.parent.name)).parent


def find_runs(runs: Path) -> list[Run]:
    """Every readable run below `runs`, the members of sweeps and benchmarks included, by time; the newest is last."""
    found = []
    for path in visible([*runs.glob(f"*/{kernel.MANIFEST}"), *runs.glob(f"*/*/{kernel.MANIFEST}")], runs):
        try:
            found.append(open_run(path.parent))
        except InputError as error:
            print(error, file=sys.stderr)
    return sorted(found, key=lambda run: run.ended)


def trained_by(found: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs that made weights, by the sha256 of these; runs of the same settings may have made the same."""
    made: dict[str, list[Run]] = {}
    for run in sorted(found, key=lambda run: run.name):
        if run.weights and not run.only_predicts:
            made.setdefault(run.weights, []).append(run)
    return made


def open_trained(folder: Path) -> Run:
    """The run in `folder`, which has to have trained something; else the error names the run whose weights it has."""
    run = open_run(folder)
    if not run.only_predicts:
        return run
    beside = trained_by(find_runs(folder.parent)).get(run.weights or "")
    whose = f"the weights of {beside[0].folder}" if beside else f"weights of a run that is not in {folder.parent}"
    raise InputError(f"{folder}: only predicts, with {whose}: give that one")


# ------------------------------------------------------------------------------------------------------------ made
def new_folder(runs: Path, name: str) -> Path:
    """A new folder `runs`/<UTC time>-<name>, which sorts by time; two of one second get two folders."""
    begin, number = runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}", 1
    folder = begin
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = begin.with_name(f"{begin.name}-{number}")
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror}); --runs DIR names another place") from None


def named_folder(folder: Path, again: bool) -> Path:
    """The folder that the user named for a run: a finished one in it is refused, or (`again`) kept aside."""
    if not is_complete(folder):
        return folder
    if not again:
        raise InputError(
            f"{folder}: holds a finished run; name another --output, or --again keeps that one aside and runs anew"
        )
    folder = folder.resolve()  # "." has no name, and would be wherever the folder goes
    with locked(folder):
        places = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
        aside = next(place for place in places if not place.exists())
        folder.rename(aside)
    print(f"the finished run is kept as {aside}", file=sys.stderr)
    return folder


@contextlib.contextmanager
def left_if_used(folder: Path) -> Iterator[None]:
    """A folder that nothing was written into is taken away again, unless it is that of a run which has just begun."""
    try:
        yield
    finally:
        if folder.is_dir():
            with contextlib.suppress(OSError, InputError), locked(folder):
                folder.rmdir()  # only ever an empty one


def run_logged(data: Path, output: Path, arguments: list[str]) -> Run:
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
