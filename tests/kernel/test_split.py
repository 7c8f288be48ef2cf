"""Which images are held out, and which of their captions are looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from drawn import TINY
from forked import succeeded
from outputs import FINAL


@pytest.mark.parametrize(
    ("images", "fraction", "count"),
    [(6000, 0.1, 600), (25_000, 0.1, 2500), (240, 0.5, 100), (1994, 0.1, 100), (240, 0.1, 24), (30, 0.1, 3)],
)
def test_the_split_is_disjoint_and_complete_in_whole_pools(kernel, images: int, fraction: float, count: int):
    train, held_out = kernel.split_images(images, fraction, 0)
    assert len(held_out) == count
    assert len(train) == images - count
    assert sorted([*train, *held_out]) == list(range(images))
    again = kernel.split_images(images, fraction, 0)
    assert (again[0] == train).all()
    assert (again[1] == held_out).all()
    assert not np.array_equal(kernel.split_images(images, fraction, 1)[1], held_out)


def test_two_images_are_held_out_at_the_least(kernel, server, data: Path, tmp_path: Path):
    settings = (*TINY, "--set=val_fraction=0.001")
    succeeded(server.run("--input", data, "--output", tmp_path / "out", *settings))
    assert len(kernel.load_weights(tmp_path / "out" / FINAL)["val_images"]) == 2


def test_too_few_images_to_hold_any_out(kernel):
    with pytest.raises(kernel.UserError, match="too few"):
        kernel.split_images(3, 0.5, 0)


def test_no_caption_of_a_validation_image_is_trained_on(kernel):
    """The trap of .942 local and .874 on the board: sisters of a validation caption in training."""
    image_of = np.random.default_rng(0).integers(300, size=2000)
    train, held_out = kernel.split_images(300, 0.4, 0)
    views = kernel.caption_views(image_of, held_out)
    assert not set(image_of[views.ravel()]) & set(train)


def test_a_view_has_one_caption_of_each_image(kernel):
    image_of = np.random.default_rng(0).permutation(np.repeat(np.arange(50), 5))
    images = np.random.default_rng(1).permutation(50)[:20]
    views = kernel.caption_views(image_of, images)
    assert views.shape == (5, 20)
    assert (image_of[views] == images).all()
    assert len(np.unique(views)) == 100  # five different captions of each


def test_images_with_unequal_caption_counts(kernel):
    image_of = np.array([2, 0, 1, 1, 2, 2, 1, 1, 1, 1])  # one, six and three captions
    views = kernel.caption_views(image_of, np.array([2, 0, 1]), 5)
    assert views[:, 0].tolist() == [0, 4, 5, 0, 4]  # three captions, in turn
    assert views[:, 1].tolist() == [1] * 5
    assert views[:, 2].tolist() == [2, 3, 6, 7, 8]


def test_an_image_without_a_caption(kernel):
    for image in (1, 3):
        with pytest.raises(kernel.UserError, match=f"image {image} has no caption"):
            kernel.caption_views(np.array([0, 0, 2]), np.array([0, image]), 1)
