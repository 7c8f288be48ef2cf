"""What a run leaves behind, looked at from outside: files, manifest, figures; and how a run says that it failed."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from drawn import IMAGE
from forked import KernelServer, failed_in_one_line, same_weights
from lib.project import sha256_of

SUBMISSION, MANIFEST, METRICS = "pipeline_submission.csv", "manifest.json", "metrics.json"
FINAL, VALIDATED = "pipeline_final_model.pth", "pipeline_validated_model.pth"
LOG, CURVES = "training_log.csv", "training_curves.png"
OUTPUTS = {SUBMISSION, FINAL, VALIDATED, METRICS, LOG, CURVES, MANIFEST}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def mrr(output: Path) -> float:
    """What validation says of the submission, raw."""
    return read_json(output / METRICS)["validation"]["pool100_raw"]["mrr"]


def check_submitted(kernel: Any, output: Path, rows: int = 100) -> dict[str, Any]:
    """The submission is valid, the manifest vouches for it and tells what predicted it; the manifest."""
    kernel.check_submission(output / SUBMISSION, np.arange(1, rows + 1), IMAGE)
    manifest = read_json(output / MANIFEST)
    for name, facts in manifest["outputs"].items():
        assert facts == {"sha256": sha256_of(output / name), "bytes": (output / name).stat().st_size}, name
    metrics, bundle = read_json(output / METRICS), kernel.load_weights(output / FINAL)
    predicting = {one["candidate"]: one for one in metrics["members"] if one["weight"]}
    assert abs(sum(one["weight"] for one in predicting.values()) - 1) < 1e-6
    assert len(bundle["members"]) == len(manifest["predicted_by"]) == len(predicting)
    for one, member in zip(manifest["predicted_by"], bundle["members"], strict=True):
        assert one.items() <= predicting[one["candidate"]].items()
        assert (member["weight"], member["refitted"]) == (one["weight"], one["refitted"])
    assert metrics["repulsion"] == manifest["repulsion"] == bundle["repulsion"]
    return manifest


def check_outputs(kernel: Any, output: Path, checkpoints: tuple[int, ...] = ()) -> dict[str, Any]:
    """A complete run: everything is there, nothing else is, nothing was left out; the manifest."""
    names = OUTPUTS | {f"pipeline_model_checkpoint_epoch_{n}.pth" for n in checkpoints}
    if not rows_of(output / LOG):  # of the closed form alone there are no curves
        names -= {CURVES}
    assert {path.name for path in output.iterdir()} == names
    manifest = check_submitted(kernel, output)
    assert manifest["complete"] is True
    assert manifest["stopped"] == ""
    assert read_json(output / METRICS)["left_out"] == read_json(output / METRICS)["failures"] == []
    assert set(manifest["outputs"]) == names - {MANIFEST}
    assert {"inputs", "knobs", "versions", "device", "seconds"} <= set(manifest)
    return manifest


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same(output: Path, expected: Path) -> None:
    """Weights, submission, figures and history are those of the other run, and nothing is left over."""
    for name in (FINAL, VALIDATED):
        assert same_weights(output / name, expected / name), name
    assert sha256_of(output / SUBMISSION) == sha256_of(expected / SUBMISSION)
    untimed = [[{**row, "seconds": ""} for row in rows_of(folder / LOG)] for folder in (output, expected)]
    assert untimed[0] == untimed[1]
    metrics = [read_json(folder / METRICS) for folder in (output, expected)]
    for one in metrics:
        one["members"] = [{**member, "seconds": 0} for member in one["members"]]
    for key in ("validation", "members", "weights", "repulsion", "left_out", "failures"):
        assert metrics[0][key] == metrics[1][key], key
    assert read_json(output / MANIFEST)["complete"] is True
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()}


def fails(server: KernelServer, message: str, output: Path, source: Path, *arguments: object) -> None:
    """A run that what it was given ends in one line, and that leaves nothing half-written."""
    ended = server.run("--input", source, "--output", output, *arguments)
    failed_in_one_line(ended, 2, re.escape(message))
    assert "Traceback" not in ended.stdout, ended.stdout
    if output.is_dir():
        left = {path.name for path in output.iterdir()}
        assert not [name for name in left if name.startswith((".", "pipeline", "manifest", "metrics"))], left
