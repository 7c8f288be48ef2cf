"""What a run of a recipe cost and gave: quality, time, work, memory; and what this machine could do at most."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib import kernel
from lib.data import FILES
from lib.process import as_arguments
from lib.runs import COSINE, FULL, RAW, Run, run_logged

POOLS = (RAW, COSINE)
SCORES = {RAW: "raw", COSINE: "cosine", FULL: "full gallery"}


# ------------------------------------------------------------------------------------------- one run
@dataclass(frozen=True)
class Measured:
    """What one run of a recipe gave."""

    recipe: str
    seed: int
    scores: dict[str, float]  # MRR by the kernel's names
    curve: list[tuple[float, dict[str, float]]]  # (training seconds, best scores so far), the final ones last
    load_seconds: float
    train_seconds: float  # validations while training included
    step_seconds: float  # without them
    captions: int  # trained on, all epochs and candidates counted
    flops: float
    device: str
    dtype: str
    peak_bytes: int  # resident; on a GPU the device's own peak


def read_curve(run: Run) -> list[tuple[float, dict[str, float]]]:
    """The best candidate's scores so far over training time, and last the blend's; a closed form has no epochs."""
    with (run.folder / kernel.TRAINING_LOG).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "validate" and row[RAW]]
    points = [(max(0.0, float(row["seconds"]) - run.metrics["seconds"]["load"]), row) for row in rows]
    points += [(one["seconds"], one) for one in run.metrics["members"] if not one["epochs"]]
    best, curve = dict.fromkeys(SCORES, 0.0), []
    for seconds, row in sorted(points, key=lambda point: point[0]):
        best = {name: max(best[name], float(row[name])) for name in SCORES}
        curve.append((seconds, best))
    return [*curve, (max([run.metrics["seconds"]["train"], *(seconds for seconds, _ in curve)]), run.mrr)]


def step_seconds(run: Run) -> float:
    """Seconds of the training steps of all candidates, without the validations in between."""
    return max(sum(one["seconds"] for one in run.metrics["members"]) - run.metrics["validate_seconds"], 0.01)


def member_knobs(run: Run, member: dict[str, Any]) -> kernel.Knobs:
    """A candidate's knobs: the run's, changed as its line in metrics.json says ("key=value key=value", or words)."""
    changes = [kernel.parse_setting(part) for part in member["knobs"].split() if "=" in part]
    return kernel.Knobs(**{**run.manifest["knobs"], **dict(changes)})


def network_flops(knobs: kernel.Knobs, captions: int, gallery: int, d_text: int, d_image: int) -> float:
    """One caption, forward and backward: 2 a weight and product, three products a matrix, two with the gallery.

    A matrix that the caption's vector alone goes into has no use for the gradient of its input. What a bag of words
    adds up is no product, and next to nothing. A softmax is over the step's share of the gallery, a triplet loss over
    the batch's images.
    """
    seen = {"vector": d_text, "words": knobs.word_width, "both": d_text + knobs.word_width}[knobs.sees]
    first = seen * knobs.hidden * (2 if knobs.activation == "gate" else 1)
    if knobs.network == "align" and knobs.skip:
        first += seen * d_image
    shown, batch = min(gallery, knobs.gallery or gallery), kernel.batch_size(knobs, captions)
    compared = {"softmax": shown, "triplet": batch // kernel.VIEWS, "cosine": 0}[knobs.loss]
    return (4 if knobs.sees == "vector" else 6) * first + 6 * knobs.hidden * d_image + 4 * compared * d_image


def solve_flops(captions: int, gallery: int, d_text: int, d_image: int) -> float:
    """The closed form: a covariance over the captions, two over the images, two linear systems and their products."""
    systems = 2 / 3 * (d_text**3 + d_image**3) + 2 * d_text * d_image * (d_text + d_image)
    products = 2 * d_text * d_image * (d_text + 2 * d_image)
    return 2 * captions * d_text**2 + 2 * gallery * d_image * (d_text + d_image) + systems + products


def count_work(run: Run, data: Path) -> tuple[int, float]:
    """(captions, FLOP) of the validated training: every candidate's, with the epochs that it really took."""
    bundle = kernel.load_torch(run.folder / kernel.VALIDATED_MODEL)
    with np.load(kernel.find_file(data, FILES[0])) as npz:
        captions, images = len(npz["captions/ids"]), len(npz["images/names"])
    own = images - len(bundle["val_images"])
    seen, flops = 0.0, 0.0
    for member in run.metrics["members"]:
        knobs = member_knobs(run, member)
        extra = run.manifest["pairs"] if knobs.pairs else []
        gallery = own + sum(file["joined_images"] for file in extra)
        learnt = round(captions * own / images) + sum(file["joined_captions"] for file in extra)
        if knobs.network == "linear":
            seen, flops = seen + learnt, flops + solve_flops(learnt, gallery, *bundle["dims"])
        done = learnt * member["epochs"]
        seen, flops = seen + done, flops + done * network_flops(knobs, learnt, gallery, *bundle["dims"])
    return round(seen), flops


def measure(recipe: str, seed: int, data: Path, output: Path, settings: list[str]) -> Measured:
    """Run one recipe with one seed (of training and of the split) and read off what it did."""
    arguments = as_arguments({"recipe": recipe, "seed": seed, "split_seed": seed, "refit": False}, settings)
    run = run_logged(data, output / f"{recipe}-seed{seed}", arguments)
    captions, flops = count_work(run, data)
    metrics = run.metrics
    return Measured(
        recipe,
        seed,
        run.mrr,
        read_curve(run),
        metrics["seconds"]["load"],
        metrics["seconds"]["train"],
        step_seconds(run),
        captions,
        flops,
        metrics["device"],
        metrics["dtype"],
        metrics.get("peak_device_bytes") or metrics["peak_rss_bytes"],
    )


# ------------------------------------------------------------------------------------------- this machine
def matmul_peak(device: str, dtype: str) -> float:
    """FLOP/s that products of a number type reach here: those of the best size."""
    import torch  # takes a second: not for --help

    place = torch.device("cpu" if device == "cpu" else "cuda")
    return max(kernel.product_rate(kernel.DTYPES[dtype], place, size) for size in (1024, 1536, 2048, 3072))


def run_all(recipes: list[str], seeds: list[int], data: Path, output: Path, settings: list[str]) -> Iterator[Measured]:
    """Every recipe with every seed, one after another, so that none disturbs another's time."""
    table = [(recipe, seed) for recipe in recipes for seed in seeds]
    for number, (recipe, seed) in enumerate(table, 1):
        print(f"run {number} of {len(table)}: {recipe}, seed {seed}", file=sys.stderr)
        run = measure(recipe, seed, data, output, settings)
        scores = ", ".join(f"{label} {run.scores[name]:.4f}" for name, label in SCORES.items())
        print(f"  {run.train_seconds:.1f} s of training, MRR {scores}", file=sys.stderr)
        yield run
