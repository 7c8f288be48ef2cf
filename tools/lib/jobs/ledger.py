"""All runs side by side: what each was, what it scored, what the board said; and two of them compared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import kernel, record
from lib.process import as_text, users_of
from lib.project import InputError, figure, format_table
from lib.runs import COSINE, FULL, RAW, Run, find_runs, trained_by

SCORES = {"raw": RAW, "cosine": COSINE, "full": FULL}
SORTS = ("date", *SCORES, "seconds", "public")


@dataclass(frozen=True)
class Entry:
    run: str  # its folder, relative to that of all runs
    date: str  # UTC, when it ended
    recipe: str
    changed: dict[str, Any]  # knobs that are not the recipe's
    note: str  # how it ended, where that is not by itself; whose weights predicted
    raw: float | None  # MRR of the validation in pools of 100, ...
    raw_se: float | None
    cosine: float | None
    full: float | None  # ... and in the whole gallery, by cosine
    seconds: float | None
    device: str
    submission: int | None  # Kaggle's number of it
    public: float | None


def tells(key: str) -> bool:
    """Whether a knob says anything of a result: this kernel has it, and it is not only how a run is carried out."""
    return key in kernel.FIELDS and key != "mode" and (key == "max_minutes" or not kernel.FIELDS[key].metadata["free"])


def changed_knobs(run: Run) -> dict[str, Any]:
    if run.recipe not in kernel.RECIPES:
        return {}
    plain = dataclasses.asdict(kernel.resolve_knobs({"recipe": run.recipe}))
    return {
        key: value for key, value in (run.manifest.get("knobs") or {}).items() if tells(key) and value != plain[key]
    }


def note_of(run: Run, names: dict[str, str]) -> str:
    """What else has to be said of a run; `names` of runs by the sha256 of their weights."""
    found = [f"ended by {run.manifest['stopped']}"] if run.manifest.get("stopped") else []
    if not run.complete:
        others = users_of(run.folder)
        found.append(f"at work ({others})" if others else "unfinished")
    if run.only_predicts and run.weights:
        found.append(f"weights of {names.get(run.weights, 'another run')}")
    found += [f"{len(run.manifest['members'])} members"] if isinstance(run.manifest.get("members"), dict) else []
    return ", ".join(found)


def submissions(runs: Path) -> dict[str, tuple[int, float | None]]:
    """(ref, public score) of the last submission of a csv, by its sha256, as the local record has them."""
    public = {entry.get("ref"): entry.get("public") for entry in record.find(runs, event="scored")}
    return {entry["sha256"]: (entry["ref"], public.get(entry["ref"])) for entry in record.find(runs, event="submitted")}


def entry_of(run: Run, runs: Path, names: dict[str, str], sent: dict[str, tuple[int, float | None]]) -> Entry:
    scores = {key: run.mrr.get(name) for key, name in SCORES.items()}
    ref, public = sent.get(run.outputs.get(kernel.SUBMISSION, {}).get("sha256", ""), (None, None))
    return Entry(
        str(run.folder.relative_to(runs)),
        f"{run.ended:%Y-%m-%d %H:%M}",
        run.recipe,
        changed_knobs(run),
        note_of(run, names),
        raw_se=run.scores.get(RAW, {}).get("mrr_se"),
        seconds=run.manifest.get("seconds", {}).get("total"),
        device=run.manifest.get("device", ""),
        submission=ref,
        public=public,
        **scores,
    )


def read_ledger(runs: Path) -> list[Entry]:
    """A line a run below `runs`, the newest last."""
    if not runs.is_dir():
        raise InputError(f"{runs}: no such folder; python tools/run_local.py makes a run")
    found = find_runs(runs)
    names = {weights: " = ".join(run.name for run in made) for weights, made in trained_by(found).items()}
    sent = submissions(runs)
    return [entry_of(run, runs, names, sent) for run in found]


def arranged(entries: list[Entry], recipe: str | None, last: int | None, sort: str) -> list[Entry]:
    """The entries asked for: the newest last, or by another column the best first; what has none comes at the end."""
    known = list(dict.fromkeys([*kernel.RECIPES, *(entry.recipe for entry in entries)]))  # also sweeps, recipes of old
    if recipe is not None and recipe not in known:
        raise InputError(f"--recipe {recipe}: neither a recipe nor a run of one; there are {', '.join(known)}")
    chosen = [entry for entry in entries if recipe is None or entry.recipe == recipe]
    chosen = chosen[-last:] if last else chosen
    if sort == "date":
        return chosen
    sign = 1 if sort == "seconds" else -1
    return sorted(chosen, key=lambda entry: (getattr(entry, sort) is None, sign * (getattr(entry, sort) or 0)))


def table(entries: list[Entry]) -> str:
    """One line a run."""
    about, results = ["run", "ended (UTC)", "recipe"], ["raw", "+-", "cosine", "all held-out", "seconds"]
    header = [*about, *results, "device", "submitted", "public", "what differs"]
    rows = []
    for one in entries:
        scores = [figure(value) for value in (one.raw, one.raw_se, one.cosine, one.full)]
        board = [one.submission, figure(one.public, ".5f")]
        differs = "; ".join(filter(None, [as_text(one.changed), one.note]))
        seconds = figure(one.seconds, ".1f")
        rows.append([one.run, one.date, one.recipe, *scores, seconds, one.device or None, *board, differs])
    return format_table(header, rows, texts=(0, 1, 2, len(header) - 1))


# ------------------------------------------------------------------------------------------------------ two of them
def different_knobs(one: Run, other: Run) -> dict[str, tuple[Any, Any]]:
    """The knobs in which two runs differ, each with both values; None where a run does not have it."""
    ours, theirs = ({"recipe": run.recipe, **(run.manifest.get("knobs") or {})} for run in (one, other))
    return {key: (ours.get(key), theirs.get(key)) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}


def reason_of(key: str) -> str:
    """What the kernel says of a knob; nothing where it has it no more."""
    return kernel.FIELDS[key].metadata["why"] if key in kernel.FIELDS else ""


def unpaired(one: Run, other: Run) -> dict[str, dict[str, float]]:
    """Differences of the MRR as the runs recorded them, with the interval of two independent samples of images."""
    found = {}
    for key in ("raw", "cosine"):
        ours, theirs = (run.scores.get(SCORES[key]) for run in (one, other))
        if ours and theirs:
            difference = ours["mrr"] - theirs["mrr"]
            half = 1.96 * (ours["mrr_se"] ** 2 + theirs["mrr_se"] ** 2) ** 0.5
            found[key] = {"difference": difference, "low": difference - half, "high": difference + half}
    return found


# ------------------------------------------------------------------------------------------------------ the picture
def finding(entries: list[Entry]) -> str:
    """What the picture shows, in one sentence."""
    best = max(entries, key=lambda entry: entry.raw or 0)
    near = [entry for entry in entries if (entry.raw or 0) >= (best.raw or 0) - (best.raw_se or 0)]
    fast = min(near, key=lambda entry: entry.seconds or 0)
    text = f"Best: {best.run} with {best.raw:.3f} in {best.seconds:,.0f} s"
    return text if fast is best else f"{text}; {fast.run} is as good within the error in {fast.seconds:,.0f} s"


def plot(entries: list[Entry], path: Path) -> None:
    """Validation MRR with its standard error against the seconds of the run, a colour a recipe."""
    from lib.plots import quality_plot  # the table needs none

    drawn = [entry for entry in entries if entry.raw and entry.seconds]
    groups: dict[str, list[tuple[float, float, float]]] = {}
    for entry in drawn:
        groups.setdefault(entry.recipe, []).append((entry.seconds or 0, entry.raw or 0, entry.raw_se or 0))
    quality_plot(finding(drawn), groups, "o", path)
