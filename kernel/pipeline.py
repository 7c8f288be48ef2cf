"""Map caption embeddings to image embeddings so that each caption finds its photo: data -> model -> submission.

    python kernel/pipeline.py --input data --output out    the default recipe, locally; --recipe and --set change it
    python kernel/pipeline.py                              on Kaggle: /kaggle/input -> /kaggle/working
    python kernel/pipeline.py --mode predict ...           no training: weights found below --input

Measured on 2 CPU cores with bf16 units, on a real stand-in of 6,090 photos (600 held out, MRR in pools of 100, mean of
three seeds and splits): ensemble .772 raw and .772 cosine in 113 s of training, align .766 and .769 in 34 s,
closed_form .700 and .688 in under a second; the original system .337 and .553 in 163 s (one seed). Reproduce:
`python tools/benchmark.py --seeds 1 2 3 --data DIR`; README.md has more, and what did not work.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STARTED = time.monotonic()

# ------------------------------------------------------------------------------------------------ knobs
# A packaged copy carries its own values here; command line beats OVERRIDES beats recipe beats default.
OVERRIDES: dict = {}


@dataclass(frozen=True)
class Knobs:
    """Everything that may be set, with why it has its value. `--set KEY=VALUE` changes one."""

    recipe: str = "ensemble"  # a named set of knobs below; the quality of each is in the README's table
    mode: str = "train"  # train, or predict with weights found below the input root
    seed: int = 0  # initial weights, order, mixing and dropout all follow from it
    split_seed: int = 0  # the validation images follow from this one, so that runs of several seeds can be compared
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32, bfloat16 or float16
    # network
    network: str = "align"  # align, mlp (the baseline's) or linear (the closed form)
    hidden: int = 4096  # wide and shallow
    activation: str = "silu"  # silu, square (of relu) or gate: as good alone, and members that differ help each other
    dropout: float = 0.6  # on the hidden layer; 5 captions a photo are few
    input_dropout: float = 0.3  # on the text vector: the regulariser that gained most
    # objective
    raw_weight: float = 0.5  # share of the loss on raw-length images (the board's score), rest on unit length (cosine)
    temperature: float = 0.02  # start of the learnt softmax temperature; tuned public solutions end at .01-.02
    logit_block: int = 512  # rows of gallery logits held at once: bounds memory for any batch
    # training
    epochs: int = 12  # ends at a rate of zero, so none is picked on validation; 6 do for 5,000 photos, more need more
    batch: int = 1024  # small enough for many steps, large enough to keep a GPU busy
    min_steps: int = 150  # small data gets a smaller batch, so that it gets as many updates
    lr: float = 1e-3
    weight_decay: float = 1e-2
    schedule: str = "cosine"  # cosine with a short warm-up, or constant (the baseline)
    members: int = 1  # networks whose unit predictions are averaged
    variants: str = ""  # how members differ on purpose: "raw_weight=1; network=linear", taken in turn
    repulsion: float = 0.2  # between the predictions of a pool, whose images are known to differ
    ridge: float = 0.1  # closed form: penalty, in units of the mean variance of a text dimension
    whiten: float = 0.3  # closed form: residual whitening's floor, in units of the mean residual variance
    # evaluation and running
    val_fraction: float = 0.1  # images held out; rounded to whole pools of 100
    refit: bool = True  # after validation train once more on all images, then predict
    eval_every: int = 4  # epochs between validation rows
    infer_batch: int = 256
    checkpoint_every: int = 5  # epochs between the named checkpoints
    checkpoint_seconds: float = 60.0  # at most so much work is lost when the machine dies
    max_minutes: float = 715.0  # Kaggle ends a session at 12 h; epochs and members are planned to fit
    submit_on_stop: bool = "KAGGLE_KERNEL_RUN_TYPE" in os.environ  # a stopped run still submits its best state
    warm_start: bool = False  # start from a run's weights found below the input root
    processes: int = 0  # member trainers at once; 0: one a usable GPU


RECIPES: dict[str, dict[str, Any]] = {
    # The original system, to the letter: 2-layer MLP, cosine loss, plain Adam, nothing averaged.
    "baseline": {"network": "mlp", "hidden": 4096, "dropout": 0.2, "schedule": "constant", "epochs": 20, "batch": 64,
                 "lr": 1e-3, "weight_decay": 0.0, "repulsion": 0.0, "min_steps": 0, "eval_every": 5},
    # Ridge, then residual whitening: seconds, no network.
    "closed_form": {"network": "linear"},
    # One network on both objectives at once.
    "align": {},
    # Networks that differ on purpose.
    "ensemble": {"members": 5, "variants": "; hidden=2048; hidden=2048 activation=square; "
                                           "hidden=2048 activation=gate; network=linear"},
}

SUBMISSION, METRICS, MANIFEST = "pipeline_submission.csv", "metrics.json", "manifest.json"
FINAL_MODEL, VALIDATED_MODEL = "pipeline_final_model.pth", "pipeline_validated_model.pth"
TRAINING_LOG, CURVES, CHECKPOINT = "training_log.csv", "training_curves.png", "pipeline_model_checkpoint_epoch_{}.pth"
RESUME_RUN = "resume_run.json"
BUDGET = "time budget"  # the reason to stop that was asked for: such a run is complete
POOL, TOP, VIEWS = 100, 99, 5  # the official evaluation: pools of 100, of which the first 99 ranks count


class UserError(Exception):
    """What was given is wrong; one line that names the thing, the place and the next step."""

    exit_code = 2


class TrainingFailed(UserError):
    """The input is right, but training cannot go on; one line that says why."""

    exit_code = 1


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value` as a knob's name and a value of that knob's type."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise UserError(f"--set {text}: expected KEY=VALUE, such as --set epochs=8")
    return key, typed(key, value)


def typed(key: str, value: Any) -> Any:
    """`value` in the type of knob `key`; an unknown knob or a mistyped value is an error that helps."""
    defaults = {field.name: field.default for field in dataclasses.fields(Knobs)}
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, n=3, cutoff=0.5) or sorted(defaults)
        raise UserError(f"unknown knob '{key}'; did you mean {', '.join(near)}?")
    kind = type(defaults[key])
    text = str(value).strip()
    with contextlib.suppress(ValueError, KeyError):
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        number = kind(text)
        if kind is not float or math.isfinite(number):
            return number
    raise UserError(f"knob '{key}' takes {kind.__name__} (default {defaults[key]}), not '{text}'")


def resolve_knobs(arguments: dict[str, Any]) -> Knobs:
    """Knobs by precedence: `arguments` (command line), OVERRIDES, recipe, default."""
    given = {key: typed(key, value) for key, value in {**OVERRIDES, **arguments}.items()}
    recipe = given.get("recipe", Knobs.recipe)
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe '{recipe}'; there are {', '.join(RECIPES)}")
    return check_knobs(dataclasses.replace(Knobs(), **{**RECIPES[recipe], **given}))


CHOICES = {"mode": ("train", "predict"), "device": ("auto", "cpu", "cuda"), "schedule": ("cosine", "constant"),
           "dtype": ("auto", "float32", "bfloat16", "float16"), "network": ("align", "mlp", "linear"),
           "activation": ("silu", "square", "gate")}
AT_LEAST_ONE = ("hidden", "epochs", "batch", "logit_block", "members", "eval_every", "infer_batch", "checkpoint_every")
POSITIVE = ("lr", "ridge", "whiten", "temperature", "max_minutes", "val_fraction")
HIGHEST = {"dropout": 0.99, "input_dropout": 0.99, "raw_weight": 1, "repulsion": 0.9, "val_fraction": 0.9}  # else 1e6


def check_knobs(knobs: Knobs) -> Knobs:
    """Words that are in no vocabulary and numbers that are out of range are errors."""
    for key, value in dataclasses.asdict(knobs).items():
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"knob '{key}' is one of {', '.join(CHOICES[key])}, not '{value}'")
        low, high = 1 if key in AT_LEAST_ONE else 1e-9 if key in POSITIVE else 0, HIGHEST.get(key, 1_000_000)
        if key not in CHOICES and isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"knob '{key}' lies in {low:g}..{high:g}, not {value}")
    return knobs


def member_knobs(knobs: Knobs, member: int) -> Knobs:
    """Knobs of one member: the k-th variant in turn, and a seed of its own."""
    variants = knobs.variants.split(";")
    settings = [part for part in variants[member % len(variants)].split() if part]
    return check_knobs(dataclasses.replace(knobs, **dict(parse_setting(setting) for setting in settings)))


# ------------------------------------------------------------------------------------------ environment
def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def log(text: str) -> None:
    """One plain line at once: Kaggle's log and `run_local.py` read line by line."""
    print(text, flush=True)


