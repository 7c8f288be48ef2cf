"""Fixed random encoders that stand in for RoBERTa and DINOv2."""

from __future__ import annotations

import zlib
from itertools import pairwise

import numpy as np
from PIL import Image

TEXT_DIM, IMAGE_DIM = 1024, 1536
ENCODER_SEED = 20251  # the encoders are fixed: only the scenes and the wording follow --seed
BUCKETS = 4096
FUNCTION_WORDS = frozenset(
    ["a", "an", ".", ",", "of", "the", "and", "is", "there", "in", "on", "at", "with", "to", "see", "taken", "picture"]
)
COLOUR_FILTERS, EDGE_FILTERS = 64, 24
GRID = (2, 3)
SHRINK = 3  # the encoder sees pictures at a third of their size: less to compute, shapes still to be told apart


def encode_text(captions: list[str]) -> np.ndarray:
    """(n, 1024) float32: hashed words and bigrams, function words muted, through a random two-layer map."""
    rng = np.random.default_rng(ENCODER_SEED)
    table = rng.normal(size=(BUCKETS, TEXT_DIM)).astype(np.float32)
    mix = rng.normal(size=(TEXT_DIM, TEXT_DIM)).astype(np.float32) / np.float32(TEXT_DIM**0.5)
    common = rng.normal(size=TEXT_DIM).astype(np.float32)
    sums = np.empty((len(captions), TEXT_DIM), np.float32)
    for row, caption in zip(sums, captions, strict=True):
        words = caption.lower().split()
        tokens = [*((word,) for word in words), *pairwise(words)]
        weights = np.array([0.1 if FUNCTION_WORDS.issuperset(token) else 1 for token in tokens], np.float32)
        rows = [zlib.crc32(" ".join(token).encode()) % BUCKETS for token in tokens]
        row[:] = weights @ table[rows] / np.linalg.norm(weights)
    return np.float32(0.5) * (np.tanh(np.tanh(sums) @ mix) + np.float32(0.4) * common)


def picture_features(pictures: list[Image.Image]) -> np.ndarray:
    """(n, filters, 1 + cells) pooled responses of random colour and edge filters, over the whole and over each cell."""
    rng = np.random.default_rng(ENCODER_SEED + 1)
    tints = rng.uniform(0, 1, size=(3, COLOUR_FILTERS)).astype(np.float32)
    angles = rng.uniform(0, 2 * np.pi, EDGE_FILTERS).astype(np.float32)
    pixels = np.stack([np.asarray(picture.reduce(SHRINK), np.float32) for picture in pictures]) / 255
    distance = (pixels**2).sum(-1, keepdims=True) - 2 * pixels @ tints + (tints**2).sum(0)
    down, across = np.gradient(pixels.mean(-1), axis=(1, 2))
    edges = across[..., None] * np.cos(angles) + down[..., None] * np.sin(angles)
    responses = np.concatenate([np.exp(-25 * distance), np.maximum(4 * edges - 0.15, 0)], -1)
    n, height, width, filters = responses.shape
    cells = responses.reshape(n, GRID[0], height // GRID[0], GRID[1], width // GRID[1], filters).mean((2, 4))
    cells = cells.reshape(n, -1, filters)
    # the root keeps a small shape visible beside a large background
    return np.concatenate([cells.mean(1, keepdims=True), cells], 1).transpose(0, 2, 1) ** 0.25


def encode_pictures(features: np.ndarray) -> np.ndarray:
    """(n, 1536) float32 around one strong common direction; pictures with more to see are longer vectors."""
    rng = np.random.default_rng(ENCODER_SEED + 2)
    detail = features[:, COLOUR_FILTERS:].mean((1, 2))
    weights = np.array([3] + [1] * (features.shape[2] - 1), np.float32)  # what is seen counts more than where
    flat = ((features - 0.4) * weights).reshape(len(features), -1)
    mix = rng.normal(size=(flat.shape[1], IMAGE_DIM)).astype(np.float32) / np.float32(flat.shape[1] ** 0.5)
    common = rng.normal(size=IMAGE_DIM).astype(np.float32)
    vectors = np.tanh(3 * flat @ mix) + np.float32(0.3) * common
    return (vectors * 0.93 * np.exp(1.6 * (detail - 0.17))[:, None]).astype(np.float32)
