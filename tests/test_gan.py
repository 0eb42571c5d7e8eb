"""The generator's predictor: a seed is a picture, whatever else is drawn."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import publish_tiny
from PIL import Image

from app.errors import BadValue
from app.predictors.gan import ImageSampler, png, sheet


@pytest.fixture
def sampler(tmp_path: Path) -> ImageSampler:
    return ImageSampler(publish_tiny(tmp_path, "tiny-gan"), torch.device("cpu"))


def test_an_image_does_not_change_with_the_count_or_the_crowd(sampler: ImageSampler) -> None:
    (many,) = sampler.predict([sampler.parse(100, None, 5)])
    for count in (1, 2, 3, 17, 64):
        crowd = [sampler.parse(7, None, 1), sampler.parse(count, None, 5), sampler.parse(50, None, 2)]
        assert np.array_equal(sampler.predict(crowd)[1], many[:count])
    assert not np.array_equal(many, sampler.predict([sampler.parse(100, None, 6)])[0])


def test_a_label_that_does_not_exist_is_refused(sampler: ImageSampler) -> None:
    with pytest.raises(BadValue, match="label is 'x'; tiny-gan draws without labels"):
        sampler.parse(1, "x", 0)


def test_a_sheet_is_nearly_square_and_a_png_is_lossless() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 4), dtype=np.uint8)
    picture = sheet(images, gap=1)
    assert picture.shape == (3, 3 * 6 + 1, 3 * 5 + 1)
    assert np.array_equal(picture[:, 13:18, 1:5], images[6])
    assert (picture[:, 13:18, 6:] == 255).all()
    read = np.asarray(Image.open(io.BytesIO(png(images[0]))))
    assert np.array_equal(read.transpose(2, 0, 1), images[0])
