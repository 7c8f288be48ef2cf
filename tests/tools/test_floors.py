"""Who may know whom: imports go down the floors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.project import REPO

TOOLS = REPO / "tools"
FLOORS = (
    {"project"},
    {"kernel", "process", "record", "sample", "kaggle_api"},
    {"data", "runs", "plots"},
    {"weights"},
    {"jobs", "report", "bench"},
    {"commands"},
)
COMMANDS = {path.stem for path in TOOLS.glob("*.py")}


def part_of(path: Path) -> str:
    """The part of the house that a file belongs to: a module or folder of lib/, or the commands."""
    place = path.relative_to(TOOLS).with_suffix("").parts
    return place[1] if place[0] == "lib" else "commands"


def imported_parts(path: Path) -> Iterator[str]:
    """The parts of the house that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "lib":
                yield rest[0]
            elif first in COMMANDS:
                yield "commands"


def floor_of(part: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(TOOLS.rglob("*.py")) if path.name != "__init__.py"],
    ids=lambda path: str(path.relative_to(TOOLS)),
)
def test_imports_go_down(path: Path) -> None:
    own = part_of(path)
    for part in imported_parts(path):
        below = floor_of(part) < floor_of(own)
        assert below or (part == own and own != "commands"), f"{own} imports {part}"
