"""What the report of tools/verify.py shows: every picture, table and section, and the files that they become."""
from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lib import kernel
from lib.project import ToolError, atomic_path
from lib.report import figures as draw
from lib.report.measure import Validation
from lib.report.page import Section, page

CONTACT_ROWS = 3
RETRIEVED = 5
RETRIEVAL = ("mrr", "mrr_se", "recall@1", "recall@3", "recall@5", "recall@10", "recall@50", "ndcg")
DISTANCE_HEADER = ("distance", "own mean", "sd", "median", "random mean", "sd", "median", "nearer to own",
                   "improvement", "95% interval")
BASELINE_HEADER = ("model", "MRR raw", "+-", "MRR cosine", "+-", "recall@1", "recall@10", "full gallery")


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


def contact_figures(predictions: np.ndarray, held: Validation, photos: draw.Photos) -> dict[str, Figure]:
    """A sheet each of good, median and worst captions."""
    ranks = np.stack([kernel.true_ranks(view, held.images) for view in predictions])
    titles = {"good": f"{(ranks == 1).mean():.0%} of captions find their photo first; three of them",
              "median": f"A median caption finds its photo at rank {int(np.median(ranks))} of {kernel.POOL}",
              "worst": f"The worst of {ranks.size} captions finds its photo at rank {ranks.max()} of {kernel.POOL}"}
    return {f"contact_{name}": draw.contact_figure(titles[name], contact_rows(picked, predictions, held, ranks,
                                                                              kernel.POOL), photos, held.captions[0])
            for name, picked in pick_captions(ranks).items()}


def all_figures(results: dict[str, Any], predictions: np.ndarray, held: Validation, measured: dict[str, tuple],
                photos: draw.Photos) -> dict[str, Figure]:
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
                **contact_figures(predictions, held, photos)}


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
