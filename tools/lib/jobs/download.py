"""The competition's files: fetched, and verified by size and sha256 before they take their place."""

from __future__ import annotations

import contextlib
import shutil
import stat
import zipfile
import zlib
from pathlib import Path

from lib.data import KNOWN, Known
from lib.kaggle_api.client import KaggleClient
from lib.kaggle_api.http import safe_name
from lib.project import ToolError, atomic_path

ARCHIVE_BYTES = 3_790_000_000  # about; twice that is needed while it is unpacked
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # what damaged or locked archives raise


def check_space(folder: Path, needed: int) -> None:
    """Fail before the download rather than after most of it."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ToolError(f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed: make room or use --data")


def fetch(client: KaggleClient, competition: str, name: str, known: Known, data: Path) -> None:
    """One file, verified before it takes its place."""
    path = data / name
    check_space(data, known.size)
    print(f"{name}: fetching {known.size / 1e6:,.1f} MB to {path}")
    fetched = path.with_name(f".{path.name}.fetched")
    client.competitions.download_file(competition, name, fetched)
    if fetched.stat().st_size != known.size:
        unzip(fetched)
    if wrong := known.problem(fetched):
        fetched.unlink()
        raise ToolError(f"{name}: {wrong}; it was removed: run this again, or see whether the competition changed it")
    fetched.replace(path)
    print(f"{name}: size and sha256 are right")


def unzip(path: Path) -> None:
    """Kaggle may serve a file within a zip: put the one that is in it in its place; anything else is left as it is."""
    with contextlib.suppress(*BROKEN), zipfile.ZipFile(path) as archive:
        if len(archive.infolist()) == 1:
            extract(archive, archive.infolist()[0], path)


def extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, dest: Path) -> None:
    """A file out of an archive, which appears whole."""
    with archive.open(member) as source, atomic_path(dest) as path, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def fetch_needed(client: KaggleClient, competition: str, data: Path, force: bool) -> None:
    """The files that training and prediction read."""
    for name, known in KNOWN.items():
        wrong = known.problem(data / name)
        if not wrong and not force:
            print(f"{name}: already there, size and sha256 are right")
            continue
        if wrong and (data / name).exists():
            print(f"{name}: {wrong}")
        fetch(client, competition, name, known, data)


def unpack(archive: Path, data: Path) -> int:
    """Unpack below `data`; the number of files. Nothing is written when a member would leave the folder."""
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [member for member in packed.infolist() if not member.is_dir()]
            for member in members:
                safe_name(member.filename)
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise ToolError(f"{archive.name}: {member.filename} is a link: nothing was unpacked")
            for member in members:
                extract(packed, member, data / member.filename)
    except BROKEN as error:
        archive.unlink()
        raise ToolError(f"{archive.name}: a broken zip ({error}); it was removed: run this again") from None
    return len(members)


def fetch_all(client: KaggleClient, competition: str, data: Path, force: bool) -> None:
    """Everything as one zip, unpacked and then removed; the needed files are verified."""
    archive = data / f"{competition}.zip"  # lies there until all of it is unpacked
    have_images = any(path.is_dir() for path in data.rglob("Images")) and not archive.exists()
    if have_images and not force and not any(known.problem(data / name) for name, known in KNOWN.items()):
        print(f"{data}: already complete (--force fetches it again)")
        return
    check_space(data, ARCHIVE_BYTES if archive.exists() else 2 * ARCHIVE_BYTES)
    if force or not archive.exists():
        print(f"{competition}: fetching everything (about {ARCHIVE_BYTES / 1e9:.1f} GB) to {archive}")
        client.competitions.download_archive(competition, archive)
    print(f"{competition}: unpacking to {data}")
    count = unpack(archive, data)
    for name, known in KNOWN.items():
        if wrong := known.problem(data / name):
            raise ToolError(
                f"{name}: {wrong}; {archive} is kept: see whether the competition changed it, or fetch it with --force"
            )
    archive.unlink()
    print(f"{competition}: {count:,} files; size and sha256 of the {len(KNOWN)} needed ones are right")
