"""Each call of the store to the file system fails once, and the process is killed after each of them.

Afterwards the store has its old or its new content, all of it is readable, and the next operation succeeds. Files that
were written but not flushed are lost when the process is killed, as at a power failure.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.disk import CrashDisk, FullDisk, Killed
from support.networks import publish_tiny, tiny_version

from app.store import Store, StoreError, catalogue

NAME = "tiny-gan"
Operation = Callable[[Store], object]


OPERATIONS: dict[str, Operation] = {
    "publish the first model of a task": lambda store: store.publish(*tiny_version("tiny-cnn")),
    "activate": lambda store: store.activate(NAME, 1),
    "change the default": lambda store: store.make_default("tiny-cgan"),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store in which version 2 of tiny-gan is active."""
    folder = tmp_path_factory.mktemp("store")
    for name in (NAME, NAME, NAME, "tiny-cgan"):
        publish_tiny(folder, name)
    for number in (1, 3, 2):
        Store(folder).activate(NAME, number)
    return folder


def state(folder: Path) -> list[dict[str, Any]]:
    """Return all that a service and the command line read from a store. Raises StoreError if a file is invalid."""
    store = Store(folder)
    rows = [catalogue.describe_model(store, row["name"]) for row in catalogue.list_models(store)]
    for row in rows:
        assert not row["problem"]
        for version in row["versions"]:
            store.verify(row["name"], version["version"])
            del version["bytes"]
        del row["changed"]
    return rows


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("killed", [False, True], ids=["failed", "killed"])
def test_after_any_failure_the_store_is_old_or_new_and_usable(
    operation: Operation, killed: bool, original: Path, tmp_path: Path
) -> None:
    before, new = state(original), tmp_path / "new"
    shutil.copytree(original, new)
    operation(Store(new))
    after = state(new)
    assert after != before
    outcomes = set()
    for number in range(1000):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        disk = CrashDisk(number) if killed else FullDisk(number)
        try:
            operation(Store(folder, disk=disk))
        except (OSError, StoreError, Killed):
            found = state(folder)
            assert found in (before, after), number
            defaults = next(catalogue.verify(Store(folder)))
            assert killed or not defaults["problem"], number  # after a crash, the default model may be missing
            outcomes.add(found == after)
        if not disk.happened:
            break
        operation(Store(folder))
        assert not [row for row in catalogue.verify(Store(folder)) if row["problem"]], number
        shutil.rmtree(folder)
    assert number > 5
    assert outcomes == {False, True}


def test_a_version_that_shall_not_be_active_is_never_active(original: Path, tmp_path: Path) -> None:
    for number in range(1000):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        disk = CrashDisk(number)
        with contextlib.suppress(Killed):
            Store(folder, disk=disk).publish(*tiny_version("tiny-cgan"), activate=False)
        assert Store(folder).roles("tiny-cgan").active == 1, number
        if not disk.happened:
            break
        shutil.rmtree(folder)
    assert Store(folder).numbers("tiny-cgan") == [1, 2]