def choose_device(knobs: Knobs) -> torch.device:
    """The device that really works: a P100 says 'available' and then fails on the first product."""
    reason = "asked for" if knobs.device == "cpu" else "torch sees no CUDA device"
    if knobs.device != "cpu" and torch.cuda.is_available():
        try:
            (torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")).sum().item()
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


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(device: torch.device, knobs: Knobs) -> torch.dtype:
    """bf16 only where it is native, fp16 on older GPUs (T4), on a CPU what a short timing shows."""
    if knobs.dtype != "auto":
        dtype, reason = DTYPES[knobs.dtype], "asked for"
    elif device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)  # is_bf16_supported() counts emulation in
        dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
        reason = f"CUDA capability {capability[0]}.{capability[1]}; bf16 units begin at 8.0"
    else:
        gain = matmul_seconds(torch.float32) / matmul_seconds(torch.bfloat16)
        dtype = torch.bfloat16 if gain > 1.5 else torch.float32
        reason = f"bf16 products run at {gain:.1f} times the speed of float32 here"
    log(f"dtype: {str(dtype).removeprefix('torch.')} ({reason})")
    return dtype


def matmul_seconds(dtype: torch.dtype, size: int = 768, rounds: int = 5) -> float:
    """Best seconds of a square CPU product in `dtype`."""
    matrix, times = torch.ones(size, size, dtype=dtype), []
    for _ in range(rounds):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return min(times)


