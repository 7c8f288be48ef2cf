"""Fixtures of the Kaggle tools: commands that work against the stand-in, everything below the test's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from drawn import IMAGE, drawn_competition, write_tree
from lib.data import Known
from lib.jobs.dataset import facts_of
from made_runs import made_outputs, make_run
from stand_in import Plan, metric_score


@pytest.fixture(autouse=True)
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands stage what they send: below the test's folder, not in the repository."""
    for part, name in (("order", "kernel"), ("dataset", "dataset"), ("fleet", "sweep")):
        monkeypatch.setattr(f"lib.jobs.{part}.BUILD", tmp_path / "build" / name)
    return tmp_path / "build"


@pytest.fixture
def push(tool, tmp_path, kaggle) -> Callable:
    """The tool; it keeps its record in the test's folder."""
    return partial(tool, "push_kernel", "--runs", tmp_path / "runs")


@pytest.fixture
def package(tool, tmp_path) -> Callable:
    """The tool, on a run with made-up weights, `runs/mine`."""
    run = make_run(tmp_path / "runs" / "mine")
    return partial(tool, "package_dataset", "--runs", tmp_path / "runs", "--run", run)


@pytest.fixture
def finished(kaggle) -> dict[str, bytes]:
    """The next kernels end well, after a while, with these outputs."""
    outputs = made_outputs()
    kaggle.plans = [Plan(queued=1, running=1, outputs=outputs, log="epoch 1\nepoch 2\n")]
    return outputs


@pytest.fixture
def competition(kaggle, kernel, tmp_path, monkeypatch):
    """The competition in small, scored by the real metric, downloaded into data/."""
    files, solution = drawn_competition()
    found = kaggle.competitions["aml-competition"]
    found.files, found.score = dict(files), metric_score(kernel, solution)
    found.others = {"the others": 0.01}
    write_tree(tmp_path / "data", files)
    known = {name: Known(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    monkeypatch.setattr("lib.jobs.submission.KNOWN", known)
    return found


@pytest.fixture
def run_ship(tool, tmp_path, competition) -> Callable:
    """The tool, with everything in the test's folder."""
    return partial(tool, "ship", "--runs", tmp_path / "runs", "--data", tmp_path / "data")


@pytest.fixture
def weights(tmp_path, kaggle, kernel) -> Path:
    """A run with made-up weights; the next kernels answer with a valid submission made from them."""
    run = make_run(tmp_path / "runs" / "mine")
    predictions = kernel.np.random.default_rng(0).normal(size=(100, IMAGE)).astype("float32")
    kernel.write_submission(tmp_path / "made.csv", range(1, 101), predictions)
    used = facts_of(run, [kernel.FINAL_MODEL])
    outputs = made_outputs(submission=(tmp_path / "made.csv").read_bytes(), inputs=used)
    kaggle.plans = [Plan(queued=1, running=1, outputs=outputs)]
    return run


@pytest.fixture
def lagging(kaggle, monkeypatch) -> None:
    """Every listing lags a minute, at a pace at which a tool's start takes less than that."""
    kaggle.clock.pace = 0.02
    monkeypatch.setenv("ALIGN_PACE", str(kaggle.clock.pace))
    for name in ("history_lag", "kernel_lag", "dataset_lag", "files_lag", "output_lag", "session_lag"):
        setattr(kaggle.habits, name, 60.0)
