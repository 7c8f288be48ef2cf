"""Several hundred damaged files: each is read, or refused in one line; never a traceback, a hang, or much memory.

The whole fuzz is one sub-process (`python tests/kernel/test_fuzz.py FOLDER`), so that its peak memory can be read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from drawn import KNOBS, TEST, TRAIN, draw_data

HERE = Path(__file__).resolve().parent
SEED, SECONDS = 20260, 20.0
TOKENS = [
    b"NaN",
    b"1e999",
    b"-1",
    b"0",
    b"[" * 5000,
    b'"',
    b"{",
    b"null",
    b"9" * 400,
    b"9" * 5000,
    b"\xff",
    b"\n",
    b"true",
    b",",
    b"-0.0",
    b"1e-400",
    b"''",
    b"\0",
    b"18446744073709551616",
    b"<f8",
    b"|O",
    b"<U99999999",
]


class Hang(BaseException):
    """A case took too long; no `except Exception` of the kernel stops it."""


# ---------------------------------------------------------------------------------------------- mutations
def flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def swap(data: bytes, draw: random.Random) -> bytes:
    """Two chunks change places."""
    a, b, c, d = sorted(draw.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def cut(data: bytes, draw: random.Random) -> bytes:
    """A chunk is lost, or becomes zeros, or comes twice."""
    a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + draw.choice([b"", bytes(b - a), data[a:b] * 2]) + data[b:]


def token(data: bytes, draw: random.Random) -> bytes:
    """A number or word becomes something that parsers dislike."""
    words = list(re.finditer(rb"[\w.+-]+", data)) or [re.search(b"", data)]
    word = draw.choice(words)
    return data[: word.start()] + draw.choice(TOKENS) + data[word.end() :]


def digit(data: bytes, draw: random.Random) -> bytes:
    """One digit of the first kilobyte changes or grows: shapes, types and counts of a header."""
    digits = [match.start() for match in re.finditer(rb"\d", data[:1024])] or [0]
    place = draw.choice(digits)
    return data[:place] + draw.choice([b"0", b"1", b"7", b"99", b"9999999999"]) + data[place + 1 :]


MUTATIONS = [flip, truncate, swap, cut, token, digit]


def inside(data: bytes, draw: random.Random) -> bytes:
    """One member of a zip archive is mutated and the archive written anew: its checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = {name: old.read(name) for name in old.namelist()}
    victim = draw.choice(sorted(members, key=lambda name: not name.endswith("pkl"))[:1] * 3 + sorted(members))
    mutation = draw.choice([*MUTATIONS, None])
    if mutation:
        members[victim] = mutation(members[victim] or b"\0", draw)
    else:
        del members[victim]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as new:
        for name, content in members.items():
            new.writestr(name, content)
    return buffer.getvalue()


def mutate(data: bytes, draw: random.Random) -> tuple[bytes, bool]:
    """Damaged data, and whether its checksums must have noticed."""
    archive = data.startswith(b"PK")
    if archive and draw.random() < 0.6:
        return inside(data, draw), False
    return draw.choice(MUTATIONS)(data, draw), archive


