"""A run's weights that have not seen its validation images: found, checked, and made to predict.

What the report knows of a bundle's keys and of how the kernel predicts stands here.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib import kernel
from lib.project import InputError

Bundle = dict[str, Any]


@dataclass(frozen=True)
class Validation:
    """The images that a run held out, with their captions in views, and the training images for baselines."""

    names: list[str]
    images: np.ndarray  # (m, d_image)
    captions: list[list[str]]  # [view][image]
    text: np.ndarray  # (views, m, d_text)
    train: Any  # the kernel's TrainSet, and ...
    seen: np.ndarray  # ... its images that were trained on


def load_run(run: Path) -> tuple[Bundle, list[str]]:
    """The weights that have not seen the validation images, and what has to be said about them."""
    if not run.is_dir():
        raise InputError(f"{run}: no such run; python tools/run_local.py makes one")
    validated, final = run / kernel.VALIDATED_MODEL, run / kernel.FINAL_MODEL
    path = validated if validated.exists() else final
    if not path.exists():
        raise InputError(f"{run}: no weights ({kernel.VALIDATED_MODEL}) in it; python tools/run_local.py makes a run")
    bundle, notes = kernel.load_weights(path), unfinished(run)
    if not bundle["val_images"]:
        raise InputError(f"{path}: no validation images were held out; run again with --set val_fraction=0.1")
    if path == validated:
        return bundle, notes
    if bundle["knobs"]["refit"]:
        raise InputError(f"{run}: no {kernel.VALIDATED_MODEL}, and {final.name} has seen the validation images; "
                         "fetch the other file as well or run again with --set refit=false")
    return bundle, [*notes, f"{kernel.VALIDATED_MODEL} is missing; {final.name} is used: with refit=false it is the "
                            "same model"]


def record_of(run: Path, name: str) -> dict[str, Any]:
    """A JSON file of a run, {} where it has none that can be read: weights alone are enough to be verified."""
    try:
        content = json.loads((run / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def unfinished(run: Path) -> list[str]:
    """What has to be said of a run that was interrupted: how far it came, and what its submission was predicted by."""
    manifest = record_of(run, kernel.MANIFEST)
    if not manifest:
        return [f"{run} has no {kernel.MANIFEST}: it was interrupted or still runs, and the figures are of what it "
                "has trained so far"]
    if manifest.get("complete"):
        return []
    trained = [f"candidate {one['candidate']} for {one['epochs']:g} epochs"
               for one in record_of(run, kernel.METRICS).get("members", [])]
    predicted = [f"candidate {one['candidate']}{'' if one['refitted'] else ' (not refitted)'}"
                 for one in manifest.get("predicted_by", [])]
    parts = [f"{run} is not finished ({manifest.get('stopped') or 'it failed, or still runs'})"]
    parts += [f"trained: {', '.join(trained)}"] if trained else []
    parts += [f"its submission is predicted by {', '.join(predicted)}"] if predicted else []
    return ["; ".join(parts)]


def held_out(bundle: Bundle, data: Path) -> Validation:
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


# ----------------------------------------------------------------------------------------------------- predicting

def predict(bundle: Bundle, text: np.ndarray, captions: list[list[str]]) -> np.ndarray:
    """Predictions (views, m, d_image) without repulsion of text (views, m, d_text) and captions [view][image]."""
    views, m, width = text.shape
    return kernel.predict(bundle, text.reshape(-1, width)).reshape(views, m, -1)


def repelled(bundle: Bundle, predictions: np.ndarray) -> np.ndarray:
    """Predictions (views, m, d_image) as the submission's are made of them, view by view."""
    return np.stack([kernel.repel(bundle, view) for view in predictions])


def repulsion_of(bundle: Bundle) -> float:
    """The strength of repulsion that the run predicts with; 0: none."""
    return float(bundle["knobs"]["repulsion"])


def learnt_temperature(bundle: Bundle) -> float | None:
    """The softmax temperature learnt for raw-length images, the members' geometric mean; None where none is learnt."""
    scales = [member["state"]["log_scale"][0].item() for member in bundle["members"] if "log_scale" in member["state"]]
    return float(np.exp(-np.minimum(scales, np.log(200)).mean())) if scales else None  # 200: the kernel's own clamp
