"""Photos and captions -> pairs.npz in the competition's layout: more training pairs, or photos of your own.

    python kernel/embed.py --captions captions.csv --photos DIR --output out    csv `image,caption`, or COCO's json
    python kernel/embed.py ... --check train.npz --photos DIR IMAGES            first compare with stored vectors
    python kernel/embed.py                  on Kaggle: COCO and the competition, attached -> /kaggle/working/pairs.npz

Photos: DINOv2-giant, mean of all tokens (1536). Captions: RoBERTa, mean of the tokens that are no padding (1024).
Neither is normalised. Photos are found by name at any depth below --photos. A killed run goes on from its shards.
Needs torch, numpy, pillow and transformers (`pip install -r requirements-embed.txt`); a GPU for more than a try.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# ------------------------------------------------------------------------------------------------ knobs
# A pushed copy carries its own values here, by option name; the command line beats them.
OVERRIDES: dict = {}

STARTED = time.monotonic()
ON_KAGGLE = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
PAIRS, MANIFEST, SHARDS = "pairs.npz", "manifest.json", "embed_shards"
MAX_TOKENS = 128  # sentence-transformers' limit for this text encoder
LONGEST_CAPTION = 2000  # characters; a text array is as wide as its longest row
CHECKED, SAME = 50, 0.999  # rows compared with the competition's, and the cosine that the same encoder reaches
SHARD = 256  # photos a shard: what a killed run loses at most
PHOTOS_SHARE = 0.8  # of the time budget; the rest is for the captions and for writing
CAPTIONS_A_PHOTO = 8  # a caption costs less than a photo by far: so much larger are its batches and shards


class UserError(Exception):
    """What was given is wrong; one line that names the thing, the place and the next step."""

    exit_code = 2


class Parser(argparse.ArgumentParser):
    """A wrong option is an error like any other: one line."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; --help lists the options")


def make_parser() -> Parser:
    """The options, each with what it is for."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--captions",
        default="captions_train2017.json",
        metavar="FILE",
        help="csv with the header image,caption, or COCO's captions json: a path, or a name below --photos",
    )
    add("--input", type=Path, default=Path("/kaggle/input"), metavar="DIR", help="what is not named lies below it")
    add("--photos", type=Path, nargs="+", metavar="DIR", help="the photos' folders (default: --input)")
    add("--output", type=Path, default=Path("/kaggle/working"), metavar="DIR", help="folder to write to")
    add(
        "--check",
        default="train.npz" if ON_KAGGLE else None,
        metavar="FILE",
        help=f"embed {CHECKED} photos and captions of this train.npz first and stop if they differ from its vectors "
        "(on Kaggle by default; --check= leaves it out)",
    )
    add("--missing", choices=("error", "skip"), default="error", help="captions whose photo is not there")
    add("--limit", type=int, default=0, metavar="N", help="the first N photos only (default all)")
    add("--image-model", default="facebook/dinov2-giant", metavar="NAME", help="a folder, or a name of the hub")
    add("--text-model", default="sentence-transformers/roberta-large-nli-stsb-mean-tokens", metavar="NAME")
    add("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto")
    add(
        "--max-minutes",
        type=float,
        default=700.0 if ON_KAGGLE else math.inf,
        metavar="M",
        help="write what is embedded by then: Kaggle ends a session at 12 h and keeps nothing (elsewhere no end)",
    )
    return parser


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value` as an option's name and its text, or number."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise UserError(f"--set {text}: expected KEY=VALUE, such as --set limit=25000")
    typed = getattr(resolve_knobs({key: value}), key.replace("-", "_"))
    return key, typed if isinstance(typed, int | float) else value


def resolve_knobs(settings: dict[str, Any], argv: Sequence[str] = ()) -> argparse.Namespace:
    """All options, checked: `argv` beats `settings` beats the defaults."""
    given = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    knobs = make_parser().parse_args([*given, *argv])
    knobs.photos = knobs.photos or [knobs.input]
    if knobs.limit < 0 or not knobs.max_minutes > 0:
        raise UserError(f"--limit {knobs.limit} --max-minutes {knobs.max_minutes:g}: no less than 0 and more than 0")
    return knobs


# ---------------------------------------------------------------------------------------------- plumbing
def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def log(text: str) -> None:
    """One plain line at once, for Kaggle's log."""
    print(text, flush=True)


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Damaged bytes can fail anywhere in decoding: one line whatever it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {what} cannot be read ({type(error).__name__}: {first_line(error)})") from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block succeeds: nobody ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); free some space or choose another --output") from error
    finally:
        temporary.unlink(missing_ok=True)


