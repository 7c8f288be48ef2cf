"""Map caption vectors to photo vectors so that each caption finds its photo: data -> networks -> submission.

    python kernel/pipeline.py --input data --output out    the default recipe, locally; --recipe and --set change it
    python kernel/pipeline.py                              on Kaggle: /kaggle/input -> /kaggle/working
    python kernel/pipeline.py --mode predict ...           no training: weights found below --input

From its first seconds on a run has a checked submission of known quality (the closed form's), and replaces it only by
one that validation says is better.

Measured on 2 CPU cores (AVX512-bf16, no matrix units), on a real stand-in of 6,090 photos, 600 of them held out, MRR in
pools of 100, mean of three seeds and splits: ensemble .782 raw and .785 cosine after 125 s of training, align .766 and
.768 after 37 s, closed_form .707 and .694 after one; the original system .340 and .550 after 161 s (one seed).
Reproduce: `python tools/benchmark.py --seeds 1 2 3 --data DIR`; docs/results.md has more, docs/trials.md what did not
work.
"""

from __future__ import annotations

import os
import time

STARTED = time.monotonic()  # before the imports below, which take seconds of the time budget
# Threads that wait sleep, which torch heeds only before its import: spinning, they rob one another of the cores on a
# machine that is busy besides, where an epoch then takes two to five times as long; on an idle one this costs 2 %.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# ruff: noqa: E402
import argparse
import collections
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import io
import itertools
import json
import math
import platform
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------ knobs
# A packaged copy carries its own values here; command line beats OVERRIDES beats recipe beats default.
OVERRIDES: dict = {}


def knob(default: Any, why: str, low: float = 0, high: float = 1e6, choices: tuple = (), free: bool = False) -> Any:
    """A field of Knobs: its default, the reason for it, its bounds or choices; `free`: may differ on resume."""
    return field(default=default, metadata={"why": why, "low": low, "high": high, "choices": choices, "free": free})


@dataclass(frozen=True)
class Knobs:
    """Everything that may be set, with why it has its value. `--set KEY=VALUE` changes one, for every candidate."""

    # the run
    recipe: str = knob("ensemble", "a list of candidates, below")
    mode: str = knob("train", "or predict, with weights found below the input root", choices=("train", "predict"))
    seed: int = knob(0, "initial weights, order and dropout all follow from it")
    split_seed: int = knob(0, "the validation images follow from it, so that runs of several seeds can be compared")
    device: str = knob("auto", "what a probe shows to work", choices=("auto", "cpu", "cuda"), free=True)
    dtype: str = knob("auto", "native or fastest", choices=("auto", "float32", "bfloat16", "float16"), free=True)
    workers: int = knob(0, "networks trained at once; 0: one a usable card", free=True)
    max_minutes: float = knob(715.0, "Kaggle ends a session at 12 h; all that is planned fits into it", 1e-3, free=True)
    val_fraction: float = knob(0.1, "images held out, in whole pools of 100 where there are enough", 1e-3, 0.9)
    refit: bool = knob(True, "chosen networks are trained once more on all images before they predict")
    repulsion: float = knob(0.3, "between a pool's predictions; validation chooses none, half or all of it", 0, 0.9)
    eval_every: int = knob(4, "epochs between validation rows", 1, free=True)
    checkpoint_every: int = knob(5, "epochs between the named checkpoints", 1, free=True)
    checkpoint_seconds: float = knob(60.0, "at most so much work is lost when the machine dies", free=True)
    infer_batch: int = knob(256, "captions predicted at once", 1)
    consecutive_captions: bool = knob(False, "where captions/label is missing: equal runs of captions an image")
    pairs_compare: bool = knob(False, "with pairs: every candidate also without them, and the two side by side")
    # a candidate: what it learns from
    pairs: bool = knob(False, "join pairs*.npz found below the input root; look up whether the rules allow it")
    pairs_weight: float = knob(1.0, "of an extra caption in the loss, beside the competition's own", 1e-3, 100)
    network: str = knob("align", "mlp is the original's, linear the closed form", choices=("align", "mlp", "linear"))
    sees: str = knob("vector", "the caption's vector, its words, or both", choices=("vector", "words", "both"))
    word_count: int = knob(3, "training captions that a word must stand in: rarer ones are learnt by heart", 1)
    word_width: int = knob(512, "width of a caption's bag of words", 1)
    word_dropout: float = knob(0.3, "share of the words left out at a step", 0, 0.99)
    word_rate: float = knob(1.0, "times the learning rate for the table of words, each of which is rarely seen", 1e-3)
    # its network
    hidden: int = knob(2048, "wide and shallow", 1)
    activation: str = knob("silu", "square is relu's, gate multiplies", choices=("silu", "square", "gate"))
    skip: bool = knob(True, "a linear map beside the hidden layer")
    dropout: float = knob(0.6, "on the hidden layer: five captions a photo are few", 0, 0.99)
    input_dropout: float = knob(0.3, "on the input: the regulariser that gained most", 0, 0.99)
    # its objective
    loss: str = knob("softmax", "over all images; triplet: the hardest few", choices=("softmax", "triplet", "cosine"))
    raw_weight: float = knob(0.5, "share of the captions scored on raw-length images, the board's way", 0, 1)
    temperature: float = knob(0.02, "start of the learnt one; tuned public solutions end at .01-.02", 1e-3)
    margin: float = knob(0.2, "of the triplet loss", 0, 10)
    negatives: int = knob(3, "of the triplet loss: the hardest other images of the batch", 1)
    gallery: int = knob(8192, "images of the softmax at a step, the batch's own among them; 0: all", 0)
    logit_block: int = knob(512, "rows of gallery logits held at once: bounds memory for any batch", 1)
    prior: float = knob(1.0, "its weight in the blend, unless chosen weights gain more than their error", 0, 100)
    # its training
    epochs: int = knob(0, "ends at a rate of zero, so none is picked on validation; 0: by the number of photos")
    epoch_factor: float = knob(1.0, "times that number: cheap epochs can be more", 1e-3)
    batch: int = knob(1024, "small enough for many steps, large enough to keep a card busy", 1)
    min_steps: int = knob(150, "small data gets a smaller batch, so that it gets as many updates")
    lr: float = knob(1e-3, "of AdamW", 1e-9)
    weight_decay: float = knob(1e-2, "of AdamW")
    schedule: str = knob("cosine", "with a short warm-up; constant is the original's", choices=("cosine", "constant"))
    ridge: float = knob(0.1, "closed form: penalty, in units of the mean variance of a text dimension", 1e-9)
    whiten: float = knob(0.3, "closed form: floor, in units of the mean residual variance", 1e-9)


FIELDS = {one.name: one for one in dataclasses.fields(Knobs)}
CLOSED_FORM: dict[str, Any] = {"network": "linear", "prior": 0.0}  # ridge, then residual whitening: seconds
# Hardest images of the batch, on raw dot products: half of the time of the softmax over all of them.
TRIPLET: dict[str, Any] = {"loss": "triplet", "skip": False, "dropout": 0.7, "input_dropout": 0.1, "lr": 2e-3}
TRIPLET |= {"batch": 2000, "epoch_factor": 1.25}
TRIPLET_SQUARE: dict[str, Any] = TRIPLET | {"activation": "square"}
SOFTMAX: dict[str, Any] = {"epoch_factor": 0.67}  # over all images, raw and unit length at once
JOINED: dict[str, Any] = {"sees": "both", "epoch_factor": 0.85}  # the same on vector and words
WORDS: dict[str, Any] = {"sees": "words", "epoch_factor": 0.67, "word_rate": 3.0}
ENSEMBLE = [CLOSED_FORM, TRIPLET, JOINED, SOFTMAX, WORDS, TRIPLET_SQUARE]  # what gains most for its time goes first
RECIPES: dict[str, list[dict[str, Any]]] = {
    # The original system, to the letter: 2-layer MLP, cosine loss, plain Adam, nothing averaged.
    "baseline": [
        {"network": "mlp", "loss": "cosine", "hidden": 4096, "dropout": 0.2, "schedule": "constant", "epochs": 20}
        | {"batch": 64, "lr": 1e-3, "weight_decay": 0.0, "repulsion": 0.0, "min_steps": 0, "eval_every": 5}
    ],
    "closed_form": [CLOSED_FORM],
    "align": [CLOSED_FORM, JOINED],
    # Networks that differ in what they see and what they minimise: kinds count, not numbers.
    "ensemble": ENSEMBLE,
    # The same, then draws around the best so far for as long as there is time.
    "search": ENSEMBLE,
}
# What a draw of `search` may change, two at a time.
DRAWS: dict[str, tuple] = {
    "sees": ("vector", "both"),
    "loss": ("softmax", "triplet"),
    "epoch_factor": (0.5, 1.0, 2.0, 4.0),
    "hidden": (1024, 2048, 4096),
    "activation": ("silu", "square", "gate"),
    "dropout": (0.5, 0.6, 0.7),
    "input_dropout": (0.1, 0.2, 0.3, 0.4),
    "raw_weight": (0.25, 0.5, 0.75, 1.0),
    "batch": (512, 1024, 2048),
    "lr": (5e-4, 1e-3, 2e-3),
}

SUBMISSION, METRICS, MANIFEST = "pipeline_submission.csv", "metrics.json", "manifest.json"
FINAL_MODEL, VALIDATED_MODEL = "pipeline_final_model.pth", "pipeline_validated_model.pth"
TRAINING_LOG, CURVES, CHECKPOINT = "training_log.csv", "training_curves.png", "pipeline_model_checkpoint_epoch_{}.pth"
RESUME_RUN, RESUME_STATE = "resume_run.json", "resume_{}_{}.pth"
PHASES = ("validate", "refit")  # without the validation images, to choose; with them, to predict
BUDGET = "time budget"  # the reason to stop that was asked for: such a run is complete
POOL, TOP, VIEWS = 100, 99, 5  # the official evaluation: pools of 100, of which the first 99 ranks count
PREDICTING = ("mode", "device", "infer_batch", "repulsion")  # the knobs that predicting honours
WORDS_KEPT = 32  # of a caption; few have more


class UserError(Exception):
    """What was given is wrong; one line that names the thing, the place and the next step."""

    exit_code = 2


class TrainingFailed(UserError):
    """The input is right, but training or writing cannot go on; one line that says why."""

    exit_code = 1


class WriteFailed(UserError):
    """The disk is full, or went away."""

    exit_code = 1


