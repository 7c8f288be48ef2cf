"""The history of submissions: Kaggle's, joined with the local record by the submission's ref."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import record
from lib.jobs.submission import read_message, record_scored
from lib.kaggle_api.client import KaggleClient
from lib.kaggle_api.competitions import Submission
from lib.kaggle_api.patience import glance
from lib.project import figure, format_table


@dataclass(frozen=True)
class Attempt:
    """One submission, from Kaggle, from the record, or from both."""

    ref: int
    date: str
    run: str
    commit: str
    validation: float | None
    validation_se: float | None
    public: float | None
    private: float | None
    status: str
    kernel: str


@dataclass(frozen=True)
class Place:
    """Where the best submission stands."""

    rank: int
    teams: int
    first: float
    gap: float


# --------------------------------------------------------------------------------------------- joining
def latest(runs: Path, event: str, slug: str) -> dict[int, dict[str, Any]]:
    """The last entry of this kind for each ref."""
    return {entry["ref"]: entry for entry in record.find(runs, event=event, competition=slug)}


def row_of(ref: int, shown: Submission | None, made: dict[str, Any], scored: dict[str, Any]) -> Attempt:
    """What Kaggle shows wins for scores, the record for what was submitted, the message fills in for it."""
    message = shown.description if shown else made.get("message") or scored.get("message") or ""
    if shown is None:
        public, private, date = scored.get("public"), scored.get("private"), scored.get("date") or made.get("time", "")
        status = "unknown" if public is None else "complete"
        shown = Submission(ref, "", date, message, status, public, private, "")
    known: dict[str, Any] = dict.fromkeys(("run", "validation", "validation_se", "kernel", "commit", "dirty"))
    known |= read_message(message)
    known |= {key: value for key, value in made.items() if value is not None}
    return Attempt(
        ref=ref,
        date=shown.date[:16],
        run=known["run"] or shown.file_name,
        commit=f"{known['commit'] or ''}{'+' if known['dirty'] else ''}",
        validation=known["validation"],
        validation_se=known["validation_se"],
        public=shown.public_score,
        private=shown.private_score,
        status=shown.status,
        kernel=f"{known['kernel']} v{known['version']}" if known["kernel"] else "",
    )


def join(shown: list[Submission], runs: Path, slug: str) -> list[Attempt]:
    """Every submission that Kaggle or the record knows, oldest first."""
    made, scored = latest(runs, "submitted", slug), latest(runs, "scored", slug)
    by_ref = {item.ref: item for item in shown}
    return [
        row_of(ref, by_ref.get(ref), made.get(ref, {}), scored.get(ref, {}))
        for ref in sorted({*by_ref, *made, *scored})
    ]


def keep(shown: list[Submission], runs: Path, slug: str) -> None:
    """Put scores into the record that it does not have, or not any more as they are now."""
    scored = latest(runs, "scored", slug)
    for item in shown:
        have = scored.get(item.ref, {})
        now = (item.public_score, item.private_score)
        if item.status == "complete" and (have.get("public"), have.get("private")) != now:
            record_scored(runs, item, slug)


def best_of(rows: list[Attempt]) -> Attempt | None:
    return max((row for row in rows if row.public is not None), key=lambda row: row.public or 0.0, default=None)


def place_of(best: Attempt | None, board: list[float]) -> Place | None:
    """The place that the best public score has on the board (which shows rounded scores), and the gap to the first."""
    if best is None or best.public is None or not board:
        return None
    rank = 1 + sum(score > best.public + 5e-6 for score in board)
    return Place(rank, len(board), max(board), max(0.0, max(board) - best.public))


# --------------------------------------------------------------------------------------------- showing
def table(rows: list[Attempt], best: Attempt | None) -> str:
    """One line a submission; the best is marked."""
    header = ["run", "ref", "date", "commit", "validation", "+-", "public", "private", "status"]
    lines = []
    for row in rows:
        name = row.run + (" *" if row is best else "")
        ours = [figure(row.validation), figure(row.validation_se)]
        theirs = [figure(row.public, ".5f"), figure(row.private, ".5f"), row.status]
        lines.append([name, row.ref, row.date, row.commit or None, *ours, *theirs])
    return format_table(header, lines)


def finding(rows: list[Attempt], best: Attempt | None) -> str:
    """What the history says, in one sentence: the title of the plot."""
    if best is None:
        return "No submission is scored yet"
    pairs = [(row.validation, row.public) for row in rows if row.validation is not None and row.public is not None]
    if not pairs:
        return f"Best public MRR {best.public:.4f} ({best.run})"
    gap = sum(public - validation for validation, public in pairs) / len(pairs)
    side = "above" if gap >= 0 else "below"
    return f"Best public MRR {best.public:.4f} ({best.run}); the board is on average {abs(gap):.3f} {side} validation"


def plot(rows: list[Attempt], best: Attempt | None, path: Path) -> None:
    """Validation with its standard error, public and private score of every submission, in their order."""
    from lib.plots import BLUE, GREEN, LIGHT, ORANGE, legend_below, new_figure, save_png, themed  # the table needs none

    numbered = list(enumerate(rows, 1))
    public = [(number, row.public) for number, row in numbered if row.public is not None]
    private = [(number, row.private) for number, row in numbered if row.private is not None]
    local = [(number, row.validation, row.validation_se or 0) for number, row in numbered if row.validation is not None]
    with themed(LIGHT):
        figure, axes = new_figure(finding(rows, best), height=4.5, width=8)
        if public:
            axes.plot(*zip(*public, strict=True), "o-", color=BLUE, label="public score", linewidth=1)
        if private:
            axes.plot(*zip(*private, strict=True), "s-", color=ORANGE, label="private score", linewidth=1)
        if local:
            x, y, error = zip(*local, strict=True)
            axes.errorbar(x, y, error, fmt="^", color=GREEN, capsize=3, label="local validation +- standard error")
        axes.set(xlabel="submission", ylabel="MRR, pools of 100 (higher is better)")
        step = 1 + len(rows) // 20  # so many names can be read side by side
        names = [row.run for row in rows]
        axes.set_xticks(range(1, len(rows) + 1, step), names[::step], rotation=30, ha="right")
        legend_below(figure, axes)
        save_png(figure, path)


def from_kaggle(client: KaggleClient, runs: Path, slug: str) -> tuple[list[Attempt], list[float]]:
    """The joined rows and the scores on the leaderboard."""
    shown = client.competitions.history(slug)
    keep(shown, runs, slug)
    return join(shown, runs, slug), glance("the leaderboard", lambda: client.competitions.leaderboard(slug), [])
