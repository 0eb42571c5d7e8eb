"""Read an ONNX file and its external data, from a folder or from a ZIP archive."""

from __future__ import annotations

import errno
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from app.importing.limits import allow_bytes
from app.networks.imported.onnx_check import check_onnx
from app.networks.imported.onnx_runner import EXTERNAL, MODEL
from app.store import StoreError

DAMAGED = (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, zlib.error)


class BadModel(StoreError):
    """The file is not a model that can be served. The message states what is wrong."""


def read_files(path: Path, folder: Path, max_bytes: int) -> dict[str, Tensor]:
    """Return one tensor with the bytes of the ONNX file, and one for each file of external data.

    The names of the tensors are those in the store. ``folder`` is an empty folder, into which an archive is unpacked.
    External data must be in the folder of the ONNX file or below it. If the ONNX file is a link, the folder of its
    target is allowed too: in the cache of Hugging Face, the model and its data are links to another folder.

    Raises:
        BadModel: a file is invalid, missing or too large. All sizes are checked before a file is read.
    """
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    path = _unpack(path, folder, max_bytes) if is_archive else path
    _check_size(path.name, path.stat().st_size, max_bytes)
    tensors = {MODEL: _tensor(path)}
    try:
        external = check_onnx(tensors[MODEL].numpy().tobytes()).external
    except ValueError as error:
        raise BadModel(f"{path.name}: {error}") from None
    folders, found = (path.parent.resolve(), path.resolve().parent), {}
    for name in external:
        paths = [(folder / name).resolve() for folder in folders]  # follows links
        allowed = [each for each in paths if each.is_file() and any(map(each.is_relative_to, folders))]
        if not allowed:
            problem = f"external data {name!r} is not a file below the folder of the model"
            raise BadModel(f"{path.name}: {problem}; over HTTP, send a ZIP archive of the model and its data")
        found[name] = allowed[0]
    _check_size(path.name, sum(each.stat().st_size for each in (path, *found.values())), max_bytes)
    return tensors | {f"{EXTERNAL}{name}": _tensor(each) for name, each in found.items()}


def _unpack(path: Path, folder: Path, max_bytes: int) -> Path:
    """Unpack an archive, and return the path of its ONNX file. Raises BadModel if there is not exactly one."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_size(path.name, sum(entry.file_size for entry in archive.infolist()), max_bytes)
            archive.extractall(folder)  # never writes outside the folder
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: an entry has a negative offset
            raise
        raise BadModel(f"{path.name} cannot be unpacked: {error}") from None
    models = [each for each in folder.rglob("*.onnx") if "__MACOSX" not in each.parts]
    if len(models) != 1:
        hint = "; only the command line imports .pt2 files, if their names end in .pt2"
        raise BadModel(f"the archive should have one file with a name that ends in .onnx; it has {len(models)}{hint}")
    return models[0]


def _check_size(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise BadModel(f"{name} and its external data have {size:,} bytes; the maximum is {max_bytes:,}")
    allow_bytes(size)


def _tensor(path: Path) -> Tensor:
    return torch.from_numpy(np.fromfile(path, np.uint8))