def keep_memory() -> None:
    """Have glibc keep what tensors free: fresh pages for every big tensor cost more than the arithmetic on them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt, and may not need it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no maps of their own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no return of the heap's top


class Stop:
    """Why training should end early: a signal, or the time budget. Asked after every step."""

    def __init__(self, max_minutes: float) -> None:
        budget = 60 * max_minutes
        self.deadline = STARTED + budget - min(60.0, 5 + 0.02 * budget)  # the rest predicts and writes
        self.signal = self.parent = 0  # a helper's parent: it does not outlive it
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.note)

    def note(self, number: int, frame: object) -> None:
        """First signal: end the step, checkpoint, stop. The second one does not wait."""
        if self.signal == number:  # a helper hears of Ctrl-C twice: from the terminal, then SIGTERM from its parent
            os._exit(128 + number)
        self.signal = number
        log(f"{signal.Signals(number).name}: ending this step, then a checkpoint (once more: leave at once)")

    @property
    def reason(self) -> str:
        if self.signal:
            return signal.Signals(self.signal).name
        if self.parent and os.getppid() != self.parent:
            return "parent ended"
        return BUDGET if time.monotonic() > self.deadline else ""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block succeeds: nobody ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(f"{path}: cannot be written ({error}); free some space or choose another --output") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_torch(path: Path, content: dict) -> None:
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def load_torch(path: Path) -> dict:
    """A dictionary of tensors and plain values; never code (weights_only)."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch checks no checksum: a flipped bit would be a silent weight
            if name := archive.testzip():
                raise ValueError(f"wrong checksum of {name}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can fail anywhere in zip, pickle or tensor code
        raise UserError(f"{path}: not a readable weights file ({first_line(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no weights of this script; fetch it again")
    return content


def write_json(path: Path, content: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def file_facts(path: Path) -> dict[str, Any]:
    """sha256 and size of a file, for the manifest."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


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


@dataclass
class TestSet:
    """Test captions in file order."""

    caption_ids: np.ndarray  # (n,) int64
    captions: list[str]
    text: np.ndarray  # (n, d_text) float32
    image_dim: int


def find_file(root: Path, name: str) -> Path:
    """The one file called `name` anywhere below `root`: flat, nested, old and new Kaggle mounts alike."""
    if not root.is_dir():
        raise UserError(f"{root}: no such input folder; give one with --input")
    found: dict[Path, Path] = {}
    seen: set[Path] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:  # a link back up, or one mount shown twice
            folders.clear()
        elif name in files:
            found[(real / name).resolve()] = Path(folder) / name
        seen.add(real)
    if len(found) > 1:
        listing = " and ".join(sorted(str(path) for path in found.values()))
        raise UserError(f"{root}: more than one {name}: {listing}; point --input at one of them")
    if not found:
        present = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise UserError(f"{root}: no {name} below it (it holds {present}); attach or download the competition's data")
    return next(iter(found.values()))


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Damaged bytes can fail anywhere in zip, zlib, header or text decoding: one line whatever it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {what} cannot be read ({first_line(error)}); download the file again") from error


class Npz:
    """Checked arrays of an untrusted .npz: no pickle, and every error names file, key and first bad row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path, "the archive"):
            self.arrays = np.load(path, allow_pickle=False)
            self.keys = list(self.arrays.files)

    def fail(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.path}: {key}: {problem}")

    def read(self, key: str, *shape: int | None, kind: str) -> np.ndarray:
        """Array `key` of a `shape` (None: any) and a `kind` of type (i: integer, f: float, U: text)."""
        if key not in self.keys:
            raise self.fail(key, f"this key is missing; there are {', '.join(self.keys[:12])}")
        with reading(self.path, key):
            array = np.asarray(self.arrays[key])  # a member without the format's magic comes as bytes
        fits = [want in (None, have) for want, have in zip(shape, array.shape, strict=False)]
        if array.ndim != len(shape) or not all(fits) or array.dtype.kind not in kind:
            wanted = " x ".join("any" if n is None else str(n) for n in shape)
            raise self.fail(key, f"is {array.dtype} of shape {array.shape}, expected kind '{kind}' of {wanted}")
        return array

    def ids(self) -> np.ndarray:
        ids = self.read("captions/ids", None, kind="iu").astype(np.int64)
        first = np.unique(ids, return_index=True)[1]
        if len(first) < len(ids):
            row = int(np.setdiff1d(np.arange(len(ids)), first)[0])
            raise self.fail("captions/ids", f"row {row}: id {ids[row]} was there before")
        return ids

    def words(self, key: str, rows: int | None) -> list[str]:
        array = self.read(key, rows, kind="U")
        with reading(self.path, key):
            return array.tolist()

    def vectors(self, key: str, rows: int) -> np.ndarray:
        """Embeddings (rows, d) as float32, every value finite."""
        array = self.read(key, rows, None, kind="f").astype(np.float32, copy=False)
        if not array.size:
            raise self.fail(key, f"is empty: {array.shape}")
        for start in range(0, rows, 4096):  # in blocks: a mask of the whole would cost a quarter of the data again
            bad = ~np.isfinite(array[start:start + 4096]).all(axis=1)
            if bad.any():
                raise self.fail(key, f"row {start + int(bad.argmax())} holds NaN or infinity")
        return array

    def label(self, captions: int, images: int) -> np.ndarray:
        """Image of each caption from the one-hot matrix, read as a stream: 3.1 GB that are never held."""
        key, image_of = "captions/label", np.empty(captions, np.int64)
        with reading(self.path, key), self.arrays.zip.open(f"{key}.npy") as stream:
            np.lib.format.read_magic(stream)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            if shape != (captions, images) or fortran or dtype != np.bool_:
                raise self.fail(key, f"is {dtype} of shape {shape}, expected bool of ({captions}, {images})")
            rows = max(1, (1 << 20) // images)  # blocks that stay in the processor's cache
            for start in range(0, captions, rows):
                count = min(rows, captions - start)
                block = np.frombuffer(stream.read(count * images).ljust(count * images, b"\0"), np.uint8)
                block = block.reshape(count, images)
                image_of[start:start + count] = block.argmax(axis=1)
                if np.count_nonzero(block) != count or not block.max(axis=1).all():
                    named = np.count_nonzero(block, axis=1)
                    bad = int((named != 1).argmax())
                    raise self.fail(key, f"row {start + bad} names {named[bad]} images, expected 1")
        return image_of


def read_train(path: Path) -> TrainSet:
    """train.npz, checked: shapes agree, one image a caption, finite, ids unique."""
    npz = Npz(path)
    ids = npz.ids()
    names = npz.words("images/names", None)
    captions = npz.words("captions/text", len(ids))
    if "captions/label" in npz.keys:
        image_of = npz.label(len(ids), len(names))
    else:
        if not names or len(ids) % len(names):
            raise UserError(f"{path}: captions/label is missing, and {len(ids)} captions do not divide by {len(names)}")
        image_of = np.arange(len(ids)) // (len(ids) // len(names))
        log(f"{path}: no captions/label; taking {len(ids) // len(names)} consecutive captions an image")
    text = npz.vectors("captions/embeddings", len(ids))
    return TrainSet(ids, captions, text, image_of, names, npz.vectors("images/embeddings", len(names)))


def read_test(path: Path) -> TestSet:
    """test.clean.npz, checked; at least one row."""
    npz = Npz(path)
    ids = npz.ids()
    if not len(ids):
        raise UserError(f"{path}: captions/ids: no rows, so there is nothing to predict")
    width = int(npz.read("metadata/embedding_dim_image", 1, kind="iu")[0])
    return TestSet(ids, npz.words("captions/text", len(ids)), npz.vectors("captions/embeddings", len(ids)), width)


def split_images(n_images: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) image indices, disjoint; validation in whole pools of 100 where there are enough."""
    count = max(2, round(n_images * fraction)) if fraction else 0
    count = count // POOL * POOL or count
    if n_images - count < 2:
        raise UserError(f"{n_images} images are too few to hold out {count}; lower --set val_fraction")
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


# ------------------------------------------------------------------------------------------------ model
class Dropout(nn.Module):
    """nn.Dropout in steps of 1/256, eight elements a random number: drawing one each outlasts the products on a CPU."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.cut = round(256 * share)

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or not self.cut:
            return values
        words = torch.randint(-2**63, 2**63 - 1, (values.numel() // 8 + 1,), device=values.device)
        keep = words.view(torch.uint8)[:values.numel()].view(values.shape) >= self.cut
        return values * keep.to(values.dtype).mul_(256 / (256 - self.cut))


class AlignNet(nn.Module):
    """LayerNorm, dropout, one wide hidden layer (LayerNorm, activation, dropout), linear skip.

    Text (b, d_text) -> predictions (b, d_image).
    """

    def __init__(self, d_text: int, d_image: int, knobs: Knobs) -> None:
        super().__init__()
        self.activation = knobs.activation
        self.expand = nn.Linear(d_text, knobs.hidden * (2 if self.activation == "gate" else 1), bias=False)
        self.norm_hidden, self.project = nn.LayerNorm(knobs.hidden), nn.Linear(knobs.hidden, d_image)
        self.skip = nn.Linear(d_text, d_image, bias=False)
        self.input_dropout, self.dropout = Dropout(knobs.input_dropout), Dropout(knobs.dropout)
        # 1/temperature in log space, one for each image geometry: (raw, unit)
        self.log_scale = nn.Parameter(torch.full((2,), -math.log(knobs.temperature)))

    def forward(self, text: Tensor) -> Tensor:
        text = self.input_dropout(F.layer_norm(text, text.shape[1:]))
        return self.project(self.dropout(self.activate(self.expand(text)))) + self.skip(text)

    def activate(self, hidden: Tensor) -> Tensor:
        if self.activation == "gate":
            value, gate = hidden.chunk(2, dim=1)
            return self.norm_hidden(value * F.silu(gate))
        hidden = self.norm_hidden(hidden)
        return F.silu(hidden) if self.activation == "silu" else F.relu(hidden).square()


def mlp(d_text: int, d_image: int, knobs: Knobs) -> nn.Module:
    """The original two-layer network."""
    return nn.Sequential(nn.Linear(d_text, knobs.hidden), nn.ReLU(), nn.Dropout(knobs.dropout),
                         nn.Linear(knobs.hidden, d_image))


NETWORKS: dict[str, Callable[[int, int, Knobs], nn.Module]] = {
    "align": AlignNet, "mlp": mlp, "linear": lambda d_text, d_image, knobs: nn.Linear(d_text, d_image)}


def fit_closed_form(text: Tensor, images: Tensor, image_of: Tensor, knobs: Knobs) -> dict[str, Tensor]:
    """Ridge, then residual whitening: p = (S + l I)^-1 (A x + b), the best linear query for y|x ~ N(Ax, S).

    text (n, d_text), images (m, d_image), image_of (n,); returns the state of nn.Linear. The mean image is taken
    off: it is the same for the whole gallery, so it moves no rank.
    """
    n, mean_text, y = len(text), text.mean(0), (images - images.mean(0)).double()
    count = torch.bincount(image_of, minlength=len(y)).unsqueeze(1)
    pooled = torch.zeros(len(y), text.shape[1], device=text.device).index_add_(0, image_of, text) - count * mean_text
    covariance = ((text.T @ text) / n - torch.outer(mean_text, mean_text)).double()
    cross = pooled.double().T @ y / n  # (d_text, d_image); sums over captions are sums over images of their pooled ones
    ridge = knobs.ridge * covariance.diagonal().mean() * torch.eye(len(covariance), device=y.device)
    weight = torch.linalg.solve(covariance + ridge, cross)
    explained = weight.T @ cross
    scatter = (y * count).T @ y / n - explained - explained.T + weight.T @ covariance @ weight  # of the residual
    floor = knobs.whiten * scatter.diagonal().mean() * torch.eye(len(scatter), device=y.device)
    query = torch.linalg.solve(scatter + floor, weight.T).float()  # (d_image, d_text)
    return {"weight": query, "bias": -query @ mean_text}


class GalleryLoss(torch.autograd.Function):
    """Summed cross-entropy of scaled queries (b, d) against a whole gallery (m, d), `block` rows at a time.

    The gallery is frozen, so the loss's gradient is known as soon as its softmax is: (softmax - one_hot) @ gallery.
    It is taken in the forward pass, so that no logits outlive their block and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, gallery: Tensor, label: Tensor, block: int) -> Tensor:
        gradient = torch.empty_like(queries)
        loss = queries.new_zeros(())
        for start in range(0, len(queries), block):
            rows = slice(start, start + block)
            # half-precision logits: softmax still sums in float32 inside
            probability = torch.softmax(queries[rows].to(gallery.dtype) @ gallery.T, dim=1)
            loss -= probability.gather(1, label[rows].unsqueeze(1)).float().clamp_min(1e-7).log().sum()
            gradient[rows] = probability @ gallery
        gradient -= gallery[label]
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None


# --------------------------------------------------------------------------------------------- training
@dataclass
class Run:
    """What every phase and member of one run shares."""

    source: Path
    output: Path
    knobs: Knobs
    train: TrainSet
    test: TestSet
    inputs: dict[str, dict]  # sha256 and size of the files read
    device: torch.device
    dtype: torch.dtype
    text: Tensor  # (n, d_text) on the device, in the computing type
    train_images: np.ndarray
    val_images: np.ndarray
    stop: Stop
    fingerprint: str  # of data and knobs: a state of anything else is refused
    warm: dict[str, dict] = field(default_factory=dict)  # phase -> bundle to start from
    seconds: dict[str, float] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - start


@dataclass
class Task:
    """The images that a phase trains on, as tensors on the device."""

    captions: Tensor  # (n,) indices of their captions
    label: Tensor  # (all captions,) row in `images`; -1 for captions of other images
    images: Tensor  # (m, d_image) float32
    galleries: tuple[Tensor, Tensor]  # centred (raw, unit) images in the computing type


def make_task(run: Run, images: np.ndarray) -> Task:
    position = torch.full((len(run.train.images),), -1)
    position[torch.from_numpy(images)] = torch.arange(len(images))
    label = position[torch.from_numpy(run.train.image_of)]
    captions = (label >= 0).nonzero().squeeze(1)
    vectors = torch.from_numpy(run.train.images[images])
    # A vector taken off the whole gallery moves no rank and no gradient, and spares the logits' precision.
    raw, unit = vectors / vectors.norm(dim=1).mean(), F.normalize(vectors, dim=1)
    galleries = tuple((view - view.mean(0)).to(run.device, run.dtype) for view in (raw, unit))
    return Task(captions.to(run.device), label.to(run.device), vectors.to(run.device), galleries)


class Trainer:
    """One member in one phase: trains epoch by epoch, checkpoints, goes on where a killed run stopped."""

    POSITION = ("epoch", "step", "finished", "lr_factor", "block", "loss_sum", "history")

    def __init__(self, run: Run, task: Task, phase: str, member: int) -> None:
        self.run, self.task, self.phase, self.member = run, task, phase, member
        self.knobs = member_knobs(run.knobs, member)
        self.path = run.output / f"resume_{phase}_{member}.pth"
        seen = len(task.captions) * self.knobs.epochs
        self.batch = max(1, min(self.knobs.batch, seen // max(1, self.knobs.min_steps)))
        self.steps = math.ceil(len(task.captions) / self.batch)
        self.reset()

    def reset(self) -> None:
        """Initial state: weights from the member's seed, or from a run found below the input root."""
        self.generator(epoch=-1)
        self.model = NETWORKS[self.knobs.network](self.run.text.shape[1], self.task.images.shape[1], self.knobs)
        if self.phase in self.run.warm:
            self.model.load_state_dict(self.run.warm[self.phase]["members"][self.member]["state"])
        self.model.to(self.run.device)
        kind = torch.optim.AdamW if self.knobs.weight_decay else torch.optim.Adam
        self.optimizer = kind(self.model.parameters(), self.knobs.lr, weight_decay=self.knobs.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(self.run.device.type, enabled=self.run.dtype == torch.float16)
        self.epoch, self.step, self.finished, self.history = 0, 0, False, []
        self.lr_factor, self.block, self.saved = 1.0, self.knobs.logit_block, time.monotonic()
        self.loss_sum = torch.zeros((), device=self.run.device)

    def generator(self, epoch: int) -> torch.Generator:
        """Every epoch draws from its own stream, so that a resumed run needs no history."""
        words = f"{self.knobs.seed} {self.phase} {self.member} {epoch}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")
        torch.manual_seed(seed)
        return torch.Generator(self.run.device).manual_seed(seed)

    def learning_rate(self) -> float:
        """Short linear warm-up, then a cosine to zero; or constant."""
        if self.knobs.schedule == "constant":
            return self.knobs.lr * self.lr_factor
        done, total = self.epoch * self.steps + self.step, self.knobs.epochs * self.steps
        warm_up = (done + 1) / max(1, min(200, total // 10))
        return self.knobs.lr * self.lr_factor * min(warm_up, 0.5 * (1 + math.cos(math.pi * done / total)))

    def loss(self, text: Tensor, label: Tensor) -> Tensor:
        """Softmax over all training images, or 1 - cosine for the baseline's network."""
        with torch.autocast(self.run.device.type, self.run.dtype, enabled=self.run.dtype != torch.float32):
            prediction = self.model(text)
        if self.knobs.network == "mlp":
            return 1 - F.cosine_similarity(prediction.float(), self.task.images[label], dim=1).mean()
        query = F.normalize(prediction.float(), dim=1)
        scale = self.model.log_scale.clamp(max=math.log(200)).exp()
        cut = round(self.knobs.raw_weight * len(label))  # a share of the captions each: half the cost of both for all
        parts = ((0, slice(cut)), (1, slice(cut, None)))
        return sum(GalleryLoss.apply(query[rows] * scale[k], self.task.galleries[k], label[rows], self.block)
                   for k, rows in parts if len(label[rows])) / len(label)

    def update(self, captions: Tensor) -> None:
        """One optimiser step; out of memory halves the block of logits and tries the same captions again."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        try:
            loss = self.loss(self.run.text[captions], self.task.label[captions])
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            if self.block <= 16:
                raise TrainingFailed(f"{first_line(error)}; lower --set hidden or --set batch") from error
            self.block //= 2
            log(f"out of memory: logits in blocks of {self.block} rows from here on")
            return self.update(captions)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss_sum += loss.detach()
        self.step += 1
        return None

    def run_epoch(self) -> bool:
        """The rest of this epoch; False when the run has to stop inside it."""
        order = torch.randperm(len(self.task.captions), generator=self.generator(self.epoch), device=self.run.device)
        if self.step:  # go on inside the epoch, with the dropout that comes next
            torch.set_rng_state(self.random[0])
            if self.run.device.type == "cuda" and self.random[1:]:
                torch.cuda.set_rng_state(self.random[1])
        self.model.train()
        for captions in self.task.captions[order].split(self.batch)[self.step:]:
            self.update(captions)
            if self.run.stop.reason:
                return False
            if time.monotonic() - self.saved > self.knobs.checkpoint_seconds and math.isfinite(self.loss_sum):
                self.save()
        return True

    def train(self) -> None:
        """All remaining epochs, or as many as the run's time allows."""
        if self.knobs.network == "linear" and not self.finished:
            self.solve()
        while not self.finished:
            going = self.run_epoch()
            if not math.isfinite(self.loss_sum + sum(weight.detach().sum() for weight in self.model.parameters())):
                self.roll_back()
            elif going:
                self.end_epoch()
            else:
                return self.save()
        return None

    def solve(self) -> None:
        """The closed form, on the device, in float32."""
        text = torch.from_numpy(self.run.train.text).to(self.run.device)[self.task.captions]
        try:
            state = fit_closed_form(text, self.task.images, self.task.label[self.task.captions], self.knobs)
        except torch.linalg.LinAlgError as error:
            raise TrainingFailed(f"closed form: {first_line(error)}; raise --set ridge or --set whiten") from error
        self.model.load_state_dict(state)
        self.finished = True
        self.save()

    def end_epoch(self) -> None:
        """Log the epoch, validate where due, checkpoint."""
        run, row = self.run, {"phase": self.phase, "member": self.member, "epoch": self.epoch + 1,
                              "loss": float(self.loss_sum) / self.steps}
        self.epoch, self.step, self.finished = self.epoch + 1, 0, self.epoch + 1 == self.knobs.epochs
        self.loss_sum.zero_()
        if self.phase == "validate" and (self.finished or self.epoch % self.knobs.eval_every == 0):
            with run.timed("validate"):
                tables = validate(run, validation_predictions(run, [self.described()]))
            row |= {name: table["mrr"] for name, table in tables.items()}
        self.history.append(row | {"seconds": round(time.monotonic() - STARTED, 2)})
        log_row(self.history[-1])
        named = self.member == 0 and self.phase == ("refit" if run.knobs.refit else "validate")
        if named and self.epoch % self.knobs.checkpoint_every == 0:
            save_torch(run.output / CHECKPOINT.format(self.epoch), make_bundle(run, [self.described()]))
        if self.finished or time.monotonic() - self.saved >= self.knobs.checkpoint_seconds:
            self.save()

    def described(self) -> dict[str, Any]:
        """The member as a bundle keeps it: its knobs and the weights to predict with."""
        return {"knobs": dataclasses.asdict(self.knobs), "finished": self.finished,
                "state": {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}}

    def save(self) -> None:
        """Everything that the next step depends on; the state before this one is kept beside it."""
        cuda = [torch.cuda.get_rng_state()] if self.run.device.type == "cuda" else []
        state = {"fingerprint": self.run.fingerprint, "random": [torch.get_rng_state(), *cuda],
                 "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "scaler": self.scaler.state_dict(),
                 **{key: getattr(self, key) for key in self.POSITION}}
        if self.path.exists():
            self.path.replace(self.path.with_suffix(".previous"))
        save_torch(self.path, state)
        self.saved = time.monotonic()

    def load(self) -> bool:
        """Take up the newest readable state of this member; False when there is none."""
        for path in (self.path, self.path.with_suffix(".previous")):
            try:
                if path.exists():
                    self.take_up(load_torch(path))
                    log(f"{self.phase}, member {self.member}: going on from epoch {self.epoch}, step {self.step}")
                    return True
            except Exception as error:  # damage can show anywhere; the state before, or a new start, is as good
                log(f"{path.name}: not usable ({first_line(error)})")
                self.reset()
        return False

    def take_up(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.run.fingerprint:
            raise ValueError("it is of other data or knobs")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for key in self.POSITION:
            setattr(self, key, state[key])
        self.loss_sum, self.random = self.loss_sum.to(self.run.device), state["random"]

    def roll_back(self) -> None:
        """A loss that is no number: back to the last good state at half the rate, once."""
        if self.lr_factor < 1:
            raise TrainingFailed(f"{self.phase}, member {self.member}: the loss is no number, at half the rate as "
                                 f"well; try --set lr={self.knobs.lr / 4:g}")
        if not self.load():
            self.reset()
        self.lr_factor = 0.5
        log(f"{self.phase}, member {self.member}: the loss is no number; back to epoch {self.epoch} at half the rate")


LOG_COLUMNS = ("phase", "member", "epoch", "loss", "pool100_raw", "pool100_cosine", "full_cosine", "seconds")


def log_row(row: dict[str, Any]) -> None:
    """One line of the training table; its header where a member's training begins."""
    if row["epoch"] == 1:
        log("  ".join(column.rjust(9) for column in LOG_COLUMNS))
    cells = [f"{row[column]:.4f}" if column in LOG_COLUMNS[3:7] and column in row else row.get(column, "")
             for column in LOG_COLUMNS]
    log("  ".join(str(cell).rjust(max(9, len(column))) for column, cell in zip(LOG_COLUMNS, cells, strict=True)))


def train_phase(run: Run, phase: str, images: np.ndarray) -> list[dict]:
    """Train every member on `images`; further GPUs take their share in processes of their own."""
    task = make_task(run, images)
    gpus = torch.cuda.device_count() if run.device.type == "cuda" else 1  # a pasted script has no file to start again
    processes = min(run.knobs.members, run.knobs.processes or gpus) if "__file__" in globals() else 1
    helpers = [start_helper(run, phase, index, processes) for index in range(1, processes)]
    try:
        trained = {k: train_member(run, task, phase, k) for k in range(0, run.knobs.members, processes)}
        while not run.stop.reason and any(helper.poll() is None for helper in helpers):
            time.sleep(0.2)
    finally:  # a stopped or failed run leaves no helper behind; one that is told to stop checkpoints first
        for helper in helpers:
            helper.terminate()
            helper.wait()
    for helper in helpers:
        if helper.returncode and not run.stop.reason:
            log(f"a helper process ended with code {helper.returncode}: its members are trained here")
    for k in range(run.knobs.members):  # a helper's finished members are only loaded
        trained[k] = trained.get(k) or train_member(run, task, phase, k)
    return [trained[k] for k in sorted(trained) if trained[k]]


def train_member(run: Run, task: Task, phase: str, member: int) -> dict[str, Any] | None:
    """One member, resumed where a state of it exists; None when the run stops before it begins."""
    trainer = Trainer(run, task, phase, member)
    if not trainer.load() and run.stop.reason and member:
        return None
    trainer.train()
    run.history += trainer.history
    return trainer.described()


def start_helper(run: Run, phase: str, index: int, processes: int) -> subprocess.Popen:
    """This script once more, for the share of GPU `index`; its results come back as finished states."""
    knobs = dataclasses.asdict(run.knobs) | {"dtype": str(run.dtype).removeprefix("torch.")}
    settings = [f"--set={key}={value}" for key, value in knobs.items()]
    command = [sys.executable, __file__, "--input", str(run.source), "--output", str(run.output), *settings,
               "--helper", f"{phase}:{index}:{processes}"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else range(processes)
    return subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpus[index % len(gpus)])})


# ------------------------------------------------------------------------------------------- evaluation
def true_ranks(predictions: np.ndarray, gallery: np.ndarray, pool: int | None = POOL,
               cosine: bool = False) -> np.ndarray:
    """1-based rank of each query's own image (query i, gallery row i) in consecutive pools; None: the whole gallery.

    Scores are raw dot products, as in the official code; `cosine` gives images unit length (the length of a
    prediction moves no rank). A tie counts against the query, so a constant prediction earns nothing.
    """
    if not np.isfinite(predictions).all():
        raise ValueError("predictions hold NaN or infinity")
    if cosine:
        gallery = gallery / np.linalg.norm(gallery, axis=1, keepdims=True).clip(1e-12)
    size, ranks = pool or len(gallery), []
    for start in range(0, len(gallery), size):
        scores = predictions[start:start + size] @ gallery[start:start + size].T
        ranks.append((scores >= scores.diagonal()[:, None]).sum(axis=1))
    return np.concatenate(ranks)


def reciprocal_ranks(ranks: np.ndarray, pool: int | None) -> np.ndarray:
    """1/rank; in pools only the first 99 ranks count, as in the official code."""
    return np.where(ranks <= (TOP if pool else np.inf), 1 / ranks, 0.0)


def retrieval_metrics(predictions: np.ndarray, gallery: np.ndarray, pool: int | None = POOL,
                      cosine: bool = False) -> dict[str, float]:
    """The official numbers for predictions (q, d) against gallery (q, d): MRR, Recall@k, NDCG, mean L2 distance."""
    ranks = true_ranks(predictions, gallery, pool, cosine)
    gains = reciprocal_ranks(ranks, pool)
    return {"mrr": float(gains.mean()), "mrr_se": float(gains.std(ddof=1) / math.sqrt(len(gains))),
            **{f"recall@{k}": float((ranks <= k).mean()) for k in (1, 3, 5, 10, 50)},
            "ndcg": float(np.where(gains > 0, 1 / np.log2(ranks + 1), 0).mean()),
            "l2": float(np.linalg.norm(predictions - gallery, axis=1).mean())}


def evaluate(predictions: np.ndarray, gallery: np.ndarray) -> dict[str, dict[str, float]]:
    """Metrics of predictions (views, m, d) against m images: means over views, standard errors over images."""
    tables = {}
    for name, how in (("pool100_raw", (POOL, False)), ("pool100_cosine", (POOL, True)), ("full_cosine", (None, True))):
        views = [retrieval_metrics(view, gallery, *how) for view in predictions]
        gains = np.mean([reciprocal_ranks(true_ranks(view, gallery, *how), how[0]) for view in predictions], axis=0)
        tables[name] = {key: float(np.mean([view[key] for view in views])) for key in views[0]}
        tables[name]["mrr_se"] = float(gains.std(ddof=1) / math.sqrt(len(gains)))  # captions of one image go together
    return tables


def validation_predictions(run: Run, members: list[dict]) -> np.ndarray:
    """Predictions (views, m, d) of `members` for the captions of the run's m validation images."""
    views = caption_views(run.train.image_of, run.val_images)
    return predict(make_bundle(run, members), run.train.text[views.ravel()], run.device).reshape(*views.shape, -1)


def validate(run: Run, predictions: np.ndarray) -> dict[str, dict[str, float]]:
    """Metrics of predictions (views, m, d) as they would be submitted, against the run's validation images."""
    bundle = make_bundle(run, [])
    return evaluate(np.stack([repel(bundle, view) for view in predictions]), run.train.images[run.val_images])


def report(run: Run, members: list[dict]) -> dict[str, dict[str, float]]:
    """Print the validation table, members beside their mean, and the original's line on seen images."""
    predictions = validation_predictions(run, members)
    result = validate(run, predictions)
    log(f"\nvalidation on {len(run.val_images)} unseen images, {VIEWS} captions each, pools of {POOL}")
    log(f"{'':15}{'MRR':>7}{'+-':>8}" + "".join(f"{key:>11}" for key in list(result["pool100_raw"])[2:]))
    for name, row in result.items():
        log(f"{name:15}{row['mrr']:7.4f}{row['mrr_se']:8.4f}" + "".join(f"{v:11.4f}" for v in list(row.values())[2:]))
    if run.knobs.repulsion:
        plain = evaluate(predictions, run.train.images[run.val_images])
        log(f"the same without repulsion: raw {plain['pool100_raw']['mrr']:.4f}, "
            f"cosine {plain['pool100_cosine']['mrr']:.4f} (--set repulsion=0)")
    if len(members) > 1:
        report_members(run, members)
    seen = run.train_images[:1000]
    text = run.train.text[caption_views(run.train.image_of, seen, 1)[0]]
    row = retrieval_metrics(predict(make_bundle(run, members), text, run.device), run.train.images[seen])
    log(f"evaluation on a training subset ({len(seen)} seen images, no measure of quality): MRR {row['mrr']:.4f}\n")
    return result


def report_members(run: Run, members: list[dict]) -> None:
    """Each member's own score and its mean cosine to the others: diversity counts for more than the number."""
    each = [validation_predictions(run, [member]) for member in members]
    units = np.stack([one[0] / np.linalg.norm(one[0], axis=1, keepdims=True) for one in each])
    cosines = np.einsum("aid,bid->ab", units, units) / units.shape[1]
    for k, member in enumerate(members):
        own = validate(run, each[k])
        others = (cosines[k].sum() - cosines[k, k]) / (len(members) - 1)
        log(f"member {k}: raw {own['pool100_raw']['mrr']:.4f}  cosine {own['pool100_cosine']['mrr']:.4f}  "
            f"mean cosine to the others {others:.3f}  ({', '.join(differences(run.knobs, member['knobs']))})")


def differences(knobs: Knobs, changed: dict[str, Any]) -> list[str]:
    """How a member differs from its recipe."""
    return [f"{k}={v}" for k, v in changed.items() if v != getattr(knobs, k)] or ["as the recipe"]


# ------------------------------------------------------------------------------------------- submission
def make_bundle(run: Run, members: list[dict]) -> dict[str, Any]:
    """What is needed, with this script, to predict: knobs, dimensions and the weights of every member."""
    return {"knobs": dataclasses.asdict(run.knobs), "dims": [run.train.text.shape[1], run.train.images.shape[1]],
            "length": float(np.linalg.norm(run.train.images, axis=1).mean()), "members": members,
            "val_images": [run.train.image_names[i] for i in run.val_images]}


def load_weights(path: Path) -> dict[str, Any]:
    """A bundle written by `make_bundle`, checked as far as to predict with it."""
    bundle = load_torch(path)
    try:
        text = np.zeros((1, bundle["dims"][0]), np.float32)
        bundle["knobs"]["recipe"], bundle["knobs"]["split_seed"], list(bundle["val_images"])
        repel(bundle, predict(bundle, text))
    except Exception as error:  # any mixture of wrong keys, types and shapes
        raise UserError(f"{path}: holds no weights of this script ({first_line(error)}); fetch it again") from error
    return bundle


@torch.inference_mode()
def predict(bundle: dict[str, Any], text: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """Predicted image vectors (n, d_image) float32 of text vectors (n, d_text): mean direction of the members.

    In float32 whatever the training's type: it costs a second. The baseline's own lengths are kept; a direction
    gets the mean length of the training images.
    """
    d_text, d_image = bundle["dims"]
    if text.shape[1] != d_text:
        raise UserError(f"weights take {d_text}-d captions, the data has {text.shape[1]}-d ones; use the run's data")
    total = np.zeros((len(text), d_image), np.float32)
    for member in bundle["members"]:
        knobs = Knobs(**member["knobs"])
        with torch.device("meta"):  # no memory and no time for initial weights, whatever a damaged file claims
            model = NETWORKS[knobs.network](d_text, d_image, knobs)
        model.load_state_dict(member["state"], assign=True)
        model.eval().to(device)
        blocks = torch.from_numpy(text).split(knobs.infer_batch)
        output = torch.cat([model(block.to(device)).cpu() for block in blocks])
        if len(bundle["members"]) == 1 and knobs.network == "mlp":
            return output.numpy()
        total += F.normalize(output, dim=1).numpy()
    return total * np.float32(bundle["length"] / len(bundle["members"]))


def repel(bundle: dict[str, Any], predictions: np.ndarray) -> np.ndarray:
    """Predictions (n, d) in the order of evaluation, each pushed off those of its pool that are most like it.

    A pool's captions belong to different images, so what two predictions share tells neither's image from the
    other's: p_i - strength * sum_j softmax_j(cos(p_i, p_j) / .1) p_j. It needs the captions of a pool alone, no image.
    """
    strength, pools = bundle["knobs"]["repulsion"], []
    if not strength:
        return predictions
    for start in range(0, len(predictions), POOL):
        unit = F.normalize(torch.from_numpy(predictions[start:start + POOL]), dim=1)
        likeness = (unit @ unit.T / 0.1).fill_diagonal_(-math.inf)
        pushed = unit - strength * likeness.softmax(dim=1).nan_to_num() @ unit
        pools.append(F.normalize(pushed, dim=1).numpy() * np.float32(bundle["length"]))
    return np.concatenate(pools)


def write_submission(path: Path, ids: np.ndarray, predictions: np.ndarray) -> None:
    """The competition's csv; six significant digits keep every rank at half the size."""
    if not np.isfinite(predictions).all():
        raise UserError(f"{path}: not written: predictions hold NaN or infinity; get the weights again")
    with atomic(path) as temporary, temporary.open("w") as file:
        file.write("id,embedding\n")
        pattern = ", ".join(["%.6g"] * predictions.shape[1])
        for number, row in zip(ids, predictions.tolist(), strict=True):
            file.write(f'{number},"[{pattern % tuple(row)}]"\n')


def check_submission(path: Path, ids: np.ndarray, dim: int) -> None:
    """Re-read a submission; raises UserError on a wrong header, id, dimension or value."""
    try:
        with Path(path).open(newline="") as file:
            csv.field_size_limit(1 << 24)
            check_rows(path, csv.reader(file), ids, dim)
    except (OSError, ValueError, OverflowError, csv.Error, RecursionError) as error:
        raise UserError(f"{path}: not a readable submission ({str(error)[:100]})") from error


def check_rows(path: Path, reader: Iterator[list[str]], ids: np.ndarray, dim: int) -> None:
    header = next(reader, [])
    if header != ["id", "embedding"]:
        raise UserError(f"{path}: header is '{','.join(header)[:60]}', expected 'id,embedding'")
    first, varies, count = None, False, 0
    for count, cells in enumerate(reader, 1):
        if count > len(ids):
            raise UserError(f"{path}: more than {len(ids)} rows")
        if len(cells) != 2 or cells[0] != str(ids[count - 1]):
            raise UserError(f"{path}: row {count}: expected id {ids[count - 1]} and one quoted list, "
                            f"found '{','.join(cells)[:40]}'")
        values = json.loads(cells[1])
        if not isinstance(values, list) or len(values) != dim:
            raise UserError(f"{path}: row {count} (id {cells[0]}): expected a list of {dim} numbers")
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            raise UserError(f"{path}: row {count} (id {cells[0]}): NaN, infinity or no number")
        first = first or values
        varies |= values != first
    if count < len(ids):
        raise UserError(f"{path}: {count} rows, expected {len(ids)}; the first missing id is {ids[count]}")
    if not varies and count > 1:
        raise UserError(f"{path}: all predictions are equal")


def submit(path: Path, test: TestSet, bundle: dict[str, Any], device: torch.device) -> None:
    """Predict the test captions, write the csv, read it back."""
    write_submission(path, test.caption_ids, repel(bundle, predict(bundle, test.text, device)))
    check_submission(path, test.caption_ids, bundle["dims"][1])
    log(f"submission: {path} ({path.stat().st_size / 1e6:.1f} MB, {len(test.caption_ids)} rows, read back and checked)")


# ------------------------------------------------------------------------------------------------- main
# Knobs that change how a run is carried out, not what it computes: a resumed run may have others. The rows of a
# product are none of them: another shape is another order of sums.
CARRIED_OUT = ("mode", "device", "dtype", "max_minutes", "submit_on_stop", "checkpoint_seconds", "processes",
               "eval_every", "checkpoint_every", "warm_start")


def prepare(source: Path, output: Path, knobs: Knobs) -> Run:
    """Read and check the inputs, make the output folder, choose device and number type."""
    paths = [find_file(source, name) for name in ("train.npz", "test.clean.npz")]
    train, test = read_train(paths[0]), read_test(paths[1])
    for key, ours, theirs in (("captions/embeddings", train.text.shape[1], test.text.shape[1]),
                              ("metadata/embedding_dim_image", train.images.shape[1], test.image_dim)):
        if ours != theirs:
            raise UserError(f"{paths[1]}: {key}: {theirs} dimensions, but {paths[0]} has {ours}")
    train_images, val_images = split_images(len(train.images), knobs.val_fraction, knobs.split_seed)
    make_folder(output)
    inputs = {path.name: file_facts(path) for path in paths}
    log(f"data: {len(train.text)} captions x {train.text.shape[1]}, {len(train.images)} images x "
        f"{train.images.shape[1]}, {len(test.text)} test captions; read in {time.monotonic() - STARTED:.1f} s")
    compared = {key: value for key, value in dataclasses.asdict(knobs).items() if key not in CARRIED_OUT}
    fingerprint = hashlib.sha256(json.dumps([inputs, compared]).encode()).hexdigest()
    device = choose_device(knobs)
    dtype = choose_dtype(device, knobs)
    text = torch.from_numpy(train.text).to(device, dtype)
    run = Run(source, output, knobs, train, test, inputs, device, dtype, text, train_images, val_images,
              Stop(knobs.max_minutes), fingerprint, seconds={"load": time.monotonic() - STARTED})
    if knobs.warm_start:
        run.warm = {"validate": warm_bundle(run, VALIDATED_MODEL), "refit": warm_bundle(run, FINAL_MODEL)}
    return run


def make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"{output}: cannot be written to ({error}); choose another --output") from error


def warm_bundle(run: Run, name: str) -> dict[str, Any]:
    """Weights to start a phase from; had they seen the validation images, the figure would be a lie."""
    path = find_file(run.source, name)
    bundle = load_weights(path)
    if name == VALIDATED_MODEL and bundle["val_images"] != [run.train.image_names[i] for i in run.val_images]:
        raise UserError(f"{path}: was validated on other images; --set split_seed={bundle['knobs']['split_seed']}")
    theirs = [(one["knobs"]["network"], one["knobs"]["hidden"]) for one in bundle["members"]]
    ours = [(knobs.network, knobs.hidden) for k in range(run.knobs.members) for knobs in [member_knobs(run.knobs, k)]]
    if (theirs, bundle["dims"]) != (ours, [run.train.text.shape[1], run.train.images.shape[1]]):
        raise UserError(f"{path}: has other members or dimensions; take its recipe, {bundle['knobs']['recipe']}")
    return bundle


def take_up_or_plan(run: Run) -> None:
    """Go on with an interrupted run found in the output folder or below the input root, or plan a new one."""
    path = run.output / RESUME_RUN
    for half in run.output.glob(".*.part"):  # of a killed run
        half.unlink(missing_ok=True)
    if not path.exists() and any(run.source.rglob(RESUME_RUN)):
        earlier = find_file(run.source, RESUME_RUN).parent
        for state in [*earlier.glob("resume_*_*"), earlier / RESUME_RUN]:  # the index last: it makes the others count
            shutil.copyfile(state, run.output / state.name)
    if path.exists():
        try:
            state = json.loads(path.read_text())
            same, planned = state["fingerprint"] == run.fingerprint, {k: int(state[k]) for k in ("epochs", "members")}
            device, dtype = state["device"], DTYPES[state["dtype"]]
        except Exception as error:
            raise UserError(f"{path}: damaged ({first_line(error)}); delete resume_* there to start anew") from error
        if not same:
            raise UserError(f"{run.output}: holds an unfinished run of other data or knobs; choose another --output, "
                            "or delete resume_* there to start anew")
        run.knobs = check_knobs(dataclasses.replace(run.knobs, **planned))
        if (device, run.knobs.dtype) == (run.device.type, "auto"):  # a new timing might choose another one
            run.dtype, run.text = dtype, torch.from_numpy(run.train.text).to(run.device, dtype)
        return
    for stale in [run.output / MANIFEST, *run.output.glob("resume_*"), *run.output.glob(CHECKPOINT.format("*"))]:
        stale.unlink(missing_ok=True)
    run.knobs = plan(run)
    write_json(path, {"fingerprint": run.fingerprint, "epochs": run.knobs.epochs, "members": run.knobs.members,
                      "device": run.device.type, "dtype": str(run.dtype).removeprefix("torch.")})


def plan(run: Run) -> Knobs:
    """Epochs and members that fit the time budget, from a few timed steps of every member."""
    knobs, task, cost = run.knobs, make_task(run, run.train_images), 0.0
    for member in range(knobs.members):
        trainer = Trainer(run, task, "plan", member)
        if trainer.knobs.network != "linear":
            cost += trainer.steps * trainer.knobs.epochs * step_seconds(trainer)
    if knobs.refit:
        cost *= 1 + len(run.train.images) / len(run.train_images)
    share = (run.stop.deadline - time.monotonic()) / max(cost, 1e-9)
    if share >= 1:
        return knobs
    members = max(1, math.ceil(knobs.members * min(1, 2 * share)))  # fewer epochs first, from half on fewer members
    epochs = max(1, int(knobs.epochs * min(1, share * knobs.members / members)))
    log(f"time budget: all of it would train for {cost / 60:.1f} min; {members} member(s) of {epochs} epochs fit")
    return dataclasses.replace(knobs, members=members, epochs=epochs)


def step_seconds(trainer: Trainer, steps: int = 3) -> float:
    """Seconds of one training step; the first one pays for start-up and is not counted."""
    captions = trainer.task.captions[:trainer.batch]
    trainer.update(captions)
    start = float(trainer.loss_sum) * 0 + time.monotonic()  # reading the loss waits for the device
    for _ in range(steps):
        trainer.update(captions)
    return (float(trainer.loss_sum) * 0 + time.monotonic() - start) / steps


def train_and_submit(run: Run) -> int:
    """Validate on held-out images, refit on all, predict, write everything down; the exit code."""
    take_up_or_plan(run)
    log(f"recipe: {run.knobs.recipe}, {run.knobs.members} member(s), {run.knobs.epochs} epochs, seed {run.knobs.seed}")
    with run.timed("train"):
        members = train_phase(run, "validate", run.train_images)
    validation = report(run, members)
    save_torch(run.output / VALIDATED_MODEL, make_bundle(run, members))
    with run.timed("refit"):
        if run.knobs.refit and not run.stop.reason:
            refitted = train_phase(run, "refit", np.arange(len(run.train.images)))
            if all(member["finished"] for member in refitted) and len(refitted) == len(members):
                members = refitted
    if run.stop.signal and not run.knobs.submit_on_stop:
        log(f"stopped by {run.stop.reason}; the same command goes on from here")
        return 128 + run.stop.signal
    bundle = make_bundle(run, members)
    save_torch(run.output / FINAL_MODEL, bundle)
    with run.timed("predict"):
        submit(run.output / SUBMISSION, run.test, bundle, run.device)
    write_records(run, validation)
    return 128 + run.stop.signal if run.stop.signal else 0


def write_records(run: Run, validation: dict[str, dict]) -> None:
    """metrics.json, the training log and its picture, and last the manifest that vouches for all of them."""
    run.seconds["total"] = time.monotonic() - STARTED
    validating = round(run.seconds.pop("validate", 0.0), 2)  # a part of training's seconds
    seconds = {part: round(value, 2) for part, value in run.seconds.items()}
    machine = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    facts = {"recipe": run.knobs.recipe, "device": machine, "dtype": str(run.dtype).removeprefix("torch."),
             "seconds": seconds}
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    device = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else 0
    write_json(run.output / METRICS,
               facts | {"validate_seconds": validating, "peak_rss_bytes": rss, "peak_device_bytes": device,
                        "validation": validation})
    with atomic(run.output / TRAINING_LOG) as temporary:
        history_of(run).to_csv(temporary, index=False)
    draw_curves(run)
    knobs = dataclasses.asdict(run.knobs)
    finish(run.output, facts | {"stopped": run.stop.reason, "inputs": run.inputs, "knobs": knobs})
    if not run.stop.reason:  # nothing is left to resume
        for state in run.output.glob("resume_*"):
            state.unlink()
    log(f"done in {run.seconds['total']:.1f} s; outputs in {run.output}")


def history_of(run: Run) -> pd.DataFrame:
    """The training table of all members and phases."""
    return pd.DataFrame(run.history, columns=list(LOG_COLUMNS))


def finish(output: Path, facts: dict[str, Any]) -> None:
    """The manifest: sha256 and size of every output beside what made it."""
    names = [SUBMISSION, FINAL_MODEL, VALIDATED_MODEL, METRICS, TRAINING_LOG, CURVES]
    outputs = [path for path in [*map(output.joinpath, names), *output.glob(CHECKPOINT.format("*"))] if path.exists()]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    write_json(output / MANIFEST, {"complete": facts.get("stopped", "") in ("", BUDGET), "versions": versions, **facts,
                                   "outputs": {path.name: file_facts(path) for path in sorted(outputs)}})


def draw_curves(run: Run) -> None:
    """Loss and validation MRR by epoch, one line a member and phase."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (phase, member), rows in history_of(run).groupby(["phase", "member"]):
        tested, colour = rows.dropna(subset="pool100_raw"), f"C{member}"
        left.plot(rows["epoch"], rows["loss"], "-" if phase == "validate" else ":", color=colour,
                  label=f"member {member}, {phase}")
        for name, style in (("raw", "o-"), ("cosine", "s--")) if len(tested) else ():
            right.plot(tested["epoch"], tested[f"pool100_{name}"], style, color=colour,
                       label=f"member {member}, {name}")
    left.set(xlabel="epoch", ylabel="training loss", title="Training loss")
    right.set(xlabel="epoch", ylabel=f"MRR in pools of {POOL}", title="Validation on unseen images")
    for axes in [axes for axes in (left, right) if axes.lines]:
        axes.legend(fontsize=8)
    with atomic(run.output / CURVES) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def predict_only(source: Path, output: Path, knobs: Knobs) -> int:
    """The submission from weights found below the input root; no training data is needed."""
    weights, test_path = find_file(source, FINAL_MODEL), find_file(source, "test.clean.npz")
    bundle, test = load_weights(weights), read_test(test_path)
    if bundle["dims"][1] != test.image_dim:
        raise UserError(f"{weights}: predicts {bundle['dims'][1]} dimensions, but {test_path} wants {test.image_dim}")
    make_folder(output)
    submit(output / SUBMISSION, test, bundle, choose_device(knobs))
    finish(output, {"recipe": bundle["knobs"]["recipe"], "knobs": dataclasses.asdict(knobs),
                    "inputs": {path.name: file_facts(path) for path in (weights, test_path)},
                    "seconds": {"total": round(time.monotonic() - STARTED, 2)}})
    return 0


def help_train(run: Run, phase: str, index: int, processes: int) -> int:
    """A helper process: its share of the members, whose states are its result."""
    run.stop.parent = os.getppid()
    run.fingerprint = json.loads((run.output / RESUME_RUN).read_text())["fingerprint"]  # of knobs before planning
    task = make_task(run, run.train_images if phase == "validate" else np.arange(len(run.train.images)))
    for member in range(index, run.knobs.members, processes):
        train_member(run, task, phase, member)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=Path("/kaggle/input"), help="the data lies anywhere below it")
    parser.add_argument("--output", type=Path, default=Path("/kaggle/working"), help="folder to write to")
    parser.add_argument("--recipe", help=f"one of {', '.join(RECIPES)} (default {Knobs.recipe})")
    parser.add_argument("--mode", help="train (default) or predict")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one knob (repeatable)")
    parser.add_argument("--helper", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    try:
        named = {key: value for key in ("recipe", "mode") if (value := getattr(given, key)) is not None}
        knobs = resolve_knobs({**named, **dict(map(parse_setting, given.set))})
        if knobs.mode == "predict":
            return predict_only(given.input, given.output, knobs)
        run = prepare(given.input, given.output, knobs)
        if given.helper:
            phase, index, processes = given.helper.split(":")
            return help_train(run, phase, int(index), int(processes))
        return train_and_submit(run)
    except KeyboardInterrupt:  # before training, which notes signals itself
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 2)


if __name__ == "__main__" and (code := main()):  # no SystemExit after success: a notebook would show it as a failure
    sys.exit(code)
