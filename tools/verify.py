"""Does the model map captions to their photos, by how much, and what does it get wrong? In numbers and pictures.

    python tools/verify.py                                   the newest run in runs/, on its own validation images
    python tools/verify.py --run runs/A --against runs/B     a paired test of A's MRR against B's as well
    python tools/verify.py --run runs/A --json               the numbers only, for a script

The weights are those that have never seen the validation images. The output folder (RUN/verify) gets report.html,
one self-contained page, every figure as PNG, and verify.json.
"""
from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import verify_figures as draw
import verify_numbers as numbers
from local_run import choose_data
from matplotlib.figure import Figure
from project import RUNS, InputError, ToolError, atomic_path, format_table, load_kernel, run_tool
from verify_report import Section, page

CONTACT_ROWS = 3
RETRIEVED = 5
RETRIEVAL = ("mrr", "mrr_se", "recall@1", "recall@3", "recall@5", "recall@10", "recall@50", "ndcg")
DISTANCE_HEADER = ("distance", "own mean", "sd", "median", "random mean", "sd", "median", "nearer to own",
                   "improvement", "95% interval")
BASELINE_HEADER = ("model", "MRR raw", "+-", "MRR cosine", "+-", "recall@1", "recall@10", "full gallery")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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


def newest_run(runs: Path, kernel: ModuleType) -> Path:
    """The newest run with weights; run folders begin with their time."""
    names = (kernel.VALIDATED_MODEL, kernel.FINAL_MODEL)
    found = sorted({path.parent for name in names for path in runs.glob(f"*/{name}")})
    if not found:
        raise InputError(f"{runs}: no run with weights; python tools/run_local.py makes one")
    return found[-1]


def load_run(run: Path, kernel: ModuleType) -> tuple[dict[str, Any], list[str]]:
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


def held_out(bundle: dict[str, Any], data: Path, kernel: ModuleType) -> Validation:
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


def predict(bundle: dict[str, Any], held: Validation, kernel: ModuleType) -> np.ndarray:
    """(views, m, d_image) predictions, made as the submission's are."""
    views, m, width = held.text.shape
    plain = kernel.predict(bundle, held.text.reshape(-1, width)).reshape(views, m, -1)
    return np.stack([kernel.repel(bundle, view) for view in plain])


def disagreement(run: Path, results: dict[str, Any], kernel: ModuleType) -> list[str]:
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

def ridge(held: Validation, kernel: ModuleType) -> np.ndarray:
    """Ridge on the run's training images: the kernel's closed form with the whitening drowned in its floor."""
    knobs = kernel.resolve_knobs({"recipe": "closed_form", "whiten": 1e6})
    position = np.full(len(held.train.images), -1)
    position[held.seen] = np.arange(len(held.seen))
    label = position[held.train.image_of]
    text, images = held.train.text[label >= 0], held.train.images[held.seen]
    state = kernel.fit_closed_form(torch.from_numpy(text), torch.from_numpy(images),
                                   torch.from_numpy(label[label >= 0]), knobs)
    return (held.text @ state["weight"].numpy().T + state["bias"].numpy()) * 1e6  # back to lengths of order one


def baselines(predictions: np.ndarray, held: Validation, kernel: ModuleType) -> dict[str, np.ndarray]:
    """Predictions of what every model has to beat."""
    rng = np.random.default_rng(0)
    mean = held.train.images[held.seen].mean(0)
    return {"ridge": ridge(held, kernel), "mean image": np.broadcast_to(mean, predictions.shape),
            "random permutation": np.stack([view[rng.permutation(len(view))] for view in predictions])}


def baseline_row(name: str, predictions: np.ndarray, held: Validation, kernel: ModuleType) -> dict[str, Any]:
    """One model of the comparison."""
    tables = kernel.evaluate(predictions, held.images)
    raw, cosine = tables["pool100_raw"], tables["pool100_cosine"]
    return {"model": name, "raw": raw["mrr"], "raw_se": raw["mrr_se"], "cosine": cosine["mrr"],
            "cosine_se": cosine["mrr_se"], "recall@1": raw["recall@1"], "recall@10": raw["recall@10"],
            "full_cosine": tables["full_cosine"]["mrr"]}


