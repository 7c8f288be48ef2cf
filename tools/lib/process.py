"""The kernel as a sub-process on this machine: its folder locked, its log followed, its signals forwarded.

ended = run_kernel(data, output, ["--recipe", "align"], log=print)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lib.project import KERNEL, STOP_SIGNALS, InputError, signals_go_to

STOPPED = tuple(128 + number for number in STOP_SIGNALS)
SAVE_SECONDS = 60.0  # for a kernel that is asked to stop, to end its step and save its state


@dataclass(frozen=True)
class Ended:
    """How the kernel ended: its exit code (128 + n after signal n) and its own one line where it failed."""

    code: int
    error: str


class Forwarder:
    """Hands signals on to a process; those that come before it is there, as soon as it is."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.received: list[int] = []
        self.imports = True  # so far the process only loads its libraries: Ctrl-C would be a traceback out of one

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM if self.imports else number)

    def to(self, process: subprocess.Popen) -> None:
        self.process = process
        if self.received:
            process.terminate()

    def code(self, code: int) -> int:
        """The exit code of a process that ended with `code`: 128 + n after signal n, the first one that came here."""
        code = 128 - code if code < 0 else code
        return 128 + self.received[0] if self.received and code in STOPPED else code


def run_kernel(data: Path, output: Path, arguments: list[str], log: Callable[[str], None]) -> Ended:
    """The script itself, from an empty folder, its log line by line; an interrupt stops it and is waited for.

    kill -9 of this process is not forwarded: the kernel works on to its submission, and the lock says that it does.
    """
    command = [sys.executable, str(KERNEL), "--input", str(data.resolve()), "--output", str(output.resolve())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    error, forwarder = "", Forwarder()
    with (
        locked(output) as lock,
        tempfile.TemporaryDirectory() as empty,
        signals_go_to(forwarder),
        subprocess.Popen(
            command + arguments,
            cwd=empty,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            pass_fds=(lock,),  # a kernel that outlives this process goes on working in its folder
            process_group=0,  # Ctrl-C reaches a terminal's whole group: it must reach the kernel once, from here
        ) as process,
        stopped_on_failure(process),
    ):
        forwarder.to(process)
        for line in process.stdout or ():
            forwarder.imports = False
            if line.startswith("error: "):
                error = line.removeprefix("error: ").strip()
            else:
                log(line.rstrip("\n"))
        process.wait()
    return Ended(forwarder.code(process.returncode), error)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """The folder, made where it is missing, for one process and its children; yields the lock's file descriptor."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it goes with the last process that has the descriptor
        except BlockingIOError:
            others = users_of(folder)
            who = f" ({others})" if others else ""
            raise InputError(
                f"{folder}: a run is at work in it{who}; wait for its end or name another folder"
            ) from None
        yield lock
    finally:
        os.close(lock)


def users_of(folder: Path) -> str:
    """`process 7, 12`: the others that have a folder open; empty where there are none, or is no /proc to tell."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            if link.readlink() == folder.resolve():
                found.add(link.parts[2])
    others = sorted(found - {str(os.getpid())}, key=int)
    return f"process {', '.join(others)}" if others else ""


@contextlib.contextmanager
def stopped_on_failure(process: subprocess.Popen) -> Iterator[None]:
    """Whatever else ends the block ends the process, too: it may save its state."""
    try:
        yield
    except BaseException:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SAVE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def as_text(knobs: dict[str, Any]) -> str:
    """Knobs as a reader sees them."""
    return " ".join(f"{key}={value}" for key, value in knobs.items())


def as_arguments(knobs: dict[str, Any], settings: Sequence[str] = ()) -> list[str]:
    """Knobs, and settings as a user types them, as the kernel's command line; a knob that is in both is a slip."""
    for setting in settings:
        if (key := setting.partition("=")[0].strip()) in knobs:
            raise InputError(f"--set {setting}: {key} is set here already, to {knobs[key]}: leave it out")
    typed = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in knobs.items()]
    return [f"--set={setting}" for setting in (*typed, *settings)]
