"""A tiny run, another one to compare it with, and its report: what the tests of verify look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drawn import TINY, draw_data
from forked import KernelServer, Tool, succeeded


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 drawn images with a photo each, captions that try to break a page."""
    root = draw_data(
        tmp_path_factory.mktemp("data"),
        {
            "captions/text": lambda text: np.array(
                [f'{caption} , <b>$x_{i % 7}$</b> "open' + " word" * (i % 9) for i, caption in enumerate(text)]
            )
        },
    )
    folder = root / "train/train/Images"
    folder.mkdir()
    for i in range(240):
        Image.new("RGB", (60, 40), (i, 255 - i, 128)).save(folder / f"{1000 + i}.jpg")
    return root


@pytest.fixture(scope="session")
def train(server: KernelServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a tiny run: train("--recipe=baseline")."""

    def run(*settings: str) -> Path:
        output = tmp_path_factory.mktemp("run")
        succeeded(server.run("--input", data, "--output", output, *TINY, "--set=val_fraction=0.5", *settings))
        return output

    return run


@pytest.fixture(scope="session")
def run(train: Callable[..., Path]) -> Path:
    return train("--recipe=align", "--set=refit=false")


@pytest.fixture(scope="session")
def baseline(train: Callable[..., Path]) -> Path:
    return train("--recipe=baseline", "--set=refit=false", "--set=seed=1")


@pytest.fixture(scope="session")
def verified(
    loaded: None, run: Path, baseline: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """The folder of a report, and what the tool says as JSON."""
    output, said = tmp_path_factory.mktemp("report"), tmp_path_factory.mktemp("said")
    given = ["--run", run, "--against", baseline, "--data", data, "--output", output]
    return output, json.loads(succeeded(Tool(said, said)("verify", *given, "--json")).stdout)
