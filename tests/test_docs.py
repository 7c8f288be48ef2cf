"""What the READMEs and docs/ show is there: commands parse and run, links lead somewhere, names are the kernel's."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drawn import draw_data
from forked import succeeded
from lib.project import REPO

PAGES = sorted(page for folder in (".", "docs", "kaggle_*") for page in REPO.glob(f"{folder}/*.md"))
COMMAND = re.compile(r"(?:\.venv/bin/)?python ((?:tools|kernel)/\w+\.py[^`|&;\n]*)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACE = re.compile(r"`((?:tools|kernel|docs|tests|\.ci|kaggle_\w+)/[\w./-]*)`")


def text_of(page: Path) -> str:
    """A page's text, links and code as they are written."""
    return page.read_text(encoding="utf-8")


def shown_commands() -> list[str]:
    """Every command of ours that a page shows, without what the shell would do with it."""
    found = [match for page in PAGES for match in COMMAND.findall(text_of(page)) if "--help" not in match]
    return sorted({shlex.join(shlex.split(command, comments=True)) for command in found})


class Parsed(Exception):
    """The command line was accepted."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__()
        self.given = given


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], argparse.Namespace]:
    """What a command's own parser makes of its arguments; nothing of the command runs."""
    accept = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: Any) -> argparse.Namespace:
        raise Parsed(accept(parser, *arguments))

    def read(command: str) -> argparse.Namespace:
        script, *arguments = shlex.split(command)
        spec = importlib.util.spec_from_file_location(f"shown_{Path(script).stem}", REPO / script)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look it up
        spec.loader.exec_module(module)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as accepted:
            module.main(arguments)
        return accepted.value.given

    return read


@pytest.mark.parametrize("command", shown_commands())
def test_every_command_parses(command, parse, kernel):
    given = vars(parse(command))
    if given.get("script") == "embed" or command.startswith("kernel/embed.py"):
        return  # its knobs are options of its own, and are parsed with them
    recipes = given.get("recipes") or [given.get("recipe")]
    settings = dict(map(kernel.parse_setting, given.get("set") or []))
    for recipe in recipes:
        assert kernel.resolve_candidates(settings | ({"recipe": recipe} if recipe else {}))


@pytest.mark.slow
def test_the_readmes_walk(tool, tmp_path):
    """What the README does with two runs, on a tiny data set: every line of it, run as a user does."""
    data, runs = draw_data(tmp_path / "data"), tmp_path / "runs"
    for name in ("A", "B"):
        given = ["--data", data, "--runs", runs, "--output", runs / name, "--set", f"seed={ord(name)}"]
        succeeded(tool("run_local", "--recipe", "closed_form", *given))
    block = next(part for part in text_of(REPO / "README.md").split("```") if "--compare" in part)
    lines = [shlex.split(command, comments=True) for command in COMMAND.findall(block)]
    assert len(lines) >= 4
    for script, *arguments in lines:
        placed = [re.sub("^runs/", f"{runs}/", argument) for argument in arguments]
        extra = [] if script == "tools/runs.py" and not arguments else ["--data", data]
        succeeded(tool(Path(script).stem, *placed, "--runs", runs, *extra))


def anchors_of(page: Path) -> set[str]:
    """What a link into a page may name: headings as GitHub spells them, and marks."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    spelled = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return spelled | set(re.findall(r'<a id="([^"]+)">', text_of(page)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(text_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_places_are_there(page):
    missing = [place for place in PLACE.findall(text_of(page)) if not (REPO / place).exists()]
    assert not missing


def test_every_fault_of_kaggle_names_tests_that_are_there():
    columns = [line.split("|") for line in text_of(REPO / "docs" / "kaggle.md").splitlines() if line.startswith("| ")]
    named = [name for row in columns[1:] for name in re.findall(r"`(\w+)`", row[4])]
    tests = "\n".join(text_of(path) for path in (REPO / "tests" / "kaggle").glob("test_*.py"))
    there = " ".join(re.findall(r"def (test_\w+)", tests))
    assert named
    assert [name for name in named if name not in there] == []  # parts of names will do


def test_the_method_names_what_the_kernel_has(kernel):
    names = re.findall(r"`([A-Za-z_]\w*)`", text_of(REPO / "docs" / "method.md"))
    known = {*vars(kernel), *kernel.FIELDS, *kernel.RECIPES}
    assert names
    assert set(names) <= known


def test_the_readme_keeps_its_length():
    assert 110 <= len(text_of(REPO / "README.md").splitlines()) <= 130


def test_every_recipe_and_tool_is_told():
    from lib.kernel import recipe_names

    readme, tools = text_of(REPO / "README.md"), text_of(REPO / "docs" / "tools.md")
    assert [name for name in recipe_names() if f"`{name}`" not in readme] == []
    assert [path.name for path in (REPO / "tools").glob("*.py") if f"| `{path.name}` |" not in tools] == []


def test_the_version_is_that_of_the_newest_changes():
    newest = re.search(r"^## (\S+) ", text_of(REPO / "CHANGES.md"), flags=re.MULTILINE)[1]
    assert tomllib.loads(text_of(REPO / "pyproject.toml"))["project"]["version"] == newest


def test_every_figure_is_measured():
    assert [page.name for page in PAGES if "TODO-MEASURE" in text_of(page)] == []
