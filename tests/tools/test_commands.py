"""Every command, started from nothing: it says what it does, and an offline one never loads the Kaggle client."""

from __future__ import annotations

import pytest

from forked import TOOLS, failed, hide, succeeded

COMMANDS = sorted(path.stem for path in TOOLS.glob("*.py"))
OFFLINE = {"run_local", "sample_data", "verify", "benchmark", "kaggle_lint", "runs"}


def test_the_offline_commands_are_there():
    assert set(COMMANDS) >= OFFLINE


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(tool, tmp_path, command):
    """Without torch, which takes a second to load, and an offline one without the client."""
    client = ["kaggle", "kagglesdk", "requests"] if command in OFFLINE else []
    done = succeeded(tool.from_nothing(command, "--help", PYTHONPATH=hide(tmp_path / "hidden", "torch", *client)))
    assert f"python tools/{command}.py" in done.stdout
    assert "\n\nexit codes: " in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(("command", "package"), [("submit", "numpy"), ("run_local", "torch")])
def test_a_python_without_the_packages_is_told_in_one_line(tool, tmp_path, command, package):
    """Missing when the command is imported, or when it is at work already."""
    without = hide(tmp_path / "hidden", package)
    done = failed(
        tool.from_nothing(command, PYTHONPATH=without), 2, f"{package} is missing; run it with .venv/bin/python"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["submit", "package_dataset", "push_kernel", "sweep"])
@pytest.mark.parametrize("text", ["0", "nan", "inf", "soon"])
def test_a_wait_is_a_number_above_zero(tool, command, text):
    failed(tool(command, "--timeout-minutes", text), 2, f"minutes '{text}': give a number that is more than 0")
