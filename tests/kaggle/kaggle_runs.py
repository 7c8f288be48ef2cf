"""What the tests of the Kaggle tools share: a tiny competition, and runs as folders."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np

from lib.project import REPO

IMAGES, TESTS, D_TEXT, D_IMAGE = 220, 100, 12, 16
QUICK = ["--recipe", "closed_form", "--set", "device=cpu", "--set", "dtype=float32"]


def npz(**arrays: np.ndarray) -> bytes:
    """Arrays as the bytes of an npz; `__` in a name stands for the slash of the competition's keys."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name.replace("__", "/"): array for name, array in arrays.items()})
    return buffer.getvalue()


def competition_files() -> tuple[dict[str, bytes], dict[int, list[float]]]:
    """The competition's files in small, solvable by a linear map, and the solution: test id to image vector."""
    rng = np.random.default_rng(0)
    mapping = rng.normal(size=(D_IMAGE, D_TEXT))

    def captions_of(images: np.ndarray) -> np.ndarray:
        return (images @ mapping + 0.5 * rng.normal(size=(len(images), D_TEXT))).astype(np.float32)

    images = (2 + rng.normal(size=(IMAGES, D_IMAGE))).astype(np.float32)
    image_of = np.repeat(np.arange(IMAGES), 5)
    train = npz(
        captions__ids=np.arange(5 * IMAGES),
        captions__text=np.array([f"caption {i}" for i in range(5 * IMAGES)]),
        captions__embeddings=captions_of(images[image_of]),
        captions__label=np.eye(IMAGES, dtype=bool)[image_of],
        images__names=np.array([f"{i}.jpg" for i in range(IMAGES)]),
        images__embeddings=images,
        metadata__num_captions=np.array([5 * IMAGES]),
        metadata__num_images=np.array([IMAGES]),
        metadata__embedding_dim_text=np.array([D_TEXT]),
        metadata__embedding_dim_image=np.array([D_IMAGE]),
    )
    truth = (2 + rng.normal(size=(TESTS, D_IMAGE))).astype(np.float32)
    test = npz(
        captions__ids=np.arange(1, TESTS + 1),
        captions__text=np.array([f"test caption {i}" for i in range(TESTS)]),
        captions__embeddings=captions_of(truth),
        metadata__num_captions=np.array([TESTS]),
        metadata__embedding_dim_text=np.array([D_TEXT]),
        metadata__embedding_dim_image=np.array([D_IMAGE]),
    )
    files = {"train/train/train.npz": train, "test/test/test.clean.npz": test}
    return files, {i + 1: vector.tolist() for i, vector in enumerate(truth)}


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    """Files below a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


A_CSV = b'id,embedding\n1,"[0.5, 0.25]"\n'


def outputs_of_run(kernel, submission: bytes = A_CSV, **changes: object) -> dict[str, bytes]:
    """The outputs of a finished run with made-up weights, its manifest included and right; `changes` go into that."""
    validation = {"pool100_raw": {"mrr": 0.75, "mrr_se": 0.007, "recall@1": 0.6}}
    facts = {"recipe": "align", "device": "cpu", "dtype": "float32"}
    metrics = facts | {"seconds": {"total": 3.2}, "validation": validation}
    files = {
        kernel.FINAL_MODEL: b"\0weights" * 100,
        kernel.VALIDATED_MODEL: b"\0validated" * 100,
        kernel.SUBMISSION: submission,
        kernel.METRICS: json.dumps(metrics).encode(),
    }
    listed = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    manifest = facts | {"complete": True, "outputs": listed, "inputs": {}, "knobs": {}, "versions": {}} | changes
    return files | {kernel.MANIFEST: json.dumps(manifest).encode()}


def last_line(text: str) -> str:
    """The last line of an output."""
    return text.rstrip("\n").rpartition("\n")[2]


class KillAt(list):
    """The stand-in's list of calls, which kills the client at the first call of a name, before it takes effect."""

    name = ""
    victim: subprocess.Popen

    def append(self, call: tuple[str, dict]) -> None:
        super().append(call)
        if call[0] == self.name:
            self.name = ""
            self.victim.kill()
            self.victim.wait()


def kill_at_random_moments(
    calls: list, command: list, kills: int = 10, most: int = 15, once: bool = False
) -> list[int]:
    """Run a tool, killed so often at random moments of its work, then undisturbed; the stand-in's calls after each.

    A moment is a few milliseconds after one of the tool's next calls: by the clock alone, nearly all would fall into
    its start. A run that ends before its moment comes is no kill; after two of them there is nothing left to disturb,
    after one where a tool that has done its work refuses to do it `once` more.
    """
    draw, reached, ended = random.Random(0), [], 0
    while len(reached) < kills and ended < 2:
        moment = len(calls) + draw.randint(1, most)
        victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(calls) < moment and victim.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        victim.kill()
        if victim.wait() < 0:
            reached.append(len(calls))
        elif once:
            assert victim.returncode in (0, 2)  # a killed run may have come as far as its score
            return reached
        else:
            ended += 1
    last = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert last.returncode == 0 or (once and last.returncode == 2)
    return [*reached, len(calls)]


def copy_of_the_repo(folder: Path) -> Path:
    """What the Kaggle tools need of the repository, so that a killed one leaves its build folders elsewhere."""
    for part in ("tools", "kernel", "kaggle_dataset"):
        shutil.copytree(REPO / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(REPO / "kernel-metadata.json", folder / "kernel-metadata.json")
    return folder
