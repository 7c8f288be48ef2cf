"""The kernel as a sub-process on this machine: started, its log followed, its signals forwarded.

    ended = run_kernel(data, output, ["--recipe", "align"], log=print)
"""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.project import KERNEL

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class Ended:
    """How the kernel ended: its exit code (128 + n after signal n) and its own one line where it failed."""

    code: int
    error: str


def run_kernel(data: Path, output: Path, arguments: list[str], log: Callable[[str], None]) -> Ended:
    """The script itself, from an empty folder, its log line by line; an interrupt stops it and is waited for."""
    command = [sys.executable, str(KERNEL), "--input", str(data.resolve()), "--output", str(output.resolve())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    error = ""
    with tempfile.TemporaryDirectory() as empty, subprocess.Popen(
        command + arguments, cwd=empty, env=environment | {"PYTHONUNBUFFERED": "1"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        process_group=0,  # Ctrl-C reaches a terminal's whole group: it must reach the kernel once, from here
    ) as process, forwarded_signals(process):
        for line in process.stdout or ():
            if line.startswith("error: "):
                error = line.removeprefix("error: ").strip()
            else:
                log(line.rstrip("\n"))
    code = process.returncode
    return Ended(128 - code if code < 0 else code, error)


@contextlib.contextmanager
def forwarded_signals(process: subprocess.Popen) -> Iterator[None]:
    """SIGINT and SIGTERM go to `process` while the block lasts; whatever else ends the block ends it, too."""
    def forward(number: int, frame: object) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # its helpers as well
        raise
    finally:
        process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def as_arguments(knobs: dict[str, Any]) -> list[str]:
    """Knobs as the kernel's command line."""
    return [f"--set={key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in knobs.items()]
