"""Read an ONNX file and its external data, from a folder or from a ZIP archive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from app.importing.limits import allow_bytes
from app.networks.imported.onnx_check import check_onnx
from app.networks.imported.onnx_runner import EXTERNAL, MODEL
from app.store import StoreError
from app.store.archive import DAMAGED, open_zip

MAX_DIRECTORY_BYTES = 16 * 2**20  # size of the list of entries in a ZIP archive


class BadModel(StoreError):
    """The file is not a model that can be served. The message states what is wrong."""


def read_files(path: Path, max_bytes: int) -> dict[str, Tensor]:
    """Return one tensor with the bytes of the ONNX file, and one for each file of external data.

    The names of the tensors are those in the store. Raises BadModel if a file is invalid, missing or too large.
    """
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return _read_archive(path, file, max_bytes)
    folders = path.parent.resolve(), path.resolve().parent

    def find(name: str) -> tuple[int, Callable[[], bytes]]:
        """Find a file of external data, which must be in the folder of the ONNX file or below it.

        If ``path`` is a link, the folder of its target is allowed too: in the cache of Hugging Face, the model and its
        data are links to another folder.
        """
        paths = [(folder / name).resolve() for folder in folders]  # follows links
        allowed = [each for each in paths if each.is_file() and any(map(each.is_relative_to, folders))]
        if not allowed:
            raise BadModel(
                f"{path.name}: external data {name!r} is not a file below the folder of the model; over HTTP, send a "
                "ZIP archive of the model and its data"
            )
        return allowed[0].stat().st_size, allowed[0].read_bytes

    return _read(path.name, path.stat().st_size, path.read_bytes, find, max_bytes)


def _read_archive(path: Path, file: BinaryIO, max_bytes: int) -> dict[str, Tensor]:
    """Read an archive of one ONNX file and its external data, without writing to the disk."""
    try:
        with open_zip(file, MAX_DIRECTORY_BYTES) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            models = [name for name in entries if name.endswith(".onnx") and not name.startswith("__MACOSX/")]
            if len(models) > 1:
                raise BadModel(f"the archive has the ONNX files {', '.join(sorted(models)[:5])}; one is allowed")
            if not models:
                hint = "only the command line imports .pt2 files, if their names end in .pt2"
                raise BadModel(f"the archive has no file with a name that ends in .onnx; {hint}")
            folder = PurePosixPath(models[0]).parent

            def find(name: str) -> tuple[int, Callable[[], bytes]]:
                if (entry := str(folder / name)) not in entries:
                    problem = f"external data {name!r} is not in the archive, where {entry!r} is expected"
                    raise BadModel(f"{models[0]}: {problem}")
                return entries[entry].file_size, lambda: archive.read(entries[entry])

            size = entries[models[0]].file_size
            return _read(models[0], size, lambda: archive.read(entries[models[0]]), find, max_bytes)
    except DAMAGED as error:
        raise BadModel(f"{path.name} cannot be read: {error}") from None


def _read(
    label: str,
    size: int,
    read: Callable[[], bytes],
    find: Callable[[str], tuple[int, Callable[[], bytes]]],
    max_bytes: int,
) -> dict[str, Tensor]:
    """Read an ONNX file and its external data. All sizes are checked before a file is read.

    ``find`` returns the size of a file of external data, and a function that reads it.
    """

    def check(total: int) -> None:
        if total > max_bytes:
            raise BadModel(f"{label} and its external data have {total:,} bytes; the maximum is {max_bytes:,}")
        allow_bytes(total)

    check(size)
    content = read()
    try:
        external = check_onnx(content).external
    except ValueError as error:
        raise BadModel(f"{label}: {error}") from None
    found = {name: find(name) for name in external}
    check(size + sum(each for each, _ in found.values()))
    return {MODEL: _tensor(content), **{f"{EXTERNAL}{name}": _tensor(load()) for name, (_, load) in found.items()}}


def _tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))
