"""Fixtures: no credentials or network, the stand-in for Kaggle, the kernel as a module, tools and runs as processes."""

from __future__ import annotations

import ast
import importlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from forked import TOOLS, KernelServer, Tool

# The official client reads these when it is first imported: before any test, away from the user's own settings.
os.environ["KAGGLE_API_ENVIRONMENT"] = "LOCALHOST"
os.environ["KAGGLE_CONFIG_DIR"] = tempfile.mkdtemp(prefix="kaggle-config-")
# Tiny products gain nothing from threads, and tests that run beside each other would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Under nohup, or in the background of a script, these are ignored, and so would be by all that the suite starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's home, credentials or proxies, or can reach Kaggle: port 9 of this machine is closed."""
    for name in list(os.environ):
        if (name.startswith(("KAGGLE_", "ALIGN_")) or name.lower().endswith("_proxy")) and name not in (
            "KAGGLE_API_ENVIRONMENT",
            "KAGGLE_CONFIG_DIR",
        ):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    for name, value in {
        "HOME": home,
        "TMPDIR": home / "tmp",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": home,
    }.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator:
    """The stand-in, with this process's environment pointing to it (credentials: user and key).

    A test whose parameter `fault` is a silence does not wait for it as long as the others would.
    """
    from stand_in import StandIn

    with StandIn(tmp_path / "kaggle") as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        fault = getattr(request.node, "callspec", None) and request.node.callspec.params.get("fault")
        if getattr(fault, "silent", 0):
            monkeypatch.setenv("ALIGN_TIMEOUT_SECONDS", str(fault.silent * 0.7))
        yield server


@pytest.fixture
def client(kaggle):
    """A connected client of the stand-in."""
    from lib.kaggle_api.client import connect

    return connect()


@pytest.fixture(scope="session")
def kernel() -> ModuleType:
    """The kernel as a module."""
    from lib.kernel import load_kernel

    return load_kernel()


@pytest.fixture(scope="session")
def loaded(kernel: ModuleType) -> None:
    """All that the commands import, also within functions, is there before the first test changes any of it."""
    for path in TOOLS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in [*names, node.module] if isinstance(node, ast.ImportFrom) else names:
                importlib.import_module(name)


@pytest.fixture
def tool(loaded: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Tool:
    """Run a command of tools/ as a process, in the test's folder: tool("submit", "runs/x", "--json").returncode."""
    return Tool(tmp_path, tmp_path_factory.mktemp("said"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelServer]:
    """Runs the kernel as a process; it draws no pictures."""
    started = KernelServer(tmp_path_factory.mktemp("server"))
    started.run("--mode=ready?")  # no test's time is what the first imports take
    yield started
    started.close()
