"""Tools killed over and over while every listing lags: nothing is pushed, uploaded or submitted twice, or lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kaggle_runs import copy_of_the_repo, kill_at_random_moments, outputs_of_run, write_tree

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lagging")]
KERNEL, DATASET = "tester/aml-text-to-image-alignment", "tester/aml-alignment-weights"


@pytest.fixture
def command(tmp_path) -> Callable[..., list]:
    """A tool of a copy of the repository, whose build folders a kill may leave behind."""
    repo: Path = copy_of_the_repo(tmp_path / "repo")
    return lambda name, *options: [sys.executable, repo / "tools" / f"{name}.py", *options, "--runs", tmp_path / "runs"]


def test_push(kaggle, finished, command, tmp_path):
    kill_at_random_moments(kaggle.calls, command("push_kernel"), kills=6, most=8)
    assert len(kaggle.kernels[KERNEL]) == 1
    assert (tmp_path / "runs" / "aml-text-to-image-alignment-v1" / "manifest.json").exists()


def test_package(kaggle, kernel, command, tmp_path):
    run = write_tree(tmp_path / "runs" / "mine", outputs_of_run(kernel))
    kill_at_random_moments(kaggle.calls, command("package_dataset", "--run", run), kills=6, most=12)
    assert len(kaggle.datasets[DATASET].versions) == 1


def test_submit(kaggle, competition, kernel, weights, command, tmp_path):
    run = write_tree(tmp_path / "runs" / "done", kaggle.plans[0].outputs)
    submit = command("submit", run, "--data", tmp_path / "data")
    kill_at_random_moments(kaggle.calls, submit, kills=6, most=6, once=True)
    assert len(competition.submissions) == 1


def test_ship(kaggle, competition, weights, command, tmp_path):
    ship = command("ship", "--weights", weights, "--data", tmp_path / "data")
    kill_at_random_moments(kaggle.calls, ship, kills=6)
    assert len(kaggle.datasets[DATASET].versions) == len(kaggle.kernels[KERNEL]) == len(competition.submissions) == 1
    assert competition.submissions[0].public is not None