def digest(content: object) -> str:
    """The first half of the sha256 of plain values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------ captions and photos
def files_below(folders: list[Path]) -> Iterator[Path]:
    """Every file at any depth; a folder that a link shows twice counts once."""
    seen: set[str] = set()
    for root in folders:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give the photos' folder with --photos")
        for folder, below, files in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
            else:
                yield from (Path(folder, file) for file in files)
            seen.add(real)


def find_files(folders: list[Path], names: Iterable[str]) -> dict[str, Path]:
    """Where each name lies, if it does. A name may hold folders: they tell files called alike apart."""
    wanted: dict[str, list[str]] = {}
    for name in names:
        wanted.setdefault(PurePosixPath(name).name, []).append(name)
    found: dict[str, Path] = {}
    log(f"looking for {len(wanted):,} file(s) below {', '.join(map(str, folders))}")
    for path in files_below(folders):
        for name in wanted.get(path.name, []):
            if f"/{path.as_posix()}".endswith(f"/{name}"):
                other = found.setdefault(name, path)
                if other is not path and not other.samefile(path):
                    raise UserError(f"{name}: more than one such file: {other} and {path}; narrow --photos")
    return found


def find_file(name: str, folders: list[Path]) -> Path:
    """The file at the path `name`, or the one file of that name below the folders."""
    found = Path(name) if Path(name).is_file() else find_files(folders, [name]).get(name)
    if not found:
        raise UserError(f"{name}: no such file, here or below {', '.join(map(str, folders))}; give its path")
    return found


def csv_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place, photo's name, caption) of each row of a csv."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if (rows.fieldnames or [])[:2] != ["image", "caption"]:
            raise UserError(f"{path}: its header is {','.join(rows.fieldnames or []) or 'empty'}, not image,caption")
        for row in rows:
            caption = (row["caption"] or "").strip()
            if None in row or "\n" in caption:  # cut at a comma, or run on through lines: wrong captions without a word
                problem = "a comma or a quote in the caption"
                raise UserError(f"{path}: line {rows.line_num}: {problem}; put it in quotes, as csv does")
            yield f"line {rows.line_num}", row["image"] or "", caption


def coco_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place, photo's name, caption) of each annotation of COCO's captions json."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise UserError(f"{path}: no `images` and `annotations`, so this is not COCO's captions json")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for row, annotation in enumerate(content["annotations"]):
        if "caption" not in annotation:
            raise UserError(f"{path}: annotation {row} has no caption; use COCO's captions_*.json")
        if annotation["image_id"] not in names:
            raise UserError(f"{path}: annotation {row} is of image {annotation['image_id']!r}, which is not listed")
        yield f"annotation {row}", names[annotation["image_id"]], annotation["caption"]


def read_captions(path: Path) -> dict[str, list[str]]:
    """Photos in the order of the file, with the captions of each. Empty captions are left out and counted."""
    captions: dict[str, list[str]] = {}
    empty = 0
    with reading(path, "the captions"):
        for place, name, text in (coco_rows if path.suffix.lower() == ".json" else csv_rows)(path):
            caption = text.strip()  # as sentence-transformers does
            if not name or len(caption) > LONGEST_CAPTION:
                wrong = f"a caption of {len(caption)} characters" if name else "no photo's name"
                raise UserError(f"{path}: {place}: {wrong}; mend or remove it")
            if caption:
                captions.setdefault(name, []).append(caption)
            empty += not caption
    if not captions:
        raise UserError(f"{path}: holds no caption")
    log(
        f"{path}: {sum(map(len, captions.values())):,} captions of {len(captions):,} photos"
        + (f"; {empty} empty ones left out" if empty else "")
    )
    return captions


def choose_photos(captions: dict[str, list[str]], knobs: argparse.Namespace) -> dict[str, Path]:
    """The photos to embed, by name: those of the captions that are there, up to the limit."""
    found = find_files(knobs.photos, captions)
    below = ", ".join(map(str, knobs.photos))
    if not found:
        raise UserError(
            f"{below}: none of the {len(captions):,} photos is there, such as {next(iter(captions))}; "
            "give their folder with --photos"
        )
    if missing := [name for name in captions if name not in found]:
        problem = f"{len(missing):,} of {len(captions):,} photos are not below {below}, such as {missing[0]}"
        if knobs.missing == "error":
            raise UserError(f"{problem}; --missing skip leaves their captions out")
        log(f"{problem}; their captions are left out")
    there = [name for name in captions if name in found]
    return {name: found[name] for name in there[: knobs.limit or None]}


# ---------------------------------------------------------------------------------------------- encoders
def choose_machine(asked: str) -> tuple[torch.device, torch.dtype]:
    """The device that really works (a P100 fails on its first product), and fp16 where it has units for it.

    fp16 is three bits finer than bf16; should it overflow, `encode` says so.
    """
    device, reason = torch.device("cpu"), "torch sees no CUDA device"
    if torch.cuda.is_available():
        try:
            (torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")).sum().item()
            device, reason = torch.device("cuda", 0), torch.cuda.get_device_name()
        except RuntimeError as error:
            reason = f"CUDA probe failed: {first_line(error)}"
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    name = asked if asked != "auto" else "float16" if native else "float32"
    log(f"device: {device.type} ({reason}); dtype: {name} (fp16 is {'' if native else 'not '}native here)")
    return device, getattr(torch, name)


class Encoder:
    """A pretrained model whose tokens are averaged: what both encoders share."""

    option: str  # that names the model
    helper: str  # the class that prepares the model's input
    use_fast: bool  # whether it is the fast variant

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        try:
            import transformers  # takes seconds: what is wrong with the input is said before
        except ImportError as error:
            raise UserError(f"{first_line(error)}; pip install -r requirements-embed.txt") from error
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        log(f"loading {name}")
        try:
            prepare = getattr(transformers, self.helper).from_pretrained(name, use_fast=self.use_fast)
            model, info = transformers.AutoModel.from_pretrained(name, output_loading_info=True)
            self.width: int = model.config.hidden_size
            self.model = model.eval().to(device, dtype)
        except Exception as error:  # files, network, configuration, memory: each fails in its own way
            raise UserError(
                f"{self.option} {name}: cannot be loaded ({first_line(error)}); without internet give the "
                "folder of an attached model"
            ) from error
        if lacking := sorted(key for key in info["missing_keys"] if not key.startswith("pooler")):
            problem = f"its weights lack {lacking[0]} ({len(lacking)} in all): another model's?"
            raise UserError(f"{self.option} {name}: {problem}")
        self.name, self.prepare, self.device, self.dtype = name, prepare, device, dtype
        log(f"loaded {sum(p.numel() for p in model.parameters()):,} weights, {self.width} numbers a vector")

    def settings(self) -> dict[str, str]:
        """What the vectors depend on: model, a print of its weights, number type, preparation."""
        weights = [tensor.flatten()[:8].float().tolist() for tensor in self.model.state_dict().values()]
        return {
            "model": self.name,
            "weights": digest(weights)[:16],
            "dtype": str(self.dtype).removeprefix("torch."),
            "preparation": digest(repr(self.prepare))[:16],
        }

    @torch.inference_mode()
    def encode(self, items: list[Any]) -> np.ndarray:
        """(b, width) float32, not normalised."""
        vectors = self.average(items)
        if not torch.isfinite(vectors).all():
            raise UserError(f"{self.name}: a vector is not finite in {self.dtype}; use --dtype float32")
        return vectors.cpu().numpy()

    def read(self, item: Any) -> Any:
        """What `average` takes of an item; None for a damaged one."""
        return item

    def average(self, items: list[Any]) -> Tensor:
        """(b, width) float32."""
        raise NotImplementedError


class PhotoEncoder(Encoder):
    """The mean of all tokens, the class token's among them. An item is what `read` made of a photo."""

    option, helper = "--image-model", "AutoImageProcessor"
    use_fast = False  # Pillow's resizing on every machine

    def read(self, item: Path) -> Tensor | None:
        """A photo's pixels (3, height, width), as the model's own processor prepares them; None if it is damaged."""
        try:
            with Image.open(item) as image:
                return self.prepare(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        except MemoryError:
            raise
        except Exception:  # damaged bytes fail anywhere in Pillow's decoders
            return None

    def average(self, items: list[Tensor]) -> Tensor:
        pixels = torch.stack(items).to(self.device, self.dtype)
        return self.model(pixel_values=pixels).last_hidden_state.float().mean(dim=1)


class TextEncoder(Encoder):
    """The mean of the tokens that are no padding. An item is a caption."""

    option, helper, use_fast = "--text-model", "AutoTokenizer", True

    def average(self, items: list[str]) -> Tensor:
        tokens = self.prepare(items, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        tokens = tokens.to(self.device)
        mask = tokens["attention_mask"].unsqueeze(-1)  # (b, tokens, 1)
        hidden = self.model(**tokens).last_hidden_state.float()
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


# ------------------------------------------------------------------------------------- batches and shards
class Batches:
    """Encodes items in batches that fit the memory: one that does not is halved, and stays so for the rest."""

    def __init__(self, encoder: Encoder, size: int) -> None:
        self.encoder, self.size = encoder, size

    def encode(self, items: list[Any]) -> np.ndarray:
        """(len(items), width) float32. Taken by length, which saves most of the captions' padding."""
        order = sorted(range(len(items)), key=lambda row: len(items[row]))
        vectors, start = np.empty((len(items), self.encoder.width), np.float32), 0
        while start < len(items):
            rows = order[start : start + self.size]
            part = self.attempt([items[row] for row in rows])
            if part is None:  # tried again here: inside the except block its traceback still holds the tensors
                self.halve()
                continue
            vectors[rows] = part
            start += len(rows)
        return vectors

    def attempt(self, items: list[Any]) -> np.ndarray | None:
        """The vectors, or None if they do not fit the memory."""
        try:
            return self.encoder.encode(items)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate", str(error), re.I):
                raise
            return None

    def halve(self) -> None:
        if self.size == 1:
            raise UserError(f"{self.encoder.name}: not even a batch of one fits the memory of {self.encoder.device}")
        self.size //= 2
        log(f"out of memory: batches of {self.size} from here on")
        if self.encoder.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Shards:
    """Vectors of `total` items on disk, `rows` a file. A damaged photo's row is NaN."""

    folder: Path
    kind: str  # photos or captions
    rows: int
    total: int

    def spans(self) -> list[slice]:
        return [slice(start, min(start + self.rows, self.total)) for start in range(0, self.total, self.rows)]

    def path(self, span: slice) -> Path:
        return self.folder / f"{self.kind}_{span.start:08d}_{span.stop:08d}.npy"

    def save(self, span: slice, vectors: np.ndarray) -> None:
        with atomic(self.path(span)) as temporary, temporary.open("wb") as file:
            np.save(file, vectors)

    def load(self, span: slice) -> np.ndarray:
        """(rows, width) float32."""
        path = self.path(span)
        with reading(path, "this shard"):
            return np.load(path, allow_pickle=False)

    def blocks(self, kept: np.ndarray) -> Iterator[np.ndarray]:
        """The vectors of the `kept` items (total,) bool, shard by shard."""
        return (self.load(span)[kept[span]] for span in self.spans())


def open_shards(folder: Path, settings: dict[str, Any]) -> None:
    """Make the shards' folder with the settings that make them; one of other settings is refused."""
    path = folder / "settings.json"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error}); choose another --output") from error
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
    with reading(path, "the shards' settings"):
        made = json.loads(path.read_text())
        differ = [f"{key} {made.get(key)}, now {value}" for key, value in settings.items() if made.get(key) != value]
        if differ:
            raise UserError(f"{path}: the shards are of {'; '.join(differ)}; remove {folder} or give another --output")


