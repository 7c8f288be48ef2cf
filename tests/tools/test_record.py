"""The record: append-only, safe against torn lines and against writers at the same time."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lib import record
from lib.project import ToolError


def test_what_was_appended_is_found(tmp_path):
    record.append(tmp_path / "runs", "push", kernel="a/b", version=3, run="r1")
    record.append(tmp_path / "runs", "submission", ref=7, run="r1", sha256="f" * 64)
    assert [entry["event"] for entry in record.find(tmp_path / "runs", run="r1")] == ["push", "submission"]
    assert record.find(tmp_path / "runs", event="submission", ref=7)[0]["sha256"] == "f" * 64
    assert record.find(tmp_path / "runs", kernel="a/b", version=4) == []


def test_no_record_is_an_empty_one(tmp_path):
    assert record.read(tmp_path) == []


def test_a_torn_last_line_is_told_and_does_not_swallow_the_next_entry(tmp_path, capsys):
    record.append(tmp_path, "push", version=1)
    with (tmp_path / record.RECORD).open("a") as file:
        file.write('{"event": "push", "vers')
    record.append(tmp_path, "push", version=2)
    assert [entry["version"] for entry in record.read(tmp_path)] == [1, 2]
    assert "record.jsonl:2: torn line skipped" in capsys.readouterr().err


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: record.append(tmp_path, "push", version=n, text="x" * 9000), range(40)))
    assert sorted(entry["version"] for entry in record.read(tmp_path)) == list(range(40))


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ToolError, match=r"record\.jsonl: cannot be written"):
        record.append(tmp_path / "runs", "push")


def test_git_state_reads_changes_in_any_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "REPO", tmp_path)
    (tmp_path / "words").write_bytes(b"caf\xe9\n")
    for words in ("init -q", "add words", "-c user.name=a -c user.email=a@b commit -q -m one"):
        subprocess.run(["git", "-C", tmp_path, *words.split()], check=True)
    (tmp_path / "words").write_bytes(b"na\xefve\n")
    assert record.git_state()["dirty"]


def test_git_state_names_the_commit():
    state = record.git_state()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert state["commit"] is None or head.stdout.startswith(state["commit"])
    assert isinstance(state["dirty"], bool)
