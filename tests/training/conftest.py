"""Fixtures of the tests of trainings."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from support.images import save_blank_pictures
from support.trainings import KINDS, save_base_models, save_own_data, save_public_data
from support.waiting import locked


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save the data of all kinds of trainings and a store in a folder, and make it the working folder."""
    folder.mkdir(exist_ok=True)
    save_public_data(folder / "data")
    save_own_data(folder)
    save_base_models(folder / "models_store")
    monkeypatch.setenv("QUARTET_DATA_DIR", str(folder / "data"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def _blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    save_blank_pictures(monkeypatch)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder of a training, with its data and a store."""
    return prepared(tmp_path / "workspace", monkeypatch)


@pytest.fixture
def finished(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that trains a network once for all tests, and returns the folder of the training.

    The folder becomes the working folder. Tests must not change it.
    """

    def train(kind: str) -> Path:
        folder = shared_folder / f"trained-{kind}"
        with locked(folder.with_suffix(".lock")):
            if not (folder / "output").exists():
                prepared(folder, monkeypatch)
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    KINDS[kind].train(folder)
                (folder / "output").write_text(output.getvalue())
        monkeypatch.setenv("QUARTET_DATA_DIR", str(folder / "data"))
        monkeypatch.chdir(folder)
        return folder

    return train
