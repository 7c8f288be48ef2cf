"""scores: Kaggle's history joined with the record, each without the other, and what follows from it."""

from __future__ import annotations

import json

import pytest

from account import COMPETITION
from forked import failed, succeeded
from lib import record
from lib.jobs.history import best_of, finding, join
from lib.jobs.submission import Candidate
from stand_in import Fault, SubmissionState


def submitted(
    kaggle,
    tmp_path,
    number: int,
    public: float | None,
    validation: float | None,
    private: float | None = None,
    error: str = "",
) -> None:
    """One submission in Kaggle's history and in the record."""
    ref, sha = 1000 + number, f"{number:064d}"
    candidate = Candidate(tmp_path / "s.csv", sha, f"run-{number}", validation, 0.007)
    message = candidate.message({"commit": "475afaf", "dirty": False}, candidate.new_mark())
    polls = 0 if public is not None or error else 9
    state = SubmissionState(ref, "s.csv", message, b"", polls, public=public, private=private, error=error)
    kaggle.competitions[COMPETITION].submissions.insert(0, state)
    record.append(
        tmp_path / "runs",
        "submitted",
        ref=ref,
        sha256=sha,
        competition=COMPETITION,
        run=candidate.run,
        commit="475afaf",
        dirty=False,
        validation=validation,
        validation_se=0.007,
        message=message,
    )


@pytest.fixture
def history(kaggle, tmp_path):
    kaggle.competitions[COMPETITION].others = {"first": 0.9, "last": 0.4}
    submitted(kaggle, tmp_path, 1, 0.70, 0.72)
    submitted(kaggle, tmp_path, 2, 0.80, 0.79, private=0.78)
    submitted(kaggle, tmp_path, 3, None, 0.81)
    return kaggle


@pytest.fixture
def show(tool, tmp_path):
    return lambda *arguments: tool("scores", "--runs", tmp_path / "runs", *arguments)


def test_the_table_joins_both_and_says_what_follows(history, show, tmp_path):
    done = succeeded(show())
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["run", "ref", "date", "commit", "validation", "+-", "public", "private", "status"]
    assert lines[2].split()[:2] == ["run-2", "*"]
    assert "0.7900" in lines[2]
    assert "0.78000" in lines[2]
    assert lines[3].split()[-3:] == ["-", "-", "pending"]
    assert "best public score 0.80000: submission 1002 of run-2" in done.stdout
    assert "place 2 of 3 on the leaderboard, 0.10000 behind the first (0.90000)" in done.stdout
    assert (tmp_path / "runs/scores.png").read_bytes().startswith(b"\x89PNG")


def test_json_has_the_same(history, show):
    shown = json.loads(show("--json").stdout)
    assert shown["source"] == "kaggle"
    assert [row["public"] for row in shown["submissions"]] == [0.7, 0.8, None]
    assert shown["best"]["run"] == "run-2"
    assert shown["place"] == {"rank": 2, "teams": 3, "first": 0.9, "gap": pytest.approx(0.1)}


def test_a_lost_record_costs_nothing(history, show, tmp_path):
    before = json.loads(show("--json").stdout)
    (tmp_path / "runs" / record.RECORD).unlink()
    assert json.loads(show("--json").stdout) == before


def test_offline_shows_what_was_seen_before(history, show):
    before = json.loads(show("--json").stdout)
    calls = len(history.calls)
    offline = json.loads(show("--offline", "--json").stdout)
    assert (offline["source"], offline["place"], len(history.calls)) == ("record", None, calls)
    for row in ("run", "validation", "public", "private", "commit", "date"):
        assert [s[row] for s in offline["submissions"]][:2] == [s[row] for s in before["submissions"]][:2]


@pytest.mark.parametrize("fault", [Fault(503), Fault(drop="before"), Fault(html=True)])
def test_without_an_answer_the_record_is_shown_with_a_line(history, show, fault):
    succeeded(show())
    history.fail("ListSubmissions", *[fault] * 9)
    done = succeeded(show())
    assert "showing the local record instead" in done.stderr
    assert "run-2 *" in done.stdout


