"""doctor: green when all is there, and each thing that is not is a red line with the next command."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest

from drawn import write_tree
from forked import hide
from lib.data import Known
from lib.jobs.doctor import check_packages
from stand_in import Fault

FILES = {"train/train/train.npz": b"train", "test/test/test.clean.npz": b"test", "test/test/captions.txt": b"captions"}


@pytest.fixture
def look(tool, kaggle, tmp_path, monkeypatch):
    """Run it on a machine where all is right; what it said by the name of the check."""
    known = {name: Known(len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()}
    monkeypatch.setattr("lib.jobs.doctor.KNOWN", known)
    monkeypatch.setattr("lib.jobs.doctor.DISK_BYTES", 1)
    kaggle.competitions["aml-competition"].files = FILES
    write_tree(tmp_path / "data", FILES)

    def run() -> tuple[int, dict[str, dict]]:
        done = tool("doctor", "--data", tmp_path / "data", "--json")
        return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}

    return run


def test_all_is_green_where_all_is_right(look):
    code, checks = look()
    assert code == 0
    assert [name for name, check in checks.items() if not check["ok"]] == []
    assert list(checks) == ["python", "packages", "disk", "gpu", "data", "credentials", "rules", "quota", "submissions"]
    assert checks["credentials"]["found"] == "tester, by KAGGLE_USERNAME and KAGGLE_KEY"
    assert "kaggle 2." in checks["packages"]["found"]


def red(look, name: str, following: str) -> str:
    """Only this check is red, and says what to do."""
    code, checks = look()
    assert code == 1
    assert [key for key, check in checks.items() if not check["ok"]] == [name]
    assert following in checks[name]["next"]
    return checks[name]["found"]


def test_old_and_missing_packages_are_red(look, tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("numpy>=99\nno-such-package\n# a comment\n")
    monkeypatch.setattr("lib.jobs.doctor.REPO", tmp_path)
    found = red(look, "packages", "pip install -r requirements.txt")
    assert "is not >=99" in found
    assert "no-such-package is missing" in found


def test_data_that_is_missing_or_wrong(look, tmp_path):
    (tmp_path / "data" / "test/test/captions.txt").write_bytes(b"other")
    assert "captions.txt: has 5 bytes instead of 8" in red(look, "data", f"download_data.py --data {tmp_path}/data")


def test_data_that_cannot_be_read_hide_no_other_line(look, monkeypatch):
    def forbid(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lib.data.damage", forbid)
    assert "Permission denied" in red(look, "data", "")


def test_missing_and_wrong_credentials_are_red(look, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "wrong")
    assert "credentials were refused" in red(look, "credentials", "settings/api")
    monkeypatch.delenv("KAGGLE_KEY")
    for way in (
        "KAGGLE_API_TOKEN",
        "~/.kaggle/access_token",
        "~/.kaggle/kaggle.json",
        "KAGGLE_USERNAME and KAGGLE_KEY",
    ):
        assert red(look, "credentials", way) == "none"


def test_unaccepted_rules_and_used_up_limits_are_red(look, kaggle):
    competition = kaggle.competitions["aml-competition"]
    competition.rules_accepted = False
    red(look, "rules", "competitions/aml-competition/rules")
    competition.rules_accepted, kaggle.gpu_used_hours = True, 30.0
    assert "0.0 of 30.0 GPU hours left" in red(look, "quota", "--accelerator none")
    kaggle.gpu_used_hours, competition.daily_limit = 0.0, 0
    kaggle.fail("GetSubmissionLimits", Fault(json={"numToday": 5, "numTotal": 5}))
    red(look, "submissions", "after 00:00 UTC")


def test_one_call_that_fails_hides_no_other(look, kaggle):
    kaggle.fail("DownloadDataFile", Fault(500))
    assert "500" in red(look, "rules", "competitions/aml-competition")


def test_the_page_is_for_people(tool, kaggle, tmp_path):
    done = tool("doctor", "--data", tmp_path)
    assert done.returncode == 1
    assert "ok   python" in done.stdout
    assert "NOT  data" in done.stdout
    assert "-> python tools/download_data.py" in done.stdout


def test_it_comes_up_without_the_packages(tool, tmp_path):
    without = hide(tmp_path / "hidden", "torch", "requests", "packaging", "tqdm")
    done = tool.from_nothing("doctor", "--data", tmp_path, PYTHONPATH=without)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "ok   python" in done.stdout
    assert done.stdout.count("pip install -r requirements.txt") == 3
    assert done.stdout.count("not checked: packages first") == 3
    assert "-> python tools/download_data.py" in done.stdout  # which is looked at all the same


def test_the_sample_serves_where_there_is_no_data_at_all(tool, kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.jobs.doctor.DATA", tmp_path / "data")
    assert "the drawn sample serves meanwhile" in tool("doctor", "--data", tmp_path / "data").stdout
    (tmp_path / "data").mkdir()
    assert "the drawn sample" not in tool("doctor", "--data", tmp_path / "data").stdout


def test_one_missing_package_hides_no_other(tmp_path, monkeypatch):
    """A Python with a few of them, but not with what compares their versions."""
    (tmp_path / "requirements.txt").write_text("numpy>=99\nno-such-package\nnone-either>=1\n")
    monkeypatch.setattr("lib.jobs.doctor.REPO", tmp_path)
    monkeypatch.setitem(sys.modules, "packaging", None)
    assert check_packages().found == "no-such-package is missing, none-either is missing"
