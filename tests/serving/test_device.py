"""The choice of the device for the networks, on machines with and without GPUs."""

from __future__ import annotations

import pytest
import torch

from app.serving.device import find_device
from app.settings import SettingsError


@pytest.mark.parametrize(
    ("gpus", "name", "device"),
    [
        (0, "auto", "cpu"),
        (1, "cuda", "cuda"),
        (2, "auto", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_the_first_gpu_is_used_unless_another_device_is_named(gpus: int, name: str, device: str) -> None:
    assert find_device(name, gpus) == torch.device(device)


@pytest.mark.parametrize(
    ("gpus", "name", "sentence"),
    [
        (0, "cuda", "QUARTET_DEVICE is 'cuda': there is no GPU that torch can use; allowed values: auto, cpu"),
        (2, "cuda:2", "QUARTET_DEVICE is 'cuda:2': there are 2 GPUs; allowed values: auto, cpu, cuda:N"),
    ],
)
def test_a_missing_gpu_is_rejected(gpus: int, name: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as raised:
        find_device(name, gpus)
    assert str(raised.value) == sentence
