"""A run's weights that have not seen its validation images: found, checked, and made to predict.

What tools know of a bundle's keys and of how the kernel predicts stands here.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib import kernel
from lib.data import FILES
from lib.project import InputError, read_json
from lib.runs import ADVICE, RESUME_STATES, open_trained

Bundle = dict[str, Any]


@dataclass(frozen=True)
class Validation:
    """The images that a run held out, among the data as the kernel has them in a run."""

    problem: kernel.Problem  # without its words
    words: list[str]  # all captions as networks see them that look at words: cut as often as the test's are

    @property
    def names(self) -> list[str]:
        return [self.problem.train.image_names[i] for i in self.problem.val_images]

    @property
    def images(self) -> np.ndarray:
        """(m, d_image) of the names."""
        return self.problem.val_vectors

    @property
    def captions(self) -> list[list[str]]:
        """[view][image], as they are to be read."""
        return [[self.problem.train.captions[i] for i in view] for view in self.problem.views]


def load_run(run: Path) -> tuple[Bundle, list[str]]:
    """The weights that have not seen the validation images, and what has to be said about them."""
    if not run.is_dir():
        raise InputError(f"{run}: no such run; python tools/run_local.py makes one")
    validated, final = run / kernel.VALIDATED_MODEL, run / kernel.FINAL_MODEL
    path = validated if validated.exists() else final
    if not path.exists():
        if (run / kernel.MANIFEST).exists():
            open_trained(run)
        raise InputError(f"{run}: no weights ({kernel.VALIDATED_MODEL}) in it; python tools/run_local.py makes a run")
    bundle, notes = kernel.load_weights(path), unfinished(run)
    if not bundle["val_images"]:
        raise InputError(f"{path}: no validation images were held out; run again with --set val_fraction=0.1")
    if path == validated:
        return bundle, notes
    if bundle["knobs"]["refit"]:
        raise InputError(
            f"{run}: no {kernel.VALIDATED_MODEL}, and {final.name} has seen the validation images; "
            "fetch the other file as well or run again with --set refit=false"
        )
    instead = f"{run}: no {kernel.VALIDATED_MODEL}; {final.name} is used: with refit=false it is the same model"
    return bundle, [*notes, instead]


def unfinished(run: Path) -> list[str]:
    """What has to be said of a run that was interrupted: how far it came, and what its submission was predicted by."""
    manifest, metrics = (read_json(run / name, ADVICE, optional=True) for name in (kernel.MANIFEST, kernel.METRICS))
    if not manifest:
        why = "it was interrupted or still runs, and the figures are of what it has trained so far"
        return [f"{run} has no {kernel.MANIFEST}: {why}"]
    if manifest.get("complete"):
        return []
    trained = []
    for one in metrics.get("members", []):
        how = f"for {one['epochs']:g} epochs" if one["epochs"] else "in closed form"
        trained.append(f"candidate {one['candidate']} {how}")
    trained += under_way(run)
    predicted = [
        f"candidate {one['candidate']}{'' if one['refitted'] else ' (not refitted)'}"
        for one in manifest.get("predicted_by", [])
    ]
    parts = [f"{run} is not finished ({manifest.get('stopped') or 'it failed, or still runs'})"]
    parts += [f"trained: {', '.join(trained)}"] if trained else []
    parts += [f"its submission is predicted by {', '.join(predicted)}"] if predicted else []
    return ["; ".join(parts)]


def under_way(run: Path) -> list[str]:
    """The trainings that an interrupted run can go on with, and in which epoch they are."""
    lines = []
    for path in sorted(run.glob(RESUME_STATES)):
        with contextlib.suppress(kernel.UserError, ValueError):  # a damaged one, or a copy by hand, says nothing
            phase, number = path.stem.split("_")[1:]
            if (at := kernel.load_torch(path).get("at")) and not at.get("weights"):  # else it is trained
                what = "candidate" if phase == "validate" else "refit of candidate"
                lines.append(f"{what} {number} up to epoch {len(at['history']) + 1}")
    return lines


def held_out(bundle: Bundle, data: Path) -> Validation:
    """The run's validation images in its own order, looked up by name in the data."""
    path = kernel.find_file(data, FILES[0])
    with contextlib.redirect_stdout(sys.stderr):  # what the kernel says of odd data: stdout is the tool's own
        train = kernel.read_train(path, bundle["knobs"]["consecutive_captions"])
        test = kernel.read_test(kernel.find_file(data, FILES[1]))
    have = [train.text.shape[1], train.images.shape[1]]
    if have != list(bundle["dims"]):
        raise InputError(
            f"{path}: {have[0]}-d captions and {have[1]}-d images, but the run has "
            f"{bundle['dims'][0]} and {bundle['dims'][1]}; give its own data with --data"
        )
    place = {name: index for index, name in enumerate(train.image_names)}
    absent = [name for name in bundle["val_images"] if name not in place]
    if absent:
        raise InputError(
            f"{path}: {len(absent)} of the run's {len(bundle['val_images'])} validation images are not in "
            f"it (the first: {absent[0]}); give its own data with --data"
        )
    chosen = np.array([place[name] for name in bundle["val_images"]])
    seen = np.setdiff1d(np.arange(len(train.images)), chosen)
    words = kernel.cut_as_the_test(train.captions, test.captions, bundle["knobs"]["split_seed"])
    views, no_words = kernel.caption_views(train.image_of, chosen), np.zeros((len(words), 1), np.int32)
    return Validation(kernel.Problem(train, test, [], no_words, seen, chosen, views, {}), words)


# ----------------------------------------------------------------------------------------------------- predicting
def predict(bundle: Bundle, held: Validation, views: np.ndarray) -> np.ndarray:
    """Predictions (views, m, d_image) without repulsion, of caption indices (views, m)."""
    rows = views.ravel()
    text, words = held.problem.train.text[rows], [held.words[i] for i in rows]
    return kernel.predict(bundle, text, words).reshape(*views.shape, -1)


def repelled(bundle: Bundle, predictions: np.ndarray) -> np.ndarray:
    """Predictions (views, m, d_image) as the submission's are made of them, view by view."""
    return np.stack([kernel.repel(view, bundle["repulsion"], bundle["length"]) for view in predictions])


def learnt_temperature(bundle: Bundle) -> float | None:
    """The softmax temperature learnt for raw-length images, the members' geometric mean; None where none is learnt."""
    scales = [
        member["state"]["logit_scale"][0].item()
        for member in bundle["members"]
        if member["knobs"]["loss"] == "softmax" and member["knobs"]["network"] == "align"
    ]
    return float(np.exp(-np.minimum(scales, np.log(200)).mean())) if scales else None  # 200: the kernel's own clamp
