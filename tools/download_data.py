"""Download the data of the competition into data/ and verify it by size and sha256.

    python tools/download_data.py             the three files that training and prediction need (633 MB)
    python tools/download_data.py --images    everything, with the 25,000 photos (3.8 GB)

An interrupted download goes on where it stopped; files that are there and right are not fetched again. Kaggle wants
the rules accepted once, in the browser: https://www.kaggle.com/competitions/aml-competition/rules
"""
from __future__ import annotations

import argparse
import shutil
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path

from kaggle_client import KaggleClient, competition_errors, connect, safe_name
from project import DATA, ToolError, atomic_path, run_tool, sha256_of

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
ARCHIVE_BYTES = 3_790_000_000  # about; twice that is needed while it is unpacked


def problem(path: Path, known: Known) -> str:
    """What is wrong with the file, "" when it is the one that is known."""
    if not path.is_file():
        return "not there"
    if path.stat().st_size != known.size:
        return f"{path.stat().st_size:,} bytes instead of {known.size:,}"
    digest = sha256_of(path)
    return "" if digest == known.sha256 else f"sha256 {digest[:12]}... instead of {known.sha256[:12]}..."


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
    client.download_competition_file(competition, name, fetched, known.size)
    if wrong := problem(fetched, known):
        fetched.unlink()
        raise ToolError(f"{name}: {wrong}; it was removed: run this again, or see whether the competition changed it")
    fetched.replace(path)
    print(f"{name}: size and sha256 are right")


def fetch_needed(client: KaggleClient, competition: str, data: Path, force: bool) -> None:
    """The files that training and prediction read."""
    for name, known in KNOWN.items():
        wrong = problem(data / name, known)
        if not wrong and not force:
            print(f"{name}: already there, size and sha256 are right")
            continue
        if wrong and wrong != "not there":
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
                with packed.open(member) as source, atomic_path(data / member.filename) as path, \
                        path.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        archive.unlink()
        raise ToolError(f"{archive.name}: a broken zip ({error}); it was removed: run this again") from None
    return len(members)


def fetch_all(client: KaggleClient, competition: str, data: Path, force: bool) -> None:
    """Everything as one zip, unpacked and then removed; the needed files are verified."""
    have_images = any(path.is_dir() for path in data.rglob("Images"))
    if have_images and not force and not any(problem(data / name, known) for name, known in KNOWN.items()):
        print(f"{data}: already complete (--force fetches it again)")
        return
    check_space(data, 2 * ARCHIVE_BYTES)
    archive = data / f"{competition}.zip"
    print(f"{competition}: fetching everything (about {ARCHIVE_BYTES / 1e9:.1f} GB) to {archive}")
    client.download_competition_archive(competition, archive)
    print(f"{competition}: unpacking to {data}")
    count = unpack(archive, data)
    for name, known in KNOWN.items():
        if wrong := problem(data / name, known):
            raise ToolError(f"{name}: {wrong}; {archive} is kept: see whether the competition changed it")
    archive.unlink()
    print(f"{competition}: {count:,} files; size and sha256 of the {len(KNOWN)} needed ones are right")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Download and verify the competition's data.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/download_data.py --data data\n\nexit codes: 0 all files are there and right, "
               "1 a download or a check failed, 2 wrong input or credentials")
    parser.add_argument("--data", type=Path, default=DATA, help="where to put it (default: data/ of the repository)")
    parser.add_argument("--images", action="store_true", help="everything, with the photos, not only what is needed")
    parser.add_argument("--force", action="store_true", help="fetch also what is there and right")
    parser.add_argument("--competition", default=COMPETITION, help="its slug (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the tool."""
    arguments = parse(argv)
    try:
        arguments.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f"{arguments.data}: cannot be made ({error.strerror})") from None
    client = connect()
    with competition_errors(arguments.competition):
        fetch_files = fetch_all if arguments.images else fetch_needed
        fetch_files(client, arguments.competition, arguments.data, arguments.force)


if __name__ == "__main__":
    run_tool(main)
