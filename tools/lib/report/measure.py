"""What tools/verify.py measures of a run: on the images that it held out, beside baselines and another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib import kernel
from lib.data import FILES
from lib.project import InputError, read_json
from lib.report import numbers
from lib.report.numbers import COSINES, Pools
from lib.runs import ADVICE, COSINE, FULL, RAW, Run
from lib.weights import Bundle, Validation, held_out, learnt_temperature, load_run, predict, repelled

SEEN = 1000  # training images for the line that is no measure of quality


@dataclass(frozen=True)
class Model:
    """What predicts the held-out images: a run, by its folder's name and with its own official numbers, or no run."""

    name: str
    predictions: np.ndarray  # (views, m, d_image)
    recorded: dict[str, float] | None = None


def recorded(run: Path) -> dict[str, float] | None:
    """The run's own official numbers, if it has any: every choice in them was made on other images than measured."""
    tables = read_json(run / kernel.METRICS, ADVICE, optional=True).get("validation") or {}
    return tables.get(RAW)


def disagreement(rows: list[dict[str, Any]]) -> list[str]:
    """A warning for each run whose own record says otherwise: other data under the same names, or another kernel."""
    return [
        f"{row['model']}: its {kernel.METRICS} says MRR {row['recorded']:.4f}, measured here {row['raw']:.4f}: is this "
        "the data of the run, and the script that made it?"
        for row in rows
        if row["recorded"]
        and abs(row["raw"] - row["recorded"]) >= max(1e-3, row["raw_se"])  # the blend was chosen here
    ]