class Progress:
    """A line at most every ten seconds: how many of how many, at what rate, how long still."""

    def __init__(self, what: str, total: int, done: int) -> None:
        self.what, self.total, self.first, self.done = what, total, done, done
        self.started = self.told = time.monotonic()
        log(f"{what:<8} {done:>9,} of {total:,}{' from an earlier run' if done else ''}")

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told >= 10 or self.done == self.total:
            self.told, rate = now, (self.done - self.first) / max(now - self.started, 1e-9)
            left = (self.total - self.done) / rate / 60
            log(f"{self.what:<8} {self.done:>9,} of {self.total:,}  {rate:8.1f}/s  {left:6.1f} min left")


def one_ahead(values: Iterable[Any]) -> Iterator[Any]:
    """The same values, each made before the one ahead of it is used."""
    waiting: list[Any] = []
    for value in values:
        waiting.append(value)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def embed_all(items: list[Any], batches: Batches, shards: Shards, deadline: float = math.inf) -> int:
    """Fill the shards that are missing, until the deadline; how many items have their vectors, from the first on.

    Threads read one shard's photos while the one before is embedded.
    """
    todo = [span for span in shards.spans() if not shards.path(span).exists()]
    progress = Progress(shards.kind, shards.total, shards.total - sum(span.stop - span.start for span in todo))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for span, reads in one_ahead((span, pool.map(batches.encoder.read, items[span])) for span in todo):
            inputs = list(reads)
            whole = [row for row, item in enumerate(inputs) if item is not None]
            vectors = np.full((len(inputs), batches.encoder.width), np.nan, np.float32)
            vectors[whole] = batches.encode([inputs[row] for row in whole])
            shards.save(span, vectors)
            progress.add(len(inputs))
            if time.monotonic() > deadline:
                break
    return next((span.start for span in shards.spans() if not shards.path(span).exists()), shards.total)


