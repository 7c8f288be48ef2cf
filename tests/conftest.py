"""Fixtures: the stand-in for Kaggle, an environment without credentials or network, the kernel module."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

# The official client reads these when it is first imported: before any test, away from the user's own settings.
os.environ["KAGGLE_API_ENVIRONMENT"] = "LOCALHOST"
os.environ["KAGGLE_CONFIG_DIR"] = tempfile.mkdtemp(prefix="kaggle-config-")
# Tiny products gain nothing from threads, and tests that run beside each other would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the suite runs under nohup, what it starts would ignore it
TOOLS = Path(__file__).resolve().parent.parent / "tools"


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


@pytest.fixture
def run_tool_process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run tools/<name>.py as a user does: run_tool_process("submit", "--help", env={...})."""

    def run(name: str, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        environment = os.environ | {"KAGGLE_CONFIG_DIR": str(tmp_path / "home" / ".kaggle")} | (env or {})
        return subprocess.run(
            [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def kernel() -> ModuleType:
    """The kernel as a module."""
    from lib.kernel import load_kernel

    return load_kernel()


@dataclass(frozen=True)
class Outcome:
    """How a tool's run ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr, which of a failure is the one that counts."""
        return self.err.rstrip("\n").rpartition("\n")[2]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a tool's main in this process with the exit code of a real one: tool(submit.main, "runs/x", "--json")."""

    def run(main: Callable, *arguments: object) -> Outcome:
        from lib.project import run_tool

        with pytest.raises(SystemExit) as ended:
            run_tool(lambda: main([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run
