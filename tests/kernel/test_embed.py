"""Photos and captions to pairs.npz: pooled as by hand, resumed as if never killed, checked, and read by the kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib.kernel import load_script
from lib.project import KERNEL
from tiny_encoders import PROCESSOR, save_encoders

SCRIPT = KERNEL.with_name("embed.py")
CAPTIONS = {f"{i}.jpg": [f"a dog, number {i}" + " and another one" * k for k in range(1 + i % 3)] for i in range(11)}


# ------------------------------------------------------------------------------------------------ fixtures
@pytest.fixture(scope="module")
def embed() -> types.ModuleType:
    """The script as a module."""
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny DINOv2 and a tiny RoBERTa."""
    folder = tmp_path_factory.mktemp("models")
    save_encoders(folder / "photos", folder / "captions")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eleven photos in sub-folders, and their captions as csv and as COCO's json."""
    folder, draw = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for i, name in enumerate(CAPTIONS):
        path = folder / "photos" / "ab"[i % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40 + 3 * i, 60 - i, 3), dtype=np.uint8)).save(path)
    write_csv(folder / "captions.csv", CAPTIONS)
    annotations = [
        {"id": 7, "image_id": i, "caption": f"{text} \n"} for i, texts in enumerate(CAPTIONS.values()) for text in texts
    ]
    images = [{"id": i, "file_name": name, "width": 1} for i, name in enumerate(CAPTIONS)]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def write_csv(path: Path, captions: dict[str, list[str]]) -> Path:
    rows = [f'{name},"{text}"\n' for name, texts in captions.items() for text in texts]
    path.write_text("image,caption\n" + "".join(rows))
    return path


@pytest.fixture
def start(
    embed: types.ModuleType,
    models: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., int]:
    """Run the script in this process, with shards of four photos; later options beat the usual ones."""
    monkeypatch.setattr(embed, "SHARD", 4)
    monkeypatch.setattr(embed, "CAPTIONS_A_PHOTO", 2)
    usual = [
        "--captions",
        source / "captions.csv",
        "--photos",
        source / "photos",
        "--output",
        tmp_path / "out",
        "--image-model",
        models / "photos",
        "--text-model",
        models / "captions",
    ]
    return lambda *options: embed.main(list(map(str, [*usual, *options])))


