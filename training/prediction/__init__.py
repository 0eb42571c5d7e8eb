"""Predict with a published model: a file or folder in, a file or folder out.

    quartet predict pets photos --out labels.csv                 # images: labels with probabilities
    quartet predict sales sales.csv --out next.csv               # a table: the next values of each series
    quartet predict novel prompts.txt --out texts.csv            # a text: a continuation of each line
    quartet predict mnist-cgan --out digits --count 100          # a generator: a folder of images
    quartet predict mnist-cgan --out digits.png --count 100      # a generator: one sheet of all images
    quartet predict pets photos --out labels.csv --url http://localhost:8000

MODEL is NAME or NAME@VERSION. After an interruption, the same command continues. Images, series and prompts that fail
are listed at the end, and the exit status is then 1.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field
from tqdm import tqdm

from app.store import Card, SeriesTraits
from app.tables.forecast import TableSeries, forecast_rows, series_of
from app.tables.messages import TableError
from app.tasks.forecasting import MAX_READ
from app.tasks.image_codecs import image_grid, png
from training.configs.numbers import Count, Described
from training.data import texts
from training.data.datasets import DataError, is_hidden
from training.data.image_lists import SUFFIXES
from training.data.tables import TableOptions, read_tidy, reader_options
from training.options import STORE, Models, Name, Parser, flags
from training.prediction.backends import Request, open_backend

Row = dict[str, Any]
IMAGES_PER_REQUEST = 64
DEFAULT_HORIZON = 24  # steps, for a model without a season; as in the service
SHOWN = ("--out", "--future", "--horizon", "--top-k", "--characters", "--count", "--label", "--url", "--key")
INTERRUPTED = 130  # exit status after Ctrl-C, 128 + SIGINT


@dataclass(frozen=True)
class Item:
    """One image, series, prompt or set of generated images.

    ``rows`` converts the results of ``request`` into rows of the output.
    """

    key: str
    request: Request
    rows: Callable[[list[dict[str, Any]]], list[Row]]


# --- reading


def images(options: Namespace, card: Card) -> list[Item]:
    """Return one item for each image file in a folder and its sub-folders, or for one image file."""
    path: Path = options.input
    files = [path]
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        files = sorted(file for file in inside if not is_hidden(file, path))

    top_k = len(card.labels or []) if card.thresholds else options.top_k  # any label may reach its threshold

    def item(file: Path) -> Item:
        name = file.relative_to(path).as_posix() if file != path else file.name
        return Item(name, {"file": file, "top_k": top_k}, lambda results: [_labels(name, results[0], options.top_k)])

    return [item(file) for file in files]


def _labels(name: str, result: Mapping[str, Any], top_k: int) -> Row:
    row: Row = {"file": name}
    for place, prediction in enumerate(result["predictions"][:top_k], 1):
        suffix = "" if place == 1 else f"_{place}"
        row |= {f"label{suffix}": prediction["label"], f"probability{suffix}": prediction["probability"]}
    if all("selected" in prediction for prediction in result["predictions"]):
        row["selected"] = ";".join(each["label"] for each in result["predictions"] if each["selected"])
    return row


def prompts(options: Namespace, card: Card) -> list[Item]:
    """Return one item for each line that is not empty."""
    fields = {"max_characters": options.characters, "temperature": options.temperature}
    lines = [line for line in texts.read_file(options.input, options.encoding).split("\n") if line.strip()]

    def item(number: int, prompt: str) -> Item:
        request = {"prompt": prompt, "seed": options.seed + number - 1, **fields}
        return Item(f"prompt {number}", request, lambda results: [{"prompt": prompt, "text": results[0]["text"]}])

    return [item(number, prompt) for number, prompt in enumerate(lines, 1)]


def series(options: Namespace, card: Card) -> list[Item]:
    """Return one item for each series of a table. Raises DataError if future values of known covariates are missing."""
    traits = card.series or SeriesTraits(season=None)
    names, calendar = (traits.known.named, traits.known.calendar) if traits.known else ([], None)
    if bool(names) != (options.future is not None):
        known = f"known covariates {', '.join(names)}" if names else "no known covariates"
        raise DataError(f"{card.name} has {known}; {'add' if names else 'omit'} --future")
    read_as = reader_options(vars(options))
    table, season = read_tidy(options.input, read_as, names), traits.season or 1
    horizon = options.horizon or (None if names else season if season > 1 else DEFAULT_HORIZON)
    future = {name: read_tidy(options.future, read_as.model_copy(update={"column": [name]})) for name in names}

    def item(one: TableSeries) -> Item:
        request = {"values": one.values, "horizon": len(one.steps), "levels": options.levels}
        if one.covariates:
            request["covariates"] = one.covariates
        if calendar:
            request["start"] = one.start
        if options.season:
            request["seasonality"] = options.season
        return Item(one.name, request, lambda results: list(forecast_rows(one, results[0])))

    try:
        return [item(one) for one in series_of(table, future, horizon, MAX_READ)]
    except TableError as error:
        raise DataError(str(error)) from error


def samples(options: Namespace, card: Card) -> list[Item]:
    """Return items of at most 64 generated images. Each item has its own seed."""

    def item(first: int) -> Item:
        seed = options.seed + first // IMAGES_PER_REQUEST
        request = {"count": min(IMAGES_PER_REQUEST, options.count - first), "label": options.label, "seed": seed}

        def rows(results: list[dict[str, Any]]) -> list[Row]:
            return [
                {"path": f"{number:05}.png", "label": each["label"], "image": each["image"]}
                for number, each in enumerate(results, first + 1)
            ]

        return Item(f"image {first + 1}", request, rows)

    return [item(first) for first in range(0, options.count, IMAGES_PER_REQUEST)]


READERS: dict[str, Callable[[Namespace, Card], list[Item]]] = {
    "classify": images,
    "continue": prompts,
    "forecast": series,
    "sample": samples,
}


# --- writing


class Journal:
    """The rows of finished items, in a file beside the output, from which an interrupted command continues.

    ``content`` describes the command. The rows of another command are not used.
    """

    def __init__(self, out: Path, content: Row) -> None:
        self.path = out.with_name(f"{out.name}.part")
        head = json.dumps(content, default=str)
        lines = self.path.read_text("utf-8").split("\n")[:-1] if self.path.exists() else []  # the last is incomplete
        lines = lines if lines[:1] == [head] else [head]
        self.rows: dict[str, list[Row]] = dict(map(json.loads, lines[1:]))
        self.path.write_text("\n".join([*lines, ""]), "utf-8")

    def add(self, key: str, rows: list[Row]) -> None:
        self.rows[key] = rows
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, rows]) + "\n")


def write(out: Path, rows: list[Row], is_generated: bool) -> None:
    """Write a CSV file or, for generated images, a sheet or a folder. The output appears when it is complete."""
    new = out.with_name(f"{out.name}.new")
    if not is_generated:
        pd.DataFrame(rows).to_csv(new, index=False)
    elif out.suffix.lower() == ".png":
        pixels = np.stack([np.atleast_3d(_pixels(row)).transpose(2, 0, 1) for row in rows])
        new.write_bytes(png(image_grid(pixels), level=6))
    else:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for row in rows:
            (new / row["path"]).write_bytes(base64.b64decode(row["image"]))
        pd.DataFrame(rows, columns=["path", "label"]).to_csv(new / "images.csv", index=False)
    os.replace(new, out)


def _pixels(row: Row) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(row["image"]))))


# --- the command


def predict(options: Namespace) -> tuple[list[Row], list[str]]:
    """Compute and write all predictions. Return the rows of the output, and a line for each item that failed."""
    out: Path = options.out
    if options.input and not options.input.exists():
        raise DataError(f"{options.input} does not exist")
    with open_backend(options.model, options.store, options.device, options.url, options.key) as backend:
        card = backend.card
        is_generated = card.task == "sample"
        if is_generated != (options.input is None):
            raise DataError(f"{card.name} {'generates images: omit INPUT' if is_generated else 'needs INPUT'}")
        if is_generated and out.is_dir():
            raise DataError(f"--out {out} exists already")
        items = READERS[card.task](options, card)
        if not items:
            raise DataError(f"{options.input} holds nothing that {card.name} can read")
        content = {key: value for key, value in vars(options).items() if key not in ("key", "url", "device")}
        journal = Journal(out, content | {"version": card.version, "items": [item.key for item in items]})
        waiting, problems = [item for item in items if item.key not in journal.rows], []
        with tqdm(total=len(items), initial=len(items) - len(waiting), desc=card.name, dynamic_ncols=True) as bar:
            for item, answer in zip(waiting, backend.answers(item.request for item in waiting), strict=True):
                if isinstance(answer, Exception):
                    problems.append(f"{item.key}: {answer}")
                else:
                    journal.add(item.key, item.rows(answer))
                bar.update()
    rows = [row for item in items for row in journal.rows.get(item.key, [])]
    if rows:
        write(out, rows, is_generated)
    journal.path.unlink()
    return rows, problems


class PredictOptions(Described):
    """The options of the command, apart from those for reading a table."""

    out: Path
    """CSV file to write; for generators, a folder or a .png file"""
    future: Path | None = None
    """table with the future values of the known covariates"""
    horizon: Count | None = None
    """steps to forecast (default: all steps of --future, one season, or 24)"""
    levels: list[float] = Field([80.0, 95.0])
    """intervals in per cent"""
    top_k: Count = 3
    """labels for each image"""
    characters: Count = 200
    """length of each continuation"""
    temperature: float = 0.8
    """sampling temperature of texts"""
    count: Count = 16
    """number of images to generate"""
    label: Name | None = None
    """label of the generated images (default: all labels)"""
    seed: int = 0
    """seed of texts and generated images"""
    url: str | None = None
    """use the service at this address (default: compute in this process)"""
    key: str | None = None
    """API key of the service"""
    store: Models = STORE
    device: str = "cpu"
    """cpu, cuda or cuda:N"""


def arguments(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line."""
    parser = Parser("predict", __doc__ or "", SHOWN, argv)
    parser.add_argument("model", metavar="MODEL", help="model in the store or of the service: NAME or NAME@VERSION")
    parser.add_argument("input", metavar="INPUT", nargs="?", type=Path, help="image, folder of images, table or text")
    parser.options(flags(PredictOptions))
    parser.options(flags(TableOptions, omit=("known_covariates", "holidays")), "reading a table, as in training.lstm")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    try:
        rows, problems = predict(options)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if rows:
        print(f"wrote {options.out}")
    if problems:
        sys.exit("\n".join([f"{len(problems):,} failed:", *problems]))
