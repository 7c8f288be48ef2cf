"""The numbers behind tools/verify.py: distances, retrieval, hubs, calibration, and what chance would give.

Shapes: predictions (views, m, d_image), one caption of each of m images in a view; gallery (m, d_image), row i the
image of caption i. Captions of one image go together: whatever is resampled, is resampled by image.

    ours = gains_of(predictions, gallery, kernel.POOL, cosine=False).mean(0)   # (m,) by image; their mean is the MRR
    verdict(paired_bootstrap(ours, theirs), "the other run")                   # "Better than the other run: sure"
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lib import kernel

OTHERS = 20  # random other images a caption is compared with
TOP_K = 10  # lists in which a hub is counted
COSINES = {"raw": False, "cosine": True}  # the two rules by which images are ranked
METRICS = ("euclidean", "manhattan", "cosine")
POOL_SIZES = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True)
class Pools:
    """The pools that this many images really make: whole ones of 100, or a single smaller one."""

    images: int

    @property
    def size(self) -> int:
        """Photos that a query chooses from."""
        return min(kernel.POOL, self.images)

    def __str__(self) -> str:
        if self.images < kernel.POOL:
            return f"one pool of {self.images}"
        rest = self.images % kernel.POOL
        return f"pools of {kernel.POOL}" + (f" (the last of {rest})" if rest else "")


# ------------------------------------------------------------------------------------------------ resampling
def bootstrap_means(values: np.ndarray, rounds: int, seed: int = 0) -> np.ndarray:
    """(rounds, k) means of the rows of `values` (m, k), drawn with replacement."""
    rng, m = np.random.default_rng(seed), len(values)
    blocks = [
        rng.multinomial(m, np.full(m, 1 / m), size=min(250, rounds - start)) @ values / m
        for start in range(0, rounds, 250)
    ]  # in blocks: the counts of all rounds would not fit
    return np.concatenate(blocks)


def paired_bootstrap(ours: np.ndarray, theirs: np.ndarray, rounds: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Mean difference of two models' gains on the same images, its 95% interval and two-sided p-value."""
    difference = float((ours - theirs).mean())
    drawn = bootstrap_means((ours - theirs)[:, None], rounds, seed)[:, 0]
    # Shifted to a true difference of zero, how often does chance alone go as far as what was seen?
    beyond = np.abs(drawn - difference) >= abs(difference) - 1e-12
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "difference": difference,
        "low": float(low),
        "high": float(high),
        "p": float((1 + beyond.sum()) / (1 + rounds)),
        "images": len(ours),
        "rounds": rounds,
    }


def verdict(difference: dict[str, float], other: str) -> str:
    """A difference in plain words: one that is sure where its 95% interval leaves no doubt about the sign."""
    if not difference["difference"]:
        return f"As good as {other}, to the digit"
    if difference["low"] <= 0 <= difference["high"]:
        return f"No sure difference from {other}"
    return f"{'Better' if difference['difference'] > 0 else 'Worse'} than {other}: sure"


def difference_in_words(row: dict[str, float], other: str, name: str) -> str:
    """A difference: the verdict first, then what it rests on."""
    basis = f"p = {row['p']:.2g}, paired over {row['images']:,} images" if "p" in row else "unpaired, as recorded"
    return f"{verdict(row, other)} ({interval_in_words(row, name)}, {basis})"


def interval_in_words(row: dict[str, float], name: str) -> str:
    """A difference of the MRR `name` and its interval."""
    return f"{name} MRR {row['difference']:+.4f}, 95% interval {row['low']:+.4f} to {row['high']:+.4f}"


