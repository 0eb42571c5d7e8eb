"""The public data sets. A data set is downloaded once to ``QUARTET_DATA_DIR`` (default: ``data``).

The SHA-256 hash of the data set is verified each time that it is loaded.

python -m training.data        # download all missing data sets
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.limits import limits

CIFAR10_LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DIGITS = [str(digit) for digit in range(10)]

_M4 = "https://raw.githubusercontent.com/Mcompetitions/M4-methods/master/Dataset"
URLS = {
    "tinyshakespeare.txt": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "m4/Hourly-train.csv": f"{_M4}/Train/Hourly-train.csv",
    "m4/Hourly-test.csv": f"{_M4}/Test/Hourly-test.csv",
    "m4/Weekly-train.csv": f"{_M4}/Train/Weekly-train.csv",
    "m4/Weekly-test.csv": f"{_M4}/Test/Weekly-test.csv",
    "ETTh1.csv": "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",
    "airline-passengers.csv": "https://raw.githubusercontent.com/jbrownlee/Datasets/master/airline-passengers.csv",
}

# SHA-256 of each file or, for images, of the four tensors in order
SHA256 = {
    "cifar10": "9048fcbac9c08a64d57a7c5a5a66750a974ad4eab380914df129f7e223d823df",
    "mnist": "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b",
    "tinyshakespeare.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "m4/Hourly-train.csv": "ea59b7783573c49077a835ab6465c7d66f1474783360f310988a9a737fbca62f",
    "m4/Hourly-test.csv": "71a57fccb15e534d973626ada4fb87febf789e9317715b7cc6dd3b5f90db6f42",
    "m4/Weekly-train.csv": "d478d3f6ed673e6ed3c2cb0fbed5425f72eedd51318ebebeb0b5ecfcefc37714",
    "m4/Weekly-test.csv": "3b2bc4be8e636e802260dcd843ca3c5da40536a1fbe1ecb3229a97dae4f44688",
    "ETTh1.csv": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "airline-passengers.csv": "8cb51be753a718d9be5d76d7e238cc224792754676adc21faa59e954b0201621",
}


class DataError(SystemExit):
    """An error in the data of a training. As a SystemExit, it ends the command with a message, without a traceback."""


def shorten(names: Sequence[str]) -> str:
    """Return the first five names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def print_first(lines: Sequence[str], most: int, file: str) -> None:
    """Print the first lines of a list that ``file`` in the folder of the run has completely."""
    for line in lines[:most]:
        print(f"  {line}")
    if len(lines) > most:
        print(f"  ... and {len(lines) - most:,} more; all are in {file} in the run folder")


def is_hidden(file: Path, folder: Path) -> bool:
    """Return whether a file in a folder, or one of the sub-folders above it, has a name such as .thumbnails."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


@dataclass(frozen=True)
class Images:
    """A data set of uint8 images [N, channels, side, side] with int64 labels [N].

    The test part is for the final evaluation only.
    """

    name: str
    labels: list[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    sha256: str

    def split_validation(self, count: int) -> tuple[Tensor, Tensor]:
        """Return two tensors: the indices of the training images, and the indices of ``count`` validation images.

        The split is always the same.
        """
        order = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(5000))
        return order[count:], order[:count]

    def measured(self, validation: int | None = None) -> tuple[str, Tensor, Tensor]:
        """Return the name, images and labels of the test part.

        If ``validation`` is given, return the name, images and labels of this number of validation images instead.
        """
        if validation is None:
            return f"{self.name} test part", self.test_images, self.test_labels
        _, some = self.split_validation(validation)
        return f"{self.name} validation part", self.train_images[some], self.train_labels[some]


@dataclass(frozen=True)
class Text:
    """A text, split as in nanoGPT: the first 90 % are for training, the last 10 % for testing."""

    train: str
    test: str
    sha256: str


@dataclass(frozen=True)
class Sine:
    """The workshop's series of 1,000 values: the sine of 0 to 20 plus Gaussian noise.

    The first ``split`` values, 800, are for training.
    """

    values: Tensor
    noiseless: Tensor
    noise: float
    split: int
    sha256: str


@dataclass(frozen=True)
class Series:
    """One series of values, float64 [T]."""

    values: Tensor
    sha256: str


@dataclass(frozen=True)
class Collection:
    """Series with the same season length.

    ``season``: season length in values. ``past``: the past values of each series, float64 [T]. ``future``: the future
    values of all series, [N, horizon].
    """

    name: str
    season: int
    past: list[Tensor]
    future: Tensor
    sha256: str


def data_directory() -> Path:
    """Return the folder of the data sets."""
    return Path(os.environ.get("QUARTET_DATA_DIR", "data"))


def cifar10() -> Images:
    """Return 60,000 colour images of 32 x 32 pixels in ten classes (Krizhevsky 2009)."""
    return _images("cifar10", CIFAR10_LABELS)


def mnist() -> Images:
    """Return 70,000 grey handwritten digits of 28 x 28 pixels (LeCun et al. 1998)."""
    return _images("mnist", DIGITS)


def tinyshakespeare() -> Text:
    """Return 1,115,394 characters of Shakespeare's plays, with 65 different characters (Karpathy 2015)."""
    content = _file("tinyshakespeare.txt").read_bytes()
    text = content.decode("utf-8")
    split = int(len(text) * 0.9)
    return Text(text[:split], text[split:], hashlib.sha256(content).hexdigest())


