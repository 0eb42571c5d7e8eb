"""The files from which a training run is resumed: its folder with the config and the log, and its checkpoints."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from app.store.disk import Disk
from training.options import Options


def open_folder(options: Options, content: dict[str, Any], lock: contextlib.ExitStack) -> Path:
    """Return a new folder or, with ``--resume``, that of the newest unfinished run with the same config and data.

    The folder is locked until ``lock`` is closed. The operating system releases the locks of killed processes. Runs
    that another process is training are not resumed. Exits with a message if no run can be resumed.

    Args:
        options: the options of the command.
        content: what config.json contains.
        lock: holds the lock of the folder.
    """
    runs = options.runs / options.name
    started = [folder for folder in runs.glob("*") if (folder / "config.json").exists()]
    unfinished = sorted((folder for folder in started if not (folder / "finished").exists()), reverse=True)
    if options.resume and unfinished:
        changes = {folder: _changes(folder, content) for folder in unfinished}
        fitting = [folder for folder in unfinished if not changes[folder]]
        for folder in fitting:
            with contextlib.suppress(BlockingIOError):
                lock.enter_context(Disk().lock(folder, wait=False))
                return folder
        newest = unfinished[0]
        if not fitting:
            sys.exit(f"{newest} was started with {changes[newest]}: resume it with the same options and data")
        sys.exit(f"{fitting[0]} is still running in another process: wait until it ends, or stop it")
    if options.resume:
        print(f"{runs} holds no unfinished run: starting a new run")
    folder = runs / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")[:-3]
    folder.mkdir(parents=True)
    lock.enter_context(Disk().lock(folder))
    (folder / "config.tmp").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(folder / "config.tmp", folder / "config.json")
    return folder


def _changes(folder: Path, content: dict[str, Any]) -> str:
    """Return the differences between the config.json of a run and ``content``, or an empty string."""
    before = json.loads((folder / "config.json").read_text())
    changed = [key for key in {**content, **before} if before.get(key) != content.get(key)]
    return ", ".join(f"{key} {before.get(key)} (now {content.get(key)})" for key in changed)


def log_lines(path: Path) -> list[str]:
    """Return the complete lines of a log, or an empty list if the log does not exist."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]  # a killed process may leave the last line incomplete


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
