"""Tiny trainings of all kinds, on small data sets with the files of the real ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.networks import publish_network
from support.service import ROOT
from training import cnn, gan, lstm, rnn
from training.data import shapes

WHITENED: dict[str, Any] = {"widths": [8, 8, 8], "label_smoothing": 0.2}
TEXT = "".join(f"line {i}: to be, or not to be, that is the question {i * i}\n" for i in range(300))
SALES = "sold\n" + "".join(f"{100 + 9 * (i % 7) + i * i % 11}\n" for i in range(90))
IMAGES = ["--epochs", "3", "--set", "batch=16", "validation=60"]
TINY_TEXT = ["--epochs", "2", "--set", "batch=4", "bptt=40", "validation=0.4"]
WIDTHS = ["--set", "first_width=24", "second_width=26", "third_width=26"]
GAN = ["--epochs", "3", "--set", "batch=16", "latent=4"]


@dataclass(frozen=True)
class Kind:
    """A tiny training.

    Attributes:
        script: the module of the command.
        model: the name of the model that it publishes.
        options: the options of the command, without those of ``command``.
        own: whether it trains on the user's data.
        refits: whether it trains again on all data before it publishes.
        main: whether its test runs in ``make test``; the tests of the others are slow.
    """

    script: Any
    model: str
    options: tuple[str, ...]
    own: bool = False
    refits: bool = False
    main: bool = True

    def command(self, folder: Path, *options: str) -> list[str]:
        """Return the arguments of the command. ``folder`` has the runs and the store."""
        common = [
            "--seed",
            "3",
            "--threads",
            "1",
            "--runs",
            str(folder / "runs"),
            "--store",
            str(folder / "models_store"),
        ]
        return [*self.options, *(["--name", "mine"] if self.own else []), *common, *options]

    def train(self, folder: Path, *options: str) -> None:
        self.script.main(self.command(folder, *options))


KINDS = {
    "cnn": Kind(cnn, "cifar10-lenet", tuple(IMAGES)),
    "accurate": Kind(
        *(cnn, "cifar10-accurate"),
        ("--preset", "accurate", *WIDTHS, *IMAGES, "--set", "selected=8", "corrupted=0.5"),
    ),
    "rnn": Kind(rnn, "shakespeare-rnn", ("--set", "hidden=8", *TINY_TEXT), main=False),
    "gated": Kind(
        *(rnn, "shakespeare-rnn"),
        ("--preset", "gated", "--set", "hidden=16", "layers=2", *TINY_TEXT),
    ),
    "lstm": Kind(
        *(lstm, "sine-lstm"),
        ("--set", "hidden=4", "window=10", "--horizon", "5", "--set", "steps=60", "batch=4"),
    ),
    "forecaster": Kind(
        *(lstm, "series-lstm"),
        (
            *("--preset", "strong", "--set", "hidden=8", "members=2", "steps=20", "batch=8"),
            *("--set", "synthetic_series=6", "structural_series=6"),
        ),
    ),
    "gan": Kind(gan, "mnist-gan", (*GAN, "--set", "r1_penalty=1"), main=False),
    "conditional": Kind(
        gan, "mnist-cgan", ("--preset", "conditional", *GAN, "--set", "recalibration_batches=2"), main=False
    ),
    "own-cnn": Kind(
        *(cnn, "mine", ("--images", "shapes", "--epochs", "4", "--set", "batch=16", "--refit")), own=True, refits=True
    ),
    "own-rnn": Kind(
        *(rnn, "mine"),
        (
            *("--text", "novel.txt", "--set", "hidden=8", "layers=1", "--epochs", "3", "--set", "bptt=16"),
            *("--set", "dropout=0", "batch=64", "--refit"),
        ),
        own=True,
        refits=True,
    ),
    "own-gan": Kind(
        *(gan, "mine", ("--images", "shapes", *GAN, "--size", "28", "--set", "recalibration_batches=2")), own=True
    ),
    "own-lstm": Kind(
        *(
            lstm,
            "mine",
            (
                "--csv",
                "sales.csv",
                "--season",
                "7",
                "--epochs",
                "3",
                "--set",
                "batch=16",
                "--force",
                "--from",
                "base-lstm",
            ),
        ),
        own=True,
        refits=True,
    ),
}


def of_kinds(**chosen: bool) -> pytest.MarkDecorator:
    """Parametrise a test by ``kind``: the kinds with these attributes. Those that are not ``main`` are slow."""
    names = [name for name, kind in KINDS.items() if all(getattr(kind, key) == value for key, value in chosen.items())]
    return pytest.mark.parametrize(
        "kind", [pytest.param(name, marks=() if KINDS[name].main else pytest.mark.slow) for name in names]
    )


def save_public_data(folder: Path, seed: int = 0) -> None:
    """Save data sets of noise with the files and shapes of the real ones. ``seed`` changes the test parts only."""
    (folder / "m4").mkdir(parents=True, exist_ok=True)
    parts = {"train": torch.Generator().manual_seed(0), "test": torch.Generator().manual_seed(1 + seed)}
    for name, channels, side in (("cifar10", 3, 32), ("mnist", 1, 28)):
        tensors = {}
        for part, count in (("train", 200), ("test", 60)):
            tensors[f"{part}_images"] = torch.randint(
                0, 256, (count, channels, side, side), dtype=torch.uint8, generator=parts[part]
            )
            tensors[f"{part}_labels"] = torch.arange(count) % 10
        save_file(tensors, folder / f"{name}.safetensors")
    for kind, horizon in (("Hourly", 48), ("Weekly", 13)):
        for part, length in (("train", 200), ("test", horizon)):
            rows = 10 + torch.randn(4, length, generator=parts[part]).cumsum(1)
            head = ",".join(["V1", *map(str, range(length))])
            lines = [head, *(f"W,{','.join(map(str, row.tolist()))}" for row in rows)]
            (folder / "m4" / f"{kind}-{part}.csv").write_text("\n".join(lines))
    text = "HAMLET:\nto be, or not to be: that is the question\n\n" * 200
    end = len(text) * 9 // 10
    (folder / "tinyshakespeare.txt").write_text(text[:end] + (text[end:] if seed == 0 else "?" * (len(text) - end)))


def save_own_data(folder: Path) -> None:
    """Save drawings of shapes, a text and a table of sales."""
    shapes.main([str(folder / "shapes"), "--count", "24"])
    (folder / "novel.txt").write_text(TEXT)
    (folder / "sales.csv").write_text(SALES)


def save_base_models(folder: Path) -> None:
    """Create a store with mnist-judge, which rates generators, and two tiny networks to start from."""
    shutil.copytree(ROOT / "models_store" / "mnist-judge", folder / "mnist-judge")
    publish_network(folder, "cifar10-whitened", "whitened-net", WHITENED, 7, labels=[str(i) for i in range(10)])
    publish_network(folder, "base-lstm")


def only_entry(folder: Path) -> Path:
    (path,) = (each for each in folder.iterdir() if not re.match(r"\.|test_measurements", each.name))
    return path


def log_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the records of a run's log."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def train_own(stem: str, *options: str, name: str = "mine") -> None:
    """Train on the user's data in the working folder. ``stem``: such as "cnn" for the kind "own-cnn"."""
    kind = KINDS[f"own-{stem}"]
    kind.script.main([*kind.options, "--name", name, "--threads", "1", *options])


def set_limits(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    """Change constants of ``training.limits``."""
    values = {**json.loads(os.environ["QUARTET_TRAINING_LIMITS"]), **changed}
    monkeypatch.setenv("QUARTET_TRAINING_LIMITS", json.dumps(values))


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, steps: int = 1) -> Iterator[None]:
    """Interrupt the training in the ``with`` block with Ctrl-C after some steps, and expect its message."""
    with monkeypatch.context() as patch:
        set_limits(patch, signal=signal.SIGINT, signal_steps=steps)
        with pytest.raises(SystemExit, match=r"saved .* at step \d+; resume with: "):
            yield
