"""A later candidate, a refit or a disk that fails: the best so far stays, and one line says why."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from drawn import JOINED, SMALL, TINY
from forked import failed_in_one_line, succeeded
from lib.project import sha256_of
from outputs import FINAL, MANIFEST, METRICS, SUBMISSION, check_outputs, check_submitted, read_json


@pytest.mark.parametrize("kaggle", [False, True])
def test_a_later_failure_leaves_the_best_so_far(kernel, data, tmp_path, monkeypatch, run_here, capsys, kaggle):
    """Words end in an error: exit code 1 with the reason, the submission is of the others and says so."""
    if kaggle:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")

    def failing(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nmore lines")

    monkeypatch.setattr(kernel, "WordBag", failing)
    assert run_here("--input", data, "--output", tmp_path / "out", "--recipe=ensemble", *SMALL) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: candidate ")
    assert captured.err.count("\n") == 1
    assert "device-side assert triggered" in captured.err
    assert "Traceback" not in captured.out
    manifest, metrics = check_submitted(kernel, tmp_path / "out"), read_json(tmp_path / "out" / METRICS)
    assert manifest["complete"] is False
    assert len(metrics["failures"]) == 2
    assert len(metrics["members"]) == 4
    assert all("sees=" not in one["knobs"] for one in manifest["predicted_by"])


def test_what_failed_is_freed_before_the_next_network(kernel, data, tmp_path, monkeypatch, run_here):
    """On a card its tensors would leave no room for the next one's."""
    right, tasks, kept = kernel.make_task, [], []

    def made(*others: Any) -> Any:
        kept.extend(number for number, task in enumerate(tasks) if task() is not None)
        task = right(*others)
        tasks.append(weakref.ref(task))
        return task

    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernel, "make_task", made)
    monkeypatch.setattr(kernel, "WordBag", failing)
    assert run_here("--input", data, "--output", tmp_path / "out", "--recipe=ensemble", *SMALL) == 1
    assert len(tasks) > 6
    assert kept == []


def test_a_refit_that_fails_predicts_with_the_validated_weights(kernel, data, tmp_path, monkeypatch, run_here, capsys):
    right = kernel.train_network

    def failing(name: str, *others: Any, **named: Any) -> Any:
        if name.startswith("refit"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(name, *others, **named)

    monkeypatch.setattr(kernel, "train_network", failing)
    assert run_here("--input", data, "--output", tmp_path / "out", *JOINED) == 1
    assert "refit: CUDA out of memory" in capsys.readouterr().err
    manifest = check_submitted(kernel, tmp_path / "out")
    assert {one["candidate"]: one["refitted"] for one in manifest["predicted_by"]}[1] is False


def test_a_failure_ends_what_is_trained_beside_it(kernel, data, tmp_path: Path, monkeypatch, run_here, capsys):
    """The other card's network would go on for hours; its state is kept."""

    def failing(run: Any, complete: bool = False) -> None:
        raise kernel.WriteFailed("the disk is full")

    monkeypatch.setattr(kernel.Run, "publish", failing)
    long = [*JOINED, "--set=epochs=3000", "--set=workers=2"]
    assert run_here("--input", data, "--output", tmp_path / "out", *long) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"
    assert not kernel.read_state(tmp_path / "out" / "resume_validate_1.pth")["at"].weights, "it has gone on to its end"


def test_the_only_candidate_that_fails_leaves_nothing(kernel, data, tmp_path: Path, monkeypatch, run_here, capsys):
    def failing(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("linalg.solve: the input matrix is singular.")

    monkeypatch.setattr(kernel, "fit_closed_form", failing)
    assert run_here("--input", data, "--output", tmp_path / "out", "--recipe=closed_form", *SMALL) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: candidate 0")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out" / SUBMISSION).exists()
    assert not (tmp_path / "out" / MANIFEST).exists()


GUARDED = {"memory": torch.OutOfMemoryError("CUDA out of memory"), "no number": ValueError("predictions hold NaN")}


@pytest.mark.parametrize("error", GUARDED.values(), ids=GUARDED)
def test_validating_may_fail_as_training_may(kernel, data, tmp_path, monkeypatch, run_here, error: Exception):
    """Its predictions don't fit, or are no numbers: that candidate is out, the others submit."""
    right = kernel.predictions_of

    def failing(network: Any, *others: Any) -> Any:
        if not isinstance(network, kernel.LinearMap):
            raise error
        return right(network, *others)

    monkeypatch.setattr(kernel, "predictions_of", failing)
    assert run_here("--input", data, "--output", tmp_path / "out", *TINY) == 1
    assert len(check_submitted(kernel, tmp_path / "out")["predicted_by"]) == 1


def test_memory_that_runs_out_in_predicting_is_one_line(kernel, data, tmp_path, monkeypatch, run_here, capsys):
    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernel, "predict", failing)
    code = run_here("--input", data, "--output", tmp_path / "out", "--recipe=closed_form", *SMALL)
    said = capsys.readouterr().err
    assert code == 1
    assert "out of memory" in said
    assert "disk" not in said


def test_what_a_card_has_no_memory_for_is_predicted_on_the_cpu(kernel, first, data, monkeypatch, capsys):
    """Another submission is there already, and hours of the run may be left."""
    bundle, test = kernel.load_weights(first[0] / FINAL), kernel.read_test(kernel.find_file(data, "test.clean.npz"))
    right, devices = kernel.predict, []

    def predict(bundle: Any, text: Any, captions: Any, device: torch.device) -> Any:
        devices.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory\nmore lines")
        return right(bundle, text, captions, device)

    monkeypatch.setattr(kernel, "predict", predict)
    by_card, by_cpu = (kernel.predicted(bundle, test, torch.device(kind)) for kind in ("cuda", "cpu"))
    assert devices == ["cuda", "cpu", "cpu"]
    assert (by_card == by_cpu).all()
    assert capsys.readouterr().out == "predicting: CUDA out of memory; on the CPU then\n"


@pytest.mark.parametrize("limit", [3_000, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (30_000, 60_000))])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(kernel, server, data, first, tmp_path: Path, limit: int):
    """No file may grow past the limit: at one size it is weights that fail, at others the csv or a resume state."""
    output = tmp_path / "out"
    arguments = ("--input", data, "--output", output, *JOINED, "--set=checkpoint_every=3")
    ended = server.run(*arguments, "--set=checkpoint_seconds=0", file_limit=limit)
    failed_in_one_line(ended, 1, "cannot be written.*free some space")
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    assert (output / MANIFEST).exists() == (limit > 50_000), "the closed form's is smaller than a network's state"
    if (output / MANIFEST).exists():  # what is there is whole
        check_submitted(kernel, output)
    for path in output.glob("*.pth"):
        assert kernel.load_torch(path)
    succeeded(server.run(*arguments))
    assert sha256_of(output / SUBMISSION) == sha256_of(first[0] / SUBMISSION)
    check_outputs(kernel, output, checkpoints=(3, 6))
