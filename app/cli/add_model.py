"""The command ``python -m app.models add``, which imports a network that was trained outside this project."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.importing.add import Description, add
from app.settings import Settings
from app.store import Card, StoreError
from app.tasks.imported.text_generation import BYTES

MAX_LIST_BYTES = 4 * 2**20  # size of a file with labels or characters
TASK_OPTIONS = {  # see the predictors in app.tasks.imported
    "infer": (),
    "classify": ("input", "output", "size", "resize", "interpolation", "mean", "std", "softmax"),
    "sample": ("latents", "classes", "output", "low", "high"),
    "forecast": ("input", "output", "context", "quantiles", "standardise", "seasons", "non_negative"),
    "continue": ("tokens", "logits", "states", "next_states", "context", "unknown"),
}
LISTS = {"labels": ("classify", "sample"), "vocabulary": ("continue",)}  # tasks that read each of these files


def _integer(text: str) -> int:
    with suppress(ValueError):
        if abs(number := int(text)) < 2**63:
            return number
    raise argparse.ArgumentTypeError(f"{text[:80]!r} should be an integer between -2**63 and 2**63")


def _number(text: str) -> float:
    with suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise argparse.ArgumentTypeError(f"{text[:80]!r} should be a number that is not infinite or NaN")


def _numbers(text: str) -> list[float]:
    try:
        return [_number(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r} should be numbers that are not infinite or NaN, separated by commas"
        ) from None


def _names(text: str) -> list[str]:
    return text.split(",")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="file that torch.export.save has written, ONNX file, or ZIP file of an ONNX file and its external data",
    )
    parser.add_argument("--name", required=True, help="name of the model")
    parser.add_argument("--title", default="", help="one sentence about the model")
    parser.add_argument("--licence", default="not stated", help="licence of the network")
    parser.add_argument("--source", default="not stated", help="where the network comes from, such as a URL")
    parser.add_argument(
        "--task", choices=TASK_OPTIONS, default="infer", help="task of the network; infer: only tensors under /v2"
    )
    _add_image_arguments(parser)
    _add_sequence_arguments(parser)


def _add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the tasks ``classify`` and ``sample``."""
    group = parser.add_argument_group("classify: images [N, C, H, W] or [N, H, W, C] to classes [N, labels]")
    group.add_argument("--labels", metavar="FILE", type=Path, help="text file with one label per line, also for sample")
    group.add_argument("--size", type=_integer, help="height and width in pixels (default: those of the input tensor)")
    group.add_argument(
        "--resize", type=_integer, metavar="PIXELS", help="scale the shorter side to PIXELS, then crop the centre"
    )
    group.add_argument(
        "--interpolation", choices=("bilinear", "bicubic"), help="method of resizing (default: bilinear)"
    )
    group.add_argument("--mean", type=_numbers, metavar="A,B,C", help="mean of each channel, for pixels from 0 to 1")
    group.add_argument("--std", type=_numbers, metavar="A,B,C", help="standard deviation of each channel")
    group.add_argument(
        "--no-softmax",
        dest="softmax",
        action="store_const",
        const=False,
        help="the network outputs probabilities, not logits",
    )
    group = parser.add_argument_group("sample: latents [N, latent] to images [N, C, H, W]")
    group.add_argument("--latents", metavar="TENSOR", help="name of the input for the latent vectors")
    group.add_argument("--classes", metavar="TENSOR", help="name of the input for class indices [N]; needs --labels")
    group.add_argument("--low", type=_number, help="value of black in the output (default: -1)")
    group.add_argument("--high", type=_number, help="value of white in the output (default: 1)")


