"""Runs with made-up outputs, for tests of what looks at runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lib import kernel
from lib.project import sha256_of


def make_run(folder: Path, mtime: float = 1e9, validation: dict[str, Any] | None = None, **facts: Any) -> Path:
    """A run with made-up outputs, its manifest right, of a time; `facts` go into the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"seconds": {"total": 3.2, "train": 2.0}, "validate_seconds": 0.5, "validation": validation or {}}
    for name, text in {
        kernel.SUBMISSION: f"id,embedding\n{folder.name}",
        kernel.FINAL_MODEL: f"weights {folder.name}",
        kernel.VALIDATED_MODEL: "validated",
        kernel.METRICS: json.dumps(metrics),
    }.items():
        (folder / name).write_text(text)
    outputs = {
        path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for path in folder.iterdir()
        if path.is_file() and path.name != kernel.MANIFEST
    }
    manifest = {
        "complete": True,
        "recipe": "align",
        "device": "cpu",
        "dtype": "float32",
        "seconds": {"total": 3.2},
        "inputs": {},
        "knobs": {},
        "outputs": outputs,
    }
    (folder / kernel.MANIFEST).write_text(json.dumps(manifest | facts))
    for path in folder.iterdir():
        os.utime(path, (mtime, mtime))
    return folder
