"""The speed of the serving code on one thread, for single items and for batches, which each training measures."""

from __future__ import annotations

from typing import Any

import torch

from app import store
from app.tasks import TASKS
from app.tasks.speed import measure as measure
from app.tasks.speed import processor as processor


def hardware(device: str) -> str:
    """Return the name of the processor or the GPU in the form that cards use."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()


def describe(speed: dict[str, Any], task: store.TaskName) -> str:
    """Return a text with the time of a single item and the number of items per second in batches."""
    unit = TASKS[task].unit
    return (
        f"on one thread {speed['milliseconds']:g} ms for one {unit}, {speed['per_second']:,.0f} {unit}s a second "
        f"in batches of {speed['rows']}"
    )
