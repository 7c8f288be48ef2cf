"""A packaged run as a kernel finds it on Kaggle, in either layout: it predicts, and goes on from a state."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from account import WEIGHTS
from drawn import CLOSED, TINY
from forked import succeeded


def mount(kaggle, folder: Path) -> Path:
    """What a kernel with the packaged run and the competition's data finds as its input."""
    sources = {"datasetDataSources": [WEIGHTS], "competitionDataSources": ["aml-competition"]}
    return kaggle.mount(sources, folder)


@pytest.mark.parametrize("layout", ["old", "new"])
def test_a_kernel_predicts_with_packaged_weights(kaggle, competition, kernel, server, package, tmp_path, layout):
    kaggle.mount_layout = layout
    trained, predicted = tmp_path / "runs" / "trained", tmp_path / "predicted"
    succeeded(server.run("--input", tmp_path / "data", "--output", trained, *CLOSED))
    succeeded(package("--run", trained))
    inputs = mount(kaggle, tmp_path / "kaggle" / "input")
    place = inputs / ("datasets/tester/aml-alignment-weights" if layout == "new" else "aml-alignment-weights")
    assert (place / kernel.FINAL_MODEL).is_file()

    succeeded(server.run("--input", inputs, "--output", predicted, "--mode", "predict", "--set", "device=cpu"))
    assert (predicted / kernel.SUBMISSION).read_bytes() == (trained / kernel.SUBMISSION).read_bytes()
    used = json.loads((predicted / kernel.MANIFEST).read_text())["inputs"][kernel.FINAL_MODEL]
    assert used == json.loads((place / kernel.MANIFEST).read_text())["files"][kernel.FINAL_MODEL]


@pytest.mark.slow
def test_a_kernel_goes_on_from_the_packaged_state_of_a_stopped_run(
    kaggle, competition, kernel, server, package, tmp_path
):
    stopped, resumed = tmp_path / "runs" / "stopped", tmp_path / "resumed"
    knobs = [*TINY, "--set=epochs=60", "--set=eval_every=20", "--set=refit=false", "--set=checkpoint_seconds=0"]
    ended = server.stop(
        signal.SIGTERM, "--input", tmp_path / "data", "--output", stopped, *knobs, after=f"{'validate':>9}"
    )
    assert ended.returncode == 128 + signal.SIGTERM
    succeeded(package("--run", stopped))
    sent = kaggle.datasets[WEIGHTS].versions[0].files
    assert {name for name in sent if name.startswith("resume_")} == {path.name for path in stopped.glob("resume_*")}

    inputs = mount(kaggle, tmp_path / "kaggle" / "input")
    assert "going on from epoch" in succeeded(server.run("--input", inputs, "--output", resumed, *knobs)).stdout
    assert json.loads((resumed / kernel.MANIFEST).read_text())["complete"]
