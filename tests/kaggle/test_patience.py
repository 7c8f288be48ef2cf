"""The rules of waiting, in their one place: outages are borne for minutes, absences proved, looks never stop a job."""

from __future__ import annotations

import subprocess

import pytest

from lib import record
from lib.kaggle_api import patience
from lib.kaggle_api.errors import (
    Forbidden,
    KaggleError,
    NotDone,
    NotFound,
    RateLimited,
    Refused,
    ServerError,
    Unauthorized,
)
from lib.kaggle_api.patience import Patience, glance
from lib.project import InputError

PATIENCE = Patience()


class Clock:
    """Time that passes only in sleep: minutes of waiting take none, and none is lost on a busy machine."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "time", Clock())


class Server:
    """Fails from the first call on for so many seconds, then answers."""

    def __init__(self, error: KaggleError, seconds: float) -> None:
        self.error, self.end = error, PATIENCE.now() + seconds

    def __call__(self) -> str:
        if PATIENCE.now() < self.end:
            raise self.error
        return "there"


@pytest.mark.parametrize("kind", [ServerError, RateLimited, Forbidden, NotFound, Refused])
def test_ten_minutes_of_failures_are_waited_out(kind):
    assert PATIENCE.wait_for(Server(kind("no"), 600), "it", 12 * 3600) == "there"


def test_a_failure_that_lasts_ends_the_wait_after_a_quarter_of_an_hour():
    begin = PATIENCE.now()
    with pytest.raises(ServerError, match=r"no; so for 1[5-9] minutes"):
        PATIENCE.wait_for(Server(ServerError("no"), 10**6), "it", 12 * 3600)
    assert PATIENCE.now() - begin >= 900


def test_an_answer_in_between_ends_an_outage():
    answers = iter([*[ServerError("no")] * 15, None, *[ServerError("no")] * 15, "there"])

    def check() -> str | None:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    assert Patience(outage_seconds=1100).wait_for(check, "it", 12 * 3600) == "there"


def test_credentials_are_not_waited_for():
    with pytest.raises(Unauthorized):
        PATIENCE.wait_for(Server(Unauthorized("no"), 600), "it", 3600)


def test_a_wait_takes_as_long_as_the_server_asks():
    error = RateLimited("no")
    error.retry_after = 500.0
    begin = PATIENCE.now()
    assert PATIENCE.wait_for(Server(error, 10), "it", 3600) == "there"
    assert PATIENCE.now() - begin >= 500


def test_what_shows_after_a_minute_is_found_and_an_absence_is_proved_over_longer():
    shows = PATIENCE.now() + 60
    assert PATIENCE.look(lambda: "there" if PATIENCE.now() >= shows else None, "it") == "there"
    looks = []
    assert PATIENCE.look(lambda: looks.append(PATIENCE.now()), "it") is None
    assert len(looks) >= 4
    assert looks[-1] - looks[0] >= 60


def test_a_failing_look_proves_no_absence():
    with pytest.raises(ServerError):
        PATIENCE.look(Server(ServerError("no"), 10**6), "it")


def test_a_glance_never_stops_the_job(capsys):
    assert glance("the quota", Server(ServerError("no quota today"), 10**6), "nothing") == "nothing"
    assert "the quota: not known, going on without it (no quota today)" in capsys.readouterr().err
    assert glance("the quota", lambda: 3, None) == 3


def test_the_owner_alone_makes_no_dirty_commit(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    path = tmp_path / "kernel-metadata.json"
    path.write_text('{\n  "id": "INSERT_KAGGLE_USERNAME/x",\n  "title": "x"\n}\n')
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    monkeypatch.setattr(record, "REPO", tmp_path)
    path.write_text(path.read_text().replace("INSERT_KAGGLE_USERNAME", "ada"))
    assert record.git_state()["dirty"] is False
    path.write_text(path.read_text().replace('"title": "x"', '"title": "y"'))
    assert record.git_state()["dirty"] is True


def test_waiting_ends_at_its_deadline():
    with pytest.raises(NotDone, match="the thing: not done after"):
        PATIENCE.wait_for(lambda: None, "the thing", 60)


def test_waiting_returns_what_was_found():
    answers = iter([None, None, 0])
    assert PATIENCE.wait_for(lambda: next(answers), "it", 60) == 0


def test_timing_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("ALIGN_TRIES", "3")
    monkeypatch.setenv("ALIGN_TIMEOUT_SECONDS", "7.5")
    assert (Patience.from_environment().tries, Patience.from_environment().timeout_seconds) == (3, 7.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALIGN_TRIES", "many"), ("ALIGN_TRIES", "0"), ("ALIGN_POLL_SECONDS", "-1"), ("ALIGN_PROOF_SECONDS", "nan")],
)
def test_a_time_that_is_none_is_one_line(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}='{value}' is not a number above zero"):
        Patience.from_environment()
