"""Describe the machine that runs a benchmark."""

from __future__ import annotations

import os

import torch

from app.tasks.speed import processor


def hardware() -> str:
    return f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
