"""What tools/verify.py measures of a run: on the images that it held out, beside baselines and another run."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lib import kernel
from lib.project import InputError
from lib.report import numbers
from lib.report.numbers import Pools
from lib.report.weights import (
    Bundle,
    Validation,
    learnt_temperature,
    load_run,
    predict,
    record_of,
    repelled,
    repulsion_of,
)

SEEN = 1000  # training images for the line that is no measure of quality


def disagreement(run: Path, results: dict[str, Any]) -> list[str]:
    """A warning where the run's own record says otherwise: other data under the same names, or another kernel."""
    try:
        recorded = record_of(run, kernel.METRICS)["validation"]["pool100_raw"]["mrr"]
    except (KeyError, TypeError):
        return []
    found = results["baselines"][0]["raw"]
    if abs(found - recorded) < 1e-3:
        return []
    return [f"{run / kernel.METRICS} says MRR {recorded:.4f}, measured here {found:.4f}: is this the data of the run, "
            "and the script that made it?"]


# ------------------------------------------------------------------------------------------------------ baselines

def ridge(held: Validation) -> np.ndarray:
    """Ridge on the run's training images: the kernel's closed form with the whitening drowned in its floor."""
    import torch  # here, so that a command's --help does not wait for it

    knobs = kernel.resolve_knobs({"recipe": "closed_form", "whiten": 1e6})
    position = np.full(len(held.train.images), -1)
    position[held.seen] = np.arange(len(held.seen))
    label = position[held.train.image_of]
    text, images = held.train.text[label >= 0], held.train.images[held.seen]
    state = kernel.fit_closed_form(torch.from_numpy(text), torch.from_numpy(images),
                                   torch.from_numpy(label[label >= 0]), knobs)
    return (held.text @ state["weight"].numpy().T + state["bias"].numpy()) * 1e6  # back to lengths of order one


def baselines(predictions: np.ndarray, held: Validation) -> dict[str, np.ndarray]:
    """Predictions of what every model has to beat."""
    rng = np.random.default_rng(0)
    mean = held.train.images[held.seen].mean(0)
    return {"ridge": ridge(held), "mean image": np.broadcast_to(mean, predictions.shape),
            "random permutation": np.stack([view[rng.permutation(len(view))] for view in predictions])}


def baseline_row(name: str, predictions: np.ndarray, held: Validation) -> dict[str, Any]:
    """One model of the comparison."""
    tables = kernel.evaluate(predictions, held.images)
    raw, cosine = tables["pool100_raw"], tables["pool100_cosine"]
    return {"model": name, "raw": raw["mrr"], "raw_se": raw["mrr_se"], "cosine": cosine["mrr"],
            "cosine_se": cosine["mrr_se"], "recall@1": raw["recall@1"], "recall@10": raw["recall@10"],
            "full_cosine": tables["full_cosine"]["mrr"]}


def other_run(path: Path, bundle: Bundle, held: Validation) -> tuple[str, np.ndarray, list[str]]:
    """Name, predictions and warnings of the run to compare with; it must have been validated on the same images."""
    other, notes = load_run(path)
    if other["dims"] != bundle["dims"]:
        raise InputError(f"{path}: takes and gives {other['dims']} dimensions, the run {bundle['dims']}; give a run of "
                         "the same data")
    if set(other["val_images"]) != set(bundle["val_images"]):
        raise InputError(f"{path}: was validated on other images; make it again with --set split_seed="
                         f"{bundle['knobs']['split_seed']} on the same data")
    predictions = repelled(other, predict(other, held.text, held.captions))
    recipe = other["knobs"]["recipe"]
    return path.name if recipe in path.name else f"{recipe} ({path.name})", predictions, notes


def compare(ours: np.ndarray, theirs: np.ndarray, gallery: np.ndarray) -> dict[str, dict[str, float]]:
    """The paired bootstrap of the difference in MRR, raw and cosine."""
    return {name: numbers.paired_bootstrap(*(numbers.image_gains(each, gallery, kernel.POOL, cosine)
                                             for each in (ours, theirs)))
            for name, cosine in (("raw", False), ("cosine", True))}


# ----------------------------------------------------------------------------------------------------- everything

def calibrate(bundle: Bundle, predictions: np.ndarray, held: Validation) -> dict[str, Any]:
    """Calibration in pools at the learnt temperature and at the best one."""
    scores, learnt = numbers.pool_scores(predictions, held.images, kernel.POOL), learnt_temperature(bundle)
    return {"learnt": numbers.calibration(scores, learnt) if learnt else None,
            "best": numbers.calibration(scores, numbers.best_temperature(scores))}


def retrieval(predictions: np.ndarray, held: Validation) -> dict[str, Any]:
    """The official numbers by view and pooled."""
    views = [{name: kernel.retrieval_metrics(view, held.images, kernel.POOL, cosine)
              for name, cosine in (("raw", False), ("cosine", True))} for view in predictions]
    return {"views": views, "pooled": kernel.evaluate(predictions, held.images)}


def on_seen_images(bundle: Bundle, held: Validation) -> dict[str, Any]:
    """The official numbers on images that were trained on: how much was learnt by heart, no measure of quality."""
    seen, train = held.seen[:SEEN], held.train
    view = kernel.caption_views(train.image_of, seen, 1)
    predictions = repelled(bundle, predict(bundle, train.text[view], [[train.captions[i] for i in view[0]]]))
    return {"images": len(seen), **kernel.evaluate(predictions, train.images[seen])["pool100_raw"]}


Drawable = tuple[np.ndarray, dict[str, tuple]]  # predictions, distances by metric: what pictures are drawn of


def measure(bundle: Bundle, held: Validation,
            against: tuple[str, np.ndarray] | None) -> tuple[dict[str, Any], Drawable]:
    """Every number of the report, and what the pictures need beside them."""
    plain = predict(bundle, held.text, held.captions)
    predictions = repelled(bundle, plain)
    measured, facts = numbers.distances(predictions, held.images), numbers.anisotropy(predictions, held.images)
    others = baselines(predictions, held)
    models = {bundle["knobs"]["recipe"]: predictions, **(dict([against]) if against else {}), **others}
    gains = numbers.gains_of(predictions, held.images, kernel.POOL, False)
    results = {
        "images": len(held.names), "captions": int(predictions.shape[0] * predictions.shape[1]),
        "pool": Pools(len(held.names)).size, "pools": str(Pools(len(held.names))),
        "baselines": [baseline_row(name, each, held) for name, each in models.items()],
        "against": compare(predictions, against[1], held.images) if against else None,
        "against_ridge": compare(predictions, others["ridge"], held.images),
        "retrieval": retrieval(predictions, held),
        "without_repulsion": kernel.evaluate(plain, held.images) if repulsion_of(bundle) else None,
        "seen": on_seen_images(bundle, held),
        "pool_sizes": numbers.pool_curve(predictions, held.images),
        "caption_length": numbers.by_caption_length(held.captions, gains),
        "hubness": numbers.hubness(predictions, held.images, held.names),
        "calibration": calibrate(bundle, predictions, held),
        "distances": {name: numbers.summarise_distance(*each) for name, each in measured.items()},
        "anisotropy": facts, "distance_notes": numbers.distance_warnings(facts)}
    return results, (predictions, measured)
