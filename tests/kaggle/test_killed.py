"""Tools killed over and over while every listing lags: nothing is pushed, uploaded or submitted twice, or lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from account import PIPELINE, WEIGHTS
from drawn import write_tree
from forked import Forked
from made_runs import make_run
from stopping import kill_at_random_moments

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lagging")]


@pytest.fixture
def starts(tool, tmp_path) -> Callable[..., Callable[[], Forked]]:
    """What starts a tool with these options."""
    return lambda name, *options: partial(tool.start, name, *options, "--runs", tmp_path / "runs")


def test_a_push_killed_over_and_over_is_made_once(kaggle, finished, starts, tmp_path):
    kill_at_random_moments(kaggle.calls, starts("push_kernel"), kills=6, most=8)
    assert len(kaggle.kernels[PIPELINE]) == 1
    assert (tmp_path / "runs" / "aml-text-to-image-alignment-v1" / "manifest.json").exists()


def test_a_package_killed_over_and_over_is_uploaded_once(kaggle, starts, tmp_path):
    run = make_run(tmp_path / "runs" / "mine")
    kill_at_random_moments(kaggle.calls, starts("package_dataset", "--run", run), kills=6, most=12)
    assert len(kaggle.datasets[WEIGHTS].versions) == 1


def test_a_submission_killed_over_and_over_is_made_once(kaggle, competition, weights, starts, tmp_path):
    run = write_tree(tmp_path / "runs" / "done", kaggle.plans[0].outputs)
    submit = starts("submit", run, "--data", tmp_path / "data")
    kill_at_random_moments(kaggle.calls, submit, kills=6, most=6, once=True)
    assert len(competition.submissions) == 1


def test_a_ship_killed_over_and_over_does_each_step_once(kaggle, competition, weights, starts, tmp_path):
    ship = starts("ship", "--weights", weights, "--data", tmp_path / "data")
    kill_at_random_moments(kaggle.calls, ship, kills=6)
    assert len(kaggle.datasets[WEIGHTS].versions) == len(kaggle.kernels[PIPELINE]) == len(competition.submissions) == 1
    assert competition.submissions[0].public is not None
