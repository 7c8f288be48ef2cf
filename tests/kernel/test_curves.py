"""The picture that a run draws of its training."""

from __future__ import annotations

import pandas as pd
import pytest
from matplotlib.figure import Figure

LEVELS = {"the blend": 0.625, "closed form": 0.5}


@pytest.mark.parametrize("networks", [2, 40])
def test_curves_have_whole_epochs_a_line_of_the_blend_and_a_legend_beside_them(
    kernel, tmp_path, monkeypatch, networks: int
) -> None:
    """Of a search's many networks the heaviest are named."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [
        (phase, number, epoch, 3.0 / epoch, score, score)
        for phase, score in (("validate", 0.5), ("refit", None))
        for number in range(1, networks + 1)
        for epoch in (1, 2, 3)
    ]
    table = pd.DataFrame(rows, columns=["phase", "candidate", "epoch", "loss", "pool100_raw", "pool100_cosine"])
    kernel.draw_curves(tmp_path / "curves.png", table, list(range(1, networks)), LEVELS)
    (figure,) = drawn
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert all(tick == round(tick) for tick in axes.get_xticks())
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    labels = figure.axes[1].get_legend_handles_labels()[1]
    named = {f"candidate {number}" for number in range(1, networks)[:10]}
    assert set(labels) == {"the blend: 0.625", "closed form: 0.500", "others"} | named
    for line in figure.axes[0].get_lines():  # 3/epoch beside its first one, whatever the scale of the loss
        assert line.get_ydata().tolist() == [1, 1 / 2, 1 / 3]
