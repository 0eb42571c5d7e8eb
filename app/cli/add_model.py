"""The command ``python -m app.models add``, which imports a network that was trained outside this project."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from app.importing.options import AddOptions, Interpolation, Task
from app.store import Card, StoreError


def numbers(text: str) -> list[float]:
    """Return the numbers in a text, which are separated by commas."""
    with suppress(ValueError):
        values = [float(part) for part in text.split(",")]
        if all(map(math.isfinite, values)):
            return values
    raise argparse.ArgumentTypeError(
        f"{text[:80]!r} should be numbers that are not infinite or NaN, separated by commas"
    )


def pixels(text: str) -> int:
    """Return a number of pixels."""
    with suppress(ValueError):
        if 0 < (number := int(text)) < 2**31:
            return number
    raise argparse.ArgumentTypeError(f"{text[:80]!r} should be a number of pixels above 0")


ARGUMENTS: dict[str, dict[str, Any]] = {  # how argparse reads the options that are not plain texts
    "name": {"required": True},
    "task": {"choices": get_args(Task), "default": "infer"},
    "labels": {"metavar": "FILE", "type": Path},
    "size": {"type": pixels},
    "resize": {"type": pixels},
    "interpolation": {"choices": get_args(Interpolation)},
    "mean": {"metavar": "A,B,C", "type": numbers},
    "std": {"metavar": "A,B,C", "type": numbers},
    "softmax": {"action": argparse.BooleanOptionalAction},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="ONNX file, ZIP file of an ONNX file and its external data, or .pt2 file of torch.export.save, which may "
        "run code",
    )
    for name, field in AddOptions.model_fields.items():
        parser.add_argument(f"--{name}", help=field.description, **ARGUMENTS.get(name, {}))


def run(args: argparse.Namespace) -> Card:
    """Import the file ``args.file`` and return the card of the new version. Raises StoreError."""
    from app.importing.add import ASSUMED_SCALING, Description, add  # needs torch
    from app.settings import Settings

    given = {name: value for name in AddOptions.model_fields if (value := getattr(args, name)) is not None}
    origin = {name: given.pop(name) for name in ("name", "title", "task", "licence", "source") if name in given}
    if args.task == "infer" and given:
        option = next(iter(given)) if given.get("softmax", True) else "no-softmax"
        raise StoreError(f"--{option} is not an option of the task 'infer'; add --task classify")
    if args.task == "classify" and not args.labels:
        raise StoreError("the task 'classify' needs --labels FILE, a text file with one label per line")
    labels = _read_labels(given.pop("labels")) if given else None
    command = f"python -m app.models {shlex.join(sys.argv[1:])}"
    description = Description(**origin, options=given, labels=labels, command=command)
    limits = Settings().limits
    card = add(
        args.store, args.file, description, limits.max_import_bytes, limits.speed_seconds, activate=args.activate
    )
    if card.notes:
        print(f"assumed: {ASSUMED_SCALING}", file=sys.stderr)
    return card


def _read_labels(path: Path) -> list[str]:
    try:
        text = path.read_text("utf-8-sig")  # programs on Windows may write a byte order mark
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} is not UTF-8: {error.reason}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
