"""Faults that users met and that no other test is named after: an interrupted drawing, a small pool, the curves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from matplotlib.figure import Figure

import run_local
from lib.project import REPO
from lib.runs import RAW, Run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sample_that_is_interrupted_leaves_no_folder(tmp_path: Path, number: int) -> None:
    home = tmp_path / "new"
    command = [sys.executable, str(REPO / "tools" / "sample_data.py"), str(home / "data")]
    drawing = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    begun = time.monotonic()
    while not list(home.glob(".data.*.part/train/train/Images/*.jpg")):
        assert drawing.poll() is None
        assert time.monotonic() - begun < 60
        time.sleep(0.01)
    drawing.send_signal(number)
    assert drawing.communicate(timeout=60)[1].splitlines()[-1] == "interrupted"
    assert drawing.returncode == 128 + number
    assert list(home.iterdir()) == []


def test_fewer_than_a_hundred_images_are_not_called_pools_of_100(tmp_path: Path, capsys) -> None:
    keys = ("mrr", "mrr_se", "recall@1", "recall@5", "recall@10", "ndcg")
    metrics = {"pool": 24, "validation": {RAW: dict.fromkeys(keys, 0.5)}}
    run_local.report(Run(tmp_path, {"seconds": {"total": 1.0}}, metrics), False)
    out = capsys.readouterr().out
    assert "pool24_raw" in out
    assert "pool100" not in out


def test_curves_have_whole_epochs_a_line_of_the_blend_and_a_legend_beside_them(kernel, tmp_path, monkeypatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [
        (phase, number, epoch, 3.0 / epoch, score, score)
        for phase, score in (("validate", 0.5), ("refit", None))
        for number in (1, 2)
        for epoch in (1, 2, 3)
    ]
    table = pd.DataFrame(rows, columns=["phase", "member", "epoch", "loss", "pool100_raw", "pool100_cosine"])
    kernel.draw_curves(tmp_path / "curves.png", table, SimpleNamespace(members=[SimpleNamespace(number=1)], mrr=0.625))
    (figure,) = drawn
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert all(tick == round(tick) for tick in axes.get_xticks())
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    labels = figure.axes[1].get_legend_handles_labels()[1]
    assert {"the blend: 0.625", "candidate 1"} == set(labels)