# ------------------------------------------------------------------------------------------------- check
def spread(count: int) -> np.ndarray:
    """Up to CHECKED of `count` rows, evenly spread."""
    return np.unique(np.linspace(0, count - 1, CHECKED).round().astype(int))


def compare(what: str, ours: np.ndarray, stored: np.ndarray) -> dict[str, float]:
    """Mean and lowest cosine of our vectors with the stored ones, both (n, d)."""
    if ours.shape[1] != stored.shape[1]:
        raise UserError(
            f"check: our {what} have {ours.shape[1]} numbers, the stored ones {stored.shape[1]}: "
            "give the same model as theirs"
        )
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(stored, axis=1)
    cosine = (ours * stored).sum(axis=1) / np.maximum(norms, 1e-12)
    return {"rows": len(ours), "mean": float(cosine.mean()), "lowest": float(cosine.min())}


def some_photos(train: Path, names: list[str], folders: list[Path], encoder: Encoder) -> dict[int, Tensor]:
    """Some of the competition's photos as the encoder takes them, by their row."""
    found = find_files(folders, names)
    there = [row for row, name in enumerate(names) if name in found]
    read = {there[i]: encoder.read(found[names[there[i]]]) for i in (spread(len(there)) if there else ())}
    whole = {row: pixels for row, pixels in read.items() if pixels is not None}
    if not whole:
        raise UserError(
            f"{train}: none of its photos below {', '.join(map(str, folders))} can be read, such as "
            f"{names[0]}; add their folder to --photos"
        )
    return whole


