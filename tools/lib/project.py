"""The ground floor: where things are, how a tool fails, how a file is written, how a table is printed.

Exit codes, the same in every tool: 0 done and checked, 1 the thing asked for failed, 2 the input is wrong,
130 interrupted. A failure is one line on stderr that names the thing, the place and the next command.
"""
from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
KERNEL = REPO / "kernel" / "pipeline.py"
DATA = REPO / "data"
RUNS = REPO / "runs"


class ToolError(Exception):
    """The thing asked for did not happen; `exit_code` 1, one line for the user."""

    exit_code = 1


class InputError(ToolError):
    """What the user gave is wrong; `exit_code` 2, one line for the user."""

    exit_code = 2


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and leave with an honest exit code: no traceback for a failure that has a name."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `tool | head`: the reader left, nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        # The kernel's own UserError is another module's class: known by its mark, not by its type.
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        code = exit_code
    sys.exit(code)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's 0600 would make an output that a team cannot share
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Fixed columns: the first left-aligned, the others right-aligned; None prints as '-'."""
    cells = [list(header), *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        padded[0] = row[0].ljust(widths[0])
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same as markdown."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join('-' if cell is None else str(cell) for cell in line)} |" for line in lines) + "\n"
