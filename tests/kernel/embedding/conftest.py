"""What the tests of kernel/embed.py share: the script, tiny encoders, a few photos with captions, runs as processes."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from forked import Ended, Forked, failed_in_one_line
from lib.kernel import load_script
from tiny_encoders import CAPTIONS, SCRIPT, save_encoders, write_csv


@pytest.fixture(scope="module")
def embed() -> types.ModuleType:
    """The script as a module."""
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny DINOv2 and a tiny RoBERTa."""
    folder = tmp_path_factory.mktemp("models")
    save_encoders(folder / "photos", folder / "captions")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eleven photos in sub-folders, and their captions as csv and as COCO's json."""
    folder, draw = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for i, name in enumerate(CAPTIONS):
        path = folder / "photos" / "ab"[i % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40 + 3 * i, 60 - i, 3), dtype=np.uint8)).save(path)
    write_csv(folder / "captions.csv", CAPTIONS)
    annotations = [
        {"id": 7, "image_id": i, "caption": f"{text} \n"} for i, texts in enumerate(CAPTIONS.values()) for text in texts
    ]
    images = [{"id": i, "file_name": name, "width": 1} for i, name in enumerate(CAPTIONS)]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


@pytest.fixture
def start(
    embed: types.ModuleType,
    models: Path,
    source: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Ended]:
    """Run the script as a process, with shards of four photos; later options beat the usual ones."""
    monkeypatch.setattr(embed, "SHARD", 4)
    monkeypatch.setattr(embed, "CAPTIONS_A_PHOTO", 2)
    said = tmp_path_factory.mktemp("said")
    usual = ["--captions", source / "captions.csv", "--photos", source / "photos", "--output", tmp_path / "out"]
    usual += ["--image-model", models / "photos", "--text-model", models / "captions"]

    def run(*options: object) -> Ended:
        return Forked(lambda: embed.main(list(map(str, [*usual, *options]))), said / "out", said / "err").wait()

    return run


@pytest.fixture
def fails(start: Callable[..., Ended], tmp_path: Path) -> Callable[..., str]:
    """The one line that a run ends with, which writes nothing."""

    def run(*options: object) -> str:
        done = failed_in_one_line(start(*options), 2)
        assert not (tmp_path / "out" / "pairs.npz").exists()
        assert not (tmp_path / "out" / "manifest.json").exists()
        return done.error

    return run


@pytest.fixture
def encoders(embed: types.ModuleType, models: Path) -> tuple[Any, Any]:
    """Both encoders, on the CPU in float32."""
    machine = torch.device("cpu"), torch.float32
    return (embed.PhotoEncoder(str(models / "photos"), *machine), embed.TextEncoder(str(models / "captions"), *machine))