def check_encoders(train: Path, folders: list[Path], photos: Batches, captions: Batches) -> dict[str, dict]:
    """Embed some of the competition's own photos and captions; an error with both figures if they differ."""
    with (
        reading(train, "the competition's vectors"),
        train.open("rb") as file,  # np.load by the path would leave that of a damaged npz open
        np.load(file, allow_pickle=False) as arrays,
    ):
        pixels = some_photos(train, arrays["images/names"].tolist(), folders, photos.encoder)
        stored, texts = arrays["images/embeddings"][list(pixels)], arrays["captions/text"]
        result = {"photos": compare("photos", photos.encode(list(pixels.values())), stored)}
        some = spread(len(texts))
        result["captions"] = compare(
            "captions",
            captions.encode([str(text).strip() for text in texts[some]]),
            arrays["captions/embeddings"][some],
        )
    figures = "; ".join(
        f"{part['rows']} {what}, mean cosine {part['mean']:.5f}, lowest {part['lowest']:.5f}"
        for what, part in result.items()
    )
    if min(part["lowest"] for part in result.values()) < SAME:
        raise UserError(
            f"check: {figures}: below {SAME}, so these are not the encoders of {train} (in "
            f"{photos.encoder.settings()['dtype']}); nothing is written"
        )
    log(f"check: {figures}: the encoders of {train}")
    return result


