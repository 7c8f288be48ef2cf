"""A submission against the answers, where somebody has them: the kernel's metric on test captions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from lib import kernel
from lib.project import InputError
from lib.report.contents import POOLED, RETRIEVAL_HEADER, retrieval_rows
from lib.report.measure import compare
from lib.report.numbers import Pools, difference_in_words
from lib.report.page import Table

IDS, IMAGES = "captions/ids", "images/embeddings"


def read_solution(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The ids (n,) of an npz of answers and each one's image (n, d_image); anything else is the user's error."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:  # numpy leaves a damaged one open
            ids, images = np.asarray(npz[IDS]), np.asarray(npz[IMAGES], np.float32)
    except KeyError:
        raise InputError(f"{path}: not a file of answers: it needs the keys {IDS} and {IMAGES}") from None
    except Exception as error:  # damaged bytes can fail anywhere in zip, zlib or header
        raise InputError(f"{path}: not a readable npz ({str(error)[:100]})") from error
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or images.ndim != 2 or len(ids) != len(images) or len(ids) < 2:
        raise InputError(
            f"{path}: {IDS} of shape {ids.shape} and {IMAGES} of shape {images.shape}: expected as many "
            "whole numbers as vectors, two at least"
        )
    if not np.isfinite(images).all():
        raise InputError(f"{path}: {IMAGES} holds NaN or infinity")
    return ids.astype(np.int64), images


def submission_of(place: Path) -> Path:
    """The csv itself, or that of a run's folder."""
    path = place / kernel.SUBMISSION if place.is_dir() else place
    if not path.is_file():
        raise InputError(f"{path}: no such submission; give a run's folder or a csv with --run")
    return path


def read_submission(path: Path, ids: np.ndarray, dim: int) -> np.ndarray:
    """Predictions (n, dim), once the kernel has found the file to be a submission for these ids."""
    kernel.check_submission(path, ids, dim)  # also lifts csv's limit on a cell's length
    with path.open(newline="", encoding="utf-8") as file:
        rows = [json.loads(row["embedding"]) for row in csv.DictReader(file)]
    with np.errstate(over="ignore"):
        predictions = np.array(rows, np.float32)
    if not (finite := np.isfinite(predictions).all(axis=1)).all():
        raise InputError(f"{path}: id {ids[finite.argmin()]}: a number that is too large for float32")
    return predictions


def score(place: Path, answers: Path, against: Path | None) -> dict[str, Any]:
    """The official numbers of a submission, and a paired comparison with another one of the same captions."""
    (ids, images), path = read_solution(answers), submission_of(place)
    predictions, compared = read_submission(path, ids, images.shape[1])[None], None
    if against:
        other = submission_of(against)
        theirs = read_submission(other, ids, images.shape[1])[None]
        compared = {"submission": str(other), **compare(predictions, theirs, images)}
    return {
        "submission": str(path),
        "solution": str(answers),
        "captions": len(ids),
        "pool": Pools(len(ids)).size,
        "pools": str(Pools(len(ids))),
        "scores": kernel.evaluate(predictions, images),
        "against": compared,
    }


def score_table(result: dict[str, Any]) -> Table:
    return RETRIEVAL_HEADER, retrieval_rows({label: result["scores"][key] for key, label in POOLED.items()})


def score_lines(result: dict[str, Any]) -> list[str]:
    """What the table is of, and the comparison in words."""
    lines = [f"{result['submission']}: {result['captions']:,} captions in {result['pools']}"]
    if against := result["against"]:
        lines += [difference_in_words(against[name], against["submission"], name) for name in ("raw", "cosine")]
    return lines