@pytest.fixture
def fails(start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a run ends with, which writes nothing."""

    def run(*options: object) -> str:
        capsys.readouterr()
        assert start(*options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: "), error
        assert error.count("\n") == 1, error
        assert not (tmp_path / "out" / "pairs.npz").exists()
        assert not (tmp_path / "out" / "manifest.json").exists()
        return error

    return run


@pytest.fixture
def encoders(embed: types.ModuleType, models: Path) -> tuple[Any, Any]:
    """Both encoders, on the CPU in float32."""
    machine = torch.device("cpu"), torch.float32
    return (embed.PhotoEncoder(str(models / "photos"), *machine), embed.TextEncoder(str(models / "captions"), *machine))


# ------------------------------------------------------------------------------------------------ encoders
def by_hand(path: Path) -> torch.Tensor:
    """A photo as the processor's settings say, without the processor: (3, 28, 28)."""
    photo = Image.open(path).convert("RGB")
    short = min(photo.size)
    photo = photo.resize((int(photo.width * 32 / short), int(photo.height * 32 / short)), Image.Resampling.BICUBIC)
    left, top = (photo.width - 28) // 2, (photo.height - 28) // 2
    pixels = np.asarray(photo.crop((left, top, left + 28, top + 28)), np.float32) / 255
    mean, std = np.float32(PROCESSOR["image_mean"]), np.float32(PROCESSOR["image_std"])
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_a_photo_is_the_mean_of_all_its_tokens(encoders, models: Path, tmp_path: Path, mode: str):
    from transformers import Dinov2Model

    pixels = np.random.default_rng(1).integers(0, 256, (50, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "photo.png")
    photo = encoders[0].read(tmp_path / "photo.png")
    torch.testing.assert_close(photo, by_hand(tmp_path / "photo.png"), rtol=0, atol=1e-5)
    model = Dinov2Model.from_pretrained(models / "photos").eval()
    with torch.no_grad():
        tokens = model(photo[None]).last_hidden_state[0]
    assert tokens.shape == (1 + 2 * 2, 16)  # the class token and four patches
    vector = encoders[0].encode([photo])
    assert vector.dtype == np.float32
    assert vector.shape == (1, 16)
    np.testing.assert_allclose(vector[0], sum(token.numpy() for token in tokens) / 5, atol=1e-6)
    assert abs(np.linalg.norm(vector) - 1) > 0.1  # not normalised


def test_padding_does_not_leak_into_a_caption(encoders, models: Path):
    """Each caption beside much longer ones has the vector that it has alone."""
    from transformers import AutoTokenizer, RobertaModel

    captions = ["a dog", "two men walk on the grass beside a red ball", "a", "the cat sits " * 9]
    model, tokenizer = (
        RobertaModel.from_pretrained(models / "captions").eval(),
        AutoTokenizer.from_pretrained(models / "captions"),
    )
    together = encoders[1].encode(captions)
    for caption, vector in zip(captions, together, strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(caption)["input_ids"]])
            tokens = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].numpy()
        assert len(tokens) == len(caption.strip()) + 2 or caption.endswith(" ")  # bytes between <s> and </s>
        np.testing.assert_allclose(vector, tokens.sum(axis=0) / len(tokens), atol=1e-5)


def test_a_long_caption_is_cut_where_sentence_transformers_cuts(encoders):
    vectors = encoders[1].encode(["dog " * 60, "dog " * 80])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_a_number_type_that_overflows_is_told(embed, encoders):
    encoder = encoders[0]
    encoder.model.layernorm.weight.data.fill_(float("inf"))
    with pytest.raises(embed.UserError, match=r"not finite in .*; use --dtype float32"):
        encoder.encode([torch.zeros(3, 28, 28)])