# --------------------------------------------------------------------------------------------- pairs.npz
def write_array(archive: zipfile.ZipFile, key: str, dtype: Any, shape: tuple, blocks: Iterable[np.ndarray]) -> None:
    """One compressed array, block of rows by block: the whole is never held. Same rows, same bytes (no time stamp)."""
    info, rows = zipfile.ZipInfo(f"{key}.npy"), 0
    info.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(info, "w", force_zip64=True) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for block in blocks:
            stream.write(np.ascontiguousarray(block, dtype).tobytes())
            rows += len(block)
    assert rows == shape[0], f"{key}: {rows} rows of {shape}"


def in_blocks(values: list[str], rows: int = 65536) -> Iterator[np.ndarray]:
    """A long list as short arrays."""
    return (np.array(values[start : start + rows]) for start in range(0, len(values), rows))


def one_hot(image_of: np.ndarray, images: int) -> Iterator[np.ndarray]:
    """The label's rows (captions, images) in blocks of some 16 MB."""
    rows = max(1, (1 << 24) // images)
    for start in range(0, len(image_of), rows):
        yield image_of[start : start + rows, None] == np.arange(images)


def write_pairs(path: Path, captions: dict[str, list[str]], photos: Shards, texts: Shards) -> dict[str, Any]:
    """pairs.npz of the photos that could be read, with their captions; the counts, and the damaged photos' names.

    The label is always written: whatever the number of captions a photo has, the mapping is exact.
    """
    whole = np.concatenate([~np.isnan(photos.load(span)[:, 0]) for span in photos.spans()])
    counts = np.array([len(group) for group in captions.values()])
    kept = np.repeat(whole, counts)  # by caption
    names = [name for name, good in zip(captions, whole, strict=True) if good]
    damaged = [name for name, good in zip(captions, whole, strict=True) if not good]
    if damaged:
        log(f"{len(damaged):,} damaged photo(s) left out with their captions: {', '.join(damaged[:8])}")
    if not names:
        raise UserError("no photo is left, so there are no pairs; fetch the photos again")
    words = [text for name in names for text in captions[name]]
    n, m = len(words), len(names)
    d_text, d_image = texts.load(texts.spans()[0]).shape[1], photos.load(photos.spans()[0]).shape[1]
    sizes = {"num_captions": n, "num_images": m, "embedding_dim_text": d_text, "embedding_dim_image": d_image}
    log(f"writing {PAIRS}: {n:,} captions of {m:,} photos")
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for key, value in sizes.items():
            write_array(archive, f"metadata/{key}", np.int64, (1,), [np.array([value])])
        write_array(archive, "captions/ids", np.int64, (n,), [np.arange(1, n + 1)])
        write_array(archive, "captions/text", f"U{max(map(len, words))}", (n,), in_blocks(words))
        write_array(archive, "captions/embeddings", np.float32, (n, d_text), texts.blocks(kept))
        write_array(archive, "captions/label", np.bool_, (n, m), one_hot(np.repeat(np.arange(m), counts[whole]), m))
        write_array(archive, "images/names", f"U{max(map(len, names))}", (m,), in_blocks(names))
        write_array(archive, "images/embeddings", np.float32, (m, d_image), photos.blocks(whole))
    return sizes | {"damaged": damaged}


# ------------------------------------------------------------------------------------------ command line
def embed(knobs: argparse.Namespace) -> None:
    """Read, find, load, check, embed, write; the manifest comes last and vouches for the pairs."""
    if (manifest := knobs.output / MANIFEST).exists():
        raise UserError(f"{manifest}: pairs were made here already; remove it or give another --output")
    captions = read_captions(find_file(knobs.captions, knobs.photos))
    paths = choose_photos(captions, knobs)
    captions = {name: captions[name] for name in paths}
    photos, texts = load_encoders(knobs)
    checked = None
    if knobs.check:
        checked = check_encoders(find_file(knobs.check, knobs.photos), knobs.photos, photos, texts)
    settings: dict[str, Any] = {
        "input": digest(captions),
        "photos": photos.encoder.settings(),
        "captions": texts.encoder.settings(),
    }
    folder = knobs.output / SHARDS
    open_shards(folder, settings)
    photo_shards = Shards(folder, "photos", SHARD, len(paths))
    deadline = STARTED + 60 * knobs.max_minutes * PHOTOS_SHARE
    if (done := embed_all(list(paths.values()), photos, photo_shards, deadline)) < len(paths):
        log(f"time budget: {done:,} of {len(paths):,} photos are embedded; the others are left out")
        captions, photo_shards = dict(itertools.islice(captions.items(), done)), replace(photo_shards, total=done)
    words = [text for group in captions.values() for text in group]
    text_shards = Shards(folder, "captions", SHARD * CAPTIONS_A_PHOTO, len(words))
    embed_all(words, texts, text_shards)
    counts = write_pairs(folder / PAIRS, captions, photo_shards, text_shards)
    (folder / PAIRS).replace(knobs.output / PAIRS)
    finish(manifest, counts | {"check": checked, "not_in_time": len(paths) - done} | settings)
    shutil.rmtree(folder)  # with whatever killed runs left half written


def load_encoders(knobs: argparse.Namespace) -> tuple[Batches, Batches]:
    """Both encoders, with the batch sizes to begin at."""
    device, dtype = choose_machine(knobs.dtype)
    size = 256 if device.type == "cuda" else 8
    return (
        Batches(PhotoEncoder(knobs.image_model, device, dtype), size),
        Batches(TextEncoder(knobs.text_model, device, dtype), size * CAPTIONS_A_PHOTO),
    )


def finish(path: Path, facts: dict[str, Any]) -> None:
    """The manifest, as the kernel's: sha256 and size of the output beside what made it."""
    pairs = path.with_name(PAIRS)
    with pairs.open("rb") as file:
        digest_of = hashlib.file_digest(file, "sha256").hexdigest()
    output: dict[str, Any] = {"sha256": digest_of, "bytes": pairs.stat().st_size}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": sys.modules["transformers"].__version__,
    }
    with atomic(path) as temporary:
        content = {"complete": True, "versions": versions, **facts, "outputs": {PAIRS: output}}
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    log(f"done: {pairs}, {output['bytes']:,} bytes, sha256 {output['sha256'][:12]}")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        embed(resolve_knobs(OVERRIDES, sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from its shards", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 2)
    return 0


if __name__ == "__main__" and (code := main()):  # no SystemExit after success: a notebook would show it as a failure
    sys.exit(code)