# ------------------------------------------------------------------------------------------------- distances
def distances(predictions: np.ndarray, gallery: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By metric: (views, m) to the own image and (views, m, others) to random other images."""
    m = len(gallery)
    shifts = np.random.default_rng(0).permutation(np.arange(1, m))[:OTHERS]
    rows = [[distance(view, np.roll(gallery, -shift, axis=0)) for shift in (0, *shifts)] for view in predictions]
    table = np.array(rows).transpose(2, 0, 3, 1)  # metric, view, image, (own, others)
    return {metric: (each[..., 0], each[..., 1:]) for metric, each in zip(METRICS, table, strict=True)}


def distance(predictions: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(3, m): Euclidean, Manhattan and cosine distance, row by row."""
    gap = predictions - images
    cosine = np.einsum("ij,ij->i", kernel.unit(predictions), kernel.unit(images))
    return np.stack([np.linalg.norm(gap, axis=1), np.abs(gap).sum(1), 1 - cosine])


def summarise_distance(own: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """Mean, spread and median of both, the share nearer to the own image, and the improvement with its interval."""
    by_image = np.stack([own.mean(0), others.mean((0, 2))], axis=1)
    drawn = bootstrap_means(by_image, 2000)
    low, high = np.percentile(100 * (1 - drawn[:, 0] / drawn[:, 1]), [2.5, 97.5])
    spread = {
        name: {"mean": float(values.mean()), "sd": float(values.std(ddof=1)), "median": float(np.median(values))}
        for name, values in (("own", own), ("random", others))
    }
    return spread | {
        "nearer_to_own": float((own[..., None] < others).mean()),
        "improvement_percent": float(100 * (1 - own.mean() / others.mean())),
        "improvement_low": float(low),
        "improvement_high": float(high),
    }


def anisotropy(predictions: np.ndarray, gallery: np.ndarray) -> dict[str, float]:
    """How far images share one direction, and predictions with them."""
    images, queries = kernel.unit(gallery), kernel.unit(predictions)
    m, mean = len(images), images.mean(0)
    between = (m * mean @ mean - 1) / (m - 1)  # mean cosine over all pairs but those of an image with itself
    return {
        "cosine_image_to_random_image": float(between),
        "cosine_prediction_to_random_image": float((queries @ mean).mean()),
    }


def distance_notes(summary: dict[str, dict[str, Any]]) -> list[str]:
    """Which distance to look at, where they differ by more than a caption in a hundred; `summary` by metric."""
    euclidean, cosine = (summary[metric]["nearer_to_own"] for metric in ("euclidean", "cosine"))
    if cosine - euclidean < 0.01:
        return []
    return [
        f"Cosine is the distance to look at: by it {cosine:.1%} of captions are nearer to their own photo, by "
        f"Euclidean distance {euclidean:.1%}, as a prediction is a direction and its length says nothing of the photo's"
    ]


# ------------------------------------------------------------------------------------------------- retrieval
def gains_of(predictions: np.ndarray, gallery: np.ndarray, pool: int, cosine: bool) -> np.ndarray:
    """(views, m) reciprocal ranks; in the official pools by the official rule, which counts 99 ranks."""
    rule = pool if pool == kernel.POOL else None
    return np.stack(
        [kernel.reciprocal_ranks(kernel.true_ranks(view, gallery, pool, cosine), rule) for view in predictions]
    )


def pool_curve(predictions: np.ndarray, gallery: np.ndarray) -> list[dict[str, float]]:
    """MRR in pools of 10 to the full gallery, beside what chance gives; an incomplete last pool is left out."""
    rows, m = [], len(gallery)
    for size in [*(size for size in POOL_SIZES if size < m), m]:
        whole = m // size * size
        cut = predictions[:, :whole], gallery[:whole]
        scores = {name: float(gains_of(*cut, size, cosine).mean()) for name, cosine in COSINES.items()}
        rows.append({"pool": size, "chance": float((1 / np.arange(1, size + 1)).mean()), **scores})
    return rows


def count_words(text: str) -> int:
    """Words of a caption; a full stop that stands alone is none."""
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


def by_caption_length(captions: list[list[str]], gains: np.ndarray) -> list[dict[str, Any]]:
    """MRR by the number of words, in five groups of about equal size; standard errors over images."""
    words = np.array([[count_words(text) for text in view] for view in captions])
    edges = np.unique(np.quantile(words, np.linspace(0, 1, 6)).astype(int))
    rows = []
    for low, high in pairwise(edges if len(edges) > 1 else np.repeat(edges, 2)):
        low = low + (low > edges[0])  # groups begin one word after the last one's end
        inside = (words >= low) & (words <= high)
        if inside.any():
            mean = gains[inside].mean()
            error = np.sqrt((np.where(inside, gains - mean, 0).sum(0) ** 2).sum()) / inside.sum()
            row = {"from": int(low), "to": int(high), "captions": int(inside.sum())}
            rows.append(row | {"mrr": float(mean), "mrr_se": float(error)})
    return rows


def hubness(predictions: np.ndarray, gallery: np.ndarray, names: list[str]) -> dict[str, Any]:
    """How often each image is among the first ten of the whole gallery (raw scores), the skew and the worst hubs."""
    k, counts = min(TOP_K, len(gallery)), np.zeros(len(gallery), int)
    for view in predictions:
        for start in range(0, len(view), 500):
            scores = view[start : start + 500] @ gallery.T
            counts += np.bincount(np.argpartition(-scores, k - 1, axis=1)[:, :k].ravel(), minlength=len(gallery))
    centred = counts - counts.mean()
    worst = np.argsort(-counts, kind="stable")[:5]
    return {
        "k": k,
        "captions": int(predictions.shape[0] * predictions.shape[1]),
        "counts": counts.tolist(),
        "expected": float(counts.mean()),
        "skew": float((centred**3).mean() / max(centred.std(), 1e-12) ** 3),
        "never": float((counts == 0).mean()),
        "worst": [{"image": names[i], "lists": int(counts[i])} for i in worst],
    }


# ----------------------------------------------------------------------------------------------- calibration
def pool_scores(predictions: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """(views x m, pool) scores of directions against raw images of mean length one; the own image comes first.

    An incomplete last pool is left out, unless it is the only one.
    """
    images, queries = gallery / np.linalg.norm(gallery, axis=1).mean(), kernel.unit(predictions)
    size, rows = Pools(len(gallery)).size, []
    for view in queries:
        for start in range(0, len(gallery) - size + 1, size):
            scores = view[start : start + size] @ images[start : start + size].T
            shifted = (np.arange(size)[:, None] + np.arange(size)) % size
            rows.append(np.take_along_axis(scores, shifted, axis=1))
    return np.concatenate(rows)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponent = np.exp(logits - logits.max(-1, keepdims=True))
    return exponent / exponent.sum(-1, keepdims=True)


def surprise(probability: np.ndarray) -> float:
    """Mean loss of rows of probabilities, of which the own image's comes first."""
    return float(-np.log(np.maximum(probability[:, 0], 1e-12)).mean())


def calibration(scores: np.ndarray, temperature: float) -> dict[str, Any]:
    """Is the first image of a pool right as often as the softmax says? Mean gap (ECE), loss, curve, its worst bin."""
    probability = softmax(scores / temperature)
    confidence, right = probability.max(1), probability.argmax(1) == 0
    which = np.minimum((10 * confidence).astype(int), 9)
    curve = []
    for one in np.unique(which):
        inside = which == one
        point = {"confidence": float(confidence[inside].mean()), "right": float(right[inside].mean())}
        curve.append(point | {"captions": int(inside.sum())})
    gap = sum(row["captions"] * abs(row["confidence"] - row["right"]) for row in curve) / len(scores)
    filled = [row for row in curve if row["captions"] >= max(10, len(scores) / 50)]  # else chance alone makes a gap
    worst = max(filled, key=lambda row: abs(row["confidence"] - row["right"]), default=None)
    return {
        "temperature": float(temperature),
        "says": float(confidence.mean()),
        "right": float(right.mean()),
        "ece": float(gap),
        "loss": surprise(probability),
        "curve": curve,
        "worst": worst,
    }


def best_temperature(scores: np.ndarray) -> float:
    """The temperature of the lowest loss on these pools, to some three per cent."""
    grid = np.geomspace(0.002, 1, 200)
    return float(min(grid, key=lambda temperature: surprise(softmax(scores[::3] / temperature))))
