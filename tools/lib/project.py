"""The ground floor: where things are, how a tool begins and fails, how a file is written, how a table is printed.

Exit codes, the same in every tool: 0 done and checked, 1 the thing asked for failed, 2 the input is wrong,
128 + n ended by signal n (130 Ctrl-C). A failure is one line on stderr that names the thing, the place and the next
command.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import secrets
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

REPO = Path(__file__).resolve().parent.parent.parent
KERNEL = REPO / "kernel" / "pipeline.py"
DATA = REPO / "data"
RUNS = REPO / "runs"
COMPETITION = "aml-competition"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INSTALL = "run it with .venv/bin/python, or pip install -r requirements.txt"


class ToolError(Exception):
    """The thing asked for did not happen; `exit_code` 1, one line for the user."""

    exit_code = 1


class InputError(ToolError):
    """What the user gave is wrong; `exit_code` 2, one line for the user."""

    exit_code = 2


# ---------------------------------------------------------------------------------- how a tool begins and ends
def tell_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The end by an error that nobody caught: a package that this Python lacks is one line, not a traceback."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in ("", "lib", *sys.stdlib_module_names):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {package} is missing; {INSTALL}", file=sys.stderr)
    sys.exit(InputError.exit_code)


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and leave with an honest exit code: no traceback for a failure that has a name."""
    outlive_readers()
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt  # whatever was begun is cleaned up on the way out, as after Ctrl-C

    with signals_go_to(stop):
        try:
            code = main() or 0
            sys.stdout.flush()  # a full disk is told here, not after the exit code
        except SystemExit:
            raise
        except BaseException as error:  # an import that a signal ends fails in its own way
            code = exit_code_of(error, received)
    sys.exit(code)


def exit_code_of(error: BaseException, received: Sequence[int]) -> int:
    """The exit code of a failed tool, whose one line is printed; an error without a code is raised: it is a bug."""
    if received or isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 128 + (received[-1] if received else signal.SIGINT)
    # The kernel's own UserError is another module's class: known by its mark, not by its type.
    code = getattr(error, "exit_code", ToolError.exit_code if isinstance(error, OSError) else None)
    if code is None:
        raise error
    print(f"error: {error}", file=sys.stderr)
    return code


@contextmanager
def signals_go_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Stop signals go to `handler` while the block lasts; those that are ignored, as under nohup, stay ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    heard = [number for number, old in before.items() if old is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


class Outlet(io.FileIO):
    """A standard stream that outlives its reader: `tool | head` ends the reading, not the work."""

    def write(self, data: Any) -> int:
        """As of a file; what nobody reads any more is dropped."""
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # else each write would fail, the last one at exit
            if error.errno not in (errno.EPIPE, errno.EIO):  # the reader left, the terminal was closed
                raise
        if self.fileno() == 1:
            print("nobody reads the output any more; the work goes on", file=sys.stderr)
        return len(data)


def outlive_readers() -> None:
    """Have this process's own standard streams outlive their readers."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):  # not a test's
            outlet, by_line = io.BufferedWriter(Outlet(number, "w", closefd=False)), number == 2 or stream.isatty()
            text = io.TextIOWrapper(outlet, stream.encoding, "backslashreplace", line_buffering=by_line)
            setattr(sys, name, text)


# ---------------------------------------------------------------------------------------------- the command line
OPTIONS: dict[str, dict[str, Any]] = {
    "--data": {"type": Path, "metavar": "DIR", "help": "the data lie somewhere below (default data/, else a sample)"},
    "--runs": {"type": Path, "default": RUNS, "metavar": "DIR", "help": "where runs and record lie (default runs/)"},
    "--recipe": {"metavar": "NAME", "help": "a recipe of the kernel (run_local.py --list)"},
    "--set": {"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "a knob; may be repeated"},
    "--json": {"action": "store_true", "help": "the result as JSON on stdout"},
    "--competition": {"metavar": "SLUG", "default": COMPETITION, "help": "its slug (default: %(default)s)"},
}


def make_parser(page: str, codes: str, *options: str) -> argparse.ArgumentParser:
    """A command's parser: its docstring with examples, what its exit codes say, and those of OPTIONS that it takes."""
    parser = argparse.ArgumentParser(
        description=page, epilog=f"exit codes: {codes}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in options:
        parser.add_argument(option, **OPTIONS[option])
    return parser


def as_command(script: str, options: dict[str, Any], *places: object) -> str:
    """A command of ours for a person to copy; an option without a value is left out, a list's is repeated."""
    words = ["python", f"tools/{script}.py", *map(str, places)]
    for option, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            words += [] if each is None else [option, str(each)]
    return shlex.join(words)


def minutes(text: str) -> float:
    """The type of an option that takes a time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"minutes '{text}': give a number that is more than 0")
    return value


# ------------------------------------------------------------------------------------------------------- files
@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    temporary.touch(exist_ok=False)  # with the rights that the user's umask gives a file
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def in_turn(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time into the block of this name; another one waits until it is its turn."""
    path = folder / ".locks" / re.sub(r"[^\w.-]+", "-", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:  # the lock goes with its process, however that ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: another process here is at it; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_file(path: Path, content: str | bytes) -> None:
    """The whole file or, after a failure, what was there before."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path: Path, advice: str, optional: bool = False) -> dict[str, Any]:
    """A JSON object; an `optional` one that is not there is {}, a broken one is the user's error with an `advice`."""
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "" if isinstance(error, FileNotFoundError) else f" ({error})"
        raise InputError(f"{path.parent}: no readable {path.name}{why}; {advice}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; {advice}")
    return content


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(path: Path, sha256: str, size: int) -> str:
    """What is wrong with a file, as the end of a sentence that begins with its name; "" for the right one."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size:,} bytes instead of {size:,}"
    digest = sha256_of(path)
    return "" if digest == sha256 else f"has another sha256: {digest[:12]}... instead of {sha256[:12]}..."


# ------------------------------------------------------------------------------------------------------ tables
def format_table(header: Sequence[str], rows: Sequence[Sequence[object]], texts: Sequence[int] = (0,)) -> str:
    """Fixed columns: those of the numbers `texts` left-aligned, the others right-aligned; None prints as '-'."""
    lines = [["-" if cell is None else str(cell) for cell in row] for row in [header, *rows]]
    columns = []
    for place, cells in enumerate(zip(*lines, strict=True)):
        width = max(map(len, cells))
        columns.append([cell.ljust(width) if place in texts else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def figure(value: float | None, pattern: str = ".4f") -> str | None:
    """A number of a table as text; None where there is none."""
    return None if value is None else format(value, pattern)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]], as_json: bool) -> None:
    """A table on stdout, or the same as JSON: a list of objects."""
    if as_json:
        names = [name.replace(" ", "_") for name in header]
        print(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
    else:
        print(format_table(header, rows))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same as markdown."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join('-' if cell is None else str(cell) for cell in line)} |" for line in lines) + "\n"
