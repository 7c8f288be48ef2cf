"""Fixtures of the Kaggle tools: called in this process against the stand-in, everything below the test's folder."""

from __future__ import annotations

import hashlib

import pytest

import push_kernel
import ship
from kaggle_runs import D_IMAGE, TESTS, competition_files, outputs_of_run, write_tree
from lib.data import Known
from lib.jobs.dataset import facts_of
from stand_in import Plan, metric_score


@pytest.fixture
def push(tmp_path, kaggle, monkeypatch):
    """Call the tool against the stand-in; it stages and keeps its record in the test's folder."""
    monkeypatch.setattr("lib.jobs.order.BUILD", tmp_path / "build" / "kernel")
    kaggle.competitions.setdefault("aml-competition", None)
    return lambda *options: push_kernel.main([*map(str, options), "--runs", str(tmp_path / "runs")])


@pytest.fixture
def finished(kaggle, kernel):
    """The next kernels end well, after a while, with these outputs."""
    outputs = outputs_of_run(kernel)
    kaggle.plans = [Plan(queued=1, running=1, outputs=outputs, log="epoch 1\nepoch 2\n")]
    return outputs


@pytest.fixture
def competition(kaggle, kernel, tmp_path):
    """The competition in small, scored by the real metric, downloaded into data/."""
    files, solution = competition_files()
    found = kaggle.competitions["aml-competition"]
    found.files, found.score = files, metric_score(kernel, solution)
    found.others = {"the others": 0.01}
    write_tree(tmp_path / "data", files)
    return found


@pytest.fixture
def run_ship(tmp_path, competition, monkeypatch):
    """Call the tool with everything in the test's folder."""
    known = {name: Known(len(data), hashlib.sha256(data).hexdigest()) for name, data in competition.files.items()}
    monkeypatch.setattr("lib.jobs.submission.KNOWN", known)
    monkeypatch.setattr("lib.jobs.order.BUILD", tmp_path / "build" / "kernel")
    monkeypatch.setattr("lib.jobs.dataset.BUILD", tmp_path / "build" / "dataset")
    fixed = ["--runs", str(tmp_path / "runs"), "--data", str(tmp_path / "data")]
    return lambda *options: ship.main([*map(str, options), *fixed])


@pytest.fixture
def weights(tmp_path, kaggle, kernel):
    """A run with made-up weights; the next kernels answer with a valid submission made from them."""
    run = write_tree(tmp_path / "runs" / "mine", outputs_of_run(kernel))
    predictions = kernel.np.random.default_rng(0).normal(size=(TESTS, D_IMAGE)).astype("float32")
    kernel.write_submission(tmp_path / "made.csv", range(1, TESTS + 1), predictions)
    used = facts_of(run, [kernel.FINAL_MODEL])
    outputs = outputs_of_run(kernel, submission=(tmp_path / "made.csv").read_bytes(), inputs=used)
    kaggle.plans = [Plan(queued=1, running=1, outputs=outputs)]
    return run


@pytest.fixture
def lagging(kaggle, monkeypatch):
    """Every listing lags a minute, at a pace at which a tool's start takes less than that."""
    kaggle.clock.pace = 0.05
    monkeypatch.setenv("ALIGN_PACE", str(kaggle.clock.pace))
    for name in ("history_lag", "kernel_lag", "dataset_lag", "files_lag", "output_lag", "session_lag"):
        setattr(kaggle.habits, name, 60.0)