# ------------------------------------------------------------------------------------------------- targets
class Corpus:
    """A small finished run and a small interrupted one, and the way each kind of file is read."""

    def __init__(self, kernel: ModuleType, folder: Path) -> None:
        self.kernel, self.folder, self.ids = kernel, folder, np.arange(1, 21)
        self.root = draw_data(folder / "data", images=40, captions=3, test=20)
        tiny = {"recipe": "align", "sees": "both", **KNOBS, "hidden": 8, "word_width": 4, "epochs": 2, "batch": 32}
        settings = [f"--set={key}={value}" for key, value in tiny.items()]
        self.code(["--input", self.root, "--output", folder / "done", *settings])
        sets = kernel.read_train(self.root / TRAIN), kernel.read_test(self.root / TEST)
        self.knobs = kernel.Knobs(**tiny)
        self.problem = kernel.make_problem(*sets, self.knobs, [self.knobs], [])
        (folder / "open").mkdir()
        self.open = kernel.Folder(folder / "open", self.knobs, "fingerprint")
        machine = kernel.Machine([torch.device("cpu")], torch.float32, 1.0)
        self.open.write_index(machine, [kernel.Candidate(5, self.knobs, drawn=True)], [5], 1.0)
        stop = kernel.Stop(1e6)
        stop.signal = signal.SIGTERM
        with contextlib.suppress(kernel.Interrupted):
            self.train(stop)
        assert self.open.state("validate", 1).exists()

    def train(self, stop: Any) -> None:
        task = self.kernel.make_task(self.problem, "validate", self.knobs, torch.device("cpu"), torch.float32)
        self.kernel.train_again_if_diverged(
            "validate 1",
            self.knobs,
            self.open.state("validate", 1),
            task=task,
            allotted=0.01,
            stop=stop,
            watch=lambda *_, **__: {"phase": "validate", "candidate": 1},
        )

    def code(self, arguments: list) -> None:
        """The script on `arguments`: 0, or 2 with one line on stderr."""
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = self.kernel.main(list(map(str, arguments)))
        if code:
            assert code == 2, errors
            assert errors.getvalue().startswith("error: "), errors
            assert errors.getvalue().count("\n") == 1, errors
            raise self.kernel.UserError(errors.getvalue())

    def predict(self, _: Path) -> None:
        output = self.folder / "predicted"
        self.code(["--input", self.folder / "predict-input", "--output", output, "--mode=predict", "--set=device=cpu"])
        assert (output / self.kernel.MANIFEST).exists()

    def weights(self, path: Path) -> np.ndarray:
        bundle = self.kernel.load_weights(path)
        return self.kernel.predict(bundle, np.ones((3, bundle["dims"][0]), np.float32), ["more3 less5"] * 3)

    def resume(self, _: Path) -> None:
        self.train(self.kernel.Stop(1e6))  # goes on from the state or starts anew, whatever the damage

    def index(self, _: Path) -> None:
        self.open.read_index(self.root)

    def submission(self, path: Path) -> None:
        self.kernel.check_submission(path, self.ids, self.problem.test.image_dim)

    def targets(self) -> list[tuple[str, Path, Path, Callable[[Path], Any], int]]:
        """(name, a right file, where its damaged copy goes, reader, number of cases)."""
        kernel, done, opened = self.kernel, self.folder / "done", self.folder / "open"
        train, test = self.root / TRAIN, self.root / TEST
        stored = self.folder / "stored.npz"
        with np.load(train) as arrays:
            np.savez(stored, **arrays)
        scratch, inputs = self.folder / "scratch", self.folder / "predict-input"
        for folder in (scratch, inputs):
            folder.mkdir()
        return [
            ("train", train, scratch / "train.npz", kernel.read_train, 90),
            ("train, stored", stored, scratch / "stored.npz", kernel.read_train, 80),
            ("test", test, scratch / "test.npz", kernel.read_test, 80),
            ("weights", done / kernel.FINAL_MODEL, scratch / "weights.pth", self.weights, 90),
            ("submission", done / kernel.SUBMISSION, scratch / "submission.csv", self.submission, 80),
            ("state", opened / "resume_validate_1.pth", opened / "resume_validate_1.pth", self.resume, 50),
            ("index", opened / kernel.RESUME_RUN, opened / kernel.RESUME_RUN, self.index, 80),
            ("predict, weights", done / kernel.FINAL_MODEL, inputs / kernel.FINAL_MODEL, self.predict, 60),
            ("predict, data", test, inputs / "test.clean.npz", self.predict, 60),
        ]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def attempt(kernel: ModuleType, read: Callable[[Path], Any], path: Path, expected: bytes = b"") -> str:
    """'read', 'refused', or what must not happen."""
    try:
        with time_limit(SECONDS):
            content = pickle.dumps(read(path))
        return "read" if not expected or content == expected else "other content was read, in spite of the checksums"
    except kernel.UserError as error:
        return "refused" if str(error).strip().count("\n") == 0 else f"several lines: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]


def fuzz(kernel: ModuleType, folder: Path) -> dict[str, Any]:
    """All cases; what became of them, and the peak memory before and after."""
    os.chdir(folder)
    corpus, draw, outcomes, wrong = Corpus(kernel, folder), random.Random(SEED), {}, []
    targets = corpus.targets()
    for name, right, _, read, _ in targets:
        if not name.startswith("predict"):
            assert attempt(kernel, read, right) == "read", name
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, right, damaged, read, cases in targets:
        data, counts, expected = right.read_bytes(), Counter(), b""
        if name.startswith("predict"):  # its other file is right
            for other in (kernel.FINAL_MODEL, "test.clean.npz"):
                shutil.copy(next(folder.glob(f"d*/**/{other}")), damaged.with_name(other))
        else:
            expected = pickle.dumps(read(right))
        for case in range(cases):
            content, checked = mutate(data, draw)
            damaged.write_bytes(content)
            outcome = attempt(kernel, read, damaged, expected if checked else b"")
            counts[outcome] += 1
            if outcome not in ("read", "refused"):
                wrong.append(f"{name}, case {case}: {outcome}")
        damaged.write_bytes(data)
        outcomes[name] = dict(counts)
    left = [str(path) for path in folder.rglob(".*")] + [str(path) for path in folder.rglob("*.part")]
    return {
        "outcomes": outcomes,
        "wrong": wrong,
        "left": left,
        "growth": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / peak,
    }


@pytest.mark.slow
def test_damaged_files_are_read_or_refused(tmp_path: Path):
    places = ":".join(map(str, (HERE, HERE.parent, HERE.parents[1] / "tools")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    outcomes = found["outcomes"]
    assert sum(sum(counts.values()) for counts in outcomes.values()) >= 500
    assert not found["wrong"], "\n".join(found["wrong"])
    assert not found["left"], found
    assert found["growth"] < 2, found
    for name, counts in outcomes.items():  # the damage is real: much of it is noticed
        assert name == "state" or counts["refused"] > 0.25 * sum(counts.values()), found
    assert "Traceback" not in done.stderr


if __name__ == "__main__":
    from lib.kernel import load_kernel

    print(json.dumps(fuzz(load_kernel(), Path(sys.argv[1]))))