def sine(seed: int = 0, noise: float = 0.2, count: int = 1000) -> Sine:
    """Return the workshop's noisy sine. Each seed gives different noise."""
    noiseless = torch.linspace(0, 20, count, dtype=torch.float64).sin()
    generator = torch.Generator().manual_seed(seed)
    values = noiseless + noise * torch.randn(count, generator=generator, dtype=torch.float64)
    return Sine(values, noiseless, noise, int(count * 0.8), hashlib.sha256(values.numpy().tobytes()).hexdigest())


def m4_hourly() -> Collection:
    """Return the 414 hourly series of the M4 competition, each with 48 future values (Makridakis et al. 2020)."""
    return _m4("Hourly", 24)


def m4_weekly() -> Collection:
    """Return the 359 weekly series of the M4 competition, each with 13 future values. M4 defines no season for them."""
    return _m4("Weekly", 1)


def etth1() -> Series:
    """Return the oil temperature of an electricity transformer: 17,420 hours from July 2016 (Zhou et al. 2021)."""
    return _column("ETTh1.csv", "OT")


def airline() -> Series:
    """Return the number of airline passengers in 144 months from 1949 (Box and Jenkins 1976)."""
    return _column("airline-passengers.csv", "Passengers")


def _m4(kind: str, season: int) -> Collection:
    parts, digest = [], hashlib.sha256()
    for part in ("train", "test"):
        content = _file(f"m4/{kind}-{part}.csv").read_bytes()
        digest.update(content)
        rows = pd.read_csv(io.BytesIO(content)).iloc[:, 1:].to_numpy(dtype=float)  # the first column names the series
        parts.append([torch.from_numpy(row[~np.isnan(row)]) for row in rows])
    return Collection(f"m4_{kind.lower()}", season, parts[0], torch.stack(parts[1]), digest.hexdigest())


def _column(name: str, column: str) -> Series:
    content = _file(name).read_bytes()
    values = torch.from_numpy(pd.read_csv(io.BytesIO(content))[column].to_numpy(dtype=float))
    return Series(values, hashlib.sha256(content).hexdigest())


def _images(name: str, labels: list[str]) -> Images:
    path = data_directory() / f"{name}.safetensors"
    if not path.exists():
        _download_images(name, path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path} is damaged ({error}): delete the file and run the command again") from error
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    if sorted(tensors) != sorted(keys):
        raise DataError(f"{path} has the tensors {sorted(tensors)}, expected {sorted(keys)}")
    digest = hashlib.sha256()
    for key in keys:
        digest.update(tensors[key].numpy().tobytes())
    _verify(path, name, digest.hexdigest())
    return Images(name, labels, **tensors, sha256=digest.hexdigest())


def _download_images(name: str, path: Path) -> None:
    """Download with torchvision, which verifies the archives, and store the pixels in one file."""
    import torchvision

    classes = {"cifar10": torchvision.datasets.CIFAR10, "mnist": torchvision.datasets.MNIST}
    tensors: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for part in ("train", "test"):
            try:
                dataset = classes[name](scratch, train=part == "train", download=True)
            except (OSError, RuntimeError) as error:
                raise DataError(_download_error(name, path, error)) from error
            pixels = torch.as_tensor(dataset.data)
            pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels.unsqueeze(1)
            tensors[f"{part}_images"] = pixels.contiguous()
            tensors[f"{part}_labels"] = torch.as_tensor(dataset.targets, dtype=torch.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, new := path.with_name(f"{path.name}.new"))
    os.replace(new, path)


def _file(name: str) -> Path:
    path = data_directory() / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URLS[name], str(path), SHA256[name] if limits().check_digests else None)
        except (OSError, RuntimeError) as error:
            raise DataError(_download_error(name, path, error)) from error
    _verify(path, name, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def _verify(path: Path, name: str, digest: str) -> None:
    expected = SHA256.get(name) if limits().check_digests else None
    if expected and digest != expected:
        raise DataError(f"{path}: sha256 is {digest}, expected {expected}: delete the file and run the command again")


def _download_error(name: str, path: Path, error: Exception) -> str:
    return (
        f"{name} is not in {path.parent} and could not be downloaded ({error}); "
        "set QUARTET_DATA_DIR to the folder that contains it"
    )


def main() -> None:
    """Download all data sets and print their sha256."""
    for load in (cifar10, mnist, tinyshakespeare, m4_hourly, m4_weekly, etth1, airline):
        dataset = load()
        print(f"{load.__name__:16} sha256 {dataset.sha256}")


if __name__ == "__main__":
    main()
