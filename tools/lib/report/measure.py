"""What tools/verify.py measures of a run: on the images that it held out, beside baselines and another run."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib import kernel
from lib.project import InputError
from lib.report import numbers

# ------------------------------------------------------------------------------------------- a run and its images

@dataclass(frozen=True)
class Validation:
    """The images that a run held out, with their captions in views, and the training images for baselines."""

    names: list[str]
    images: np.ndarray  # (m, d_image)
    captions: list[list[str]]  # [view][image]
    text: np.ndarray  # (views, m, d_text)
    train: Any  # the kernel's TrainSet, and ...
    seen: np.ndarray  # ... its images that were trained on


def newest_run(runs: Path) -> Path:
    """The newest run with weights; run folders begin with their time."""
    names = (kernel.VALIDATED_MODEL, kernel.FINAL_MODEL)
    found = sorted({path.parent for name in names for path in runs.glob(f"*/{name}")})
    if not found:
        raise InputError(f"{runs}: no run with weights; python tools/run_local.py makes one")
    return found[-1]


def load_run(run: Path) -> tuple[dict[str, Any], list[str]]:
    """The weights that have not seen the validation images, and what has to be said about them."""
    if not run.is_dir():
        raise InputError(f"{run}: no such run; python tools/run_local.py makes one")
    validated, final = run / kernel.VALIDATED_MODEL, run / kernel.FINAL_MODEL
    path = validated if validated.exists() else final
    if not path.exists():
        raise InputError(f"{run}: no weights ({kernel.VALIDATED_MODEL}) in it; python tools/run_local.py makes a run")
    bundle = kernel.load_weights(path)
    if not bundle["val_images"]:
        raise InputError(f"{path}: no validation images were held out; run again with --set val_fraction=0.1")
    if path == validated:
        return bundle, []
    if bundle["knobs"]["refit"]:
        raise InputError(f"{run}: no {kernel.VALIDATED_MODEL}, and {final.name} has seen the validation images; "
                         "fetch the other file as well or run again with --set refit=false")
    return bundle, [f"{kernel.VALIDATED_MODEL} is missing; {final.name} is used: with refit=false it is the same model"]


def held_out(bundle: dict[str, Any], data: Path) -> Validation:
    """The run's validation images in its own order, looked up by name in the data."""
    path = kernel.find_file(data, "train.npz")
    train = kernel.read_train(path)
    have = [train.text.shape[1], train.images.shape[1]]
    if have != list(bundle["dims"]):
        raise InputError(f"{path}: {have[0]}-d captions and {have[1]}-d images, but the run has "
                         f"{bundle['dims'][0]} and {bundle['dims'][1]}; give its own data with --data")
    place = {name: index for index, name in enumerate(train.image_names)}
    absent = [name for name in bundle["val_images"] if name not in place]
    if absent:
        raise InputError(f"{path}: {len(absent)} of the run's {len(bundle['val_images'])} validation images are not in "
                         f"it (the first: {absent[0]}); give its own data with --data")
    chosen = np.array([place[name] for name in bundle["val_images"]])
    views = kernel.caption_views(train.image_of, chosen)
    captions = [[train.captions[i] for i in view] for view in views]
    seen = np.setdiff1d(np.arange(len(train.images)), chosen)
    return Validation(list(bundle["val_images"]), train.images[chosen], captions, train.text[views], train, seen)


def predict(bundle: dict[str, Any], held: Validation) -> np.ndarray:
    """(views, m, d_image) predictions, made as the submission's are."""
    views, m, width = held.text.shape
    plain = kernel.predict(bundle, held.text.reshape(-1, width)).reshape(views, m, -1)
    return np.stack([kernel.repel(bundle, view) for view in plain])


