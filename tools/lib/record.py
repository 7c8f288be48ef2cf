"""The local record of what was run, pushed, submitted and scored: `<runs>/record.jsonl`, one JSON object a line.

    record.append(runs, "submitted", ref=1234, run="align-1", sha256="...", commit="475afaf")
    record.find(runs, event="submitted", ref=1234)

Append-only: an entry is one write under a lock, so writers never mix and a crash can only tear the last line, which
is told and skipped. Nothing here is needed to go on: what is lost can be read from Kaggle's own history.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib.project import REPO, InputError, ToolError

RECORD = "record.jsonl"
OWNER_LINE = r'^ *"id": '  # of the metadata files, which `push_kernel.py --init USER` changes


def prepare(runs: Path) -> None:
    """See that the record can be written, before hours of work are to be recorded."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        (runs / RECORD).open("a").close()
    except OSError as error:
        raise InputError(f"{runs}: cannot be written ({error.strerror}); --runs DIR names another place") from None


def append(runs: Path, event: str, **values: Any) -> dict[str, Any]:
    """Add an entry {time, event, ...values} and see it safely on the disk; the entry."""
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **values}
    path = runs / RECORD
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            file.write((("\n" if torn else "") + json.dumps(entry) + "\n").encode())
            os.fsync(file)
    except OSError as error:
        raise ToolError(f"{path}: cannot be written ({error.strerror})") from None
    return entry


def read(runs: Path) -> list[dict[str, Any]]:
    """Every entry, oldest first; a line that is none is told on stderr and skipped."""
    path = runs / RECORD
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            found.append(entry)
        elif line.strip():
            print(f"{path}:{number}: torn line skipped", file=sys.stderr)
    return found


def find(runs: Path, **values: Any) -> list[dict[str, Any]]:
    """The entries in which each of `values` stands as given, oldest first."""
    return [entry for entry in read(runs) if all(entry.get(key) == value for key, value in values.items())]


def git_state() -> dict[str, Any]:
    """{"commit": short hash or None, "dirty": whether tracked files differ from it, other than in their owner}."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(REPO), *arguments], capture_output=True, text=True, errors="replace")
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        return {
            "commit": git("rev-parse", "--short=10", "HEAD"),
            "dirty": bool(git("diff", "HEAD", "--ignore-matching-lines", OWNER_LINE)),
        }
    except FileNotFoundError:  # no git on this machine
        return {"commit": None, "dirty": False}
