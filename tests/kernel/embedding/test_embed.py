"""Photos and captions to pairs.npz: resumed as if never killed, checked, and read by the kernel."""

from __future__ import annotations

import gc
import json
import signal
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forked import Ended, failed, succeeded
from stopping import stop_at
from tiny_encoders import CAPTIONS, write_csv


# ------------------------------------------------------------------------------------------------- a whole run
def test_the_kernel_reads_what_was_made(kernel, encoders, start, source: Path, tmp_path: Path):
    succeeded(start())
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
    succeeded(start())
    succeeded(start("--captions", source / "coco.json", "--output", tmp_path / "coco"))
    succeeded(start("--captions", "coco.json", "--photos", source, "--output", tmp_path / "named"))
    made = {(tmp_path / name / "pairs.npz").read_bytes() for name in ("out", "coco", "named")}
    assert len(made) == 1


def kill_at(embed: types.ModuleType, start: Callable[..., Ended], where: str, count: int, *options: object) -> None:
    """A run that is killed as the count-th call of `where` begins."""
    owner, _, name = where.rpartition(".")
    with stop_at(getattr(embed, owner) if owner else embed, name, call=count, number=signal.SIGKILL):
        assert start(*options).returncode == -signal.SIGKILL


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
    embed, start, tmp_path: Path, where: str, count: int, photos: int, captions: int
):
    out = tmp_path / "out"
    kill_at(embed, start, where, count)
    assert (out / "pairs.npz").exists() == (where == "finish")
    assert not (out / "manifest.json").exists()
    said = succeeded(start()).stdout
    assert f"photos   {photos:>9} of 11 from an earlier run\n" in said
    assert f"captions {captions:>9} of 21{' from an earlier run' if captions else ''}\n" in said
    succeeded(start("--output", tmp_path / "whole"))
    assert (out / "pairs.npz").read_bytes() == (tmp_path / "whole" / "pairs.npz").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "pairs.npz"]


def test_shards_of_other_settings_are_refused(embed, start, fails, source: Path, tmp_path: Path):
    kill_at(embed, start, "write_array", 1)
    assert "the shards are of photos" in (error := fails("--dtype", "bfloat16"))
    assert "float32" in error
    fewer = write_csv(tmp_path / "fewer.csv", {name: texts[:1] for name, texts in CAPTIONS.items()})
    assert "the shards are of input" in (error := fails("--captions", fewer))
    assert "give another --output" in error
    succeeded(start())


def test_a_time_budget_keeps_what_is_embedded(kernel, embed, start, tmp_path: Path):
    done = succeeded(start("--max-minutes", 1e-9))
    assert "time budget: 4 of 11 photos are embedded; the others are left out" in done.stdout
    pairs, names = kernel.read_train(tmp_path / "out" / "pairs.npz"), list(CAPTIONS)[:4]
    assert pairs.image_names == names
    assert pairs.captions == [text for name in names for text in CAPTIONS[name]]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["not_in_time"] == 7
    succeeded(start("--limit", 4, "--output", tmp_path / "four"))
    with np.load(tmp_path / "four" / "pairs.npz") as four:
        np.testing.assert_allclose(pairs.images, four["images/embeddings"], atol=1e-6)


def test_a_budgeted_run_that_was_killed_goes_on_to_more_photos(embed, start, tmp_path: Path):
    kill_at(embed, start, "write_array", 1, "--max-minutes", 1e-9)  # its last shard of captions is a short one
    succeeded(start())
    succeeded(start("--output", tmp_path / "whole"))
    assert (tmp_path / "out" / "pairs.npz").read_bytes() == (tmp_path / "whole" / "pairs.npz").read_bytes()


def test_half_precision_stays_close(start, tmp_path: Path, source: Path):
    succeeded(start())
    succeeded(start("--dtype", "bfloat16", "--output", tmp_path / "half"))
    for key in ("images/embeddings", "captions/embeddings"):
        full, half = (np.load(tmp_path / name / "pairs.npz")[key] for name in ("out", "half"))
        assert half.dtype == np.float32
        assert not (half == full).all()
        np.testing.assert_allclose(half, full, atol=0.1)


def test_pairs_that_are_there_are_not_made_again(start, tmp_path: Path):
    succeeded(start())
    before = (tmp_path / "out" / "pairs.npz").stat()
    failed(start(), 2, "pairs were made here already")
    assert (tmp_path / "out" / "pairs.npz").stat() == before


# ------------------------------------------------------------------------------------------------- the check
@pytest.fixture
def stored(start, tmp_path: Path) -> Path:
    """Pairs made by the right encoders: they stand for the competition's train.npz."""
    succeeded(start("--output", tmp_path / "stored"))
    return tmp_path / "stored" / "pairs.npz"


def test_the_same_encoders_pass_the_check(start, stored: Path, tmp_path: Path):
    done = succeeded(start("--check", stored))
    assert "check: 11 photos, mean cosine 1.00000, lowest 1.00000; 21 captions, mean cosine" in done.stdout
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
    assert "train.npz: no such file, here or below" in fails("--check", "train.npz")


def test_damaged_vectors_to_check_with_are_told_and_closed(embed, stored: Path, tmp_path: Path):
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(stored.read_bytes()[:2000])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(embed.UserError, match=r"damaged\.npz: the competition's vectors cannot be read"):
            embed.check_encoders(damaged, [tmp_path], None, None)
        gc.collect()
    assert [str(one.message) for one in told] == []