def test_without_an_answer_and_without_a_record_there_is_nothing_to_show(kaggle, show):
    kaggle.fail("ListSubmissions", *[Fault(503)] * 9)
    done = failed(show(), 1)
    assert done.stdout == ""
    assert "Kaggle answered 503" in done.error


@pytest.mark.parametrize(
    "fault",
    [
        Fault(503),
        Fault(drop="before"),
        Fault(429, retry_after="0"),
        Fault(truncate=5),
        Fault(silent=0.6),
        Fault(html=True),
    ],
)
def test_passing_faults_are_retried(history, show, fault):
    history.fail("ListSubmissions", fault)
    history.fail("GetLeaderboard", fault)
    assert json.loads(show("--json").stdout)["place"]["rank"] == 2


def test_a_private_score_that_comes_later_is_kept(history, show, tmp_path):
    succeeded(show())
    history.competitions[COMPETITION].submissions[-1].private = 0.69
    succeeded(show())
    assert record.find(tmp_path / "runs", event="scored", ref=1001)[-1]["private"] == 0.69
    count = len(record.read(tmp_path / "runs"))
    succeeded(show())
    assert len(record.read(tmp_path / "runs")) == count


def test_submissions_made_in_the_browser_are_shown_too(history, show):
    by_hand = SubmissionState(1009, "by hand.csv", "first try", b"", 0, public=0.6)
    history.competitions[COMPETITION].submissions.insert(0, by_hand)
    assert json.loads(show("--json").stdout)["submissions"][-1]["run"] == "by hand.csv"


def test_one_that_failed_is_shown_as_such(kaggle, show, tmp_path):
    submitted(kaggle, tmp_path, 1, None, 0.7, error="wrong ids")
    done = show()
    assert done.stdout.splitlines()[1].split()[-1] == "error"
    assert "best" not in done.stdout


def test_nothing_submitted_yet(kaggle, show):
    done = succeeded(show())
    assert "no submissions yet" in done.stdout


@pytest.mark.parametrize(
    ("rows", "title"),
    [
        (
            [(0.72, 0.70), (0.79, 0.75)],
            "Best public MRR 0.7500 (run-2); the board is on average 0.030 below validation",
        ),
        ([(None, 0.70)], "Best public MRR 0.7000 (run-1)"),
        ([(0.7, None)], "No submission is scored yet"),
    ],
)
def test_the_title_of_the_plot_is_the_finding(kaggle, tmp_path, rows, title):
    for number, (validation, public) in enumerate(rows, 1):
        submitted(kaggle, tmp_path, number, public, validation)
        if public is not None:
            record.append(
                tmp_path / "runs", "scored", ref=1000 + number, competition=COMPETITION, public=public, private=None
            )
    joined = join([], tmp_path / "runs", COMPETITION)
    assert finding(joined, best_of(joined)) == title


def test_the_place_is_the_one_on_the_public_board(history, show):
    history.competitions[COMPETITION].private_board = {"first": 0.1, "second": 0.05}
    assert json.loads(show("--json").stdout)["place"]["rank"] == 2


@pytest.mark.parametrize("status", [403, 400, 500])
def test_a_leaderboard_that_fails_hides_no_history(history, show, status):
    history.fail("GetLeaderboard", *[Fault(status)] * 9)
    done = succeeded(show())
    assert "run-2 *" in done.stdout
    assert "place" not in done.stdout
    assert "the leaderboard: not" in done.stderr


def test_one_unreadable_submission_hides_no_other(history, show):
    odd = SubmissionState(1010, "odd.csv", "", b"", 0, public=float("nan"))
    history.competitions[COMPETITION].submissions.insert(0, odd)
    shown = json.loads(show("--json").stdout)
    assert shown["submissions"][-1]["public"] is None
    assert shown["best"]["run"] == "run-2"
    history.fail(
        "ListSubmissions",
        Fault(
            json={
                "submissions": [{"ref": 1, "status": "JUDGED"}, {"ref": 2, "status": "COMPLETE", "publicScore": "0.6"}]
            }
        ),
    )
    assert [one["status"] for one in json.loads(show("--json").stdout)["submissions"]][:2] == ["pending", "complete"]


def test_wrong_input_is_one_line(history, show):
    failed(show("--competition", "no-such"), 2, "no-such")
    failed(show("--plot", "x.pdf"), 2, r"is a \.png")
