"""What the report of tools/verify.py shows: every picture, table and section, and the files that they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lib import kernel
from lib.plots import DARK, LIGHT, png_of, themed
from lib.project import ToolError, figure, write_file
from lib.report import figures as draw
from lib.report.numbers import Pools, difference_in_words, distances
from lib.report.page import Picture, Section, Table, page
from lib.runs import COSINE, FULL, RAW
from lib.weights import Validation

CONTACT_ROWS = 3
RETRIEVED = 5
RETRIEVAL = ("mrr", "mrr_se", "recall@1", "recall@3", "recall@5", "recall@10", "recall@50", "ndcg")
RETRIEVAL_HEADER = ("", "MRR", "+-", *RETRIEVAL[2:])
POOLED = {RAW: "raw: the official metric", COSINE: "cosine", FULL: "cosine, all held-out"}
SPREAD = ("sd", "median")
CLOSED_FORM = "The closed form is the best linear map from captions to photos, fitted here: what networks have to beat"
BASELINE = ("recorded", "raw", "raw_se", "cosine", "cosine_se", "recall@1", "recall@10", "full_cosine")
BASELINE_HEADER = ("model", "its record", "MRR raw", "+-", "MRR cosine", "+-", "recall@1", "recall@10", "all held-out")


# ------------------------------------------------------------------------------------------------- contact sheets
def contact_rows(
    picked: list[tuple[int, int]], predictions: np.ndarray, held: Validation, ranks: np.ndarray, pool: int
) -> list[dict[str, Any]]:
    """What a contact sheet shows of (view, image) pairs: the best of the image's own pool."""
    rows = []
    for view, image in picked:
        start = image // pool * pool
        scores = held.images[start : start + pool] @ predictions[view, image]
        found = [int(start + i) for i in np.argsort(-scores, kind="stable")[:RETRIEVED]]
        row = {"caption": held.captions[view][image], "image": image, "rank": int(ranks[view, image])}
        rows.append(row | {"retrieved": found})
    return rows


def median_place(ranks: np.ndarray) -> tuple[int, int]:
    """(captions passed over, place of the median among the rest): where it is a first place, that of the misses."""
    hits = int((ranks == 1).sum())
    passed = hits if np.median(ranks) == 1 and hits < ranks.size else 0
    return passed, (passed + ranks.size) // 2


def pick_captions(ranks: np.ndarray) -> dict[str, list[tuple[int, int]]]:
    """Good, median and worst captions, each of another image; among equals a fixed random choice."""
    view, image = np.unravel_index(np.random.default_rng(0).permutation(ranks.size), ranks.shape)
    order = np.argsort(ranks[view, image], kind="stable")
    ordered = list(zip(view[order].tolist(), image[order].tolist(), strict=True))
    parts = {"good": ordered, "median": ordered[median_place(ranks)[1] :], "worst": ordered[::-1]}
    return {name: first_of_each_image(part) for name, part in parts.items()}


