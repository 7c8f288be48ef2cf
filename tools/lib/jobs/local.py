"""A run of the kernel on this machine: what is asked of it, what it reads, what is kept of it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib import kernel, record
from lib.data import FILES, KNOWN
from lib.process import as_text
from lib.project import RUNS, InputError, as_command, format_table
from lib.runs import Run, damaged_files, open_trained
from lib.weights import unfinished


def asked_for(recipe: str | None, mode: str | None, settings: list[str], weights: Path | None) -> dict[str, Any]:
    """The knobs that were set: a wrong one is told before any data is drawn or read."""
    given = kernel.beside(dict(map(kernel.parse_setting, settings)), recipe=recipe, mode=mode)
    if weights is not None:
        if given.get("recipe") or given.get("mode", "predict") != "predict":
            raise InputError("--weights predicts with the run's own recipe: leave --recipe and --mode away")
        given["mode"] = "predict"
    kernel.resolve_knobs(given)
    return given


def weights_of(folder: Path, output: Path | None) -> Path:
    """The verified weights of a run, not to be predicted with into its own folder: the kernel empties its `output`.

    Of a run that was stopped it is said how far it came.
    """
    if output is not None and output.resolve() == folder.resolve():
        raise InputError(f"{output}: holds the weights to predict with; name another --output")
    run = open_trained(folder)
    listed = run.outputs.get(kernel.FINAL_MODEL)
    if not listed:
        raise InputError(f"{folder}: the run has no {kernel.FINAL_MODEL}; name another one with --weights")
    if problems := damaged_files(folder, {kernel.FINAL_MODEL: listed}):
        raise InputError(f"{folder}: {problems[0]}; make or fetch the run again")
    for line in unfinished(folder):
        print(f"warning: {line}", file=sys.stderr, flush=True)
    return folder / kernel.FINAL_MODEL


def name_of(knobs: dict[str, Any], data: Path, weights: Path | None) -> str:
    """The run's name: the recipe, for a prediction that of the weights."""
    if knobs.get("mode") != "predict":
        return kernel.resolve_knobs(knobs).recipe
    bundle = kernel.load_weights(weights or kernel.find_file(data, kernel.FINAL_MODEL))
    return f"{bundle['knobs']['recipe']}-predict"


@contextmanager
def input_of(data: Path, weights: Path | None) -> Iterator[Path]:
    """What the kernel reads: the data, or for `weights` a folder with these and the test captions and nothing else."""
    if weights is None:
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in (kernel.find_file(data, FILES[1]), weights):
            (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def keep(run: Run, runs: Path, knobs: dict[str, Any], data: Path, weights: Path | None) -> None:
    """The run in the local record."""
    asked = {"set": knobs, "data": str(data), "weights": weights.parent.resolve().name if weights else None}
    made = {"complete": run.complete, "seconds": run.total_seconds, "validation": run.mrr}
    record.append(runs, "local_run", run=run.name, recipe=run.recipe, **asked, **made, **record.git_state())


def next_command(run: Run, data: Path, places: dict[str, Path | None]) -> str | None:
    """A validated run is looked at; another one is submitted, or scored where the answers lie beside the data.

    `places`: --data and --runs of the command that made it, where they were given.
    """
    if run.scores:
        place = None if run.folder.parent.resolve() == RUNS else run.folder
        return as_command("verify", {"--run": place, "--data": places["--data"]})
    asked = run.manifest.get("inputs", {}).get(FILES[1], {}).get("sha256")
    if asked == KNOWN["test/test/test.clean.npz"].sha256:
        return as_command("submit", places, run.folder)
    solution = data / "solution.npz"
    return as_command("verify", {"--run": run.folder, "--solution": solution}) if solution.exists() else None


def catalogue() -> str:
    """The recipes and the knobs of the kernel, with the reasons that it gives."""
    recipes = []
    for name, candidates in kernel.RECIPES.items():
        changes = " | ".join(map(as_text, candidates))
        if name == "search":
            changes = "those of ensemble, then drawn ones around the best so far, for all of max_minutes"
        recipes.append([name, len(candidates), changes])
    knobs = [[name, field.default, field.metadata["why"]] for name, field in kernel.FIELDS.items()]
    first = format_table(["recipe", "candidates", "what they change"], recipes, texts=(0, 2))
    return first + "\n\n" + format_table(["knob", "default", "why"], knobs, texts=(0, 2))