class Interrupted(Exception):
    """A signal asked the run to end; states are saved."""


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value` as a knob's name and a value of that knob's type."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise UserError(f"--set {text}: expected KEY=VALUE, such as --set epochs=8")
    return key, typed(key, value)


def beside(given: dict[str, Any], **options: str | None) -> dict[str, Any]:
    """What `--set` gave, and the options that set a knob as well: one that says otherwise is a slip."""
    named = {key: value for key, value in options.items() if value is not None}
    for key, value in named.items():
        if given.get(key, value) != value:
            raise UserError(f"--{key} {value} and --set {key}={given[key]}: give one of them")
    return {**named, **given}


def typed(key: str, value: Any) -> Any:
    """`value` in the type and within the bounds of knob `key`; anything else is an error that helps."""
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, n=3, cutoff=0.5) or sorted(FIELDS)
        raise UserError(f"unknown knob '{key}'; did you mean {', '.join(near)}?")
    kind, text, rules = type(getattr(Knobs, key)), str(value).strip(), FIELDS[key].metadata
    try:
        value = {"true": True, "1": True, "false": False, "0": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        takes = f"takes {kind.__name__} (default {FIELDS[key].default})"
        raise UserError(f"knob '{key}' {takes}, not '{text}'") from None
    if rules["choices"] and value not in rules["choices"]:
        raise UserError(f"knob '{key}' is one of {', '.join(rules['choices'])}, not '{text}'")
    if kind in (int, float) and not rules["low"] <= value <= rules["high"]:
        raise UserError(f"knob '{key}' lies in {rules['low']:g}..{rules['high']:g}, not {text}")
    return value


def resolve_given(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the user set, typed: `arguments` (command line) over OVERRIDES; the recipe's name is checked."""
    given = {key: typed(key, value) for key, value in {**OVERRIDES, **arguments}.items()}
    if given.get("recipe", Knobs.recipe) not in RECIPES:
        raise UserError(f"unknown recipe '{given['recipe']}'; there are {', '.join(RECIPES)}")
    return given


def resolve_candidates(arguments: dict[str, Any]) -> list[Knobs]:
    """Knobs of a recipe's candidates; what was set beats the candidate, which beats the default."""
    given = resolve_given(arguments)
    candidates = [Knobs(**{**one, **given}) for one in RECIPES[given.get("recipe", Knobs.recipe)]]
    different: dict[Knobs, Knobs] = {}
    for one in candidates:  # what was set can make two of them the same
        different.setdefault(dataclasses.replace(one, prior=0.0), one)
    return list(different.values())


def resolve_knobs(arguments: dict[str, Any]) -> Knobs:
    """The run's knobs: what all candidates of the recipe share, and the defaults."""
    first, *others = map(dataclasses.asdict, resolve_candidates(arguments))
    return Knobs(**{key: value for key, value in first.items() if all(one[key] == value for one in others)})


def with_epochs(knobs: Knobs, images: int) -> Knobs:
    """Knobs with epochs by the number of training photos: more photos can be looked at for longer."""
    if knobs.epochs or knobs.network == "linear":
        return knobs
    planned = round(knobs.epoch_factor * 12 * max(0.75, (images / 6000) ** 0.6))
    return dataclasses.replace(knobs, epochs=max(1, planned))


def fixed(knobs: Knobs) -> dict[str, Any]:
    """What a run has to keep when it goes on from an earlier one."""
    return {key: getattr(knobs, key) for key in FIELDS if not FIELDS[key].metadata["free"]}


def describe(knobs: Knobs, beside: Knobs) -> str:
    """The knobs that differ from those `beside`, as `key=value`."""
    return " ".join(f"{key}={getattr(knobs, key)}" for key in FIELDS if getattr(knobs, key) != getattr(beside, key))


# ------------------------------------------------------------------------------------------------- data
@dataclass
class TrainSet:
    """Captions in file order with the index of each one's image."""

    caption_ids: np.ndarray  # (n,) int64
    captions: list[str]
    text: np.ndarray  # (n, d_text) float32
    image_of: np.ndarray  # (n,) int64, row of `images`
    image_names: list[str]
    images: np.ndarray  # (m, d_image) float32, not normalised
    extra: int = 0  # of the images, how many at the end come from pairs files: trained on, never validated on

    @property
    def own(self) -> int:
        """The competition's own images: the first ones."""
        return len(self.images) - self.extra


@dataclass
class TestSet:
    """Test captions in file order."""

    caption_ids: np.ndarray  # (n,) int64
    captions: list[str]
    text: np.ndarray  # (n, d_text) float32
    image_dim: int


def files_below(root: Path, pattern: str) -> list[Path]:
    """Files below `root` whose names match, links followed: flat, nested, old and new Kaggle mounts alike."""
    if not root.is_dir():
        raise UserError(f"{root}: no such input folder; name the one that holds the data")
    found: dict[Path, Path] = {}
    seen: set[Path] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:  # a link back up, or one mount shown twice
            folders.clear()
            continue
        seen.add(real)
        found |= {(real / name).resolve(): Path(folder) / name for name in fnmatch.filter(files, pattern)}
    return sorted(found.values())


def find_file(root: Path, name: str) -> Path:
    """The one file called `name` anywhere below `root`."""
    found = files_below(root, name)
    if len(found) > 1:
        listing = " and ".join(map(str, found))
        raise UserError(f"{root}: more than one {name}: {listing}; point --input at one of them")
    if not found:
        present = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise UserError(f"{root}: no {name} below it (it holds {present}); attach or download the competition's data")
    return found[0]


@contextlib.contextmanager
def reading(path: Path, what: str, advice: str = "download the file again") -> Iterator[None]:
    """Damaged bytes can fail anywhere in zip, zlib, header or text decoding: one line whatever it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "allow_pickle" in str(error):
            advice = "it holds Python objects: save text as array.astype('U') and vectors as float32"
        raise UserError(f"{path}: {what} cannot be read ({first_line(error)}); {advice}") from error


class Npz:
    """Checked arrays of an untrusted .npz: no pickle, and every error names file, key and first bad row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path, "the archive"):
            self.arrays = np.load(path, allow_pickle=False)
            self.keys = list(self.arrays.files)

    def close(self) -> None:
        self.arrays.close()

    def fail(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.path}: {key}: {problem}")

    def read(self, key: str, *shape: int | None, kind: str) -> np.ndarray:
        """Array `key` of a `shape` (None: any) and a `kind` of type (i: integer, f: float, U: text)."""
        if key not in self.keys:
            raise self.fail(key, f"this key is missing; there are {', '.join(self.keys[:12])}")
        with reading(self.path, key):
            array = np.atleast_1d(self.arrays[key])  # a scalar, too; a member without the format's magic comes as bytes
        fits = [want in (None, have) for want, have in zip(shape, array.shape, strict=False)]
        if array.ndim != len(shape) or not all(fits) or array.dtype.kind not in kind:
            wanted = " x ".join("any" if n is None else str(n) for n in shape)
            raise self.fail(key, f"is {array.dtype} of shape {array.shape}, expected kind '{kind}' of {wanted}")
        return array

    def ids(self) -> np.ndarray:
        ids = self.read("captions/ids", None, kind="iu")
        if ids.dtype == np.uint64 and len(ids) and ids.max() > np.iinfo(np.int64).max:
            raise self.fail("captions/ids", f"row {ids.argmax()}: id {ids.max()} is beyond 64-bit integers")
        ids = ids.astype(np.int64)
        again = pd.Series(ids).duplicated()
        if again.any():
            row = int(again.argmax())
            raise self.fail("captions/ids", f"row {row}: id {ids[row]} was there before")
        return ids

    def words(self, key: str, rows: int | None) -> list[str]:
        array = self.read(key, rows, kind="U")
        with reading(self.path, key):
            native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
            if native.nbytes and native.view(np.uint32).max() > sys.maxunicode:  # numpy hands them on
                raise ValueError("it holds numbers that are no characters")
            return native.tolist()

    def vectors(self, key: str, rows: int) -> np.ndarray:
        """Embeddings (rows, d) as float32: finite, and small enough for products in float32."""
        given = self.read(key, rows, None, kind="f")
        if not given.size:
            raise self.fail(key, f"is empty: {given.shape}")
        with np.errstate(over="ignore", invalid="ignore"):
            array = given.astype(np.float32, copy=False)
            bad = ~(np.einsum("ij,ij->i", array, array) < 1e18)  # NaN is not below anything
        if bad.any():
            row = int(bad.argmax())
            value = given[row, np.abs(given[row]).argmax()]
            raise self.fail(key, f"row {row} holds NaN, infinity or a number that no embedding has: {value:.3g}")
        constant = int((array.max(axis=1) == array.min(axis=1)).sum())
        twins = rows - len({hash(row.tobytes()) for row in array})
        if constant or twins > rows // 100:
            found = f"{constant} vectors of {rows} are zero or constant, {twins} repeat another"
            log(f"warning: {self.path}: {key}: {found}")
        return array

    def label(self, captions: int, images: int) -> np.ndarray:
        """Image of each caption from the one-hot matrix, read as a stream: 3.1 GB that are never held."""
        key, image_of, named = "captions/label", np.full(captions, -1), np.zeros(captions, np.int64)
        with reading(self.path, key), self.arrays.zip.open(f"{key}.npy") as stream:
            old = np.lib.format.read_magic(stream) == (1, 0)
            header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(stream)
            if shape != (captions, images) or dtype not in (np.bool_, np.uint8):
                raise self.fail(key, f"is {dtype} of shape {shape}, expected bool of ({captions}, {images})")
            width, lines = (captions, images) if fortran else (images, captions)
            block_lines = max(1, (1 << 20) // width)  # blocks that stay in the processor's cache
            for start in range(0, lines, block_lines):
                size = min(block_lines, lines - start) * width
                block = np.frombuffer(stream.read(size).ljust(size, b"\0"), dtype)
                places = np.flatnonzero(block)
                if dtype == np.uint8 and (block[places] != 1).any():
                    raise self.fail(key, f"holds {block.max()}, expected 0 or 1")
                line, place = start + places // width, places % width
                rows, columns = (place, line) if fortran else (line, place)
                image_of[rows] = columns
                named += np.bincount(rows, minlength=captions)
        if (named != 1).any():
            bad = int((named != 1).argmax())
            raise self.fail(key, f"row {bad} names {named[bad]} images, expected 1")
        return image_of


def read_train(path: Path, consecutive: bool = False) -> TrainSet:
    """train.npz, checked: shapes agree, one image a caption, finite, ids unique.

    `consecutive`: where captions/label is missing, equal runs of captions belong to the images in order.
    """
    with contextlib.closing(Npz(path)) as npz:
        ids, names = npz.ids(), npz.words("images/names", None)
        captions = npz.words("captions/text", len(ids))
        if "captions/label" in npz.keys:
            image_of = npz.label(len(ids), len(names))
        elif not consecutive:
            raise npz.fail("captions/label", "this key is missing; --set consecutive_captions=true takes equal runs")
        elif not names or len(ids) % len(names):
            raise npz.fail("captions/label", f"is missing, and {len(ids)} captions do not divide by {len(names)}")
        else:
            image_of = np.arange(len(ids)) // (len(ids) // len(names))
            log(f"{path}: no captions/label; taking {len(ids) // len(names)} consecutive captions an image")
        text, images = npz.vectors("captions/embeddings", len(ids)), npz.vectors("images/embeddings", len(names))
    return with_captions(path, TrainSet(ids, captions, text, image_of, names, images))


def with_captions(path: Path, train: TrainSet) -> TrainSet:
    """The set without images that no caption names: there is nothing to learn from them."""
    named, image_of = np.unique(train.image_of, return_inverse=True)
    if len(named) == len(train.images):
        return train
    missing = np.setdiff1d(np.arange(len(train.images)), named)
    names = ", ".join(train.image_names[image] for image in missing[:5])
    log(f"warning: {path}: {len(missing)} images without a caption are left out: {names}")
    kept = [train.image_names[image] for image in named]
    return dataclasses.replace(train, image_of=image_of, image_names=kept, images=train.images[named])


def read_test(path: Path) -> TestSet:
    """test.clean.npz, checked; at least one row."""
    with contextlib.closing(Npz(path)) as npz:
        ids = npz.ids()
        if not len(ids):
            raise UserError(f"{path}: captions/ids: no rows, so there is nothing to predict")
        width = int(npz.read("metadata/embedding_dim_image", 1, kind="iu")[0])
        texts, vectors = npz.words("captions/text", len(ids)), npz.vectors("captions/embeddings", len(ids))
    return TestSet(ids, texts, vectors, width)


def split_images(n_images: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) image indices, disjoint; validation in whole pools of 100 where there are enough."""
    count = max(2, round(n_images * fraction))
    count = count // POOL * POOL or count
    if n_images - count < 2:
        way_out = "lower --set val_fraction" if count > 2 else "4 are the least"
        raise UserError(f"{n_images} images are too few to hold out {count}; {way_out}")
    order = np.random.default_rng(seed).permutation(n_images)
    return np.sort(order[count:]), order[:count]


def caption_views(image_of: np.ndarray, images: np.ndarray, n_views: int = VIEWS) -> np.ndarray:
    """(n_views, len(images)) caption indices: view v takes the v-th caption of each image, in turn if it has fewer."""
    order = np.argsort(image_of, kind="stable")
    counts = np.bincount(image_of, minlength=int(images.max()) + 1)
    if (counts[images] == 0).any():
        raise UserError(f"image {int(images[counts[images] == 0][0])} has no caption")
    first = np.cumsum(counts) - counts
    return np.stack([order[first[images] + view % counts[images]] for view in range(n_views)])


SAME_CAPTION, SAME_IMAGE = 0.88, 0.98  # cosines from which a pair may show what validation or the test asks for


def join_pairs(train: TrainSet, test: TestSet, held_out: np.ndarray, files: list[Path]) -> tuple[TrainSet, list[dict]]:
    """The set with the pairs of `files` (keys of train.npz, label optional) behind its own, and what became of them.

    Left out are images with a caption like one of the test's or of validation's, and those of the name or nearly the
    vector of an image that is there already.
    """
    asked = np.concatenate([test.text, train.text[np.isin(train.image_of, held_out)]])
    facts = []
    for path in files:
        extra = read_train(path, consecutive=True)
        log(f"pairs: {path}: comparing {len(extra.text)} captions and {len(extra.images)} images with what is there")
        for ours, theirs in ((train.text, extra.text), (train.images, extra.images)):
            if ours.shape[1] != theirs.shape[1]:
                raise UserError(f"{path}: {theirs.shape[1]} dimensions, but the training data has {ours.shape[1]}")
            warn_if_foreign(path, ours, theirs)
        alike = extra.image_of[nearest_cosine(extra.text, asked) >= SAME_CAPTION]
        guards = {
            "like_test_or_validation": np.isin(np.arange(len(extra.images)), alike),
            "same_name": np.isin(extra.image_names, train.image_names),
            "same_vector": nearest_cosine(extra.images, train.images) >= SAME_IMAGE,
        }
        counts = {"images": len(extra.images), **{name: int(images.sum()) for name, images in guards.items()}}
        joined = np.flatnonzero(~np.any(list(guards.values()), axis=0))
        train = with_images(train, extra, joined)
        counts |= {"joined_images": len(joined), "joined_captions": int(np.isin(extra.image_of, joined).sum())}
        log(f"pairs: {path}: " + ", ".join(f"{key.replace('_', ' ')} {count}" for key, count in counts.items()))
        facts.append({"file": path.name, **file_facts(path), **counts})
    return train, facts


def with_images(train: TrainSet, extra: TrainSet, images: np.ndarray) -> TrainSet:
    """`train` with some images of `extra`, and their captions, behind its own."""
    captions = np.flatnonzero(np.isin(extra.image_of, images))
    return TrainSet(
        np.concatenate([train.caption_ids, extra.caption_ids[captions]]),
        train.captions + [extra.captions[i] for i in captions],
        np.concatenate([train.text, extra.text[captions]]),
        np.concatenate([train.image_of, len(train.images) + np.searchsorted(images, extra.image_of[captions])]),
        train.image_names + [extra.image_names[i] for i in images],
        np.concatenate([train.images, extra.images[images]]),
        train.extra + len(images),
    )


def nearest_cosine(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each vector (n, d) the highest cosine to any of `others` (m, d)."""
    theirs = torch.from_numpy(unit(others)).T
    blocks = (torch.from_numpy(unit(vectors[start : start + 2048])) for start in range(0, len(vectors), 2048))
    return torch.cat([(block @ theirs).amax(dim=1) for block in blocks]).numpy()


def warn_if_foreign(path: Path, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Say so where extra vectors do not look like the same encoder's: by length, mean direction and spectrum."""
    looks = []
    for vectors in (ours, theirs):
        some = vectors[:: max(1, len(vectors) // 2000)].astype(np.float64)
        spread = torch.linalg.svdvals(torch.from_numpy(some - some.mean(0))).numpy() ** 2
        looks.append((np.linalg.norm(some, axis=1).mean(), some.mean(0), spread.sum() ** 2 / (spread**2).sum()))
    (length, mean, rank), (their_length, their_mean, their_rank) = looks
    cosine = float(unit(mean) @ unit(their_mean))
    facts = f"{ours.shape[1]}-d: mean length {their_length:.2f} against {length:.2f}, cosine of the means {cosine:.2f}"
    facts += f", effective rank {their_rank:.0f} against {rank:.0f}"
    alike = 0.9 < their_length / length < 1.1 and cosine > 0.8 and 0.6 < their_rank / rank < 1.7
    log(f"{'pairs' if alike else 'warning: these may be of another encoder'}: {path.name}: {facts}")


def tokens(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


def make_vocabulary(captions: list[str], least: int) -> list[str]:
    """The words that stand in at least `least` captions, in order; pairs of words were worse than words alone."""
    count = collections.Counter(word for caption in captions for word in set(tokens(caption)))
    return sorted(word for word, times in count.items() if times >= least)


def word_ids(captions: list[str], vocabulary: list[str]) -> np.ndarray:
    """(n, WORDS_KEPT) int32: the known words of each caption as 1.. of the vocabulary, 0 where there are no more."""
    row_of = {word: row for row, word in enumerate(vocabulary, 1)}
    ids = np.zeros((len(captions), WORDS_KEPT), np.int32)
    for row, caption in enumerate(captions):
        known = [row_of[word] for word in tokens(caption) if word in row_of][:WORDS_KEPT]
        ids[row, : len(known)] = known
    return ids


def comma_rate(captions: list[str]) -> float:
    """The share of captions with a comma, which tells whether texts were cut there."""
    return float(np.mean(["," in caption for caption in captions]))


def cut_as_the_test(train: list[str], test: list[str], seed: int) -> list[str]:
    """Training texts cut at their first comma as often as the test's are (its captions.txt is cut at every one)."""
    ours, theirs = comma_rate(train), comma_rate(test)
    share = 1 - theirs / ours if ours > 0.02 else 0.0
    if share < 0.5:
        return train
    cut = np.random.default_rng(seed).random(len(train)) < share
    return [caption.split(",")[0] if short else caption for caption, short in zip(train, cut, strict=True)]


def log_texts(train: list[str], test: list[str], seen: list[str]) -> None:
    """What the texts look like, and how many of training's lose what stands behind a comma."""
    for name, captions in (("training", train), ("test", test)):
        quotes = np.mean([caption.lstrip()[:1] in ('"', "'") for caption in captions])
        words = np.mean([len(tokens(caption)) for caption in captions])
        opens = f"{comma_rate(captions):.1%} have a comma, {quotes:.1%} open with a quote"
        log(f"{name} texts: {opens}, {words:.1f} words on average")
    cut = sum(one != other for one, other in zip(train, seen, strict=True))
    if cut:
        log(f"the test's texts are cut at a comma: so are the words of {cut} captions of training and validation")
    else:
        log("captions are used whole: the test's have not lost their commas")


# -------------------------------------------------------------------------------------- networks, losses
Dims = tuple[int, int, int]  # of a caption's vector, of an image's, words of the vocabulary


class Dropout(nn.Module):
    """nn.Dropout in steps of 1/256, eight elements a random number: drawing one each outlasts the products on a CPU."""

    def __init__(self, share: float, random: torch.Generator | None) -> None:
        super().__init__()
        self.cut, self.random = round(256 * share), random

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or not self.cut:
            return values
        size = (values.numel() // 8 + 1,)
        words = torch.randint(-(2**63), 2**63 - 1, size, generator=self.random, device=values.device)
        keep = words.view(torch.uint8)[: values.numel()].view(values.shape) >= self.cut
        return values * keep.to(values.dtype).mul_(256 / (256 - self.cut))


class WordBag(nn.Module):
    """Words (b, WORDS_KEPT) -> sum of their learnt vectors over the root of their number, normalised (b, width)."""

    def __init__(self, n_words: int, knobs: Knobs, random: torch.Generator | None) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(n_words + 1, knobs.word_width, mode="sum", padding_idx=0)
        self.norm, self.share, self.random = nn.LayerNorm(knobs.word_width), knobs.word_dropout, random

    def forward(self, words: Tensor) -> Tensor:
        if self.training:  # whole words go
            words = words * (torch.rand(words.shape, generator=self.random, device=words.device) >= self.share)
        count = (words > 0).sum(dim=1, keepdim=True).clamp(min=1)
        return self.norm(self.table(words) / count.sqrt())


class AlignNet(nn.Module):
    """LayerNorm, dropout, one wide hidden layer (LayerNorm, activation, dropout), linear skip.

    Text (b, d_text) and words (b, WORDS_KEPT), as far as it sees them -> predictions (b, d_image).
    """

    centre: Tensor

    def __init__(self, dims: Dims, knobs: Knobs, random: torch.Generator | None = None) -> None:
        super().__init__()
        d_text, d_image, n_words = dims
        self.sees, self.activation = knobs.sees, knobs.activation
        self.register_buffer("centre", torch.zeros(d_text))  # mean training caption
        self.words = WordBag(n_words, knobs, random) if knobs.sees != "vector" else None
        width = {"vector": d_text, "words": knobs.word_width, "both": d_text + knobs.word_width}[knobs.sees]
        self.expand = nn.Linear(width, knobs.hidden * (2 if self.activation == "gate" else 1), bias=False)
        self.norm_hidden, self.project = nn.LayerNorm(knobs.hidden), nn.Linear(knobs.hidden, d_image)
        self.skip = nn.Linear(width, d_image, bias=False) if knobs.skip else None
        self.input_dropout, self.dropout = Dropout(knobs.input_dropout, random), Dropout(knobs.dropout, random)
        self.logit_scale = nn.Parameter(torch.empty(2))  # log(1/temperature) for images of raw and of unit length

    def forward(self, text: Tensor, words: Tensor) -> Tensor:
        parts = [] if self.sees == "words" else [F.layer_norm(text - self.centre, text.shape[1:])]
        if self.words is not None:
            parts.append(self.words(words))
        seen = self.input_dropout(torch.cat(parts, dim=1))
        prediction = self.project(self.dropout(self.activate(self.expand(seen))))
        return prediction if self.skip is None else prediction + self.skip(seen)

    def activate(self, hidden: Tensor) -> Tensor:
        if self.activation == "gate":
            value, gate = hidden.chunk(2, dim=1)
            return self.norm_hidden(value * F.silu(gate))
        hidden = self.norm_hidden(hidden)
        return F.silu(hidden) if self.activation == "silu" else F.relu(hidden).square()


class OriginalNet(nn.Module):
    """The original two-layer network; text (b, d_text) -> predictions (b, d_image)."""

    def __init__(self, dims: Dims, knobs: Knobs, random: torch.Generator | None = None) -> None:
        super().__init__()
        self.expand, self.project = nn.Linear(dims[0], knobs.hidden), nn.Linear(knobs.hidden, dims[1])
        self.dropout = Dropout(knobs.dropout, random)

    def forward(self, text: Tensor, words: Tensor) -> Tensor:
        return self.project(self.dropout(F.relu(self.expand(text))))


class LinearMap(nn.Module):
    """The closed form's; text (b, d_text) -> predictions (b, d_image)."""

    def __init__(self, dims: Dims, knobs: Knobs, random: torch.Generator | None = None) -> None:
        super().__init__()
        self.map = nn.Linear(dims[0], dims[1])

    def forward(self, text: Tensor, words: Tensor) -> Tensor:
        return self.map(text)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"align": AlignNet, "mlp": OriginalNet, "linear": LinearMap}


def build_network(dims: Dims, knobs: Knobs, centre: Tensor, random: torch.Generator) -> nn.Module:
    """A network on the generator's device with initial weights, torch's own distributions, drawn from `random`."""
    with torch.device("meta"):  # torch would draw from the global generator, which other threads share
        network = NETWORKS[knobs.network](dims, knobs, random)
    network.to_empty(device=random.device)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            for weights in module.parameters(recurse=False):
                nn.init.uniform_(weights, -bound, bound, generator=random)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.EmbeddingBag):
            nn.init.normal_(module.weight, std=0.05, generator=random)
            module.weight.data[0] = 0  # the padding
    if isinstance(network, AlignNet):
        network.centre.copy_(centre)
        nn.init.constant_(network.logit_scale, -math.log(knobs.temperature))
    return network


def fit_closed_form(task: Task, knobs: Knobs) -> dict[str, Tensor]:
    """Ridge, then residual whitening: p = (S + l I)^-1 (A x + b), the best linear query for y|x ~ N(Ax, S).

    Returns the state of LinearMap. The mean image is taken off: it is the same for the whole gallery, so it moves no
    rank.
    """
    device, label, (d_text, d_image) = task.text.device, task.label, (task.text.shape[1], task.images.shape[1])
    weight = torch.where(label >= 0, task.weight[label], 0)  # (all captions,)
    n, mean_text, mean_image = float(weight.sum()), weight @ task.text / weight.sum(), task.images.mean(0)
    count = torch.zeros(len(task.images), device=device).index_add_(0, label[task.captions], weight[task.captions])
    pooled = torch.zeros(len(task.images), d_text, device=device)  # captions of an image, summed
    covariance = torch.zeros(d_text, d_text, device=device)
    for captions in task.captions.split(8192):
        block = task.text[captions] - mean_text  # before the products, whose float32 a common offset would use up
        weighted = block * weight[captions].unsqueeze(1)
        covariance += block.T @ weighted / n
        pooled.index_add_(0, label[captions], weighted)
    cross = torch.zeros(d_text, d_image, device=device, dtype=torch.double)
    variance = torch.zeros(d_image, d_image, device=device, dtype=torch.double)
    for rows in torch.arange(len(task.images), device=device).split(4096):
        y = (task.images[rows] - mean_image).double()
        cross += pooled[rows].double().T @ y / n
        variance += (y * count[rows].unsqueeze(1)).T @ y / n
    covariance = covariance.double()
    ridge = knobs.ridge * covariance.diagonal().mean() * torch.eye(d_text, device=device)
    map_back = torch.linalg.solve(covariance + ridge, cross)
    explained = map_back.T @ cross
    scatter = variance - explained - explained.T + map_back.T @ covariance @ map_back  # of the residual
    floor = knobs.whiten * scatter.diagonal().mean() * torch.eye(d_image, device=device)
    query = torch.linalg.solve(scatter + floor, map_back.T).float()  # (d_image, d_text)
    if not query.isfinite().all():
        raise TrainingFailed("closed form: no finite solution; raise --set ridge or --set whiten")
    return {"map.weight": query, "map.bias": -query @ mean_text}


class GalleryLoss(torch.autograd.Function):
    """Cross-entropy (b,) of scaled queries (b, d) against a whole gallery (m, d), `block` rows at a time.

    The gallery is frozen, so the loss's gradient is known as soon as its softmax is: (softmax - one_hot) @ gallery.
    It is taken in the forward pass, so that no logits outlive their block and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, gallery: Tensor, label: Tensor, block: int) -> Tensor:
        gradient, loss = torch.empty_like(queries), queries.new_empty(len(queries))
        for start in range(0, len(queries), block):
            rows = slice(start, start + block)
            own = label[rows].unsqueeze(1)
            logits = queries[rows].to(gallery.dtype) @ gallery.T
            probability = torch.softmax(logits, dim=1)  # sums in float32 inside
            # The highest logit's probability is never too small for half precision: it gives log(sum(exp)).
            log_sum = logits.amax(1, keepdim=True).float() - probability.amax(1, keepdim=True).float().log()
            surprise = (log_sum - logits.gather(1, own).float()).clamp_min(0)
            loss[rows] = surprise.squeeze(1)
            # softmax - one_hot in two parts: near 1, half precision would lose what is left of the difference
            probability.scatter_(1, own, 0)
            gradient[rows] = probability @ gallery
            gradient[rows] += torch.expm1(-surprise) * gallery[label[rows]]
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(1), None, None, None


@dataclass
class Task:
    """The images that a phase trains on, as tensors on one device."""

    n_words: int  # of the vocabulary
    galleries: tuple[Tensor, Tensor]  # centred (raw, unit) images in the computing type
    text: Tensor  # (all captions, d_text) float32
    words: Tensor  # (all captions, WORDS_KEPT) int32
    captions: Tensor  # (n,) indices of the captions of these images
    sisters: Tensor  # (m, VIEWS) indices of each image's captions
    label: Tensor  # (all captions,) row in `images`; -1 for captions of other images
    images: Tensor  # (m, d_image) float32
    weight: Tensor  # (m,) of an image's captions in the loss

    @property
    def dtype(self) -> torch.dtype:
        return self.galleries[0].dtype


def softmax_loss(learner: Learner, query: Tensor, task: Task, label: Tensor) -> Tensor:
    """Cross-entropy over the training images: a share of the captions against raw lengths, the rest against unit."""
    knobs, galleries = learner.knobs, list(task.galleries)
    if 0 < knobs.gallery < len(task.images):  # other negatives at each step do for all of them, in half the time
        drawn = torch.rand(len(task.images), generator=learner.random, device=query.device)
        drawn[label] = 2.0  # the batch's own come first
        images = drawn.topk(min(len(drawn), max(knobs.gallery, len(label)))).indices
        galleries = [gallery[images] for gallery in galleries]
        place = torch.zeros(len(task.images), dtype=torch.long, device=query.device)
        place[images] = torch.arange(len(images), device=query.device)
        label = place[label]
    scale = learner.network.get_parameter("logit_scale").clamp(max=math.log(200)).exp()
    query = F.normalize(query, dim=1)
    cut = [round(knobs.raw_weight * len(label))]
    parts = zip(query.tensor_split(cut), scale, galleries, label.tensor_split(cut), strict=True)
    return torch.cat([GalleryLoss.apply(some * by, gallery, own, learner.block) for some, by, gallery, own in parts])


def triplet_loss(learner: Learner, query: Tensor, task: Task, label: Tensor) -> Tensor:
    """Hinge against the hardest other images of the batch, on raw dot products (after VSE++, Faghri et al. 2018)."""
    images, own = label.unique(return_inverse=True)
    gallery = task.galleries[0][images]
    scores = (F.normalize(query, dim=1).to(gallery.dtype) @ gallery.T).float()
    right = scores.gather(1, own.unsqueeze(1))
    others = scores.scatter(1, own.unsqueeze(1), -math.inf)
    count = min(learner.knobs.negatives, len(images) - 1)  # none in a batch of one image
    return F.relu(learner.knobs.margin + others.topk(count, dim=1).values - right).sum(dim=1) / max(1, count)


def cosine_loss(learner: Learner, query: Tensor, task: Task, label: Tensor) -> Tensor:
    """The original's: 1 - cosine to the own image."""
    return 1 - F.cosine_similarity(query, task.images[label], dim=1)


# Losses (b,) of predictions (b, d_image) for captions whose images are `label` (b,).
LOSSES: dict[str, Callable[..., Tensor]] = {"softmax": softmax_loss, "triplet": triplet_loss, "cosine": cosine_loss}


# --------------------------------------------------------------------------------- predicting and scoring
@torch.inference_mode()
def network_predictions(network: nn.Module, text: Tensor, words: Tensor, rows: int) -> np.ndarray:
    """Predictions (n, d_image) float32 of `network`, where it is, for text (n, d_text); `rows` at a time.

    In float32 whatever the training's type: it costs a second.
    """
    device = next(network.parameters()).device
    network.eval()
    blocks = zip(text.split(rows), words.split(rows), strict=True)
    return torch.cat([network(some.to(device), ids.to(device)).float().cpu() for some, ids in blocks]).numpy()


def products(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Dot products (..., n, m) of queries (..., n, d) and gallery (m, d).

    By torch: numpy's own threads take 50 times as long at small products while another process keeps the cores busy.
    """
    kind = np.result_type(queries, gallery)
    return (torch.from_numpy(queries.astype(kind)) @ torch.from_numpy(gallery.astype(kind)).T).numpy()


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., d) at length 1; zero stays zero."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)


def predict(
    bundle: dict[str, Any], text: np.ndarray, captions: list[str], device: torch.device | str = "cpu"
) -> np.ndarray:
    """Predicted image vectors (n, d_image) float32 of captions and their vectors (n, d_text).

    The weighted mean direction of the bundle's members at the mean length of the training images: a prediction's own
    length moves no rank.
    """
    d_text, d_image = bundle["dims"]
    if text.shape[1] != d_text:
        raise UserError(f"weights take {d_text}-d captions, the data has {text.shape[1]}-d ones; use the run's data")
    vocabulary, total = bundle["vocabulary"], np.zeros((len(text), d_image), np.float32)
    words = torch.from_numpy(word_ids(captions, vocabulary))
    for member in bundle["members"]:
        network = network_of(Knobs(**member["knobs"]), member["state"], (d_text, d_image, len(vocabulary))).to(device)
        output = network_predictions(network, torch.from_numpy(text), words, bundle["knobs"]["infer_batch"])
        total += np.float32(member["weight"]) * unit(output)
    return total * np.float32(bundle["length"])


def repel(predictions: np.ndarray, strength: float, length: float) -> np.ndarray:
    """Predictions (n, d) in the order of evaluation, each pushed off those of its pool that are most like it.

    A pool's captions belong to different images, so what two predictions share tells neither's image from the
    other's: p_i - strength * sum_j softmax_j(cos(p_i, p_j) / .1) p_j. It needs the captions of a pool alone, no image.
    """
    if not strength:
        return predictions
    pools = []
    for start in range(0, len(predictions), POOL):
        own = F.normalize(torch.from_numpy(predictions[start : start + POOL]), dim=1)
        likeness = (own @ own.T / 0.1).fill_diagonal_(-math.inf)
        pushed = own - strength * likeness.softmax(dim=1).nan_to_num() @ own
        pools.append(F.normalize(pushed, dim=1).numpy() * np.float32(length))
    return np.concatenate(pools)


def true_ranks(
    predictions: np.ndarray, gallery: np.ndarray, pool: int | None = POOL, cosine: bool = False
) -> np.ndarray:
    """1-based rank of each query's own image (query i, gallery row i) in consecutive pools; None: the whole gallery.

    Scores are raw dot products, as in the official code; `cosine` gives images unit length (the length of a
    prediction moves no rank). A tie counts against the query, so a constant prediction earns nothing.
    """
    if not np.isfinite(predictions).all():
        raise ValueError("predictions hold NaN or infinity")
    gallery = unit(gallery) if cosine else gallery
    size, ranks = pool or len(gallery), []
    for start in range(0, len(gallery), size):
        scores = products(predictions[start : start + size], gallery[start : start + size])
        ranks.append((scores >= scores.diagonal()[:, None]).sum(axis=1))
    return np.concatenate(ranks)


def reciprocal_ranks(ranks: np.ndarray, pool: int | None) -> np.ndarray:
    """1/rank; in pools only the first 99 ranks count, as in the official code."""
    return np.where(ranks <= (TOP if pool else np.inf), 1 / ranks, 0.0)


def retrieval_metrics(
    predictions: np.ndarray, gallery: np.ndarray, pool: int | None = POOL, cosine: bool = False
) -> dict[str, float]:
    """The official numbers for predictions (m, d), or several views of them (views, m, d), against gallery (m, d).

    MRR with its standard error over images, Recall@k, NDCG and the mean L2 distance.
    """
    views = predictions.reshape(-1, *gallery.shape)
    ranks = np.stack([true_ranks(view, gallery, pool, cosine) for view in views])
    gains = reciprocal_ranks(ranks, pool)
    return {
        "mrr": float(gains.mean()),
        "mrr_se": float(gains.mean(axis=0).std(ddof=1) / math.sqrt(gains.shape[1])),
        **{f"recall@{k}": float((ranks <= k).mean()) for k in (1, 3, 5, 10, 50)},
        "ndcg": float(np.where(gains > 0, 1 / np.log2(ranks + 1), 0).mean()),
        "l2": float(np.mean([np.linalg.norm(view - gallery, axis=1).mean() for view in views])),
    }


def evaluate(predictions: np.ndarray, gallery: np.ndarray) -> dict[str, dict[str, float]]:
    """The three tables for predictions (views, m, d) against m images: pools raw and cosine, whole gallery cosine."""
    tables = {"pool100_raw": (POOL, False), "pool100_cosine": (POOL, True), "full_cosine": (None, True)}
    return {name: retrieval_metrics(predictions, gallery, pool, cosine) for name, (pool, cosine) in tables.items()}


@dataclass
class Blend:
    """How members are averaged, and validation's honest word on it."""

    weights: np.ndarray  # (k,), sum 1
    repulsion: float
    predictions: np.ndarray  # (views, m, d): each image's by what was chosen on the other half of the images
    tables: dict[str, dict[str, float]]  # of these
    chosen: bool  # weights were chosen; else they are the priors
    prior_mrr: float  # of the priors, before repulsion
    chosen_mrr: float  # of chosen weights: of each image by those of the other half

    @property
    def mrr(self) -> float:
        return self.tables["pool100_raw"]["mrr"]


def choose_blend(members: list[np.ndarray], images: np.ndarray, repulsion: float, priors: list[float]) -> Blend:
    """Weights and repulsion (none, half or all of it) by pool-100 raw MRR, for each member's predictions (views, m, d).

    Weights come from greedy forward selection with replacement (Caruana et al. 2004), unless that gains less than its
    standard error over weights in proportion to `priors`. What is chosen on one half of the pools is measured on the
    other, both ways: the figure owes nothing to the choice.
    """
    leads = np.stack([pool_leads(unit(one), images) for one in members])
    pool = np.arange(len(images)) // POOL
    half = pool % 2 if pool[-1] else np.arange(len(images)) % 2  # a single pool is halved by its queries
    fitted = [greedy_weights(leads[:, :, half == side]) for side in (0, 1)]
    prior = np.array(priors, np.float32) / (sum(priors) or math.inf)
    crossed = np.where(half == 1, *(mean_gains(np.tensordot(one, leads, 1)) for one in fitted))
    gain = crossed - mean_gains(np.tensordot(prior, leads, 1))
    chosen = gain.mean() > gain.std(ddof=1) / math.sqrt(len(gain)) or not prior.any()

    weights = [*fitted, greedy_weights(leads)] if chosen else [prior]
    strengths = (0.0, repulsion / 2, repulsion)
    options = [[repelled_mean(members, one, strength, images) for strength in strengths] for one in weights]
    gains = [[mean_gains(pool_leads(one, images)) for one in repelled] for repelled in options]
    first, second, last = (0, 1, 2) if chosen else (0, 0, 0)  # fitted on one half, on the other, on all

    def best_of(fit: int, asked: np.ndarray) -> int:
        """Which strength is the best with some weights, for some of the images."""
        return int(np.argmax([gain[asked].mean() for gain in gains[fit]]))

    by_first, by_second = options[first][best_of(first, half == 0)], options[second][best_of(second, half == 1)]
    honest = np.where((half == 1)[:, None], by_first, by_second)
    strength = strengths[best_of(last, half >= 0)]
    priors_mrr, chosen_mrr = float((crossed - gain).mean()), float(crossed.mean())
    return Blend(weights[last], strength, honest, evaluate(honest, images), chosen, priors_mrr, chosen_mrr)


def repelled_mean(members: list[np.ndarray], weights: np.ndarray, strength: float, images: np.ndarray) -> np.ndarray:
    """Members' predictions (views, m, d) averaged as directions, at the images' mean length, and repelled in pools."""
    length = float(np.linalg.norm(images, axis=1).mean())
    mean = np.zeros_like(members[0])
    for one, weight in zip(members, weights, strict=True):  # one at a time: forty are gigabytes at the full size
        if weight:
            mean += unit(one) * np.float32(weight * length)
    return np.stack([repel(view, strength, length) for view in mean])


def pool_leads(predictions: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(views, m, pool): by how much each image of a query's pool scores above its own, raw; linear in predictions."""
    size = min(POOL, len(images))
    leads = np.empty((*predictions.shape[:2], size), np.float32)
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        scores = products(predictions[:, rows], images[rows])
        leads[:, rows] = scores - np.diagonal(scores, axis1=1, axis2=2)[:, :, None]
    return leads


def mean_gains(leads: np.ndarray) -> np.ndarray:
    """Reciprocal rank (m,) of each image, the mean over its views, from leads (views, m, pool)."""
    return reciprocal_ranks((leads >= 0).sum(axis=-1), POOL).mean(axis=0)


def greedy_weights(leads: np.ndarray, rounds: int = 10) -> np.ndarray:
    """Weights (k,) float32 by adding, round for round, the member whose addition helps most, as long as it helps."""
    votes, total, best = np.zeros(len(leads), np.float32), np.zeros_like(leads[0]), -1.0
    for _ in range(rounds):
        gains = [mean_gains(total + one).mean() for one in leads]
        if max(gains) <= best:
            break
        winner, best = int(np.argmax(gains)), max(gains)
        votes[winner] += 1
        total = total + leads[winner]
    return votes / votes.sum()


# ----------------------------------------------------------------------------------- training one network
@dataclass
class Training:
    """How far a candidate's training in one phase has come; it is over when there are weights. Saved as it is."""

    lr: float  # the candidate's, or half of it where the loss was no number
    step: int = 0
    epochs: float = 0.0  # counted at the end: fewer than planned where time was short
    seconds: float = 0.0
    watched: float = 0.0  # of these seconds, what validating and named checkpoints took
    loss_sum: float = 0.0  # of the epoch's steps
    history: list[dict[str, Any]] = field(default_factory=list)  # rows of the training log
    weights: dict[str, Tensor] = field(default_factory=dict)  # on the CPU


def read_state(path: Path, device: str = "") -> dict[str, Any]:
    """What a network's training can go on from on this kind of device; nothing where the file is of no use."""
    if not path.exists():
        return {}
    try:
        state = load_torch(path)
        state["at"] = Training(**state["at"])
        if device and state.get("device", device) != device:
            raise ValueError("it is of another kind of device, whose random numbers differ")
    except (UserError, KeyError, TypeError, ValueError) as error:  # a new start is as good
        log(f"{path.name}: not usable ({first_line(error)}); this network starts anew")
        return {}
    return state


def make_task(problem: Problem, phase: str, knobs: Knobs, device: torch.device, dtype: torch.dtype) -> Task:
    """The task of matching the captions of a phase's images to them, as tensors on `device`."""
    train, images = problem.train, problem.images_of(phase, knobs.pairs)
    position = torch.full((len(train.images),), -1)
    position[torch.from_numpy(images)] = torch.arange(len(images))
    label = position[torch.from_numpy(train.image_of)]
    captions = (label >= 0).nonzero().squeeze(1)
    sisters = torch.from_numpy(caption_views(train.image_of, images).T.copy())
    vectors = torch.from_numpy(train.images[images])
    weight = torch.from_numpy(np.where(images < train.own, 1, knobs.pairs_weight).astype(np.float32))
    # A vector taken off the whole gallery moves no rank and no gradient, and spares the logits' precision.
    lengths = vectors.norm(dim=1, keepdim=True)
    raw = ((vectors - vectors.mean(0)) / lengths.mean()).to(device, dtype)
    unit_length = vectors / lengths.clamp_min(1e-12)
    unit_length = unit_length.sub_(unit_length.mean(0)).to(device, dtype)
    tensors = (torch.from_numpy(train.text), torch.from_numpy(problem.words), captions, sisters, label, vectors, weight)
    return Task(len(problem.vocabulary), (raw, unit_length), *(tensor.to(device) for tensor in tensors))


def seed_of(*words: object) -> int:
    """A seed of its own for whatever the words name."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, words)).encode()).digest()[:7], "big")


def batch_size(knobs: Knobs, captions: int) -> int:
    """Captions a step: small data gets smaller batches, so that it gets as many updates."""
    return max(1, min(knobs.batch, captions * knobs.epochs // max(1, knobs.min_steps)))


def epoch_batches(task: Task, knobs: Knobs, seed: int) -> tuple[Tensor, ...]:
    """An epoch's captions in random order, a batch at a time; for triplets whole images, so that sisters meet."""
    size, random = batch_size(knobs, len(task.captions)), torch.Generator().manual_seed(seed)
    if knobs.loss == "triplet":
        order = torch.randperm(len(task.sisters), generator=random).to(task.sisters.device)
        return tuple(task.sisters[images].flatten() for images in order.split(max(2, size // VIEWS)))
    order = torch.randperm(len(task.captions), generator=random).to(task.captions.device)
    return task.captions[order].split(size)


def learning_rate(lr: float, schedule: str, step: int, progress: float) -> float:
    """A warm-up to `lr` over 200 steps or a tenth of the training, then a cosine to zero; or constant."""
    if schedule == "constant":
        return lr
    warm_up = max((step + 1) / 200, 10 * progress)
    return lr * min(warm_up, 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class Diverged(Exception):
    """The loss or a weight is no number."""

    lr: float


class Learner:
    """A network and all that its next step depends on."""

    def __init__(self, name: str, knobs: Knobs, task: Task) -> None:
        self.knobs, self.block = knobs, knobs.logit_block  # rows of logits held at once
        self.random = torch.Generator(task.text.device).manual_seed(seed_of(knobs.seed, name))  # weights and dropout
        dims = (task.text.shape[1], task.images.shape[1], task.n_words)
        centre = (task.label >= 0).float() @ task.text / len(task.captions)  # a mean without a copy of the captions
        self.network = build_network(dims, knobs, centre, self.random)
        table = [weights for key, weights in self.network.named_parameters() if key.startswith("words.table")]
        others = [weights for key, weights in self.network.named_parameters() if not key.startswith("words.table")]
        groups = [{"params": others, "rate": 1.0}, {"params": table, "rate": knobs.word_rate}][: 1 + len(table)]
        kind = torch.optim.AdamW if knobs.weight_decay else torch.optim.Adam
        self.optimizer = kind(groups, knobs.lr, weight_decay=knobs.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(self.random.device.type, enabled=task.dtype == torch.float16)

    def state(self, at: Training) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("network", "optimizer", "scaler")}
        return {"at": vars(at), "random": self.random.get_state(), "device": self.random.device.type, **parts}

    def take_up(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():  # the state may come from a card of another number type
            self.scaler.load_state_dict(state["scaler"])
        self.random.set_state(state["random"])

    def forget_failed_step(self) -> None:
        """Take away what a step that ended anywhere, even within the optimiser, has left half done."""
        scale, enabled = self.scaler.get_scale(), self.scaler.is_enabled()
        self.scaler = torch.amp.GradScaler(self.random.device.type, scale, enabled=enabled)
        for lent in ("grad_scale", "found_inf"):  # by the scaler to the optimiser, for one step
            vars(self.optimizer).pop(lent, None)
        for moments in self.optimizer.state.values():
            if "exp_avg_sq" not in moments:  # memory ran out amid the first step's
                moments.clear()


def take_step(learner: Learner, task: Task, captions: Tensor) -> Tensor:
    """One step of the optimiser on a batch of captions; its loss, a tensor on the device."""
    learner.network.train()
    with torch.autocast(task.text.device.type, task.dtype, enabled=task.dtype != torch.float32):
        query = learner.network(task.text[captions], task.words[captions])
    label = task.label[captions]
    losses = LOSSES[learner.knobs.loss](learner, query.float(), task, label)
    loss = (losses * task.weight[label]).sum() / task.weight[label].sum()
    learner.optimizer.zero_grad(set_to_none=True)
    learner.scaler.scale(loss).backward()
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    return loss.detach()


def careful_step(learner: Learner, task: Task, captions: Tensor) -> Tensor:
    """`take_step`, again with half the block of logits for as long as memory runs out."""
    while True:
        try:
            return take_step(learner, task, captions)
        except RuntimeError as error:  # an illegal access, say, is no reason to try again
            failure = first_line(error)
            signs = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator", "out of memory")
            if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in signs):
                raise
        # Behind the handler, whose exception keeps the failed attempt's tensors alive.
        if learner.block <= 16:
            raise TrainingFailed(f"{failure}; lower --set hidden or --set batch")
        learner.block //= 2
        log(f"out of memory: logits in blocks of {learner.block} rows from here on")
        learner.forget_failed_step()


def train_network(
    name: str, knobs: Knobs, task: Task, allotted: float, state_file: Path, stop: Stop, watch: Callable[..., dict]
) -> Training:
    """Train one network to the end of its schedule: its epochs or `allotted` seconds from now, whichever ends first.

    The rate follows the larger share of the two, so that it ends at zero on any machine. `name` seeds weights, order
    and dropout; `watch(epoch, network, last)` gives what the epoch's row of the log has beside its loss. Raises
    Interrupted after a signal, its state saved; Diverged; TrainingFailed.
    """
    learner, at = Learner(name, knobs, task), Training(knobs.lr)
    steps = len(epoch_batches(task, knobs, 0))  # an epoch
    state = read_state(state_file, task.text.device.type)
    if state and not state["at"].weights:  # else it is of a training that is over
        learner.take_up(state)
        at = state["at"]
        log(f"{name}: going on from epoch {at.step // steps + 1}, step {at.step % steps}")
    log_row({column: column for column in LOG_COLUMNS})

    total, ends, batches = steps * knobs.epochs, at.seconds + max(allotted, 1e-9), None
    loss_sum = torch.tensor(at.loss_sum, device=task.text.device)
    clock = saved = time.monotonic()
    going = True
    while going:
        if stop.signal or clock - saved >= knobs.checkpoint_seconds:
            at.loss_sum, saved = float(loss_sum), clock
            save_torch(state_file, learner.state(at))
        if stop.signal:
            raise Interrupted
        if batches is None or at.step % steps == 0:
            batches = epoch_batches(task, knobs, seed_of(knobs.seed, name, at.step // steps))
        progress = max(at.step / total, at.seconds / ends)
        for group in learner.optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(at.lr, knobs.schedule, at.step, progress)
        loss = careful_step(learner, task, batches[at.step % steps])
        loss_sum += loss.nan_to_num(0, 0, 0) if learner.scaler.is_enabled() else loss  # a scaler leaves that step out
        at.step += 1
        if at.step % steps == 0:
            float(loss_sum)  # waits for a card: what is queued there is training, not the validation that follows
        at.seconds, clock = at.seconds + time.monotonic() - clock, time.monotonic()
        going = at.step < total and at.seconds < ends and stop.reason != BUDGET
        if going and at.step % steps:
            continue

        end_epoch(learner, at, loss_sum, steps, functools.partial(watch, last=not going))
        loss_sum.zero_()
        watched, clock = time.monotonic() - clock, time.monotonic()
        at.seconds, at.watched = at.seconds + watched, at.watched + watched
    refuse_skipped(name, learner, at.step)
    at.epochs = at.step / steps
    at.weights = {key: value.detach().cpu().clone() for key, value in learner.network.state_dict().items()}
    return at


def end_epoch(learner: Learner, at: Training, loss_sum: Tensor, steps: int, watch: Callable[..., dict]) -> None:
    """A row of the log for an epoch of so many steps, or for what the time allowed of the last one."""
    if not all(values.isfinite().all() for values in (loss_sum, *learner.network.parameters())):
        raise Diverged(at.lr)
    epoch = math.ceil(at.step / steps)
    row = {"epoch": epoch, "loss": float(loss_sum) / (at.step - (epoch - 1) * steps)}
    at.history.append(row | watch(epoch, learner.network))
    log_row(at.history[-1])


def refuse_skipped(name: str, learner: Learner, steps: int) -> None:
    """Say how many steps float16 left out for gradients beyond its range.

    Many are a failure: nothing would tell that of a refit, which no validation sees.
    """
    skipped = steps - max((int(state["step"]) for state in learner.optimizer.state.values()), default=0)
    if skipped:
        log(f"{name}: {skipped} of {steps} steps were left out: gradients beyond float16")
    if skipped > steps / 4:
        raise TrainingFailed(f"{name}: {skipped} of {steps} steps had no finite gradients; try --set dtype=float32")


def train_again_if_diverged(name: str, knobs: Knobs, state_file: Path, allotted: float, **others: Any) -> Training:
    """`train_network`; where the loss is no number, once more from the start at half the rate, in what time is left."""
    lr, until = knobs.lr, time.monotonic() + allotted
    while lr >= knobs.lr / 2:
        slower, left = dataclasses.replace(knobs, lr=lr), until - time.monotonic()
        try:
            return train_network(name, slower, allotted=left, state_file=state_file, **others)
        except Diverged as diverged:
            log(f"{name}: the loss is no number at lr={diverged.lr:g}")
            lr = diverged.lr / 2
            state_file.unlink(missing_ok=True)
    raise TrainingFailed(f"{name}: the loss is no number, at half the rate as well; try --set lr={lr:g}")


# ------------------------------------------------------------------------- the run: candidates and choice
@dataclass
class Problem:
    """The data of a run, and which of it is held out."""

    train: TrainSet
    test: TestSet
    vocabulary: list[str]
    words: np.ndarray  # (all captions, WORDS_KEPT) int32
    train_images: np.ndarray
    val_images: np.ndarray
    views: np.ndarray  # (VIEWS, m) captions of the validation images
    read: dict[str, Any]  # for the manifest: digests of what was read, what became of extra pairs

    @property
    def dims(self) -> Dims:
        return self.train.text.shape[1], self.train.images.shape[1], len(self.vocabulary)

    @property
    def val_vectors(self) -> np.ndarray:
        return self.train.images[self.val_images]

    def images_of(self, phase: str, pairs: bool) -> np.ndarray:
        """The images that a phase trains on: without validation's, or all, each with the extra ones or without."""
        own = self.train_images if phase == "validate" else np.arange(self.train.own)
        return np.concatenate([own, np.arange(self.train.own, len(self.train.images))]) if pairs else own


def make_problem(train: TrainSet, test: TestSet, knobs: Knobs, candidates: list[Knobs], pairs: list[Path]) -> Problem:
    """The run's data, with the extra pairs behind its own."""
    train_images, val_images = split_images(len(train.images), knobs.val_fraction, knobs.split_seed)
    train, facts = join_pairs(train, test, val_images, pairs)
    texts, vocabulary = train.captions, []
    if any(one.sees != "vector" for one in candidates):
        texts = cut_as_the_test(train.captions, test.captions, knobs.split_seed)
        log_texts(train.captions, test.captions, texts)
        seen = np.flatnonzero(~np.isin(train.image_of, val_images))
        vocabulary = make_vocabulary([texts[i] for i in seen], knobs.word_count)
    words, views = word_ids(texts, vocabulary), caption_views(train.image_of, val_images)
    return Problem(train, test, vocabulary, words, train_images, val_images, views, {"pairs": facts})


@dataclass(eq=False)
class Candidate:
    """A network of the recipe or of the search, how it was trained, and what validation says of it."""

    number: int
    knobs: Knobs
    drawn: bool = False  # by the search
    begun: set[str] = field(default_factory=set)  # the phases that are done, under way or left out
    trained: dict[str, Training] = field(default_factory=dict)  # by phase: "validate", then "refit" on all images
    predictions: np.ndarray = field(default_factory=lambda: np.empty(0))  # (views, m, d) for the validation captions
    figures: dict[str, float] = field(default_factory=dict)  # MRR of these by table
    weight: float = 0.0  # in the best blend

    @property
    def alone(self) -> float:
        """What it scores by itself, raw and cosine."""
        return (self.figures["pool100_raw"] + self.figures["pool100_cosine"]) / 2


def predictions_of(network: nn.Module, problem: Problem, rows: int) -> np.ndarray:
    """(views, m, d) for the validation captions."""
    captions = problem.views.ravel()
    text, words = torch.from_numpy(problem.train.text[captions]), torch.from_numpy(problem.words[captions])
    return network_predictions(network, text, words, rows).reshape(*problem.views.shape, -1)


def examine(candidate: Candidate, network: nn.Module, problem: Problem) -> None:
    """Ask validation about a candidate's network."""
    candidate.predictions = predictions_of(network, problem, candidate.knobs.infer_batch)
    tables = evaluate(candidate.predictions, problem.val_vectors)
    candidate.figures = {name: table["mrr"] for name, table in tables.items()}


def blend_of(candidates: list[Candidate], problem: Problem, repulsion: float) -> Blend:
    """The blend of all that is trained so far.

    What the search has drawn has a prior like the recipe's own, if alone it is about as good as the best that sees the
    same: a weak one pulls a mean down, and picking by what helps on these images would flatter.
    """
    priors = []
    for one in candidates:
        best = max(other.alone for other in candidates if other.knobs.sees == one.knobs.sees)
        priors.append(one.knobs.prior if not one.drawn or one.alone > best - 0.01 else 0.0)
    return choose_blend([one.predictions for one in candidates], problem.val_vectors, repulsion, priors)


ENOUGH = 0.8  # of its epochs, so that a network is worth its time
MANY = 6000  # photos from which on the first two networks, of two kinds, share the time with less
MOST = 40  # candidates to average: a search of hours draws hundreds, and memory, disk and judging grow with them
VAIN = 3  # draws in a row that fail: something else is wrong, and the search ends


@dataclass
class Job:
    """A training to be done: of what, in which phase, in how many seconds at most."""

    candidate: Candidate
    phase: str
    allotted: float
    since: float = field(default_factory=time.monotonic)


@dataclass
class Plan:
    """Which training comes next and in how much time, from what things were measured to cost."""

    candidates: list[Candidate]  # the recipe's, then those that the search draws, each at its number
    knobs: Knobs
    given: dict[str, Any]  # what the user set: no draw changes it
    problem: Problem
    machine: Machine
    stop: Stop
    judging: float = 0.5  # seconds that validating the last candidate took
    publishing: float = 0.5  # and the last submission
    running: dict[Future[Training], tuple[Job, torch.device]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    in_vain: int = 0  # draws in a row that failed

    @property
    def members(self) -> list[Candidate]:
        """Of the best blend, heaviest first."""
        return sorted((one for one in self.candidates if one.weight), key=lambda one: -one.weight)

    @property
    def waiting(self) -> list[Candidate]:
        return [one for one in self.candidates if "validate" not in one.begun]

    def next_job(self) -> Job | None:
        """A refit that is due, else the recipe's next candidate, else for `search` a drawn one."""
        if self.members and self.stop.signal:
            return None
        job = self.next_refit() or self.next_waiting() or self.next_draw()
        if job:
            job.candidate.begun.add(job.phase)
        return job

    def next_refit(self) -> Job | None:
        """Heaviest first. For a member that has no time for it, its validated weights go on predicting."""
        for one in self.due():
            one.begun.add("refit")
            if one.knobs.network == "linear" or 0.9 * self.refit_seconds(one) <= self.stop.left():
                return Job(one, "refit", self.stop.left())
            self.leave_out(f"refit of candidate {one.number}: no time for it; it predicts with its validated weights")
        return None

    def next_waiting(self) -> Job | None:
        """The recipe's next candidate, as long as there is a good part of its time, or a second, for it."""
        waiting = self.waiting
        if not waiting:
            return None
        first, share = waiting[0], self.share()
        seconds = min(share * self.training_seconds(first.knobs, refit=False), self.stop.left() - self.overhead())
        linear = first.knobs.network == "linear"
        if linear or share >= ENOUGH or seconds >= 1:
            if share < 1 and not linear:
                log(f"time budget: candidate {first.number} gets {seconds:.0f} s at most")
            return Job(first, "validate", seconds)
        for one in waiting:
            one.begun.add("validate")
            self.leave_out(f"candidate {one.number} ({describe(one.knobs, self.knobs)}): no time for it")
        return self.next_refit()

    def share(self) -> float:
        """What the next candidate gets of its epochs.

        Short of time, refits are given up first, for another network is worth more than a tenth more photos; then the
        last candidates, until the others have enough of their epochs. The more photos there are, the fewer epochs are
        enough for two kinds of networks to be better than one.
        """
        share, waiting = 0.0, self.waiting
        begun = len(networks_of(self.candidates)) - len(networks_of(waiting))
        many = max(1, len(self.problem.train_images) / MANY)
        for count, refit in [(len(waiting), True), *((k, False) for k in range(len(waiting), 0, -1))]:
            training = [max(1e-9, self.training_seconds(one.knobs, refit)) for one in waiting[:count]]
            share = (self.spare(refit) - count * self.overhead()) / sum(training)
            alone = (self.stop.left() - self.overhead()) / training[0]  # no second card makes a training shorter
            share = min(share, alone)
            pair = begun + count == 2 and not refit
            enough = ENOUGH / many**1.25 if pair else ENOUGH  # below the .21 that three minutes are for 25,000 photos
            if share >= enough:
                break
        return share

    def next_draw(self) -> Job | None:
        """Around a member of the best blend, while there is time for it and its refit."""
        members = self.members
        if self.knobs.recipe != "search" or not members or self.in_vain >= VAIN or self.knobs.network == "linear":
            return None
        number, tried = len(self.candidates), {one.knobs for one in self.candidates}
        draw = random.Random(seed_of(self.knobs.seed, "draw", number))
        bases = [one.knobs for one in members if one.knobs.network == "align"] or [self.knobs]
        for _ in range(20):  # what was tried before, or takes too long, is drawn anew
            knobs = draw_candidate(draw.choice(bases), self.given, self.problem, draw)
            needed = self.training_seconds(knobs, refit=True) + self.overhead()
            if knobs not in tried and needed <= min(self.spare(refit=True), self.stop.left()):
                self.candidates.append(Candidate(number, knobs, drawn=True))
                what = describe(knobs, self.knobs) or "the recipe's"
                log(f"candidate {number} is drawn: {what}")
                return Job(self.candidates[-1], "validate", self.stop.left() - self.overhead())
        return None

    def spare(self, refit: bool) -> float:
        """Seconds of all workers that neither running trainings nor, with `refit`, refits will need."""
        promised = sum(self.refit_seconds(one) for one in self.unrefitted() if refit)
        for job, _ in self.running.values():
            one, refitting = job.candidate, job.phase == "refit"
            seconds = self.refit_seconds(one) if refitting else self.training_seconds(one.knobs, refit)
            promised += max(0.0, seconds + self.overhead() - (time.monotonic() - job.since))
        return len(self.machine.devices) * self.stop.left() - promised

    def training_seconds(self, knobs: Knobs, refit: bool) -> float:
        """Of a candidate, with its refit or without; a closed form is over before a network has begun in earnest."""
        if knobs.network == "linear":
            return 0.0
        once = training_flop(knobs, self.problem) / self.machine.rate
        return once * (1 + self.refit_ratio(knobs)) if refit and self.knobs.refit else once

    def overhead(self) -> float:
        """Seconds of a candidate beside its training: validation, at its end and in a blend, and a submission."""
        return 2 * self.judging + self.publishing

    def refit_ratio(self, knobs: Knobs) -> float:
        """How much longer a training on all images takes."""
        return len(self.problem.images_of("refit", knobs.pairs)) / len(self.problem.images_of("validate", knobs.pairs))

    def refit_seconds(self, candidate: Candidate) -> float:
        validated = candidate.trained["validate"]
        epochs = refit_epochs(validated) / validated.epochs if validated.epochs else 1.0
        return validated.seconds * epochs * self.refit_ratio(candidate.knobs)

    def unrefitted(self) -> list[Candidate]:
        """The members whose refit is to come."""
        return [one for one in self.members if self.knobs.refit and "refit" not in one.begun]

    def due(self) -> list[Candidate]:
        """Those of them whose turn it is: a closed form's at once, a network's when no candidate waits."""
        waiting = self.waiting
        return [one for one in self.unrefitted() if not waiting or one.knobs.network == "linear"]

    def learn(self, candidate: Candidate) -> None:
        """Learn from a training how fast they are here."""
        trained, knobs = candidate.trained["validate"], candidate.knobs
        if trained.epochs and trained.seconds > trained.watched:
            flop = training_flop(knobs, self.problem) * trained.epochs / knobs.epochs
            self.machine.rate = flop / (trained.seconds - trained.watched)

    def leave_out(self, what: str) -> None:
        self.left_out.append(what)
        log(f"time budget: {what}")


def networks_of(candidates: list[Candidate]) -> list[Candidate]:
    return [one for one in candidates if one.knobs.network != "linear"]


def training_flop(knobs: Knobs, problem: Problem) -> float:
    """FLOP of a whole training without the validation images; the measure of how long it takes beside others."""
    images = len(problem.images_of("validate", knobs.pairs))
    captions = images * len(problem.train.captions) // len(problem.train.images)
    d_text, d_image, n_words = problem.dims
    width = {"vector": d_text, "words": knobs.word_width, "both": d_text + knobs.word_width}[knobs.sees]
    weights = knobs.hidden * (width * (2 if knobs.activation == "gate" else 1) + d_image) + knobs.skip * width * d_image
    table = 0 if knobs.sees == "vector" else n_words * knobs.word_width
    shown = min(images, knobs.gallery or images) if knobs.loss == "softmax" else 0
    # An optimiser's step takes a weight's time in memory: as long as some thousand operations on it.
    step = 1000 * (weights + table) / batch_size(knobs, captions)
    return float(captions * knobs.epochs * (6 * weights + 4 * shown * d_image + step))


def draw_candidate(base: Knobs, given: dict[str, Any], problem: Problem, draw: random.Random) -> Knobs:
    """`base` with two of its knobs drawn anew; what the user set stays."""
    free = [key for key in DRAWS if key not in given]
    keys = draw.sample(free, min(2, len(free)))
    changes = {key: draw.choice(DRAWS[key]) for key in keys}
    images = len(problem.images_of("refit", base.pairs))
    return with_epochs(dataclasses.replace(base, **{"epochs": 0, **changes, **given}), images)


def refit_epochs(validated: Training) -> int:
    """As many whole epochs as there was time for before."""
    return max(1, int(validated.epochs))


def fit_candidate(task: Task, knobs: Knobs) -> Training:
    """The closed form on a task."""
    start = time.monotonic()
    weights = {key: value.cpu() for key, value in fit_closed_form(task, knobs).items()}
    return Training(knobs.lr, seconds=time.monotonic() - start, weights=weights)


@dataclass(kw_only=True)
class Run(Plan):
    """A plan that is carried out: what validation has judged, the best blend of it, and the submission made of that."""

    folder: Folder
    earlier: float  # seconds of the runs that this one goes on from
    loaded: float  # seconds of reading
    judged: list[Candidate] = field(default_factory=list)  # by validation, and not dropped since
    best: Blend | None = None
    failures: list[str] = field(default_factory=list)
    submitted: bool = False  # whether what predicts now has predicted the submission
    predicting: float = 0.0  # seconds of all submissions

    def train(self, trained: list[Candidate]) -> None:
        """Train what the plan gives; whenever validation says that a blend is better, it becomes the submission.

        `trained`: by the run that this one goes on from, in the order in which that run judged them.
        """
        for candidate in trained:
            if self.stop.signal and (self.folder.path / MANIFEST).exists():
                self.best = None  # what that run has submitted is of all of them
                return
            self.judge(candidate)
        if self.best:
            self.publish()
        free = list(self.machine.devices)
        with ThreadPoolExecutor(len(free)) as pool:  # a thread each, which touches its job alone
            try:
                while True:
                    while free and (job := self.next_job()):
                        device = free.pop(0)
                        self.running[pool.submit(self.work, job, device)] = job, device
                    judged, seconds = [one.number for one in self.judged], self.earlier + run_seconds()
                    self.folder.write_index(self.machine, self.candidates, judged, seconds)
                    if not self.running:
                        return
                    for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                        job, device = self.running.pop(future)
                        free.append(device)
                        self.take(job, future)
            except BaseException:
                self.stop.signal = self.stop.signal or signal.SIGTERM  # what is being trained need not go on for hours
                raise

    def work(self, job: Job, device: torch.device) -> Training:
        """Train a job's candidate, from where an interrupted run left it."""
        candidate, name = job.candidate, f"{job.phase} {job.candidate.number}"
        knobs, state_file = candidate.knobs, self.folder.state(job.phase, candidate.number)
        if job.phase == "refit":
            knobs = dataclasses.replace(knobs, epochs=refit_epochs(candidate.trained["validate"]))
        try:
            task = make_task(self.problem, job.phase, knobs, device, self.machine.dtype)
            if knobs.network == "linear":
                trained = fit_candidate(task, knobs)
            else:
                watch = functools.partial(self.watch, job)
                others = {"task": task, "stop": self.stop, "watch": watch}
                trained = train_again_if_diverged(name, knobs, state_file, job.allotted, **others)
        except (RuntimeError, ValueError) as error:  # of torch.linalg too
            raise TrainingFailed(f"candidate {candidate.number}, {job.phase}: {first_line(error)}") from error
        save_torch(state_file, {"at": vars(trained)})
        return trained

    def watch(self, job: Job, epoch: int, network: nn.Module, last: bool) -> dict[str, Any]:
        """At an epoch's end: validation where it is due, of the first network the named checkpoint; its row's rest."""
        candidate, knobs = job.candidate, job.candidate.knobs
        row: dict[str, Any] = {"phase": job.phase, "candidate": candidate.number}
        if job.phase == "validate" and (last or epoch % knobs.eval_every == 0):
            examine(candidate, network, self.problem)
            row |= candidate.figures
        named = job.phase == "validate" and candidate is networks_of(self.candidates)[0]
        if named and epoch % knobs.checkpoint_every == 0:
            weights = {key: value.cpu() for key, value in network.state_dict().items()}
            bundle = make_bundle(self.problem, knobs, [member_of(knobs, weights, 1.0)], 0.0)
            save_torch(self.folder.path / CHECKPOINT.format(epoch), bundle)
        return row | {"seconds": round(self.earlier + run_seconds(), 2)}

    def take(self, job: Job, future: Future[Training]) -> None:
        """Take what a job has trained; publish, unless a better submission follows at once."""
        try:
            job.candidate.trained[job.phase] = future.result()
        except Interrupted:
            return
        except TrainingFailed as error:
            error.__traceback__ = error.__cause__ = error.__context__ = None  # they keep what failed in memory
            self.fail(job.candidate, error)
        else:
            if job.phase == "validate":
                self.judge(job.candidate)
            else:
                self.submitted = False
        soon = sum(map(self.refit_seconds, self.due()))
        if self.best and not self.submitted and not 0 < soon < 3 * self.stop.closing:
            self.publish()

    def judge(self, candidate: Candidate) -> None:
        """Ask validation about a candidate, alone and in a blend with the others."""
        start = time.monotonic()
        if not candidate.figures:  # a network's own last validation gave them
            try:
                weights = candidate.trained["validate"].weights
                network = network_of(candidate.knobs, weights, self.problem.dims).to(self.machine.devices[0])
                examine(candidate, network, self.problem)
            except (RuntimeError, ValueError) as error:  # out of memory, or numbers that are none
                self.fail(candidate, f"candidate {candidate.number}, predicting: {error}")
                return
        averaged = sorted([*self.strongest(), candidate], key=lambda one: one.number)
        self.judged.append(candidate)
        blend = blend_of(averaged, self.problem, self.knobs.repulsion)
        if self.best is None or blend.mrr > self.best.mrr:
            self.adopt(blend, averaged)
        else:
            figures = f"{blend.mrr:.4f}, the best so far {self.best.mrr:.4f}"
            log(f"candidate {candidate.number} does not help: a blend with it has {figures}")
        self.learn(candidate)
        self.drop_weakest()
        self.judging, self.in_vain = time.monotonic() - start, 0

    def adopt(self, blend: Blend, averaged: list[Candidate]) -> None:
        """Make a blend of these the best one."""
        self.best, self.submitted = blend, False
        for one in self.judged:
            one.weight = 0.0
        for one, weight in zip(averaged, blend.weights, strict=True):
            one.weight = float(weight)

    def strongest(self) -> list[Candidate]:
        """What is averaged with a new candidate: the recipe's own, then the best of what the search has drawn."""
        best_first = sorted(self.judged, key=lambda one: (one.drawn, -one.figures["pool100_raw"], -one.number))
        return best_first[:MOST]

    def drop_weakest(self) -> None:
        """Of more than are averaged, forget those that are in no blend."""
        strongest = self.strongest()
        for one in [one for one in self.judged if one not in strongest and not one.weight]:
            log(f"candidate {one.number} is dropped: the weakest of more than {MOST}")
            self.judged.remove(one)
            self.drop(one)

    def drop(self, candidate: Candidate) -> None:
        """Forget what a drawn candidate was trained to: without a state, a run that goes on leaves it out as well."""
        forgotten = Candidate(candidate.number, candidate.knobs, drawn=True, begun={"validate"})
        self.candidates[candidate.number] = forgotten
        for phase in PHASES:
            self.folder.state(phase, candidate.number).unlink(missing_ok=True)

    def fail(self, candidate: Candidate, error: object) -> None:
        """Note what went wrong; what the search has drawn may fail, only not time and again."""
        what = first_line(error)
        log(f"failed: {what}")
        self.in_vain += candidate.drawn
        tolerated = candidate.drawn and self.in_vain < VAIN
        (self.left_out if tolerated else self.failures).append(what)
        if candidate.drawn and candidate not in self.judged:
            self.drop(candidate)

    def publish(self, complete: bool = False) -> None:
        """Replace the submission and all that tells of it, together; the manifest, which vouches for it, comes last."""
        start, best, test = time.monotonic(), cast(Blend, self.best), self.problem.test
        with together(self.folder.path) as parts:
            if not self.submitted:
                final = self.bundle(best, "refit")
                save_torch(parts / FINAL_MODEL, final)
                save_torch(parts / VALIDATED_MODEL, self.bundle(best, "validate"))
                write_submission(parts / SUBMISSION, test.caption_ids, predicted(final, test, self.machine.devices[0]))
            self.predicting += time.monotonic() - start
            self.write_records(parts, best, complete)
        self.publishing = time.monotonic() - start
        at_once = len(self.machine.devices) + 1  # each card's last training may end with a publication, and the run
        self.stop.closing = max(self.stop.closing, at_once * self.publishing + 1.5)
        if not self.submitted:
            rows = f"{len(test.caption_ids)} rows, read back and checked"
            log(f"submission: {self.folder.path / SUBMISSION} ({rows}; {best.mrr:.4f} raw in validation)")
        self.submitted = True

    def bundle(self, best: Blend, phase: str) -> dict[str, Any]:
        """The best blend with the weights of a phase, as far as its members have come to that."""
        members = []
        for one in self.members:
            used = phase if phase in one.trained else "validate"
            members.append(member_of(one.knobs, one.trained[used].weights, one.weight, used == "refit"))
        return make_bundle(self.problem, self.knobs, members, best.repulsion)

    def write_records(self, parts: Path, best: Blend, complete: bool) -> None:
        """The training log, at the end its picture, metrics.json and the manifest."""
        rows = [row for phase in PHASES for one in self.trainings(phase) for row in one.history]
        table = pd.DataFrame(rows, columns=list(LOG_COLUMNS))
        table.to_csv(parts / TRAINING_LOG, index=False)
        if complete and rows:
            linear = [one.figures["pool100_raw"] for one in self.judged if one.knobs.network == "linear"]
            levels = dict(zip(("the blend", "closed form"), (best.mrr, *linear), strict=False))
            draw_curves(parts / CURVES, table, [one.number for one in self.members], levels)

        facts: dict[str, Any] = {
            "recipe": self.knobs.recipe,
            "device": self.machine.name,
            "dtype": self.machine.dtype_name,
            "repulsion": best.repulsion,
            "seconds": {part: round(took, 2) for part, took in self.seconds().items()},
        }
        write_json(parts / METRICS, facts | self.metrics(best))
        keys = ("candidate", "knobs", "weight", "refitted")
        facts["predicted_by"] = [{key: one[key] for key in keys} for one in members_of(self.members, self.knobs)]
        stopped = "" if complete and self.stop.signal else self.stop.reason  # a signal now comes too late
        facts |= {"stopped": stopped, "knobs": dataclasses.asdict(self.knobs), **self.problem.read}
        write_manifest(parts, self.folder.path, complete, facts)

    def trainings(self, phase: str) -> list[Training]:
        return [one.trained[phase] for one in self.judged if phase in one.trained]

    def seconds(self) -> dict[str, float]:
        """Where the time went, of all parts of a resumed run."""
        train, refit = (sum(one.seconds for one in self.trainings(phase)) for phase in PHASES)
        parts = {"load": self.loaded, "train": train, "refit": refit, "predict": self.predicting}
        return parts | {"total": self.earlier + run_seconds()}

    def metrics(self, best: Blend) -> dict[str, Any]:
        """What metrics.json has beside the facts that the manifest has, too."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "validation": best.tables,
            "pool": min(POOL, len(self.problem.val_images)),
            "weights": "chosen" if best.chosen else "prior",
            "members": members_of(self.judged, self.knobs),
            "left_out": self.left_out,
            "failures": self.failures,
            "validate_seconds": round(sum(one.watched for one in self.trainings("validate")), 4),
            "peak_rss_bytes": peak * (1 if sys.platform == "darwin" else 1024),
            "peak_device_bytes": sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))),
        }

    def end(self) -> int:
        """The last publication; the exit code. Raises TrainingFailed where something went wrong."""
        stopped = self.stop.signal  # asked once: a signal during the last publication comes too late
        if self.best:
            log_report(self.best, self.judged, self.knobs, self.problem)
            self.publish(complete=not self.failures and not stopped)
        if stopped:  # Kaggle mounts no output of a failed run, so there a valid submission counts
            log(f"stopped by {self.stop.reason}; the same settings and output folder go on from here")
            submitted = (self.folder.path / SUBMISSION).exists()
            return 0 if submitted and "KAGGLE_KERNEL_RUN_TYPE" in os.environ else 128 + stopped
        if not self.best:
            raise TrainingFailed("; ".join(self.failures) or "no candidate fits the time; raise --set max_minutes")
        if self.failures:
            raise TrainingFailed(f"{'; '.join(self.failures)}; the submission is of the other candidates")
        self.folder.forget()
        log(f"done in {run_seconds():.1f} s; outputs in {self.folder.path}")
        return 0


# ------------------------------------------------------------------------------ weights and submission
def member_of(knobs: Knobs, weights: dict[str, Tensor], weight: float, refitted: bool = False) -> dict[str, Any]:
    return {"knobs": dataclasses.asdict(knobs), "state": weights, "weight": weight, "refitted": refitted}


def make_bundle(problem: Problem, knobs: Knobs, members: list[dict[str, Any]], repulsion: float) -> dict[str, Any]:
    """What is needed, with this script, to predict: knobs, dimensions and the weights of every member."""
    return {
        "knobs": dataclasses.asdict(knobs),
        "dims": list(problem.dims[:2]),
        "vocabulary": problem.vocabulary,
        "length": float(np.linalg.norm(problem.train.images[: problem.train.own], axis=1).mean()),
        "repulsion": repulsion,
        "val_images": [problem.train.image_names[i] for i in problem.val_images],
        "members": members,
    }


def network_of(knobs: Knobs, weights: dict[str, Tensor], dims: Dims) -> nn.Module:
    """A network with these weights."""
    with torch.device("meta"):  # no memory and no time for initial weights, whatever a damaged file claims
        network = NETWORKS[knobs.network](dims, knobs)
    network.load_state_dict(weights, assign=True)
    return network


def load_torch(path: Path) -> dict[str, Any]:
    """A dictionary of tensors and plain values; never code (weights_only)."""
    with reading(path, "the weights file", "fetch it again"):
        with zipfile.ZipFile(path) as archive:  # torch checks no checksum: a flipped bit would be a silent weight
            if name := archive.testzip():
                raise ValueError(f"wrong checksum of {name}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("it holds no dictionary")
    return content


def load_weights(path: Path) -> dict[str, Any]:
    """A bundle written by `make_bundle`, checked as far as to predict with it."""
    bundle = load_torch(path)
    with reading(path, "the weights of this script", "fetch them again"):  # any mixture of wrong keys, types and shapes
        bundle["knobs"]["recipe"], bundle["knobs"]["split_seed"], list(bundle["val_images"])
        tried = predict(bundle, np.zeros((1, bundle["dims"][0]), np.float32), [""])
        if not np.isfinite(repel(tried, bundle["repulsion"], bundle["length"])).all():
            raise ValueError("they predict NaN or infinity")
    return bundle


def predicted(bundle: dict[str, Any], test: TestSet, device: torch.device) -> np.ndarray:
    """What is submitted for the test captions."""
    try:
        predictions = predict(bundle, test.text, test.captions, device)
    except RuntimeError as error:  # memory, above all
        if device.type == "cpu":
            raise TrainingFailed(f"predicting: {first_line(error)}; lower --set infer_batch") from error
        log(f"predicting: {first_line(error)}; on the CPU then")
        predictions = predict(bundle, test.text, test.captions, torch.device("cpu"))
    return repel(predictions, bundle["repulsion"], bundle["length"])


def write_submission(path: Path, ids: np.ndarray, predictions: np.ndarray) -> None:
    """The competition's csv, read back and checked before it takes its place; six digits keep every rank."""
    if not np.isfinite(predictions).all():
        raise UserError(f"{path}: not written: predictions hold NaN or infinity; get the weights again")
    pattern = ", ".join(["%.6g"] * predictions.shape[1])
    with atomic(path) as part:
        with part.open("w", encoding="utf-8") as file:
            file.write("id,embedding\n")
            for number, row in zip(ids, predictions.tolist(), strict=True):
                file.write(f'{number},"[{pattern % tuple(row)}]"\n')
        check_submission(part, ids, predictions.shape[1])


def check_submission(path: Path, ids: np.ndarray, dim: int) -> None:
    """Re-read a submission; raises UserError on a wrong header, id, dimension or value."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            csv.field_size_limit(1 << 24)
            check_rows(path, csv.reader(file), ids, dim)
    except (OSError, ValueError, OverflowError, csv.Error, RecursionError) as error:
        raise UserError(f"{path}: not a readable submission ({str(error)[:100]})") from error


def check_rows(path: Path, reader: Iterator[list[str]], ids: np.ndarray, dim: int) -> None:
    header = next(reader, [])
    if header != ["id", "embedding"]:
        raise UserError(f"{path}: header is '{','.join(header)[:60]}', expected 'id,embedding'")
    first, varies = None, False
    for row, (number, cells) in enumerate(itertools.zip_longest(ids, reader), 1):
        if cells is None:
            raise UserError(f"{path}: {row - 1} rows, expected {len(ids)}; the first missing id is {number}")
        if number is None:
            raise UserError(f"{path}: more than {len(ids)} rows")
        if len(cells) != 2 or cells[0] != str(number):
            found = ",".join(cells)[:40]
            raise UserError(f"{path}: row {row}: expected id {number} and one quoted list, found '{found}'")
        try:
            values = json.loads(cells[1])
        except ValueError:  # it is cut, say
            values = None
        if not isinstance(values, list) or len(values) != dim:
            raise UserError(f"{path}: row {row} (id {number}): expected a list of {dim} numbers")
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            raise UserError(f"{path}: row {row} (id {number}): NaN, infinity or no number")
        first = first or values
        varies |= values != first
    if not varies and len(ids) > 1:
        raise UserError(f"{path}: all predictions are equal")


# --------------------------------------------------------------------------- the output folder, records
@dataclass
class Folder:
    """The output folder, with the states that an interrupted run goes on from."""

    path: Path
    knobs: Knobs  # of the run
    fingerprint: str  # of data and knobs: the states beside an index of another one don't count

    def state(self, phase: str, number: int) -> Path:
        return self.path / RESUME_STATE.format(phase, number)

    def take_up(self, candidates: list[Candidate], judged: list[int]) -> list[Candidate]:
        """Give candidates what an interrupted run had trained; these, in the order in which it judged them.

        Several cards finish in an order of their own, and which blend was the best so far depends on that.
        """
        for one in candidates:
            for phase in PHASES:
                state = read_state(self.state(phase, one.number))
                if not state or not state["at"].weights:
                    break
                one.trained[phase] = state["at"]
            one.begun = {*one.trained}
            if one.drawn and not self.state("validate", one.number).exists():
                one.begun.add("validate")  # the search has dropped it
        place = {number: k for k, number in enumerate(judged)}
        return sorted((one for one in candidates if one.trained), key=lambda one: place.get(one.number, len(place)))

    def write_index(self, machine: Machine, candidates: list[Candidate], judged: list[int], seconds: float) -> None:
        """What a run that goes on from here needs to know before it reads a state."""
        content: dict[str, Any] = {"fingerprint": self.fingerprint, "knobs": fixed(self.knobs), "seconds": seconds}
        content |= {"device": machine.devices[0].type, "dtype": machine.dtype_name}
        content["drawn"] = [dataclasses.asdict(one.knobs) for one in candidates if one.drawn]
        content["judged"] = judged
        with atomic(self.path / RESUME_RUN) as part:
            write_json(part, content)

    def read_index(self, source: Path) -> dict[str, Any]:
        """The index of an unfinished run here or below the input root, whose states are then copied here; or {}."""
        own = self.path / RESUME_RUN
        found = [own] if own.exists() else files_below(source, RESUME_RUN)
        for path in found:
            with reading(path, "the state of an unfinished run", "delete resume_* there to start anew"):
                index = json.loads(path.read_text(encoding="utf-8"))
                index["drawn"] = [Knobs(**one) for one in index["drawn"]]
                there = describe(dataclasses.replace(self.knobs, **index["knobs"]), self.knobs)
                index["judged"] = [*map(int, index["judged"])]
                index["fingerprint"], DTYPES[index["dtype"]], index["device"], float(index["seconds"])
            if index["fingerprint"] == self.fingerprint:
                if path != own:
                    clear(self.path)
                    self.forget()
                    for state in [*path.parent.glob("resume_*_*"), path]:  # the index last: it makes them count
                        shutil.copyfile(state, self.path / state.name)
                return index
        if found:
            anew = "delete resume_* there to start anew" + (", or choose another --output" if found == [own] else "")
            other = f"other knobs (there {there})" if there else "other data"
            raise UserError(f"{path.parent}: holds an unfinished run of {other}; {anew}")
        return {}

    def forget(self) -> None:
        """A complete run has nothing to go on from; the index goes first: without it no state counts."""
        for state in [self.path / RESUME_RUN, *self.path.glob("resume_*")]:
            state.unlink(missing_ok=True)


def output_files(folder: Path) -> list[Path]:
    """What a run has left in `folder` so far, less the manifest that lists it."""
    names = (SUBMISSION, METRICS, FINAL_MODEL, VALIDATED_MODEL, TRAINING_LOG, CURVES)
    return [*filter(Path.exists, map(folder.joinpath, names)), *folder.glob(CHECKPOINT.format("*"))]


def clear(folder: Path) -> None:
    """Take away what an earlier run left, the manifest first: old and new files never lie side by side."""
    for old in [folder / MANIFEST, *output_files(folder)]:
        old.unlink(missing_ok=True)


def write_manifest(parts: Path, folder: Path, complete: bool, facts: dict[str, Any]) -> None:
    """sha256 and size of every output beside what made it."""
    outputs = {path.name: path for place in (folder, parts) for path in output_files(place)}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    listed = {name: file_facts(path) for name, path in sorted(outputs.items())}
    write_json(parts / MANIFEST, {"complete": complete, "versions": versions, **facts, "outputs": listed})


def members_of(candidates: list[Candidate], knobs: Knobs) -> list[dict[str, Any]]:
    """Of each candidate: what it is, its weight in the blend, how it was trained and what it scores alone."""
    members = []
    for one in candidates:
        trained, facts = one.trained["validate"], dict[str, Any](candidate=one.number)
        facts |= {"knobs": describe(one.knobs, knobs) or "the recipe's", "weight": one.weight}
        facts |= {"refitted": "refit" in one.trained, "epochs": round(trained.epochs, 2)}
        members.append(facts | {"seconds": round(trained.seconds, 2)} | one.figures)
    return members


LOG_COLUMNS = ("phase", "candidate", "epoch", "loss", "pool100_raw", "pool100_cosine", "full_cosine", "seconds")


def log_row(row: dict[str, Any]) -> None:
    """One line of the training table."""
    cells = [row.get(column, "") for column in LOG_COLUMNS]
    texts = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
    log("  ".join(text.rjust(max(9, len(column))) for column, text in zip(LOG_COLUMNS, texts, strict=True)))


def log_report(best: Blend, candidates: list[Candidate], knobs: Knobs, problem: Problem) -> None:
    """The validation table, and every candidate beside the blend."""
    images = len(problem.val_images)
    pool = min(POOL, images)
    log(f"\nvalidation on {images} unseen images, {VIEWS} captions each, pools of {pool}")
    tables = pd.DataFrame(best.tables).T.rename(lambda name: name.replace("100", str(pool)))
    log(tables.to_string(float_format="%.4f"))
    members = pd.DataFrame(members_of(candidates, knobs))
    members.columns = [name.removeprefix("pool100_") for name in members]
    what = members.pop("knobs")
    log("\nevery candidate alone, without repulsion, and its weight in the blend")
    log(members.to_string(index=False, float_format="%.4g"))
    for number, knobs_of_it in zip(members["candidate"], what, strict=True):
        log(f"candidate {number}: {knobs_of_it}")
    kind = "chosen" if best.chosen else "the priors: choosing gains less than its error"
    log(f"weights {kind}; repulsion {best.repulsion:g} of up to {knobs.repulsion:g}")
    without = [one for one in candidates if not one.knobs.pairs]
    if knobs.pairs_compare and without:
        raw, cosine, _ = (table["mrr"] for table in blend_of(without, problem, knobs.repulsion).tables.values())
        log(f"without extra pairs: raw {raw:.4f}, cosine {cosine:.4f}")
    log("")


def draw_curves(path: Path, table: pd.DataFrame, members: list[int], levels: dict[str, float]) -> None:
    """Loss and validation MRR by epoch, a line a network and phase, the ten heaviest named; across it named `levels`.

    A loss is drawn beside that of its first epoch: those of two kinds have no scale in common.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    colours = {number: f"C{k}" for k, number in enumerate(members[:10])}
    for (phase, number), rows in table.groupby(["phase", "candidate"]):
        tested, colour = rows.dropna(subset="pool100_raw"), colours.get(number, "lightgrey")
        style, name = "-" if phase == "validate" else ":", f"candidate {number}" if number in colours else "others"
        left.plot(rows["epoch"], rows["loss"] / rows["loss"].iloc[0], style, color=colour, label=name)
        right.plot(tested["epoch"], tested["pool100_raw"], "o-", color=colour, label=name)
        right.plot(tested["epoch"], tested["pool100_cosine"], "s--", color=colour, alpha=0.5)
    for (name, mrr), style in zip(levels.items(), ("-", "-."), strict=False):
        right.axhline(mrr, color="black", linestyle=style, label=f"{name}: {mrr:.3f}")
    left.set(xlabel="epoch", ylabel="loss / first epoch's", title="Training loss; dotted: the refit on all photos")
    right.set(xlabel="epoch", ylabel="MRR in pools", title="Validation on unseen images: raw, and cosine dashed")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        lines = {text: line for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        axes.legend(lines.values(), lines, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


# -------------------------------------------------------------------------- machine, signals and files
def first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def run_seconds() -> float:
    return time.monotonic() - STARTED


def log(text: str) -> None:
    """One plain line at once: Kaggle's log and `run_local.py` read line by line."""
    try:
        print(f"{text}\n", end="", flush=True)  # in one piece, beside the lines of other threads
    except BrokenPipeError:  # who read the log is gone; the run goes on
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115


@dataclass
class Machine:
    """What networks are trained on."""

    devices: list[torch.device]  # one worker each
    dtype: torch.dtype
    rate: float  # of training, FLOP/s of one worker: a guess, until one was timed

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        first = self.devices[0]
        return torch.cuda.get_device_name(first) if first.type == "cuda" else "cpu"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_machine(knobs: Knobs, index: dict[str, Any]) -> Machine:
    """Device, number type and workers; a run that goes on from `index` keeps a CPU's type, whose timing may differ."""
    device = choose_device(knobs)
    kept = device.type == "cpu" and index.get("device") == "cpu" and knobs.dtype == "auto"
    dtype = choose_dtype(device, index["dtype"] if kept else knobs.dtype)
    cards = [torch.device("cuda", k) for k in range(torch.cuda.device_count())] if device.type == "cuda" else [device]
    devices = [cards[k % len(cards)] for k in range(knobs.workers or len(cards))]
    return Machine(devices, dtype, 0.7 * product_rate(dtype, device, 1536))


def choose_device(knobs: Knobs) -> torch.device:
    """The device that really works: a P100 says 'available' and then fails on the first product."""
    reason = "asked for" if knobs.device == "cpu" else "torch sees no CUDA device"
    if knobs.device != "cpu" and torch.cuda.is_available():
        try:
            (torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")).sum().item()
            torch.linalg.inv(torch.eye(2, device="cuda"))  # loads that library, which two threads at once can't
            log(f"device: cuda ({torch.cuda.device_count()} x {torch.cuda.get_device_name()}, a probe product passed)")
            return torch.device("cuda", 0)
        except RuntimeError as error:
            reason = f"CUDA probe failed: {first_line(error)}; torch is built for {torch.cuda.get_arch_list()}"
    if knobs.device == "cuda":
        raise UserError(f"device=cuda was asked for, but {reason}; use --set device=cpu")
    log(f"device: cpu ({reason})")
    keep_memory()
    torch.set_flush_denormal(True)  # probabilities near zero are many, and slow when they are denormal
    return torch.device("cpu")


def choose_dtype(device: torch.device, asked: str) -> torch.dtype:
    """bf16 only where it is native, fp16 on older GPUs (T4), on a CPU what a short timing shows."""
    if asked != "auto":
        dtype, reason = DTYPES[asked], "asked for, or of the run that this one goes on from"
    elif device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)  # is_bf16_supported() counts emulation in
        dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
        reason = f"CUDA capability {capability[0]}.{capability[1]}; bf16 units begin at 8.0"
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a core that is busy with something else would hide the difference
        gain = product_rate(torch.bfloat16, device, 768) / product_rate(torch.float32, device, 768)
        torch.set_num_threads(threads)
        dtype = torch.bfloat16 if gain > 1.5 else torch.float32
        reason = f"bf16 products run at {gain:.1f} times the speed of float32 here"
    log(f"dtype: {str(dtype).removeprefix('torch.')} ({reason})")
    return dtype


def product_rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """FLOP/s of the best of some square products in `dtype`."""
    size *= 1 if device.type == "cpu" else 4
    matrix, times = torch.ones(size, size, dtype=dtype, device=device), []
    for _ in range(4):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading a value waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def keep_memory() -> None:
    """Have glibc keep what tensors free: fresh pages for every big tensor cost more than the arithmetic on them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt, and may not need it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no maps of their own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no return of the heap's top


class Stop:
    """Why training should end early: a signal, or the time budget. Asked after every step."""

    def __init__(self, max_minutes: float) -> None:
        self.deadline = STARTED + 60 * max_minutes
        self.closing = 2.5  # seconds that the last submission, the records and the end of the process take
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.note)

    def note(self, number: int, frame: object) -> None:
        """First signal: end the step, save its state, stop. The second one does not wait."""
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        with contextlib.suppress(RuntimeError):  # amid another line of the log, where Python allows none
            log(f"{signal.Signals(number).name}: ending this step, then saving its state (once more: leave at once)")

    @property
    def reason(self) -> str:
        if self.signal:
            return signal.Signals(self.signal).name
        return BUDGET if self.left() < 0 else ""

    def left(self) -> float:
        """Seconds until only the last submission and the records are left to write."""
        return self.deadline - self.closing - time.monotonic()


@contextlib.contextmanager
def together(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files take their places in `folder` together when the block succeeds."""
    try:
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as scratch:
            yield Path(scratch)
            if (Path(scratch) / MANIFEST).exists():  # it vouches for the files beside it: it goes first, and comes last
                (folder / MANIFEST).unlink(missing_ok=True)
            for part in sorted(Path(scratch).iterdir(), key=lambda part: part.name == MANIFEST):
                part.replace(folder / part.name)
    except OSError as error:
        raise WriteFailed(f"{folder}: cannot be written to ({error.strerror}); free some space") from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block succeeds: nobody ever sees half a file."""
    with together(path.parent) as scratch:
        yield scratch / path.name


def save_torch(path: Path, content: dict[str, Any]) -> None:
    """Write what `load_torch` reads, in place of what was there, as a whole."""
    with atomic(path) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:  # what torch makes of a full disk
            raise WriteFailed(f"{path.name}: cannot be written (is the disk full?); free some space") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def file_facts(path: Path) -> dict[str, Any]:
    """sha256 and size of a file, for the manifest."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        for half in output.glob(".*.part"):  # of a killed run
            shutil.rmtree(half)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"{output}: cannot be written to ({error.strerror}); choose another --output") from error


# ----------------------------------------------------------------------------------------- command line
def read_problem(source: Path, knobs: Knobs, candidates: list[Knobs]) -> Problem:
    """The run's data, found below `source`."""
    paths = [find_file(source, name) for name in ("train.npz", "test.clean.npz")]
    train, test = read_train(paths[0], knobs.consecutive_captions), read_test(paths[1])
    for key, ours, theirs in (
        ("captions/embeddings", train.text.shape[1], test.text.shape[1]),
        ("metadata/embedding_dim_image", train.images.shape[1], test.image_dim),
    ):
        if ours != theirs:
            raise UserError(f"{paths[1]}: {key}: {theirs} dimensions, but {paths[0]} has {ours}")
    files = files_below(source, "pairs*.npz") if knobs.pairs else []
    if knobs.pairs and not files:
        raise UserError(f"{source}: no pairs*.npz below it; attach one, or leave --set pairs=true away")
    if files:
        log(f"pairs: {len(files)} file(s) of external data join; whether the rules allow that is yours to look up")
    problem = make_problem(train, test, knobs, candidates, files)
    problem.read["inputs"] = {path.name: file_facts(path) for path in paths}
    captions, images = (f"{len(rows)} x {rows.shape[1]}" for rows in (problem.train.text, problem.train.images))
    seconds = f"{run_seconds():.1f} s"
    log(f"data: captions {captions}, images {images}, {len(test.text)} test captions; read in {seconds}")
    return problem


def train_run(source: Path, output: Path, given: dict[str, Any]) -> int:
    """Read, train, submit; the exit code."""
    knobs, recipe = resolve_knobs(given), resolve_candidates(given)
    stop = Stop(knobs.max_minutes)
    problem, loaded = read_problem(source, knobs, recipe), run_seconds()
    if knobs.pairs_compare:
        recipe += [dataclasses.replace(one, pairs=False) for one in recipe if one.pairs]
    recipe = [with_epochs(one, len(problem.images_of("refit", one.pairs))) for one in recipe]

    make_folder(output)
    made_of = json.dumps([problem.read, *map(fixed, recipe)])
    folder = Folder(output, knobs, hashlib.sha256(made_of.encode()).hexdigest())
    index = folder.read_index(source)
    if not index:
        clear(output)
        folder.forget()
    everything = enumerate([*recipe, *index.get("drawn", [])])
    candidates = [Candidate(number, one, drawn=number >= len(recipe)) for number, one in everything]
    trained = folder.take_up(candidates, index.get("judged", []))

    machine = choose_machine(knobs, index)
    log(f"recipe: {knobs.recipe}, {len(candidates)} candidate(s), seed {knobs.seed}")
    before = index.get("seconds", 0.0)
    run = Run(candidates, knobs, given, problem, machine, stop, folder=folder, earlier=before, loaded=loaded)
    run.train(trained)
    return run.end()


def predict_run(source: Path, output: Path, given: dict[str, Any]) -> int:
    """The submission from weights found below the input root; no training data is needed."""
    for key in given:
        if key not in PREDICTING:
            raise UserError(f"knob '{key}' changes nothing in mode predict; it honours {', '.join(PREDICTING)}")
    knobs = Knobs(**given)
    weights, test_path = find_file(source, FINAL_MODEL), find_file(source, "test.clean.npz")
    if weights.resolve().parent == output.resolve():  # where what an earlier run left makes way
        raise UserError(f"{weights}: the weights lie in the output folder; choose another --output")
    bundle, test = load_weights(weights), read_test(test_path)
    if bundle["dims"][1] != test.image_dim:
        raise UserError(f"{weights}: predicts {bundle['dims'][1]} dimensions, but {test_path} wants {test.image_dim}")
    bundle["repulsion"] = given.get("repulsion", bundle["repulsion"])
    bundle["knobs"] |= given
    make_folder(output)
    clear(output)
    device = choose_device(knobs)
    with together(output) as parts:
        write_submission(parts / SUBMISSION, test.caption_ids, predicted(bundle, test, device))
        facts = {
            "recipe": bundle["knobs"]["recipe"],
            "knobs": bundle["knobs"],
            "repulsion": bundle["repulsion"],
            "inputs": {path.name: file_facts(path) for path in (weights, test_path)},
            "seconds": {"total": round(run_seconds(), 2)},
        }
        write_manifest(parts, output, True, facts)
    log(f"submission: {output / SUBMISSION} ({len(test.caption_ids)} rows, read back and checked)")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=Path("/kaggle/input"), help="the data lies anywhere below it")
    parser.add_argument("--output", type=Path, default=Path("/kaggle/working"), help="folder to write to")
    parser.add_argument("--recipe", help=f"one of {', '.join(RECIPES)} (default {Knobs.recipe})")
    parser.add_argument("--mode", help="train (default) or predict")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one knob (repeatable)")
    arguments = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a path's letters may be in no character set of the terminal
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        settings = dict(map(parse_setting, arguments.set))
        given = resolve_given(beside(settings, recipe=arguments.recipe, mode=arguments.mode))
        work = predict_run if given.get("mode") == "predict" else train_run
        return work(arguments.input, arguments.output, given)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 2)


def leave(code: int) -> None:
    """End the process at once: Python would take torch apart first, for up to four seconds on a busy machine."""
    with contextlib.suppress(OSError):  # who read is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if "__file__" in globals():
        leave(main())
    # Pasted into a notebook: no arguments, cells that can be interrupted afterwards as ever, and after success no
    # SystemExit, which would look like a failure.
    interrupted = signal.getsignal(signal.SIGINT)
    code = main([])
    signal.signal(signal.SIGINT, interrupted)
    if code:
        sys.exit(code)
