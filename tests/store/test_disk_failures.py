"""Each call of the store to the file system fails once, and the process is killed after each of them.

Afterwards the store has its old or its new content, all of it is readable, and the next operation succeeds. Files that
were written but not flushed are lost when the process is killed, as at a power failure.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.disk import CrashDisk, FullDisk, Killed
from support.networks import publish_tiny, tiny_version

from app.store import Store, StoreError, archive, catalogue

NAME = "tiny-gan"
Operation = Callable[[Store, bytes], object]


def publish(name: str) -> Operation:
    return lambda store, _: store.publish(*tiny_version(name))


OPERATIONS: dict[str, Operation] = {
    "publish": publish(NAME),
    "publish the first model of a task": publish("tiny-cnn"),
    "import": lambda store, content: archive.import_archive(store, io.BytesIO(content), 2**24, renumber=True),
    "activate": lambda store, _: store.activate(NAME, 1),
    "start a canary": lambda store, _: store.activate(NAME, 3, share=10),
    "roll back": lambda store, _: store.rollback(NAME),
    "retire": lambda store, _: store.retire(NAME, 1),
    "unload": lambda store, _: store.unload("tiny-cgan"),
    "change the default": lambda store, _: store.make_default("tiny-cgan"),
}
# They write the same files as other operations.
SLOW = "publish the first model of a task", "start a canary"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return an archive of a version of tiny-gan."""
    folder = tmp_path_factory.mktemp("other")
    publish_tiny(folder, NAME)
    return b"".join(archive.export_version(Store(folder), NAME, 1))


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


@pytest.mark.parametrize(
    "operation",
    [pytest.param(each, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, each in OPERATIONS.items()],
)
@pytest.mark.parametrize("killed", [False, True], ids=["failed", "killed"])
def test_after_any_failure_the_store_is_old_or_new_and_usable(
    operation: Operation, killed: bool, original: Path, content: bytes, tmp_path: Path
) -> None:
    before, new = state(original), tmp_path / "new"
    shutil.copytree(original, new)
    operation(Store(new), content)
    after = state(new)
    assert after != before
    outcomes = set()
    for number in range(1000):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        disk = CrashDisk(number) if killed else FullDisk(number)
        try:
            operation(Store(folder, disk=disk), content)
        except (OSError, StoreError, Killed):
            found = state(folder)
            assert found in (before, after), number
            defaults = next(catalogue.verify(Store(folder)))
            assert killed or not defaults["problem"], number  # after a crash, the default model may be missing
            outcomes.add(found == after)
        if not disk.happened:
            break
        operation(Store(folder), content)
        assert not [row for row in catalogue.verify(Store(folder)) if row["problem"]], number
        shutil.rmtree(folder)
    assert number > 5
    assert outcomes == {False, True}


@pytest.mark.parametrize("disk", [CrashDisk, FullDisk])
def test_a_version_that_shall_not_be_active_is_never_active(disk: type[Any], original: Path, tmp_path: Path) -> None:
    for number in range(1000):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        failing = disk(number)
        with contextlib.suppress(OSError, StoreError, Killed):
            Store(folder, disk=failing).publish(*tiny_version("tiny-cgan"), activate=False)
        assert Store(folder).roles("tiny-cgan").active == 1, number
        if not failing.happened:
            break
        shutil.rmtree(folder)
    assert Store(folder).numbers("tiny-cgan") == [1, 2]
