"""The benchmark of image corruptions, with a stand-in for the package of the corruptions."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.corruptions import GROUPS, corrupted, table


def test_each_image_is_corrupted_with_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def corrupt(image: np.ndarray, **options: Any) -> np.ndarray:
        calls.append(options)
        return image + np.random.randint(0, 9, image.shape)

    monkeypatch.setitem(sys.modules, "imagecorruptions", SimpleNamespace(corrupt=corrupt))
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    first, second = corrupted(images, ("fog", 3)), corrupted(images, ("fog", 3))
    assert first.dtype == np.uint8
    assert first.shape == images.shape
    assert (first == second).all()
    corrupted(images[:1], ("glass_blur", 1))
    assert calls[0] == {"severity": 3, "corruption_name": "fog"}
    assert calls[-1] == {"severity": 1, "corruption_name": "glass_blur", "seed": 0}


def test_the_table_has_the_mean_of_each_group_and_of_all_corruptions() -> None:
    kinds = [kind for kinds in GROUPS.values() for kind in kinds]
    results = {"none": [0.9], **{kind: [i / 15] for i, kind in enumerate(kinds, start=1)}}
    made = table(["a@1"], results)
    assert made["columns"] == {"images": None, "a@1": 3}
    values = [value for _, value in made["rows"]]
    assert values == pytest.approx([0.9, 2 / 15, 5.5 / 15, 9.5 / 15, 13.5 / 15, 8 / 15], abs=0.001)
    assert made["rows"][1][0] == "noise: gaussian noise, shot noise, impulse noise"