def test_weights_of_another_model_are_refused(embed, models: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    for path in (models / "captions").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(embed.UserError, match=r"its weights lack encoder.layer.0.output.dense.weight \(1 in all\)"):
        embed.TextEncoder(str(tmp_path), torch.device("cpu"), torch.float32)


# ------------------------------------------------------------------------------------------------- batches
class Small:
    """Stands for an encoder on a machine where no more than `fits` items fit."""

    width, name, device = 2, "small", torch.device("cpu")

    def __init__(self, fits: int, error: Exception) -> None:
        self.fits, self.error, self.sizes = fits, error, []

    def encode(self, items: list[str]) -> np.ndarray:
        assert sys.exc_info() == (None, None, None)  # in an except block the failed batch would still be held
        self.sizes.append(len(items))
        if len(items) > self.fits:
            raise self.error
        return np.array([[len(item), len(items)] for item in items], np.float32)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_for_good(embed, error: Exception):
    encoder, items = Small(3, error), ["a" * (1 + (7 * i) % 11) for i in range(11)]
    vectors = embed.Batches(encoder, 8).encode(items)
    assert vectors[:, 0].tolist() == [len(item) for item in items]
    assert encoder.sizes == [8, 4, 2, 2, 2, 2, 2, 1]


def test_a_batch_of_one_that_does_not_fit_and_any_other_error_end_the_run(embed):
    with pytest.raises(embed.UserError, match="small: not even a batch of one fits the memory of cpu"):
        embed.Batches(Small(0, MemoryError()), 8).encode(["a", "b"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        embed.Batches(Small(0, RuntimeError("shapes cannot be multiplied")), 8).encode(["a", "b"])


# ------------------------------------------------------------------------------------------------- a whole run
def test_the_kernel_reads_what_was_made(kernel, encoders, start, source: Path, tmp_path: Path):
    assert start() == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "pairs.npz"]
    pairs = kernel.read_train(tmp_path / "out" / "pairs.npz")
    words = [text for texts in CAPTIONS.values() for text in texts]
    assert pairs.image_names == list(CAPTIONS)
    assert pairs.captions == words
    assert pairs.image_of.tolist() == [i for i, texts in enumerate(CAPTIONS.values()) for _ in texts]
    assert pairs.caption_ids.tolist() == list(range(1, len(words) + 1))
    asked = kernel.read_test(tmp_path / "out" / "pairs.npz")  # its captions alone are a test set
    assert asked.captions == words
    assert (asked.text == pairs.text).all()
    assert asked.image_dim == 16
    photos = [encoders[0].read(source / "photos" / "ab"[i % 2] / name) for i, name in enumerate(CAPTIONS)]
    np.testing.assert_allclose(pairs.images, encoders[0].encode(photos), atol=1e-5)
    np.testing.assert_allclose(pairs.text, encoders[1].encode(words), atol=1e-5)
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert record["outputs"] == {"pairs.npz": kernel.file_facts(tmp_path / "out" / "pairs.npz")}
    with np.load(tmp_path / "out" / "pairs.npz") as arrays:
        sizes = {
            key: arrays[f"metadata/{key}"].tolist()
            for key in ("num_captions", "num_images", "embedding_dim_text", "embedding_dim_image")
        }
    assert sizes == {key: [record[key]] for key in sizes}
    assert sizes["embedding_dim_image"] == [16]


def test_coco_json_and_csv_give_the_same_file(start, source: Path, tmp_path: Path):
    assert start() == 0
    assert start("--captions", source / "coco.json", "--output", tmp_path / "coco") == 0
    assert start("--captions", "coco.json", "--photos", source, "--output", tmp_path / "named") == 0
    made = {(tmp_path / name / "pairs.npz").read_bytes() for name in ("out", "coco", "named")}
    assert len(made) == 1


def kill_at(embed: types.ModuleType, start: Callable[..., int], where: str, count: int, *options: object) -> None:
    """Run in a forked process that is killed at the count-th call of `where`."""
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return
    owner, _, name = where.rpartition(".")
    owner, calls = getattr(embed, owner) if owner else embed, []
    real = getattr(owner, name)

    def killing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(owner, name, killing)
    start(*options)
    os._exit(0)


@pytest.mark.parametrize(
    ("where", "count", "photos", "captions"),
    [
        ("Shards.save", 2, 4, 0),
        ("Path.replace", 3, 4, 0),
        ("Shards.save", 5, 11, 8),
        ("write_array", 6, 11, 21),
        ("finish", 1, 11, 21),
    ],
)
def test_a_killed_run_goes_on_to_the_same_file(
    embed, start, tmp_path: Path, capsys, where: str, count: int, photos: int, captions: int
):
    out = tmp_path / "out"
    kill_at(embed, start, where, count)
    assert (out / "pairs.npz").exists() == (where == "finish")
    assert not (out / "manifest.json").exists()
    assert start() == 0
    said = capsys.readouterr().out
    assert f"photos   {photos:>9} of 11 from an earlier run\n" in said
    assert f"captions {captions:>9} of 21{' from an earlier run' if captions else ''}\n" in said
    assert start("--output", tmp_path / "whole") == 0
    assert (out / "pairs.npz").read_bytes() == (tmp_path / "whole" / "pairs.npz").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "pairs.npz"]


def test_shards_of_other_settings_are_refused(embed, start, fails, source: Path, tmp_path: Path):
    kill_at(embed, start, "write_array", 1)
    assert "the shards are of photos" in (error := fails("--dtype", "bfloat16"))
    assert "float32" in error
    fewer = write_csv(tmp_path / "fewer.csv", {name: texts[:1] for name, texts in CAPTIONS.items()})
    assert "the shards are of input" in (error := fails("--captions", fewer))
    assert "give another --output" in error
    assert start() == 0


def test_a_time_budget_keeps_what_is_embedded(kernel, embed, start, tmp_path: Path, capsys):
    assert start("--max-minutes", 1e-9) == 0
    assert "time budget: 4 of 11 photos are embedded; the others are left out" in capsys.readouterr().out
    pairs, names = kernel.read_train(tmp_path / "out" / "pairs.npz"), list(CAPTIONS)[:4]
    assert pairs.image_names == names
    assert pairs.captions == [text for name in names for text in CAPTIONS[name]]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["not_in_time"] == 7
    assert start("--limit", 4, "--output", tmp_path / "four") == 0
    with np.load(tmp_path / "four" / "pairs.npz") as four:
        np.testing.assert_allclose(pairs.images, four["images/embeddings"], atol=1e-6)


def test_a_budgeted_run_that_was_killed_goes_on_to_more_photos(embed, start, tmp_path: Path):
    kill_at(embed, start, "write_array", 1, "--max-minutes", 1e-9)  # its last shard of captions is a short one
    assert start() == 0
    assert start("--output", tmp_path / "whole") == 0
    assert (tmp_path / "out" / "pairs.npz").read_bytes() == (tmp_path / "whole" / "pairs.npz").read_bytes()


def test_half_precision_stays_close(start, tmp_path: Path, source: Path):
    assert start() == 0
    assert start("--dtype", "bfloat16", "--output", tmp_path / "half") == 0
    for key in ("images/embeddings", "captions/embeddings"):
        full, half = (np.load(tmp_path / name / "pairs.npz")[key] for name in ("out", "half"))
        assert half.dtype == np.float32
        assert not (half == full).all()
        np.testing.assert_allclose(half, full, atol=0.1)


def test_pairs_that_are_there_are_not_made_again(start, tmp_path: Path, capsys):
    assert start() == 0
    before = (tmp_path / "out" / "pairs.npz").stat()
    assert start() == 2
    assert "pairs were made here already" in capsys.readouterr().err
    assert (tmp_path / "out" / "pairs.npz").stat() == before


# ------------------------------------------------------------------------------------------------- the check
@pytest.fixture
def stored(start, tmp_path: Path) -> Path:
    """Pairs made by the right encoders: they stand for the competition's train.npz."""
    assert start("--output", tmp_path / "stored") == 0
    return tmp_path / "stored" / "pairs.npz"


def test_the_same_encoders_pass_the_check(start, stored: Path, tmp_path: Path, capsys):
    assert start("--check", stored) == 0
    assert "check: 11 photos, mean cosine 1.00000, lowest 1.00000; 21 captions, mean cosine" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["check"]["captions"]["lowest"] > 0.99999


@pytest.mark.parametrize("wrong", ["PhotoEncoder", "TextEncoder"])
def test_a_wrong_pooling_fails_the_check(embed, fails, stored: Path, tmp_path: Path, monkeypatch, wrong: str):
    """The class token in place of the mean."""

    def first_token(self: Any, items: list[Any]) -> torch.Tensor:
        if wrong == "PhotoEncoder":
            return self.model(pixel_values=torch.stack(items)).last_hidden_state[:, 0].float()
        return self.model(**self.prepare(items, padding=True, return_tensors="pt")).last_hidden_state[:, 0]

    monkeypatch.setattr(getattr(embed, wrong), "average", first_token)
    error = fails("--check", stored)
    assert "11 photos, mean cosine" in error
    assert "21 captions, mean cosine" in error
    assert "lowest" in error
    assert f"below 0.999, so these are not the encoders of {stored}" in error
    assert not (tmp_path / "out").exists()


def test_a_check_that_cannot_be_made_says_why(fails, stored: Path, source: Path, models: Path, tmp_path: Path):
    np.savez(tmp_path / "wide.npz", **{**np.load(stored), "images/embeddings": np.ones((11, 17), np.float32)})
    assert "our photos have 16 numbers, the stored ones 17" in fails("--check", tmp_path / "wide.npz")
    np.savez(tmp_path / "other.npz", **{**np.load(stored), "images/names": np.array(["x.jpg"] * 11)})
    assert "none of its photos below" in fails("--check", tmp_path / "other.npz")
    (tmp_path / "damaged.npz").write_bytes(stored.read_bytes()[:2000])
    assert "damaged.npz: the competition's vectors cannot be read" in fails("--check", tmp_path / "damaged.npz")
    assert "train.npz: no such file, here or below" in fails("--check", "train.npz")


# -------------------------------------------------------------------------------------------- photos and captions
def test_damaged_photos_are_counted_named_and_left_out(kernel, encoders, start, source: Path, tmp_path: Path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (source / "photos").rglob("*.jpg"):
        (photos / path.name).write_bytes(path.read_bytes())
    (photos / "2.jpg").write_bytes((photos / "2.jpg").read_bytes()[:300])
    (photos / "5.jpg").write_text("<html>not found</html>")
    (photos / "8.jpg").write_bytes(b"")
    assert start("--photos", photos) == 0
    assert "3 damaged photo(s) left out with their captions: 2.jpg, 5.jpg, 8.jpg" in capsys.readouterr().out
    pairs = kernel.read_train(tmp_path / "out" / "pairs.npz")
    left = [name for name in CAPTIONS if name not in ("2.jpg", "5.jpg", "8.jpg")]
    assert pairs.image_names == left
    assert pairs.captions == [text for name in left for text in CAPTIONS[name]]
    np.testing.assert_allclose(pairs.text, encoders[1].encode(pairs.captions), atol=1e-5)
    np.testing.assert_allclose(
        pairs.images, encoders[0].encode([encoders[0].read(photos / name) for name in left]), atol=1e-5
    )
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["damaged"] == ["2.jpg", "5.jpg", "8.jpg"]


def test_nothing_but_damaged_photos_is_an_error(fails, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for name in CAPTIONS:
        (tmp_path / "photos" / name).touch()
    assert "no photo is left" in fails("--photos", tmp_path / "photos")


def test_missing_photos_and_a_limit(kernel, start, fails, source: Path, tmp_path: Path):
    some = write_csv(tmp_path / "some.csv", {"gone.jpg": ["a ghost"], **CAPTIONS})
    assert "1 of 12 photos are not below" in fails("--captions", some)
    assert start("--captions", some, "--missing", "skip", "--limit", 3) == 0
    assert kernel.read_train(tmp_path / "out" / "pairs.npz").image_names == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_folder_in_a_name_tells_photos_apart(embed, tmp_path: Path):
    for name in ("cats/1.jpg", "dogs/1.jpg", "more/cats/2.jpg", "birds/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "again").symlink_to(tmp_path / "birds")  # one file shown twice
    (tmp_path / "birds" / "up").symlink_to(tmp_path)  # a loop
    names = ["cats/1.jpg", "dogs/1.jpg", "2.jpg", "3.jpg", "4.jpg", "../1.jpg"]
    found = embed.find_files([tmp_path, tmp_path / "birds"], names)
    assert sorted(found, key=names.index) == names[:4]
    assert found["2.jpg"] == tmp_path / "more/cats/2.jpg"
    with pytest.raises(embed.UserError, match=r"1\.jpg: more than one such file: .*1\.jpg and .*1\.jpg"):
        embed.find_files([tmp_path], ["1.jpg"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("photo,text\n1.jpg,a dog\n", "its header is photo,text, not image,caption"),
        ("", "its header is empty, not image,caption"),
        ("image,caption\n", "holds no caption"),
        ("image,caption\n,a dog\n", "line 2: no photo's name"),
        ("image,caption\n1.jpg,a\n2.jpg," + "a" * 2001 + "\n", "line 3: a caption of 2001 characters"),
        ("image,caption\n1.jpg,a\n1.jpg,a dog, it runs\n", "line 3: a comma or a quote in the caption"),
        ('image,caption\n1.jpg,"a dog\n2.jpg,a cat\n', "line 3: a comma or a quote in the caption"),
        ("image,caption\n1.jpg,caf\udce9\n", "the captions cannot be read (UnicodeDecodeError"),
        ('{"images": [], "annotations": ', "the captions cannot be read (JSONDecodeError"),
        ("[]", "this is not COCO's captions json"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}', "has no caption"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "b"}]}',
            "is not listed",
        ),
        ('{"images": [{"id": 1}], "annotations": []}', "the captions cannot be read (KeyError: 'file_name')"),
    ],
)
def test_wrong_captions_are_one_line(embed, tmp_path: Path, content: str, problem: str):
    path = tmp_path / ("captions.json" if content[:1] in ("{", "[") else "captions.csv")
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(embed.UserError) as error:
        embed.read_captions(path)
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)


def test_captions_are_stripped_and_empty_ones_counted(embed, tmp_path: Path, capsys):
    (tmp_path / "captions.csv").write_text('\ufeffimage,caption\n1.jpg," a ""dog"", it runs "\n2.jpg,  \n1.jpg,b\n')
    assert embed.read_captions(tmp_path / "captions.csv") == {"1.jpg": ['a "dog", it runs', "b"]}
    assert "2 captions of 1 photos; 1 empty ones left out" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ command line
def test_settings_of_a_pushed_copy_are_options(embed):
    settings = dict(embed.parse_setting(text) for text in ("limit=25000", "image_model = /kaggle/input/dinov2"))
    knobs = embed.resolve_knobs(settings, ["--limit", "3"])
    assert settings["limit"] == 25000  # a number stays one in the script
    assert (knobs.limit, knobs.image_model, knobs.captions) == (3, "/kaggle/input/dinov2", "captions_train2017.json")
    for wrong in (
        {"limits": "x"},
        {"photo": "x"},
        {"limit": "many"},
        {"limit": -1},
        {"missing": "perhaps"},
        {"max_minutes": 0},
        {"max_minutes": "nan"},
    ):
        with pytest.raises(embed.UserError):
            embed.resolve_knobs(wrong)
    with pytest.raises(embed.UserError, match="expected KEY=VALUE"):
        embed.parse_setting("limit")


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """The script alone, as a process in an empty folder."""
    (tmp_path / "empty").mkdir()
    return lambda *options: subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, options)],
        cwd=tmp_path / "empty",
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_script_runs_on_its_own(script, models: Path, source: Path, tmp_path: Path):
    ended = script(
        "--captions",
        source / "captions.csv",
        "--photos",
        source,
        "--output",
        "made",
        "--image-model",
        models / "photos",
        "--text-model",
        models / "captions",
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "captions        21 of 21 " in ended.stdout
    assert "done: made/pairs.npz" in ended.stdout
    assert {path.name for path in (tmp_path / "empty").rglob("*")} == {"made", "pairs.npz", "manifest.json"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--photos", "nowhere"], "nowhere: no such folder"),
        (["--photos", "."], "none of the 11 photos is there, such as 0.jpg"),
        (["--photos", "SOURCE/photos/a"], "5 of 11 photos are not below"),
        (["--photos", "SOURCE", "--captions", "SOURCE/photos/a/0.jpg"], "0.jpg: the captions cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line(script, source: Path, tmp_path: Path, options: list[str], problem: str):
    ended = script("--captions", source / "captions.csv", *(text.replace("SOURCE", str(source)) for text in options))
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: ")
    assert problem in ended.stderr
    assert not list((tmp_path / "empty").iterdir())
