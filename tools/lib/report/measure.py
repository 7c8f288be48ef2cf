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
    """What predicts the held-out images: a run or a baseline.

    `recorded`: a run's own official numbers, where it has any. Every choice in them was made on other images than
    measured.
    """

    name: str
    predictions: np.ndarray  # (views, m, d_image)
    recorded: dict[str, float] | None = None
    plain: np.ndarray | None = None  # a run's predictions before repulsion, where there is any


def model_of(run: Path, bundle: Bundle, held: Validation) -> Model:
    """A run, by the name of its folder."""
    tables = read_json(run / kernel.METRICS, ADVICE, optional=True).get("validation") or {}
    plain = predict(bundle, held, held.problem.views)
    before = plain if bundle["repulsion"] else None
    return Model(run.resolve().name, repelled(bundle, plain), tables.get(RAW), before)


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
def closed_form(problem: kernel.Problem) -> np.ndarray:
    """Predictions (views, m, d_image) of the kernel's recipe of that name, without the held-out images."""
    import torch  # takes a second: not for --help

    knobs = kernel.resolve_knobs({"recipe": "closed_form"})
    task = kernel.make_task(problem, "validate", knobs, torch.device("cpu"), torch.float32)
    network = kernel.network_of(knobs, kernel.fit_closed_form(task, knobs), problem.dims)
    return kernel.predictions_of(network, problem, knobs.infer_batch)


def baselines(predictions: np.ndarray, problem: kernel.Problem) -> list[Model]:
    """What every network has to beat; the closed form comes first."""
    rng = np.random.default_rng(0)
    mean = problem.train.images[problem.train_images].mean(0)
    return [
        Model("closed form", closed_form(problem)),
        Model("mean image", np.tile(mean, (*predictions.shape[:2], 1))),
        Model("random permutation", np.stack([view[rng.permutation(len(view))] for view in predictions])),
    ]


def row_of(model: Model, images: np.ndarray) -> dict[str, Any]:
    """A model's MRR as measured here and, of a run, as it recorded it itself (raw)."""
    tables = kernel.evaluate(model.predictions, images)
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
    return model_of(path, other, held), notes


def compare(ours: np.ndarray, theirs: np.ndarray, gallery: np.ndarray) -> dict[str, dict[str, float]]:
    """The paired bootstrap of the difference in MRR, raw and cosine."""
    found = {}
    for name, cosine in COSINES.items():
        one, other = (numbers.gains_of(each, gallery, kernel.POOL, cosine).mean(0) for each in (ours, theirs))
        found[name] = numbers.paired_bootstrap(one, other)
    return found


def paired(one: Run, other: Run, data: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """A row each of two runs, by their validated weights on the images that both held out; the paired differences."""
    facts = kernel.file_facts(kernel.find_file(data, FILES[0]))
    for run in (one, other):
        if run.manifest.get("inputs", {}).get(FILES[0]) != facts:
            raise InputError(f"{run.folder}: was trained on other data than {data} holds; --data DIR names its own")
    bundle, _ = load_run(one.folder)
    held = held_out(bundle, data)
    ours, (theirs, _) = model_of(one.folder, bundle, held), other_run(other.folder, bundle, held)
    rows = [row_of(model, held.images) for model in (ours, theirs)]
    return rows, compare(ours.predictions, theirs.predictions, held.images)


# ----------------------------------------------------------------------------------------------------- everything
def calibrate(bundle: Bundle, predictions: np.ndarray, images: np.ndarray) -> dict[str, Any]:
    """Calibration in pools at the learnt temperature and at the best one."""
    scores, learnt = numbers.pool_scores(predictions, images), learnt_temperature(bundle)
    return {
        "learnt": numbers.calibration(scores, learnt) if learnt else None,
        "best": numbers.calibration(scores, numbers.best_temperature(scores)),
    }


def on_seen_images(bundle: Bundle, held: Validation) -> dict[str, Any]:
    """The official numbers on images that were trained on: how much was learnt by heart, no measure of quality."""
    train, seen = held.problem.train, held.problem.train_images[:SEEN]
    predictions = repelled(bundle, predict(bundle, held, kernel.caption_views(train.image_of, seen, 1)))
    return {"images": len(seen), **kernel.evaluate(predictions, train.images[seen])[RAW]}


def measure(bundle: Bundle, held: Validation, ours: Model, against: Model | None) -> dict[str, Any]:
    """Every number of the report."""
    predictions, images, pools = ours.predictions, held.images, Pools(len(held.names))
    others = baselines(predictions, held.problem)
    models = [ours, *([against] if against else []), *others]
    measured = numbers.distances(predictions, images)
    distances = {metric: numbers.summarise_distance(*each) for metric, each in measured.items()}
    return {
        "images": len(images),
        "captions": int(predictions.shape[0] * predictions.shape[1]),
        "pool": pools.size,
        "pools": str(pools),
        "recipe": bundle["knobs"]["recipe"],
        "recorded": ours.recorded,
        "baselines": [row_of(model, images) for model in models],
        "against": compare(predictions, against.predictions, images) if against else None,
        "against_closed_form": compare(predictions, others[0].predictions, images),
        "retrieval": {
            "views": [kernel.evaluate(view[None], images) for view in predictions],
            "pooled": kernel.evaluate(predictions, images),
        },
        "without_repulsion": None if ours.plain is None else kernel.evaluate(ours.plain, images),
        "seen": on_seen_images(bundle, held),
        "pool_sizes": numbers.pool_curve(predictions, images),
        "caption_length": numbers.by_caption_length(
            held.captions, numbers.gains_of(predictions, images, kernel.POOL, False)
        ),
        "hubness": numbers.hubness(predictions, images, held.names),
        "calibration": calibrate(bundle, predictions, images),
        "distances": distances,
        "anisotropy": numbers.anisotropy(predictions, images),
        "distance_notes": numbers.distance_notes(distances),
    }