def disagreement(run: Path, results: dict[str, Any]) -> list[str]:
    """A warning where the run's own record says otherwise: other data under the same names, or another kernel."""
    try:
        recorded = json.loads((run / kernel.METRICS).read_text(encoding="utf-8"))["validation"]["pool100_raw"]["mrr"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # weights alone are enough
    found = results["baselines"][0]["raw"]
    if abs(found - recorded) < 1e-3:
        return []
    return [f"{run / kernel.METRICS} says MRR {recorded:.4f}, measured here {found:.4f}: is this the data of the run, "
            "and the script that made it?"]


# ------------------------------------------------------------------------------------------------------ baselines

def ridge(held: Validation) -> np.ndarray:
    """Ridge on the run's training images: the kernel's closed form with the whitening drowned in its floor."""
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


def other_run(path: Path, bundle: dict[str, Any], held: Validation) -> tuple[str, np.ndarray]:
    """Name and predictions of the run to compare with; it must have been validated on the same images."""
    other, _ = load_run(path)
    if other["dims"] != bundle["dims"]:
        raise InputError(f"{path}: takes and gives {other['dims']} dimensions, the run {bundle['dims']}; give a run of "
                         "the same data")
    if set(other["val_images"]) != set(bundle["val_images"]):
        raise InputError(f"{path}: was validated on other images; make it again with --set split_seed="
                         f"{bundle['knobs']['split_seed']} on the same data")
    return f"{other['knobs']['recipe']} ({path.name})", predict(other, held)


def compare(ours: np.ndarray, theirs: np.ndarray, held: Validation) -> dict[str, dict[str, float]]:
    """The paired bootstrap of the difference in MRR, raw and cosine."""
    return {name: numbers.paired_bootstrap(*(numbers.image_gains(each, held.images, kernel.POOL, cosine)
                                             for each in (ours, theirs)))
            for name, cosine in (("raw", False), ("cosine", True))}


# ----------------------------------------------------------------------------------------------------- everything

def learnt_temperature(bundle: dict[str, Any]) -> float | None:
    """The softmax temperature learnt for raw-length images, the members' geometric mean; None where none is learnt."""
    scales = [member["state"]["log_scale"][0].item() for member in bundle["members"] if "log_scale" in member["state"]]
    return float(np.exp(-np.minimum(scales, np.log(200)).mean())) if scales else None  # 200: the kernel's own clamp


def calibrate(bundle: dict[str, Any], predictions: np.ndarray, held: Validation, pool: int) -> dict[str, Any]:
    """Calibration in pools at the learnt temperature and at the best one."""
    scores, learnt = numbers.pool_scores(predictions, held.images, pool), learnt_temperature(bundle)
    return {"learnt": numbers.calibration(scores, learnt) if learnt else None,
            "best": numbers.calibration(scores, numbers.best_temperature(scores))}


def retrieval(predictions: np.ndarray, held: Validation) -> dict[str, Any]:
    """The official numbers by view and pooled."""
    views = [{name: kernel.retrieval_metrics(view, held.images, kernel.POOL, cosine)
              for name, cosine in (("raw", False), ("cosine", True))} for view in predictions]
    return {"views": views, "pooled": kernel.evaluate(predictions, held.images)}


def measure(bundle: dict[str, Any], held: Validation, predictions: np.ndarray, against: tuple[str, np.ndarray] | None,
            measured: dict[str, tuple]) -> dict[str, Any]:
    """Every number of the report."""
    facts = numbers.anisotropy(predictions, held.images)
    models = {bundle["knobs"]["recipe"]: predictions, **(dict([against]) if against else {}),
              **baselines(predictions, held)}
    gains = numbers.gains_of(predictions, held.images, kernel.POOL, False)
    return {"images": len(held.names), "captions": int(predictions.shape[0] * predictions.shape[1]),
            "distances": {name: numbers.summarise_distance(*each) for name, each in measured.items()},
            "anisotropy": facts, "warnings": numbers.distance_warnings(facts),
            "baselines": [baseline_row(name, each, held) for name, each in models.items()],
            "against": compare(predictions, against[1], held) if against else None,
            "retrieval": retrieval(predictions, held),
            "pool_sizes": numbers.pool_curve(predictions, held.images),
            "caption_length": numbers.by_caption_length(held.captions, gains),
            "hubness": numbers.hubness(predictions, held.images, held.names),
            "calibration": calibrate(bundle, predictions, held, kernel.POOL)}
