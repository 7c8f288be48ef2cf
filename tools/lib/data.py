"""The competition's data on this machine: what it must be, and which folder a tool takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib import kernel
from lib.project import DATA, REPO, InputError, damage, in_turn


@dataclass(frozen=True)
class Known:
    """What a file of the competition must be."""

    size: int
    sha256: str

    def problem(self, path: Path) -> str:
        """What is wrong with the file, "" when it is this one."""
        return damage(path, self.sha256, self.size)


KNOWN = {
    "train/train/train.npz": Known(626_741_039, "ed9a225101b8d0540c435b084eeba692323883e96c16855fe67a83124383327a"),
    "test/test/test.clean.npz": Known(5_765_331, "28bd7029968fec0d8e75ed8f10a363aba867d00134f91a9883e2c35882e57d5e"),
    "test/test/captions.txt": Known(90_426, "671300a4b3ff6101edda25e4b58be695f062a890bde44daa04654c89632afaaa"),
}

SAMPLE = REPO / "build" / "sample"  # not below data/: the kernel would find two candidates once the real data is there
FILES = ("train.npz", "test.clean.npz")


def missing(folder: Path, name: str) -> str:
    """Why the kernel, whose search is every tool's, finds no such file below `folder`; "" where it does."""
    try:
        kernel.find_file(folder, name)
    except kernel.UserError as error:
        return str(error)
    return ""


def choose_data(given: Path | None, draw: bool = True) -> Path:
    """The folder with the competition's files: the one given, else data/, else the sample data set, drawn once.

    `draw`: whether the sample is drawn where it was not drawn before.
    """
    if given is not None:
        if not given.is_dir():
            raise InputError(f"--data {given}: no such folder; python tools/download_data.py fetches the real data")
        return given
    if not os.path.lexists(DATA):
        return sample(draw)
    problems = [missing(DATA, name) for name in FILES]
    if all(problems):  # predicting needs one of them only
        broken = DATA.is_symlink() and not DATA.exists()
        reason = f"{DATA}: links to {DATA.readlink()}, which is not there" if broken else problems[0]
        raise InputError(f"{reason}: python tools/download_data.py does that; without {DATA} the drawn sample is used")
    return DATA


def sample(draw: bool) -> Path:
    """The sample data set, drawn once: in the repository, or in the user's cache where that cannot be written."""
    from lib.sample import layout  # numpy and pillow: not needed where the data is there

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aml-text-to-image-alignment" / "sample"
    folder = SAMPLE if SAMPLE.exists() or can_be_made(SAMPLE) else cache
    if not folder.exists() and not draw:
        raise InputError(f"no {DATA} and no sample data set in {folder}; --data DIR names the data")
    print(
        f"no {DATA}: {'using' if folder.exists() else 'drawing'} the sample data set in {folder}; "
        "python tools/download_data.py fetches the real data",
        file=sys.stderr,
    )
    return drawn_once(folder, layout.make_sample)


def drawn_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A drawn data set, made where it is not there yet: of several tools that need it at once, one makes it."""
    if not folder.exists():  # all of it or nothing
        with in_turn(folder.parent, folder.name):
            if not folder.exists():  # another one has not drawn it meanwhile
                make(folder)
    return folder


def can_be_made(folder: Path) -> bool:
    """Whether a folder can be made beside others that may be missing as well."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return os.access(folder.parent, os.W_OK)
    except OSError:
        return False
