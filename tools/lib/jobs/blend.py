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
from lib.runs import COSINE, RAW, Run, check_run, open_run
from lib.weights import Validation, held_out, predict


@dataclass(frozen=True)
class Exam:
    """What all members are asked: the images that they held out, and how their blend becomes predictions."""

    held: Validation
    repulsion: float  # that the runs offered to the choice
    length: float  # of a prediction: the mean of the training images


def facts_of_data(data: Path) -> dict[str, Any]:
    """sha256 and size of the competition's files, as the manifests of runs list their inputs."""
    return {name: kernel.file_facts(kernel.find_file(data, name)) for name in FILES}


def open_exam(data: Path, runs: dict[str, Run]) -> tuple[Exam, dict[str, Any]]:
    """The exam that all runs can sit, and the facts of the data; runs of other data or another split are refused."""
    facts = facts_of_data(data)
    first: dict[str, Any] = {}
    for name, run in runs.items():
        if {name: run.manifest["inputs"].get(name) for name in facts} != facts:
            raise InputError(
                f"{run.folder}: was trained on other data than {data} holds; give its data with --data, or name "
                "another --output for a sweep on these"
            )
        bundle = kernel.load_weights(run.folder / kernel.VALIDATED_MODEL)
        first = first or bundle
        if bundle["val_images"] != first["val_images"]:
            raise InputError(
                f"run {name} held out other images than {next(iter(runs))}: give all the same split_seed "
                "and val_fraction"
            )
    return Exam(held_out(first, data), first["knobs"]["repulsion"], first["length"]), facts


def answers(run: Run, exam: Exam) -> tuple[np.ndarray, np.ndarray]:
    """Unit predictions of a run: (views, images, d) of its validated weights, (tests, d) of its final ones."""
    validated, final = (kernel.load_weights(run.folder / name) for name in (kernel.VALIDATED_MODEL, kernel.FINAL_MODEL))
    problem = exam.held.problem
    asked = kernel.predict(final, problem.test.text, problem.test.captions)
    return kernel.unit(predict(validated, exam.held, problem.views)), kernel.unit(asked)


# ------------------------------------------------------------------------------------------- the blend
def blend_runs(rows: list[Row], folders: dict[str, Path], data: Path, output: Path) -> None:
    """One checked submission of all finished runs, with its validation beside it; the manifest comes last."""
    start = time.monotonic()
    runs = {name: check_run(folder) for name, folder in folders.items()}
    exam, inputs = open_exam(data, runs)
    validated, final = zip(*(answers(run, exam) for run in runs.values()), strict=True)
    found = kernel.choose_blend(list(validated), exam.held.images, exam.repulsion, [1.0] * len(runs))
    mean = kernel.unit(np.tensordot(found.weights, np.stack(final), 1)) * np.float32(exam.length)
    output.mkdir(parents=True, exist_ok=True)
    weights = dict(zip(runs, found.weights.tolist(), strict=True))
    members = [member_facts(row, runs.get(row.name), weights.get(row.name, 0.0)) for row in rows]
    facts: dict[str, Any] = {"recipe": "sweep", "device": "cpu", "dtype": "float32"}
    with kernel.together(output) as parts:
        predictions = kernel.repel(mean, found.repulsion, exam.length)
        kernel.write_submission(parts / kernel.SUBMISSION, exam.held.problem.test.caption_ids, predictions)
        seconds = {"members": sum(run.total_seconds for run in runs.values()), "blend": time.monotonic() - start}
        seconds["total"] = sum(seconds.values())
        facts |= {"seconds": {part: round(took, 2) for part, took in seconds.items()}}
        scores = {"equal_weights_mrr": found.prior_mrr, "fitted_weights_mrr": found.chosen_mrr}
        metrics = facts | {"validation": found.tables, "members": members, "repulsion": found.repulsion, **scores}
        kernel.write_json(parts / kernel.METRICS, metrics)
        names = {name: run.folder.name for name, run in runs.items()}
        kernel.write_manifest(parts, output, True, facts | {"inputs": inputs, "knobs": {}, "members": names})


def member_facts(row: Row, run: Run | None, weight: float) -> dict[str, Any]:
    """A row of the result: its own scores and its weight; a failed run has none."""
    facts: dict[str, Any] = {"name": row.name, "overrides": row.overrides, "run": None}
    if run is not None:
        facts |= {"run": str(run.folder), "weight": round(weight, 4), **{key: run.mrr[key] for key in (RAW, COSINE)}}
    return facts


def blended_before(output: Path, folders: dict[str, Path], data: Path) -> bool:
    """Whether the folder holds the verified blend of just these runs on these data, none of them made anew since."""
    if not (output / kernel.MANIFEST).exists():
        return False
    blend, newest = check_run(output), max(open_run(folder).ended for folder in folders.values())
    made_of = {"members": {name: folder.name for name, folder in folders.items()}, "inputs": facts_of_data(data)}
    return made_of.items() <= blend.manifest.items() and newest <= blend.ended
