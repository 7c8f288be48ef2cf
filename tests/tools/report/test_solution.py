"""verify --solution: submissions against known answers, and every input that cannot be scored."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from forked import Ended, Tool, failed, succeeded


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Known answers for the test captions of the drawn data."""
    vectors = np.random.default_rng(5).normal(size=(100, 48)).astype(np.float32)  # the right one is the nearest
    path = tmp_path / "solution.npz"
    np.savez(path, **{"captions/ids": np.arange(1, 101), "images/embeddings": vectors})
    return path


@pytest.fixture
def score(tool: Tool, answers: Path) -> Callable[..., Ended]:
    """The tool, against these answers; a later --solution wins."""
    return partial(tool, "verify", "--solution", answers)


def submission(path: Path, vectors: np.ndarray, kernel) -> Path:
    kernel.write_submission(path, np.arange(1, len(vectors) + 1), vectors.astype(np.float32))
    return path


def test_a_submission_against_known_answers(answers: Path, tmp_path: Path, score, kernel) -> None:
    images = np.load(answers)["images/embeddings"]
    guess = images + 4 * np.random.default_rng(0).normal(size=images.shape)
    path = submission(tmp_path / "guess.csv", guess, kernel)
    found = json.loads(succeeded(score("--run", path, "--json")).stdout)
    expected = kernel.evaluate(guess[None], images)
    for name, table in expected.items():
        assert found["scores"][name] == pytest.approx(table, abs=1e-4)
    assert (found["captions"], found["pool"], found["against"]) == (100, 100, None)
    text = score("--run", path).stdout
    assert re.search(rf"^raw: the official metric +{expected['pool100_raw']['mrr']:.4f} ", text, re.MULTILINE)
    assert "100 captions in pools of 100" in text


def test_two_submissions_are_compared(answers: Path, tmp_path: Path, score, kernel) -> None:
    images = np.load(answers)["images/embeddings"]
    good = submission(tmp_path / "good.csv", images, kernel)
    bad = submission(tmp_path / "bad.csv", np.random.default_rng(1).normal(size=images.shape), kernel)
    text = score("--run", good, "--against", bad).stdout
    assert f"Better than {bad}: sure (raw MRR +0.9" in text


def test_a_run_s_own_submission_is_found(answers: Path, tmp_path: Path, score, kernel) -> None:
    run = tmp_path / "runs" / "20260101-000000-align"
    run.mkdir(parents=True)
    submission(run / kernel.SUBMISSION, np.load(answers)["images/embeddings"], kernel)
    for place in ("--run", run), ("--runs", run.parent):
        found = json.loads(score(*place, "--json").stdout)
        assert found["submission"] == str(run / kernel.SUBMISSION)
        assert found["scores"]["pool100_raw"]["recall@1"] > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images/embeddings": None}, "needs the keys captions/ids and images/embeddings"),
        ({"captions/ids": np.arange(1, 100)}, "expected as many whole numbers as vectors"),
        ({"captions/ids": np.arange(1, 101) / 2}, "expected as many whole numbers as vectors"),
        ({"images/embeddings": np.full((100, 48), np.nan)}, "NaN or infinity"),
        ({"captions/ids": np.arange(2, 102)}, "row 1: expected id 2"),
        ({"images/embeddings": np.ones((100, 7))}, "expected a list of 7 numbers"),
    ],
)
def test_answers_that_do_not_fit_are_named(
    answers: Path, tmp_path: Path, score, kernel, change: dict, message: str
) -> None:
    arrays = dict(np.load(answers))
    csv = submission(tmp_path / "guess.csv", arrays["images/embeddings"], kernel)
    np.savez(answers, **{key: array for key, array in (arrays | change).items() if array is not None})
    failed(score("--run", csv), 2, message)


def test_numbers_beyond_those_of_the_metric_are_named(answers: Path, tmp_path: Path, score, kernel) -> None:
    csv = submission(tmp_path / "guess.csv", np.load(answers)["images/embeddings"], kernel)
    csv.write_text(re.sub(r'^3,"\[[^,]*', '3,"[1e300', csv.read_text(), flags=re.MULTILINE))
    failed(score("--run", csv), 2, r"guess\.csv: id 3: a number that is too large")


def test_what_cannot_be_read_is_named(answers: Path, tmp_path: Path, score, kernel) -> None:
    csv = submission(tmp_path / "guess.csv", np.load(answers)["images/embeddings"], kernel)
    failed(score("--run", csv, "--data", tmp_path), 2, "leave out --data and --output")
    failed(score("--run", tmp_path / "none.csv"), 2, "no such submission")
    failed(score("--run", tmp_path), 2, "no such submission")
    failed(score("--solution", tmp_path / "none.npz", "--run", csv), 2, "not a readable npz")
    failed(score("--solution", csv, "--run", csv), 2, "not a readable npz")
    answers.write_bytes(answers.read_bytes()[:-200])
    failed(score("--run", csv), 2, "not a readable npz")
