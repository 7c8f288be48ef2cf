"""What the account of the tests has on Kaggle, and what the client's tests push there."""

from __future__ import annotations

from pathlib import Path

from drawn import read_tree
from lib.kaggle_api.kernels import Version
from stand_in import Fault, StandIn

COMPETITION = "aml-competition"
SLUG = "aml-text-to-image-alignment"
PIPELINE, EMBED = f"tester/{SLUG}", "tester/aml-embed-pairs"
WEIGHTS, PAIRS = "tester/aml-alignment-weights", "tester/aml-alignment-pairs"

META = {
    "id": "tester/aml-align",
    "title": "aml align",
    "code_file": "pipeline.py",
    "language": "python",
    "kernel_type": "script",
    "is_private": True,
    "enable_internet": False,
    "dataset_sources": [],
    "competition_sources": [COMPETITION],
}
MARK = "# order 1"
OUTAGE = [Fault(status=503)] * 40  # eight looks of five tries each: minutes


def version(number: int) -> Version:
    """A version of the kernel of META."""
    return Version(META["id"], number)


def versions(kaggle: StandIn) -> int:
    """How many versions of the pipeline were pushed."""
    return len(kaggle.kernels[PIPELINE])


def fetched(tmp_path: Path) -> dict[str, bytes]:
    """The files of the fetched first version of it."""
    return read_tree(tmp_path / "runs" / f"{SLUG}-v1")


def write(path: Path, data: bytes) -> Path:
    """A file to be sent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
