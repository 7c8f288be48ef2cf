"""Runs with made-up outputs, for tests of what looks at runs: as files to be served, and as folders."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from drawn import write_tree
from lib import kernel

VALIDATION = {"pool100_raw": {"mrr": 0.75, "mrr_se": 0.007, "recall@1": 0.6}}


def made_outputs(
    name: str = "made", validation: dict[str, Any] | None = None, submission: bytes = b"", **facts: Any
) -> dict[str, bytes]:
    """The outputs of a finished run, its manifest included; `facts` go into that. Other names, other bytes."""
    about = {"recipe": "align", "device": "cpu", "dtype": "float32", "seconds": {"total": 3.2, "train": 2.0}}
    validation = VALIDATION if validation is None else validation
    metrics = about | {"validate_seconds": 0.5, "pool": 100, "validation": validation}
    files = {
        kernel.FINAL_MODEL: f"weights of {name}".encode() * 100,
        kernel.VALIDATED_MODEL: b"validated" * 100,
        kernel.SUBMISSION: submission or f"id,embedding\n{name}\n".encode(),
        kernel.METRICS: json.dumps(metrics).encode(),
    }
    outputs = {file: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for file, data in files.items()}
    manifest = about | {"complete": True, "inputs": {}, "knobs": {}, "versions": {}, "outputs": outputs} | facts
    return files | {kernel.MANIFEST: json.dumps(manifest).encode()}


def make_run(folder: Path, mtime: float = 1e9, validation: dict[str, Any] | None = None, **facts: Any) -> Path:
    """Such a run as a folder, of a time."""
    write_tree(folder, made_outputs(folder.name, validation, **facts))
    for path in folder.iterdir():
        os.utime(path, (mtime, mtime))
    return folder


def make_prediction(folder: Path, trained: Path, mtime: float = 1e9) -> Path:
    """A run that only predicted, with the weights that the run in `trained` lists."""
    make_run(folder, mtime)
    manifest, theirs = (json.loads((run / kernel.MANIFEST).read_text()) for run in (folder, trained))
    for name in manifest["outputs"].keys() - {kernel.SUBMISSION}:
        (folder / name).unlink()
        del manifest["outputs"][name]
    manifest["inputs"] = {kernel.FINAL_MODEL: theirs["outputs"][kernel.FINAL_MODEL]}
    (folder / kernel.MANIFEST).write_text(json.dumps(manifest))
    os.utime(folder / kernel.MANIFEST, (mtime, mtime))
    return folder
