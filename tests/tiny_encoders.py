"""For kernel/embed.py: captions, and tiny random models of the real classes, saved as the hub's: no download."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch

from lib.project import KERNEL

SCRIPT = KERNEL.with_name("embed.py")
CAPTIONS = {f"{i}.jpg": [f"a dog, number {i}" + " and another one" * k for k in range(1 + i % 3)] for i in range(11)}
PHOTO_NAME, TEXT_NAME = "facebook/dinov2-giant", "sentence-transformers/roberta-large-nli-stsb-mean-tokens"
D_PHOTO, D_TEXT = 16, 12
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def write_csv(path: Path, captions: dict[str, list[str]]) -> Path:
    """Captions as the script reads them."""
    rows = [f'{name},"{text}"\n' for name, texts in captions.items() for text in texts]
    path.write_text("image,caption\n" + "".join(rows))
    return path


def save_encoders(photos: Path, captions: Path) -> None:
    """A DINOv2 and a RoBERTa with their processor and tokenizer, each in a folder."""
    pytest.importorskip("transformers", reason="pip install -r requirements-embed.txt")
    from transformers import Dinov2Config, Dinov2Model, RobertaConfig, RobertaModel

    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(
            hidden_size=D_PHOTO,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            use_swiglu_ffn=True,
        )
    ).save_pretrained(photos)
    (photos / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *map(chr, range(33, 127)), "Ġ"]  # bytes; Ġ is the space
    text = RobertaModel(
        RobertaConfig(
            vocab_size=len(tokens),
            hidden_size=D_TEXT,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=140,
            pad_token_id=1,
            initializer_range=0.5,
        )
    )
    for shared in (text.embeddings.position_embeddings, text.embeddings.token_type_embeddings):
        shared.weight.data *= 0.05  # else all captions are nearly one
    text.save_pretrained(captions)
    (captions / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (captions / "merges.txt").write_text("#version: 0.2\n")
    (captions / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))


def save_hub(home: Path) -> None:
    """Both under their real names in a hub cache below `home` (HF_HOME)."""
    folders = []
    for name in (PHOTO_NAME, TEXT_NAME):
        cached = home / "hub" / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        folders.append(cached / "snapshots" / ("0" * 40))
        folders[-1].mkdir(parents=True)
    save_encoders(*folders)
