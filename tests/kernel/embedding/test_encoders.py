"""The encoders of kernel/embed.py: pooled as by hand, in batches that fit the memory."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_encoders import PROCESSOR


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
