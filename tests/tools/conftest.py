"""Runs of the kernel that do not pay for its imports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from forked import KernelServer
from lib.process import Ended


@pytest.fixture
def forked(server: KernelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools have the server run the kernel, in place of a process from nothing."""

    def run_kernel(data: Path, output: Path, arguments: list[str], log: Callable[[str], None]) -> Ended:
        ended = server.run("--input", data, "--output", output, *arguments)
        for line in ended.stdout.splitlines():
            log(line)
        return Ended(ended.returncode, ended.stderr)

    for module in ("process", "runs"):
        monkeypatch.setattr(f"lib.{module}.run_kernel", run_kernel)