# ------------------------------------------------------------------------------------------------------ baselines
def ridge(held: Validation) -> np.ndarray:
    """Plain ridge from captions to images on the training images, with the penalty of the kernel's closed form."""
    train = held.train
    captions = np.flatnonzero(np.isin(train.image_of, held.seen))
    mean_text, mean_image = train.text[captions].mean(0), train.images[held.seen].mean(0)
    width = train.text.shape[1]
    covariance, cross = np.zeros((width, width)), np.zeros((width, train.images.shape[1]))
    for some in np.array_split(captions, 1 + len(captions) // 8192):  # in blocks: an image for each caption is a lot
        x = train.text[some] - mean_text
        covariance += x.T @ x / len(captions)
        cross += x.T @ (train.images[train.image_of[some]] - mean_image) / len(captions)
    penalty = kernel.Knobs().ridge * covariance.diagonal().mean() * np.eye(width)
    return (train.text[held.views] - mean_text) @ np.linalg.solve(covariance + penalty, cross).astype(np.float32)


def baselines(predictions: np.ndarray, held: Validation) -> list[Model]:
    """What every model has to beat; ridge comes first."""
    rng = np.random.default_rng(0)
    mean = held.train.images[held.seen].mean(0)
    return [
        Model("ridge", ridge(held)),
        Model("mean image", np.tile(mean, (*predictions.shape[:2], 1))),
        Model("random permutation", np.stack([view[rng.permutation(len(view))] for view in predictions])),
    ]


def baseline_row(model: Model, held: Validation) -> dict[str, Any]:
    """A model's MRR as measured here and, of a run, as it recorded it itself (raw)."""
    tables = kernel.evaluate(model.predictions, held.images)
    raw, cosine = tables[RAW], tables[COSINE]
    scores = {"raw": raw["mrr"], "raw_se": raw["mrr_se"], "cosine": cosine["mrr"], "cosine_se": cosine["mrr_se"]}
    recall = {key: raw[key] for key in ("recall@1", "recall@10")}
    own = model.recorded["mrr"] if model.recorded else None
    return {"model": model.name, "recorded": own, **scores, **recall, "full_cosine": tables[FULL]["mrr"]}


def other_run(path: Path, bundle: Bundle, held: Validation) -> tuple[Model, list[str]]:
    """The run to compare with, and warnings; it must have been validated on the same images."""
    other, notes = load_run(path)
    if other["dims"] != bundle["dims"]:
        raise InputError(
            f"{path}: takes and gives {other['dims']} dimensions, the run {bundle['dims']}; give a run of the same data"
        )
    if set(other["val_images"]) != set(bundle["val_images"]):
        raise InputError(
            f"{path}: was validated on other images; make it again with --set split_seed="
            f"{bundle['knobs']['split_seed']} on the same data"
        )
    predictions = repelled(other, predict(other, held, held.views))
    return Model(path.resolve().name, predictions, recorded(path)), notes


def compare(ours: np.ndarray, theirs: np.ndarray, gallery: np.ndarray) -> dict[str, dict[str, float]]:
    """The paired bootstrap of the difference in MRR, raw and cosine."""
    found = {}
    for name, cosine in COSINES.items():
        gains = [numbers.image_gains(each, gallery, kernel.POOL, cosine) for each in (ours, theirs)]
        found[name] = numbers.paired_bootstrap(gains[0], gains[1])
    return found


def paired(one: Run, other: Run, data: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """A row each of two runs, by their validated weights on the images that both held out; the paired differences."""
    facts = kernel.file_facts(kernel.find_file(data, FILES[0]))
    for run in (one, other):
        if run.manifest.get("inputs", {}).get(FILES[0]) != facts:
            raise InputError(f"{run.folder}: was trained on other data than {data} holds; --data DIR names its own")
    bundle, _ = load_run(one.folder)
    held = held_out(bundle, data)
    theirs, _ = other_run(other.folder, bundle, held)
    predictions = repelled(bundle, predict(bundle, held, held.views))
    ours = Model(one.folder.resolve().name, predictions, recorded(one.folder))
    rows = [baseline_row(model, held) for model in (ours, theirs)]
    return rows, compare(ours.predictions, theirs.predictions, held.images)


# ----------------------------------------------------------------------------------------------------- everything
def calibrate(bundle: Bundle, predictions: np.ndarray, held: Validation) -> dict[str, Any]:
    """Calibration in pools at the learnt temperature and at the best one."""
    scores, learnt = numbers.pool_scores(predictions, held.images, kernel.POOL), learnt_temperature(bundle)
    return {
        "learnt": numbers.calibration(scores, learnt) if learnt else None,
        "best": numbers.calibration(scores, numbers.best_temperature(scores)),
    }


def retrieval(predictions: np.ndarray, held: Validation) -> dict[str, Any]:
    """The official numbers by view and pooled."""
    views = [
        {name: kernel.retrieval_metrics(view, held.images, kernel.POOL, cosine) for name, cosine in COSINES.items()}
        for view in predictions
    ]
    return {"views": views, "pooled": kernel.evaluate(predictions, held.images)}


def on_seen_images(bundle: Bundle, held: Validation) -> dict[str, Any]:
    """The official numbers on images that were trained on: how much was learnt by heart, no measure of quality."""
    seen = held.seen[:SEEN]
    predictions = repelled(bundle, predict(bundle, held, kernel.caption_views(held.train.image_of, seen, 1)))
    return {"images": len(seen), **kernel.evaluate(predictions, held.train.images[seen])[RAW]}


Drawable = tuple[np.ndarray, dict[str, tuple]]  # predictions, distances by metric: what pictures are drawn of


def measure(run: Path, bundle: Bundle, held: Validation, against: Model | None) -> tuple[dict[str, Any], Drawable]:
    """Every number of the report, and what the pictures need beside them."""
    plain = predict(bundle, held, held.views)
    predictions = repelled(bundle, plain)
    measured, facts = numbers.distances(predictions, held.images), numbers.anisotropy(predictions, held.images)
    ours, others = Model(run.resolve().name, predictions, recorded(run)), baselines(predictions, held)
    models = [ours, *([against] if against else []), *others]
    gains = numbers.gains_of(predictions, held.images, kernel.POOL, False)
    results = {
        "images": len(held.names),
        "captions": int(predictions.shape[0] * predictions.shape[1]),
        "pool": Pools(len(held.names)).size,
        "pools": str(Pools(len(held.names))),
        "recipe": bundle["knobs"]["recipe"],
        "recorded": ours.recorded,
        "baselines": [baseline_row(model, held) for model in models],
        "against": compare(predictions, against.predictions, held.images) if against else None,
        "against_ridge": compare(predictions, others[0].predictions, held.images),
        "retrieval": retrieval(predictions, held),
        "without_repulsion": kernel.evaluate(plain, held.images) if bundle["repulsion"] else None,
        "seen": on_seen_images(bundle, held),
        "pool_sizes": numbers.pool_curve(predictions, held.images),
        "caption_length": numbers.by_caption_length(held.captions, gains),
        "hubness": numbers.hubness(predictions, held.images, held.names),
        "calibration": calibrate(bundle, predictions, held),
        "distances": {name: numbers.summarise_distance(*each) for name, each in measured.items()},
        "anisotropy": facts,
        "distance_notes": numbers.distance_warnings(facts),
    }
    return results, (predictions, measured)