def other_run(path: Path, bundle: dict[str, Any], held: Validation, kernel: ModuleType) -> tuple[str, np.ndarray]:
    """Name and predictions of the run to compare with; it must have been validated on the same images."""
    other, _ = load_run(path, kernel)
    if other["dims"] != bundle["dims"]:
        raise InputError(f"{path}: takes and gives {other['dims']} dimensions, the run {bundle['dims']}; give a run of "
                         "the same data")
    if set(other["val_images"]) != set(bundle["val_images"]):
        raise InputError(f"{path}: was validated on other images; make it again with --set split_seed="
                         f"{bundle['knobs']['split_seed']} on the same data")
    return f"{other['knobs']['recipe']} ({path.name})", predict(other, held, kernel)


def compare(ours: np.ndarray, theirs: np.ndarray, held: Validation, kernel: ModuleType) -> dict[str, dict[str, float]]:
    """The paired bootstrap of the difference in MRR, raw and cosine."""
    return {name: numbers.paired_bootstrap(*(numbers.image_gains(kernel, each, held.images, kernel.POOL, cosine)
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


def retrieval(predictions: np.ndarray, held: Validation, kernel: ModuleType) -> dict[str, Any]:
    """The official numbers by view and pooled."""
    views = [{name: kernel.retrieval_metrics(view, held.images, kernel.POOL, cosine)
              for name, cosine in (("raw", False), ("cosine", True))} for view in predictions]
    return {"views": views, "pooled": kernel.evaluate(predictions, held.images)}


def measure(bundle: dict[str, Any], held: Validation, predictions: np.ndarray, against: tuple[str, np.ndarray] | None,
            measured: dict[str, tuple], kernel: ModuleType) -> dict[str, Any]:
    """Every number of the report."""
    facts = numbers.anisotropy(predictions, held.images)
    models = {bundle["knobs"]["recipe"]: predictions, **(dict([against]) if against else {}),
              **baselines(predictions, held, kernel)}
    gains = numbers.gains_of(kernel, predictions, held.images, kernel.POOL, False)
    return {"images": len(held.names), "captions": int(predictions.shape[0] * predictions.shape[1]),
            "distances": {name: numbers.summarise_distance(*each) for name, each in measured.items()},
            "anisotropy": facts, "warnings": numbers.distance_warnings(facts),
            "baselines": [baseline_row(name, each, held, kernel) for name, each in models.items()],
            "against": compare(predictions, against[1], held, kernel) if against else None,
            "retrieval": retrieval(predictions, held, kernel),
            "pool_sizes": numbers.pool_curve(kernel, predictions, held.images),
            "caption_length": numbers.by_caption_length(held.captions, gains),
            "hubness": numbers.hubness(predictions, held.images, held.names),
            "calibration": calibrate(bundle, predictions, held, kernel.POOL)}


# ------------------------------------------------------------------------------------------------- contact sheets

def contact_rows(picked: list[tuple[int, int]], predictions: np.ndarray, held: Validation, ranks: np.ndarray,
                 pool: int) -> list[dict[str, Any]]:
    """What a contact sheet shows of (view, image) pairs: the best of the image's own pool."""
    rows = []
    for view, image in picked:
        start = image // pool * pool
        scores = held.images[start:start + pool] @ predictions[view, image]
        rows.append({"caption": held.captions[view][image], "image": image, "rank": int(ranks[view, image]),
                     "retrieved": [int(start + i) for i in np.argsort(-scores, kind="stable")[:RETRIEVED]]})
    return rows


def pick_captions(ranks: np.ndarray) -> dict[str, list[tuple[int, int]]]:
    """Good, median and worst captions, each of another image; among equals a fixed random choice."""
    view, image = np.unravel_index(np.random.default_rng(0).permutation(ranks.size), ranks.shape)
    order = np.argsort(ranks[view, image], kind="stable")
    ordered = list(zip(view[order].tolist(), image[order].tolist(), strict=True))
    middle = len(ordered) // 2
    return {name: first_of_each_image(part) for name, part in (
        ("good", ordered), ("median", ordered[middle:]), ("worst", ordered[::-1]))}


def first_of_each_image(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    chosen: dict[int, tuple[int, int]] = {}
    for pair in pairs:
        chosen.setdefault(pair[1], pair)
        if len(chosen) == CONTACT_ROWS:
            break
    return list(chosen.values())


def contact_figures(predictions: np.ndarray, held: Validation, photos: draw.Photos,
                    kernel: ModuleType) -> dict[str, Figure]:
    """A sheet each of good, median and worst captions."""
    ranks = np.stack([kernel.true_ranks(view, held.images) for view in predictions])
    titles = {"good": f"{(ranks == 1).mean():.0%} of captions find their photo first; three of them",
              "median": f"A median caption finds its photo at rank {int(np.median(ranks))} of {kernel.POOL}",
              "worst": f"The worst of {ranks.size} captions finds its photo at rank {ranks.max()} of {kernel.POOL}"}
    return {f"contact_{name}": draw.contact_figure(titles[name], contact_rows(picked, predictions, held, ranks,
                                                                              kernel.POOL), photos, held.captions[0])
            for name, picked in pick_captions(ranks).items()}


def all_figures(results: dict[str, Any], predictions: np.ndarray, held: Validation, measured: dict[str, tuple],
                photos: draw.Photos, kernel: ModuleType) -> dict[str, Figure]:
    """Every picture by its file's name."""
    ranks = np.stack([kernel.true_ranks(view, held.images) for view in predictions])
    calibrated = results["calibration"]
    with draw.plt.rc_context(draw.STYLE):
        return {"distances": draw.distance_figure(measured, results["distances"], photos, held.captions[0]),
                "baselines": draw.baseline_figure(results["baselines"]),
                "pool_sizes": draw.pool_figure(results["pool_sizes"]), "ranks": draw.rank_figure(ranks),
                "caption_length": draw.length_figure(results["caption_length"]),
                "hubness": draw.hub_figure(results["hubness"]),
                "calibration": draw.calibration_figure(calibrated["learnt"], calibrated["best"]),
                **contact_figures(predictions, held, photos, kernel)}


# --------------------------------------------------------------------------------------------------------- report

def distance_table(results: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows."""
    rows = []
    for metric, each in results["distances"].items():
        cells = [f"{each[who][what]:.4g}" for who in ("own", "random") for what in ("mean", "sd", "median")]
        rows.append([metric, *cells, f"{each['nearer_to_own']:.2%}", f"{each['improvement_percent']:.2f}%",
                     f"{each['improvement_low']:.2f}..{each['improvement_high']:.2f}"])
    return DISTANCE_HEADER, rows


def baseline_table(results: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows."""
    return BASELINE_HEADER, [[row["model"], *(f"{value:.4f}" for value in list(row.values())[1:])]
                             for row in results["baselines"]]


def retrieval_table(results: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows: each view, then all of them."""
    found = results["retrieval"]
    rows = [[f"view {number}, {name}", view[name]] for name in ("raw", "cosine")
            for number, view in enumerate(found["views"], 1)]
    rows += [[f"all, {name}", table] for name, table in found["pooled"].items()]
    return ("captions", *RETRIEVAL), [[name, *(f"{table[key]:.4f}" for key in RETRIEVAL)] for name, table in rows]


def hub_table(results: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    hubs = results["hubness"]
    return ("worst hubs", f"first {hubs['k']} of", "of captions"), [
        [hub["image"], str(hub["lists"]), f"{hub['lists'] / hubs['captions']:.1%}"] for hub in hubs["worst"]]


def against_lines(results: dict[str, Any]) -> list[str]:
    """The paired bootstrap in words."""
    return [f"{name.capitalize()} MRR: {row['difference']:+.4f} against {results['baselines'][1]['model']} (95% "
            f"interval {row['low']:+.4f}..{row['high']:+.4f}, p = {row['p']:.2g}, paired bootstrap over "
            f"{row['images']} images)"
            for name, row in (results["against"] or {}).items()]


def sections(results: dict[str, Any], pictures: dict[str, bytes], titles: dict[str, str]) -> list[Section]:
    """The report in reading order."""
    def show(*names: str) -> list[tuple[str, bytes]]:
        return [(titles[name], pictures[name]) for name in names]

    facts = results["anisotropy"]
    return [
        Section("Distances", "Each prediction against its own image and against random others, for all captions. Two "
                f"random photos have a cosine of {facts['cosine_image_to_random_image']:.2f}, a prediction and a "
                f"random photo {facts['cosine_prediction_to_random_image']:.2f}.", show("distances"),
                [distance_table(results)]),
        Section("Against baselines", ". ".join(against_lines(results)) or "A second run can be given with --against.",
                show("baselines"), [baseline_table(results)]),
        Section("Retrieval", "The official metric: pools of 100, one caption of an image in a view, raw dot product; "
                "cosine beside it.", show("ranks", "pool_sizes", "caption_length"), [retrieval_table(results)]),
        Section("Hubs", "Images that come up for many captions take places from others.", show("hubness"),
                [hub_table(results)]),
        Section("Calibration", "The softmax over a pool read as a probability.", show("calibration")),
        Section("Examples", "The true image, then the five best retrieved of its pool; the true one is framed.",
                show("contact_good", "contact_median", "contact_worst"))]


def write_outputs(output: Path, results: dict[str, Any], figures: dict[str, Figure]) -> None:
    """Each figure as PNG, the numbers as JSON, and last the page that shows all of it."""
    pictures, titles = {}, {}
    for name, figure in figures.items():
        titles[name] = " ".join(figure.get_suptitle().split())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        draw.plt.close(figure)
        pictures[name] = buffer.getvalue()
    lead = (f"Run {Path(results['run']).name}, {results['captions']} captions of {results['images']} photos that these "
            "weights have never seen.")
    best = results["baselines"][0]
    text = page(f"{best['model']}: MRR {best['raw']:.3f} in pools of 100 (+- {best['raw_se']:.3f})", lead,
                results["warnings"], sections(results, pictures, titles))
    files = {f"{name}.png": data for name, data in pictures.items()}
    files |= {"verify.json": (json.dumps(results, indent=1) + "\n").encode(), "report.html": text.encode()}
    try:
        for name, data in files.items():
            with atomic_path(output / name) as temporary:
                temporary.write_bytes(data)
    except OSError as error:
        raise ToolError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error


def verify(run: Path, data: Path, output: Path, against: Path | None) -> dict[str, Any]:
    """Everything about one run; returns the numbers."""
    kernel = load_kernel()
    bundle, notes = load_run(run, kernel)
    say(f"reading {data}")
    held = held_out(bundle, data, kernel)
    say(f"{run.name}: {len(held.names)} validation images, {len(held.captions)} captions each")
    predictions = predict(bundle, held, kernel)
    other = other_run(against, bundle, held, kernel) if against else None
    measured = numbers.distances(predictions, held.images)
    results = {"run": str(run), "data": str(data), **measure(bundle, held, predictions, other, measured, kernel)}
    photos = draw.find_photos(data, held.names)
    notes += disagreement(run, results, kernel) + photos.warnings(data)
    results["warnings"] = notes + results["warnings"]
    results["photos"] = {"shown_from": len(photos.paths), "missing": len(photos.missing),
                         "damaged": len(photos.damaged)}
    say("drawing")
    write_outputs(output, results, all_figures(results, predictions, held, measured, photos, kernel))
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Verify a run on its own validation images: distances, baselines, retrieval, pictures, a report.",
        epilog="example: python tools/verify.py --run runs/20260102-120000-align --against runs/20260101-120000-base")
    parser.add_argument("--run", type=Path, help="a run's folder (default: the newest with weights in --runs)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs are (default: runs/)")
    parser.add_argument("--data", type=Path, help="the run's data (default: data/, else the drawn sample)")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN/verify)")
    parser.add_argument("--against", type=Path, metavar="RUN", help="another run on the same split, for a paired test")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    given = parser.parse_args(argv)
    run = given.run or newest_run(given.runs, load_kernel())
    output = given.output or run / "verify"
    results = verify(run, choose_data(given.data), output, given.against)
    for warning in results["warnings"]:
        say(f"warning: {warning}")
    if given.json:
        print(json.dumps(results | {"report": str(output / "report.html")}, indent=1))
        return 0
    tables = [format_table(*table(results)) for table in (distance_table, baseline_table, retrieval_table)]
    print("\n\n".join(tables), *against_lines(results), f"report: {output / 'report.html'}", sep="\n")
    return 0


if __name__ == "__main__":
    run_tool(main)
