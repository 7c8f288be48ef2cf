"""Blend the predictions of several runs into one: unit-length mean, weighted only where that is measured to be better.

A blend is scored on the images that every run held out. Weights are fitted on one half of their pools and measured on
the other, both ways: they are kept only when they beat equal weights by more than the standard error of the gain.
What is scored is what is submitted: the mean, repelled within pools as the kernel repels its own members' mean.
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
from lib.project import InputError, sha256_of
from lib.runs import Run, check_run


@dataclass(frozen=True)
class Exam:
    """The data that members are asked about: held-out images with their captions, and the test captions."""

    text: np.ndarray  # (views * images, d_text)
    gallery: np.ndarray  # (images, d_image)
    test_ids: np.ndarray
    test_text: np.ndarray
    bundle: dict[str, Any]  # how the kernel finishes predictions: the runs' repulsion and length

    @property
    def views(self) -> int:
        """Captions of each image."""
        return len(self.text) // len(self.gallery)


@dataclass(frozen=True)
class Blend:
    """Weights of the members, and the blend's honest validation."""

    weights: np.ndarray
    validation: dict[str, dict[str, float]]
    equal: float  # pool-100 raw MRR with equal weights
    held_out: float | None  # the same with weights fitted on the other half; None where there was nothing to halve


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows at unit length."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def open_exam(data: Path, runs: dict[str, Run]) -> tuple[Exam, dict[str, Any]]:
    """The exam that all runs can sit, and the facts of the data; runs of other data or another split are refused."""
    paths = [kernel.find_file(data, name) for name in FILES]
    facts = {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in paths}
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
    text = train.text[kernel.caption_views(train.image_of, images).ravel()]
    bundle = {"knobs": {"repulsion": first["knobs"]["repulsion"]}, "length": first["length"]}  # the same in all runs
    return Exam(text, train.images[images], test.caption_ids, test.text, bundle), facts


def answers(run: Run, exam: Exam) -> tuple[np.ndarray, np.ndarray]:
    """Unit predictions of a run: (views, images, d) of its validated weights, (tests, d) of its final ones."""
    validated = unit(kernel.predict(kernel.load_weights(run.folder / kernel.VALIDATED_MODEL), exam.text))
    final = unit(kernel.predict(kernel.load_weights(run.folder / kernel.FINAL_MODEL), exam.test_text))
    return validated.reshape(exam.views, len(exam.gallery), -1), final


def finished(mean: np.ndarray, bundle: dict[str, Any]) -> np.ndarray:
    """The mean (n, d) of unit predictions as it is submitted: repelled within pools, at the length of an image."""
    return kernel.repel(bundle, (unit(mean) * bundle["length"]).astype(np.float32))


def finished_views(means: np.ndarray, bundle: dict[str, Any]) -> np.ndarray:
    """The same for each view of means (views, images, d): a view has one caption of each image, as the test set."""
    return np.stack([finished(view, bundle) for view in means])


def gains(means: np.ndarray, gallery: np.ndarray, bundle: dict[str, Any]) -> np.ndarray:
    """Reciprocal rank of each image, raw in pools of 100, the mean over its captions: means (views, images, d)."""
    ranks = [kernel.true_ranks(view, gallery) for view in finished_views(means, bundle)]
    return np.mean([kernel.reciprocal_ranks(row, kernel.POOL) for row in ranks], axis=0)


def climb(members: np.ndarray, gallery: np.ndarray, bundle: dict[str, Any]) -> np.ndarray:
    """Weights of members (k, views, images, d): from one vote each, votes are added as long as that helps."""
    votes, total = np.ones(len(members)), members.sum(0)
    best = gains(total, gallery, bundle).mean()
    for _ in range(2 * len(members)):
        scores = [gains(total + member, gallery, bundle).mean() for member in members]
        if max(scores) <= best:
            break
        best, chosen = max(scores), int(np.argmax(scores))
        votes[chosen] += 1
        total = total + members[chosen]
    return votes / votes.sum()


def weigh(members: np.ndarray, gallery: np.ndarray, bundle: dict[str, Any]) -> Blend:
    """Equal weights, or fitted ones where they are better on images that they were not fitted on."""
    equal = members.mean(0)
    equal_gains = gains(equal, gallery, bundle)
    weights, chosen, held_out = np.full(len(members), 1 / len(members)), equal, None
    half = np.arange(len(gallery)) // kernel.POOL % 2  # whole pools
    if half.any() and len(members) > 1:
        crossed = np.empty_like(equal)
        for side in (0, 1):
            fitted = climb(members[:, :, half != side], gallery[half != side], bundle)
            crossed[:, half == side] = np.tensordot(fitted, members[:, :, half == side], 1)
        gain = gains(crossed, gallery, bundle) - equal_gains
        held_out = float((equal_gains + gain).mean())
        if gain.mean() > gain.std(ddof=1) / len(gain)**0.5:
            weights, chosen = climb(members, gallery, bundle), crossed
    validation = kernel.evaluate(finished_views(chosen, bundle), gallery)
    return Blend(weights, validation, float(equal_gains.mean()), held_out)


# ------------------------------------------------------------------------------------------- the blend
def blend_runs(rows: list[Row], folders: dict[str, Path], data: Path, output: Path) -> None:
    """One checked submission of all finished runs, with its validation beside it; the manifest comes last."""
    start = time.monotonic()
    (output / kernel.MANIFEST).unlink(missing_ok=True)  # of a blend of fewer runs
    runs = {name: check_run(folder) for name, folder in folders.items()}
    exam, inputs = open_exam(data, runs)
    validated, final = zip(*(answers(run, exam) for run in runs.values()), strict=True)
    found = weigh(np.stack(validated), exam.gallery, exam.bundle)
    output.mkdir(parents=True, exist_ok=True)
    submission = output / kernel.SUBMISSION
    predictions = finished(np.tensordot(found.weights, np.stack(final), 1), exam.bundle)
    kernel.write_submission(submission, exam.test_ids, predictions)
    kernel.check_submission(submission, exam.test_ids, predictions.shape[1])
    members = [member_facts(row, runs.get(row.name), dict(zip(runs, found.weights, strict=True))) for row in rows]
    seconds = {"total": round(time.monotonic() - start, 2)}
    kernel.write_json(output / kernel.METRICS, {
        "recipe": "sweep", "device": "cpu", "dtype": "float32", "seconds": seconds, "validation": found.validation,
        "members": members, "equal_weights_mrr": found.equal, "fitted_weights_mrr": found.held_out})
    kernel.finish(output, {"recipe": "sweep", "device": "cpu", "dtype": "float32", "seconds": seconds,
                           "inputs": inputs, "knobs": {}, "members": {n: run.folder.name for n, run in runs.items()}})


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
