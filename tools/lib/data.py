"""The competition's data on this machine: what it must be, and which folder a tool takes."""
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from lib.project import DATA, REPO, InputError
from lib.sample import layout

COMPETITION = "aml-competition"


@dataclass(frozen=True)
class Known:
    """What a file of the competition must be."""

    size: int
    sha256: str


KNOWN = {
    "train/train/train.npz": Known(626_741_039, "ed9a225101b8d0540c435b084eeba692323883e96c16855fe67a83124383327a"),
    "test/test/test.clean.npz": Known(5_765_331, "28bd7029968fec0d8e75ed8f10a363aba867d00134f91a9883e2c35882e57d5e"),
    "test/test/captions.txt": Known(90_426, "671300a4b3ff6101edda25e4b58be695f062a890bde44daa04654c89632afaaa"),
}

SAMPLE = REPO / "build" / "sample"  # not below data/: the kernel would find two candidates once the real data is there
FILES = ("train.npz", "test.clean.npz")


def choose_data(given: Path | None) -> Path:
    """The folder with the competition's files: the one given, else data/, else the sample data set, drawn once."""
    if given is not None:
        if not given.is_dir():
            raise InputError(f"--data {given}: no such folder; python tools/download_data.py fetches the real data")
        return given
    if DATA.is_dir() and any(next(DATA.rglob(name), None) for name in FILES):
        return DATA
    drawn = SAMPLE.exists()  # all of it or nothing
    print(f"no data in {DATA}: {'using' if drawn else 'drawing'} the sample data set in {SAMPLE}; "
          "python tools/download_data.py fetches the real data", file=sys.stderr)
    if not drawn:
        layout.make_sample(SAMPLE)
    return SAMPLE
