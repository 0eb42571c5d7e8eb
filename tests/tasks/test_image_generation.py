"""Image generation: a seed gives the same image alone and in every batch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import publish_tiny

from app.tasks.image_codecs import image_grid, png
from app.tasks.image_generation import ImageSampler, SampleJob


@pytest.fixture
def sampler(tmp_path: Path) -> ImageSampler:
    return ImageSampler(publish_tiny(tmp_path, "tiny-gan"), torch.device("cpu"))


@pytest.fixture
def conditional(tmp_path: Path) -> ImageSampler:
    return ImageSampler(publish_tiny(tmp_path, "tiny-cgan"), torch.device("cpu"))


def test_an_image_with_a_label_does_not_depend_on_count_or_batch(conditional: ImageSampler) -> None:
    conditional.warm_up(64)
    latents = conditional.parse(100, None, 5)
    (images,) = conditional.predict([latents])
    for count in (1, 3, 64):
        batch = [conditional.parse(7, "z", 1), conditional.parse(count, None, 5), conditional.parse(50, None, 2)]
        assert np.array_equal(conditional.predict(batch)[1], images[:count])
        assert conditional.names(batch[1]) == conditional.names(latents)[:count]
    assert not np.array_equal(images, conditional.predict([conditional.parse(100, None, 6)])[0])


@pytest.mark.parametrize("name", ["sampler", "conditional"])
def test_images_computed_in_parts_are_the_same(name: str, request: pytest.FixtureRequest) -> None:
    sampler: ImageSampler = request.getfixturevalue(name)
    sampler.warm_up(64)
    images = sampler.parse(100, None, 5)
    parts = sampler.split(images, 16)
    assert [len(part) for part in parts] == [16] * 6 + [4]
    joined = sampler.join([sampler.predict([sampler.parse(3, None, 1), part])[1] for part in parts])
    assert np.array_equal(joined, sampler.predict([images])[0])


def test_labels_are_balanced_and_a_label_keeps_the_latents(conditional: ImageSampler) -> None:
    balanced, labelled = conditional.parse(60, None, 5), conditional.parse(60, "y", 5)
    names = conditional.names(balanced)
    assert all(sorted(names[i : i + 3], key=str) == ["x", "y", "z"] for i in range(0, 60, 3))
    assert names != names[:3] * 20
    assert conditional.names(labelled) == ["y"] * 60
    assert np.array_equal(balanced.latents, labelled.latents)
    pixels, ys = conditional.predict([balanced, labelled])
    indices = [i for i, name in enumerate(names) if name == "y"]
    assert np.array_equal(pixels[indices], ys[indices])
    assert not np.array_equal(pixels, ys)


@pytest.mark.parametrize("name", ["sampler", "conditional"])
def test_an_interpolation_between_two_seeds_has_equal_steps(name: str, request: pytest.FixtureRequest) -> None:
    sampler: ImageSampler = request.getfixturevalue(name)
    (path,) = sampler.prepare(SampleJob(9, None, 5, 6))
    first = sampler.parse(1, None, 5)
    last = sampler.parse(1, (sampler.names(first))[0], 6)
    assert np.array_equal(path.latents[[0, -1]], np.concatenate([first.latents, last.latents]))
    assert sampler.names(path) == sampler.names(first) * 9
    start, end = first.latents[0], last.latents[0]
    lengths = np.linalg.norm(path.latents, axis=1)
    assert lengths.min() > 0.95 * min(np.linalg.norm(start), np.linalg.norm(end)), "the path passes near the origin"
    directions = path.latents / lengths[:, None]
    angles = np.arccos((directions[1:] * directions[:-1]).sum(axis=1))
    assert angles.max() < 3 * angles.min()
    pixels, one, other = sampler.predict([path, first, last])
    assert np.array_equal(pixels[[0, -1]], np.concatenate([one, other]))


def test_an_interpolation_to_the_same_seed_is_constant_and_one_image_is_the_start(sampler: ImageSampler) -> None:
    start = sampler.parse(1, None, 5).latents
    (constant,), (one,) = sampler.prepare(SampleJob(4, None, 5, 5)), sampler.prepare(SampleJob(1, None, 5, 6))
    assert np.allclose(constant.latents, start.repeat(4, axis=0), rtol=1e-12)
    assert np.array_equal(one.latents, start)


def test_a_grid_is_nearly_square_and_a_png_is_lossless() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 4), dtype=np.uint8)
    grid = image_grid(images, gap=1)
    assert grid.shape == (3, 3 * 6 + 1, 3 * 5 + 1)
    assert np.array_equal(grid[:, 13:18, 1:5], images[6])
    assert (grid[:, 13:18, 6:] == 255).all()
    decoded = np.asarray(Image.open(io.BytesIO(png(images[0]))))
    assert np.array_equal(decoded.transpose(2, 0, 1), images[0])