def first_of_each_image(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    chosen: dict[int, int] = {}
    for view, image in pairs:
        chosen.setdefault(image, view)
    return [(view, image) for image, view in chosen.items()][:CONTACT_ROWS]


def contact_figures(
    predictions: np.ndarray, ranks: np.ndarray, held: Validation, photos: draw.Photos
) -> dict[str, Figure]:
    """A sheet each of good, median and worst captions."""
    size, (passed, place) = Pools(len(held.names)).size, median_place(ranks)
    median = f"rank {np.sort(ranks, axis=None)[place]} of {size}"
    misses = f"{1 - passed / ranks.size:.0%} of captions miss the first place; the median of these is {median}"
    titles = {
        "good": f"{(ranks == 1).mean():.0%} of captions find their photo first; three of them",
        "median": misses if passed else f"A median caption finds its photo at {median}",
        "worst": f"The worst of {ranks.size:,} captions finds its photo at rank {ranks.max()} of {size}",
    }
    return {
        f"contact_{name}": draw.contact_figure(
            titles[name], contact_rows(picked, predictions, held, ranks, size), photos, held.captions[0]
        )
        for name, picked in pick_captions(ranks).items()
    }


def all_figures(
    results: dict[str, Any], predictions: np.ndarray, measured: dict[str, tuple], held: Validation, photos: draw.Photos
) -> dict[str, Figure]:
    """Every picture by its file's name, in the theme that is in use."""
    ranks = np.stack([kernel.true_ranks(view, held.images) for view in predictions])
    pools, calibrated = Pools(len(held.names)), results["calibration"]
    return {
        "ranks": draw.rank_figure(ranks, pools),
        "pool_sizes": draw.pool_figure(results["pool_sizes"]),
        "baselines": draw.baseline_figure(results),
        "caption_length": draw.length_figure(results["caption_length"], pools),
        **contact_figures(predictions, ranks, held, photos),
        "hubness": draw.hub_figure(results["hubness"]),
        "calibration": draw.calibration_figure(calibrated["learnt"], calibrated["best"]),
        "distances": draw.distance_figure(measured, results["distances"], photos, held.captions[0]),
    }


# --------------------------------------------------------------------------------------------------------- tables
def retrieval_rows(named: dict[str, dict[str, float]]) -> list[list[str]]:
    return [[name, *(f"{table[key]:.4f}" for key in RETRIEVAL)] for name, table in named.items()]


def official_table(results: dict[str, Any]) -> Table:
    """The official metric and its twins over all captions; beside them what repulsion gave and what was learnt."""
    named = {label: results["retrieval"]["pooled"][key] for key, label in POOLED.items()}
    if plain := results["without_repulsion"]:
        named |= {"raw, without repulsion": plain[RAW], "cosine, without repulsion": plain[COSINE]}
    seen = results["seen"]
    named[f"raw, {seen['images']:,} seen images (no measure of quality)"] = seen
    return RETRIEVAL_HEADER, retrieval_rows(named)


def view_table(results: dict[str, Any]) -> Table:
    """The same by view: one caption of every image each."""
    views = list(enumerate(results["retrieval"]["views"], 1))
    tables = {"raw": RAW, "cosine": COSINE}
    named = {f"caption {number}, {name}": view[key] for name, key in tables.items() for number, view in views}
    return RETRIEVAL_HEADER, retrieval_rows(named)


def baseline_table(results: dict[str, Any]) -> Table:
    return BASELINE_HEADER, [[row["model"], *(figure(row[key]) for key in BASELINE)] for row in results["baselines"]]


def distance_table(results: dict[str, Any]) -> Table:
    rows = []
    for metric, each in results["distances"].items():
        cells = [f"{each[who][what]:.4g}" for who in ("own", "random") for what in ("mean", *SPREAD)]
        interval = f"{each['improvement_low']:.2f}..{each['improvement_high']:.2f}"
        rows.append([metric, *cells, f"{each['nearer_to_own']:.2%}", f"{each['improvement_percent']:.2f}%", interval])
    header = ("distance", "own mean", *SPREAD, "random mean", *SPREAD)
    return (*header, "own nearer", "nearer by", "95% interval"), rows


def hub_table(results: dict[str, Any]) -> Table:
    hubs = results["hubness"]
    return ("largest hubs", f"captions with it in the first {hubs['k']}", "share"), [
        [hub["image"], str(hub["lists"]), f"{hub['lists'] / hubs['captions']:.1%}"] for hub in hubs["worst"]
    ]


# --------------------------------------------------------------------------------------------------------- report
def verdicts(results: dict[str, Any]) -> list[str]:
    """Whether it is surely better than the other run, or than the closed form: by raw and by cosine."""
    rows = results["against"] or results["against_closed_form"]
    other = results["baselines"][1]["model"] if results["against"] else "the closed form"
    return [difference_in_words(row, other, name) for name, row in rows.items()]


def official(results: dict[str, Any]) -> dict[str, float]:
    """The run's official numbers: its own, honest ones; those measured here only where it has left none."""
    return results["recorded"] or results["retrieval"]["pooled"][RAW]


def opening(results: dict[str, Any]) -> list[str]:
    """The official metric in a sentence, the comparison in another, and whose figures they are."""
    table = official(results)
    return [
        f"Among {results['pool']} photos the right one comes first for {table['recall@1']:.0%} of captions, within "
        f"the first ten for {table['recall@10']:.0%}.",
        verdicts(results)[0] + ".",
        *choice_in_words(results["baselines"]),
        f"Run {results['run']}, recipe {results['recipe']}: {results['captions']:,} captions of {results['images']:,} "
        "photos that these weights have never seen. MRR is the mean of 1/rank by raw dot product, the competition's "
        "metric.",
    ]


def choice_in_words(rows: list[dict[str, Any]]) -> list[str]:
    """A run's own figure where it differs: there no image was measured by what was chosen on it."""
    return [
        f"What {row['model']} averages, and how, was chosen on these photos. Chosen on one half of them and measured "
        f"on the other it has {row['recorded']:.4f} in place of {row['raw']:.4f}: the run's own, honest figure."
        for row in rows
        if row["recorded"] and abs(row["raw"] - row["recorded"]) >= 5e-5
    ]


def sections(results: dict[str, Any], pictures: dict[str, Picture]) -> list[Section]:
    """The report in reading order."""

    def show(*names: str) -> list[Picture]:
        return [pictures[name] for name in names]

    return [
        Section(
            "The official metric",
            f"One caption of an image in a view, {results['pools']}, raw dot product; a cosine gives all photos the "
            "same length. Repulsion pushes the predictions of a pool apart. Errors are standard errors over images.",
            show("ranks", "pool_sizes"),
            [official_table(results)],
        ),
        Section(
            "Beside others",
            ". ".join([*verdicts(results), CLOSED_FORM]) + ".",
            show("baselines"),
            [baseline_table(results)],
        ),
        Section(
            "Examples",
            "The true image, then the five best retrieved of its pool; the true one is framed.",
            show("contact_good", "contact_median", "contact_worst"),
        ),
        Section(
            "By caption",
            "Longer and shorter ones, and each of an image's captions by itself.",
            show("caption_length"),
            [view_table(results)],
        ),
        Section(
            "Hubs and calibration",
            "Hubs, photos that come up for many captions, take places from others. A softmax over a pool's scores, "
            "divided by the temperature, is the model's confidence in each photo; it should be right as often as it "
            "says. No rank depends on that.",
            show("hubness", "calibration"),
            [hub_table(results)],
        ),
        Section("Distances", about_distances(results), show("distances"), [distance_table(results)]),
    ]


def about_distances(results: dict[str, Any]) -> str:
    facts = results["anisotropy"]
    return " ".join(
        [
            "Each prediction against its own image and against random others, for all captions. Two random photos have "
            f"a cosine of {facts['cosine_image_to_random_image']:.2f}, a prediction and a random photo "
            f"{facts['cosine_prediction_to_random_image']:.2f}: compare own with random, not with another model's.",
            *(f"{note}." for note in results["distance_notes"]),
        ]
    )


def draw_all(
    results: dict[str, Any], predictions: np.ndarray, held: Validation, photos: draw.Photos
) -> dict[str, Picture]:
    """Every picture in both themes, by its file's name."""
    titles, drawn, measured = {}, {}, distances(predictions, held.images)
    for theme in (LIGHT, DARK):
        with themed(theme):
            figures = all_figures(results, predictions, measured, held, photos)
            titles = {name: " ".join(figure.get_suptitle().split()) for name, figure in figures.items()}
            drawn[theme] = {name: png_of(figure) for name, figure in figures.items()}
    return {name: Picture(title, drawn[LIGHT][name], drawn[DARK][name]) for name, title in titles.items()}


def write_outputs(output: Path, results: dict[str, Any], pictures: dict[str, Picture]) -> None:
    """Each picture as PNG, the numbers as JSON, and last the page that shows all of it."""
    table, name = official(results), results["baselines"][0]["model"]
    title = f"{name}: MRR {table['mrr']:.3f} ± {table['mrr_se']:.3f} in {results['pools']}"
    text = page(title, opening(results), results["warnings"], sections(results, pictures))
    files = {f"{name}.png": picture.light for name, picture in pictures.items()}
    files |= {f"dark/{name}.png": picture.dark for name, picture in pictures.items()}
    texts = {"verify.json": json.dumps(results, indent=1) + "\n", "report.html": text}
    try:
        for name, content in (files | texts).items():
            write_file(output / name, content)
    except OSError as error:
        raise ToolError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
