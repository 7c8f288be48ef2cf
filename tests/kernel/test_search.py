"""A search of hours: what it holds does not grow with what it draws, and a draw may fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drawn import SMALL
from outputs import METRICS, check_submitted, read_json
from stopping import stopped_at_its_end

OWN = set(range(6))  # the recipe's candidates


@pytest.fixture
def search(kernel, data: Path, tmp_path: Path, run_here, monkeypatch) -> Callable[..., int]:
    """A search that ends when it has `drawn` so many; `fails`: whose training does."""
    draw, train = kernel.Plan.next_draw, kernel.train_network

    def run(drawn: int = 6, fails: Callable[[int], bool] = lambda number: False) -> int:
        def next_draw(plan: Any) -> Any:
            return draw(plan) if len(plan.candidates) < len(OWN) + drawn else None

        def train_network(name: str, *others: Any, **named: Any) -> Any:
            run.trained.append(name)
            if fails(int(name.split()[1])):
                raise kernel.TrainingFailed(f"{name}: the loss is no number")
            return train(name, *others, **named)

        run.trained = []
        monkeypatch.setattr(kernel.Plan, "next_draw", next_draw)
        monkeypatch.setattr(kernel, "train_network", train_network)
        settings = ["--recipe=search", *SMALL, "--set=epochs=1", "--set=val_fraction=0.4"]
        return run_here("--input", data, "--output", tmp_path / "out", *settings)

    return run


def numbers(output: Path) -> set[int]:
    """The candidates that a run holds at its end."""
    return {one["candidate"] for one in read_json(output / METRICS)["members"]}


def test_a_long_search_averages_the_best_of_what_it_drew(kernel, search, tmp_path: Path, monkeypatch, capsys):
    averaged, right = [], kernel.blend_of

    def blend_of(candidates: list[Any], *others: Any) -> Any:
        averaged.append([one.number for one in candidates])
        return right(candidates, *others)

    monkeypatch.setattr(kernel, "MOST", 8)
    monkeypatch.setattr(kernel, "blend_of", blend_of)
    assert search(drawn=9) == 0
    assert max(map(len, averaged)) == 9  # the eight best so far, and the next one
    assert all(set(numbers) >= OWN for numbers in averaged[5:])
    check_submitted(kernel, tmp_path / "out")
    kept = numbers(tmp_path / "out")
    assert kept >= OWN
    assert len(kept) < 6 + 9
    said = capsys.readouterr().out
    for number in set(range(6 + 9)) - kept:
        assert f"candidate {number} is dropped: the weakest of more than 8" in said


def test_what_was_dropped_has_no_weights_on_disk_and_is_not_trained_again(kernel, search, tmp_path: Path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(kernel, "MOST", 7)
    with stopped_at_its_end(kernel):
        assert search() == 143
    kept = numbers(output)
    for number in range(6 + 6):
        assert (output / f"resume_validate_{number}.pth").exists() == (number in kept), number
        assert number in kept or not (output / f"resume_refit_{number}.pth").exists(), number
    assert search() == 0
    assert not [name for name in search.trained if name.startswith("validate")]
    check_submitted(kernel, output)
    assert numbers(output) <= kept


def test_a_draw_that_fails_is_left_out_for_good(kernel, search, tmp_path: Path):
    """A search tries what may not work: its other candidates are what was asked for."""
    output = tmp_path / "out"
    with stopped_at_its_end(kernel):
        assert search(drawn=4, fails=lambda number: number == 7) == 143
    assert read_json(output / METRICS)["left_out"] == ["validate 7: the loss is no number"]
    assert search(drawn=4) == 0
    assert "validate 7" not in search.trained
    assert check_submitted(kernel, output)["complete"] is True
    assert not read_json(output / METRICS)["failures"]
    assert numbers(output) == {*OWN, 6, 8, 9}


def test_a_search_whose_draws_all_fail_ends(kernel, search, tmp_path: Path, capsys):
    assert search(drawn=20, fails=lambda number: number not in OWN) == 1
    assert [name for name in search.trained if int(name.split()[1]) not in OWN] == [f"validate {n}" for n in (6, 7, 8)]
    assert capsys.readouterr().err.startswith("error: validate 8: the loss is no number")
    manifest, metrics = check_submitted(kernel, tmp_path / "out"), read_json(tmp_path / "out" / METRICS)
    assert manifest["complete"] is False
    assert [len(metrics[key]) for key in ("left_out", "failures")] == [2, 1]
