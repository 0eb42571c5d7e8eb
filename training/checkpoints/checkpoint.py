"""Read and write the checkpoints of a training run."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import torch


def load(path: Path, objects: dict[str, Any]) -> dict[str, Any]:
    """Restore the tracked ``objects`` from a checkpoint, and return the checkpoint.

    Exits with a message if the checkpoint is damaged, or does not fit the objects.
    """
    advice = "start a new run without --resume"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file, torch raises errors of many classes
        sys.exit(f"{path} is damaged ({type(error).__name__}); {advice}")
    try:
        for name, tracked in objects.items():
            tracked.load_state_dict(state["tracked"][name])
    except (RuntimeError, KeyError, ValueError) as error:
        sys.exit(f"{path} does not fit this network, for example {str(error)[:200]}; {advice}")
    return state


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint. It replaces the previous checkpoint atomically.

    Exits with a message if it cannot be written, for example because the disk is full. The previous checkpoint is kept.
    """
    new, content = path.with_name("state.tmp"), io.BytesIO()
    torch.save(state, content)  # not to the file, because the errors of torch do not name the cause
    try:
        new.write_bytes(content.getbuffer())
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        kept = "; the previous checkpoint is kept, so --resume continues the run" if path.exists() else ""
        sys.exit(f"the checkpoint {new} could not be written ({error.strerror}){kept}")
