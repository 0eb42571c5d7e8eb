"""The command ``python -m app.models add``, which imports a network that was trained outside this project."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from contextlib import suppress
from pathlib import Path

from app.store import Card, StoreError

OPTIONS = ("input", "output", "size", "resize", "interpolation", "mean", "std", "softmax")  # of the task classify


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="ONNX file, ZIP file of an ONNX file and its external data, or .pt2 file of torch.export.save, which may "
        "run code",
    )
    parser.add_argument("--name", required=True, help="name of the model")
    parser.add_argument("--title", default="", help="one sentence about the model")
    parser.add_argument("--licence", default="not stated", help="licence of the network")
    parser.add_argument("--source", default="not stated", help="where the network comes from, such as a URL")
    parser.add_argument(
        "--task",
        choices=("infer", "classify"),
        default="infer",
        help="task of the network; infer: only tensors under /v2",
    )
    group = parser.add_argument_group("classify: images [N, C, H, W] or [N, H, W, C] to classes [N, labels]")
    group.add_argument("--labels", metavar="FILE", type=Path, help="text file with one label per line")
    group.add_argument("--input", metavar="TENSOR", help="name of the input (default: the only one)")
    group.add_argument("--output", metavar="TENSOR", help="name of the output (default: the only one)")
    group.add_argument("--size", type=pixels, help="height and width in pixels (default: those of the input tensor)")
    group.add_argument(
        "--resize", type=pixels, metavar="PIXELS", help="scale the shorter side to PIXELS, then crop the centre"
    )
    group.add_argument(
        "--interpolation", choices=("bilinear", "bicubic"), help="method of resizing (default: bilinear)"
    )
    group.add_argument("--mean", type=numbers, metavar="A,B,C", help="mean of each channel, for pixels from 0 to 1")
    group.add_argument("--std", type=numbers, metavar="A,B,C", help="standard deviation of each channel")
    group.add_argument(
        "--no-softmax",
        dest="softmax",
        action="store_const",
        const=False,
        help="the network outputs probabilities, not logits",
    )


def run(args: argparse.Namespace) -> Card:
    """Import the file ``args.file`` and return the card of the new version. Raises StoreError."""
    from app.importing.add import ASSUMED_SCALING, Description, add  # needs torch
    from app.settings import Settings

    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if args.task == "infer" and (wrong := [*options, *(["labels"] if args.labels else [])]):
        option = "no-softmax" if wrong[0] == "softmax" else wrong[0]
        raise StoreError(f"--{option} is not an option of the task 'infer'; add --task classify")
    if args.task == "classify" and not args.labels:
        raise StoreError("the task 'classify' needs --labels FILE, a text file with one label per line")
    labels = _read_labels(args.labels) if args.labels else None
    command = f"python -m app.models {shlex.join(sys.argv[1:])}"
    description = Description(args.name, args.title, args.task, args.licence, args.source, options, labels, command)
    settings = Settings()
    limits = settings.max_import_bytes, settings.limits.speed_seconds
    card = add(args.store, args.file, description, *limits, activate=args.activate)
    if card.notes:
        print(f"assumed: {ASSUMED_SCALING}", file=sys.stderr)
    return card


def _read_labels(path: Path) -> list[str]:
    try:
        text = path.read_text("utf-8-sig")  # programs on Windows may write a byte order mark
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} is not UTF-8: {error.reason}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
