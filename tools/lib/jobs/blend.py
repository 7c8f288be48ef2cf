"""Blend the predictions of several runs into one, as the kernel blends its own candidates.

A blend is scored on the images that every run held out: weights are chosen on one half of their pools and measured on
the other, both ways, and kept only where they beat equal weights by more than the error of the gain.
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib import kernel
from lib.data import FILES
from lib.jobs.fleet import Row
from lib.project import InputError
from lib.runs import Run, check_run


@dataclass(frozen=True)
class Exam:
    """The data that members are asked about: held-out images with their captions, and the test captions."""

    text: np.ndarray  # (views * images, d_text)
    captions: list[str]  # of the same
    gallery: np.ndarray  # (images, d_image)
    test: Any  # the kernel's TestSet
    repulsion: float  # that the runs offered to the choice
    length: float  # of a prediction: the mean of the training images

    @property
    def views(self) -> int:
        """Captions of each image."""
        return len(self.text) // len(self.gallery)


def open_exam(data: Path, runs: dict[str, Run]) -> tuple[Exam, dict[str, Any]]:
    """The exam that all runs can sit, and the facts of the data; runs of other data or another split are refused."""
    paths = [kernel.find_file(data, name) for name in FILES]
    facts = {path.name: kernel.file_facts(path) for path in paths}
    first: dict[str, Any] = {}
    for name, run in runs.items():
        if {name: run.manifest["inputs"].get(name) for name in facts} != facts:
            raise InputError(f"{run.folder}: was trained on other data than {data} holds; give its data with --data")
        bundle = kernel.load_weights(run.folder / kernel.VALIDATED_MODEL)
        first = first or bundle
        if bundle["val_images"] != first["val_images"]:
            raise InputError(f"run {name} held out other images than {next(iter(runs))}: give all the same split_seed "
                             "and val_fraction")
    train, test = kernel.read_train(paths[0]), kernel.read_test(paths[1])
    index = {name: number for number, name in enumerate(train.image_names)}
    images = np.array([index[name] for name in first["val_images"]])
    views = kernel.caption_views(train.image_of, images).ravel()
    texts = kernel.cut_as_the_test(train.captions, test.captions, first["knobs"]["split_seed"])
    captions = [texts[i] for i in views]
    repulsion = first["knobs"]["repulsion"]  # the same in all runs
    return Exam(train.text[views], captions, train.images[images], test, repulsion, first["length"]), facts


def answers(run: Run, exam: Exam) -> tuple[np.ndarray, np.ndarray]:
    """Unit predictions of a run: (views, images, d) of its validated weights, (tests, d) of its final ones."""
    validated, final = (kernel.load_weights(run.folder / name) for name in (kernel.VALIDATED_MODEL, kernel.FINAL_MODEL))
    known = kernel.unit(kernel.predict(validated, exam.text, exam.captions))
    asked = kernel.unit(kernel.predict(final, exam.test.text, exam.test.captions))
    return known.reshape(exam.views, len(exam.gallery), -1), asked


# ------------------------------------------------------------------------------------------- the blend
def blend_runs(rows: list[Row], folders: dict[str, Path], data: Path, output: Path) -> None:
    """One checked submission of all finished runs, with its validation beside it; the manifest comes last."""
    start = time.monotonic()
    (output / kernel.MANIFEST).unlink(missing_ok=True)  # of a blend of fewer runs
    runs = {name: check_run(folder) for name, folder in folders.items()}
    exam, inputs = open_exam(data, runs)
    validated, final = zip(*(answers(run, exam) for run in runs.values()), strict=True)
    found = kernel.choose_blend(list(validated), exam.gallery, exam.repulsion, [1.0] * len(runs))
    mean = kernel.unit(np.tensordot(found.weights, np.stack(final), 1)) * np.float32(exam.length)
    output.mkdir(parents=True, exist_ok=True)
    members = [member_facts(row, runs.get(row.name), dict(zip(runs, found.weights, strict=True))) for row in rows]
    facts: dict[str, Any] = {"recipe": "sweep", "device": "cpu", "dtype": "float32"}
    with kernel.together(output) as parts:
        predictions = kernel.repel(mean, found.repulsion, exam.length)
        kernel.write_submission(parts.new(kernel.SUBMISSION), exam.test.caption_ids, predictions)
        facts |= {"seconds": {"total": round(time.monotonic() - start, 2)}}
        validation = kernel.evaluate(found.predictions, exam.gallery)
        scores = {"equal_weights_mrr": found.prior_mrr, "fitted_weights_mrr": found.chosen_mrr}
        metrics = facts | {"validation": validation, "members": members, "repulsion": found.repulsion, **scores}
        kernel.write_json(parts.new(kernel.METRICS), metrics)
        names = {name: run.folder.name for name, run in runs.items()}
        kernel.write_manifest(parts, output, True, facts | {"inputs": inputs, "knobs": {}, "members": names})


def member_facts(row: Row, run: Run | None, weights: dict[str, float]) -> dict[str, Any]:
    """A row of the result: its own scores and its weight; a failed run has none."""
    facts: dict[str, Any] = {"name": row.name, "overrides": row.overrides, "run": None}
    if run is not None:
        scores = {key: run.metrics["validation"][key]["mrr"] for key in ("pool100_raw", "pool100_cosine")}
        facts |= {"run": str(run.folder), "weight": round(float(weights[row.name]), 4), **scores}
    return facts


def blended_before(output: Path, folders: dict[str, Path]) -> bool:
    """Whether the folder holds the verified blend of just these runs."""
    if not (output / kernel.MANIFEST).exists():
        return False
    members = check_run(output).manifest.get("members")
    return members == {name: folder.name for name, folder in folders.items()}