def _add_sequence_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the tasks ``forecast`` and ``continue``."""
    group = parser.add_argument_group("forecast: series [N, context] to forecasts [N, horizon] or with quantiles")
    group.add_argument("--input", metavar="TENSOR", help="name of the input, also for classify (default: the only one)")
    group.add_argument(
        "--output", metavar="TENSOR", help="name of the output, also for classify and sample (default: the only one)"
    )
    group.add_argument("--context", type=_integer, help="number of values, or of characters, that the network reads")
    group.add_argument(
        "--quantiles", type=_numbers, metavar="A,B,C", help="quantile levels of the output, such as 0.1,0.5,0.9"
    )
    group.add_argument(
        "--standardise", action="store_const", const=True, help="scale each window to mean 0 and deviation 1"
    )
    group.add_argument(
        "--seasons", metavar="TENSOR", help="name of the input for season lengths [N]; windows may begin with NaN"
    )
    group.add_argument(
        "--non-negative",
        action="store_const",
        const=True,
        help="replace negative forecasts by 0 if the series has no negative values",
    )
    group = parser.add_argument_group("continue: characters [N] and states, or windows of characters [N, T], to logits")
    group.add_argument(
        "--vocabulary",
        metavar="FILE",
        type=Path,
        help="JSON list of the characters in the order of their indices, or `bytes` if the network reads UTF-8 bytes",
    )
    group.add_argument("--tokens", metavar="TENSOR", help="name of the input for characters (default: the only one)")
    group.add_argument("--logits", metavar="TENSOR", help="name of the output with the logits (default: the only one)")
    group.add_argument("--states", type=_names, metavar="A,B", help="names of the inputs for the state")
    group.add_argument(
        "--next-states",
        type=_names,
        metavar="A,B",
        help="names of the outputs for the next state, ordered like --states",
    )
    group.add_argument("--unknown", type=_integer, help="index that stands for unknown characters (default: 0)")


def run(args: argparse.Namespace, command: Sequence[str] | None = None) -> Card:
    """Import the file ``args.file`` and return the card of the new version. Raises StoreError.

    The model card records ``command``, the arguments of ``python -m app.models``. By default, ``command`` is the
    arguments of this process.
    """
    allowed = TASK_OPTIONS[args.task]
    known = {name for names in TASK_OPTIONS.values() for name in names}
    task_options = {name: getattr(args, name) for name in sorted(known) if getattr(args, name) is not None}
    for name in [*task_options, *(name for name in LISTS if getattr(args, name))]:
        if name not in allowed and args.task not in LISTS.get(name, ()):
            option = "no-softmax" if name == "softmax" else name.replace("_", "-")
            raise StoreError(f"--{option} is not an option of the task {args.task!r}")
    reads_bytes = args.vocabulary == Path("bytes")
    if reads_bytes:
        task_options["bytes"] = True
    description = Description(
        args.name,
        args.title,
        args.task,
        args.licence,
        args.source,
        task_options,
        _read_lines(args.labels) if args.labels else None,
        BYTES if reads_bytes else _read_vocabulary(args.vocabulary) if args.vocabulary else None,
        f"python -m app.models {shlex.join(sys.argv[1:] if command is None else command)}",
    )
    return add(args.store, args.file, description, Settings().max_import_bytes)


def _read(path: Path) -> str:
    if (size := path.stat().st_size) > MAX_LIST_BYTES:
        raise StoreError(f"{path} has {size:,} bytes; the maximum is {MAX_LIST_BYTES:,}")
    try:
        return path.read_text("utf-8-sig")  # programs on Windows may write a byte order mark
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} is not UTF-8: {error.reason}") from None


def _read_lines(path: Path) -> list[str]:
    return [line.strip() for line in _read(path).splitlines() if line.strip()]


def _read_vocabulary(path: Path) -> list[str]:
    """Return the characters in a file with a JSON list. Raises StoreError for any other file."""
    try:
        characters: Any = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not JSON: {error}") from None
    if not isinstance(characters, list) or not all(isinstance(each, str) and len(each) == 1 for each in characters):
        raise StoreError(f"{path} should be a JSON list of single characters")
    return characters
