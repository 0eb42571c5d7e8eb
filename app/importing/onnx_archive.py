"""Read a ZIP archive of an ONNX file and its external data."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from app.importing.onnx_file import external_files
from app.importing.pt2_archive import MAX_DIRECTORY_BYTES
from app.importing.pt2_graph import BadProgram
from app.networks.imported.onnx_network import EXTERNAL, MODEL
from app.store.archive import check_directory, check_offset

DAMAGED = (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, struct.error, zlib.error)


def is_onnx_archive(path: Path) -> bool:
    """Return whether a file is a ZIP archive that contains an ONNX file."""
    with path.open("rb") as content:
        if content.read(2) != b"PK":
            return False
    try:
        with _opened(path) as archive:
            return bool(_models(archive))
    except BadProgram:
        return False


def read_onnx_archive(path: Path, max_bytes: int) -> dict[str, Tensor]:
    """Read an archive of one ONNX file and its external data. Return one tensor with the bytes of each file.

    The names of the tensors are those in the store.
    Nothing is written to disk. Other entries of the archive are not read.

    Raises:
        BadProgram: the archive has several ONNX files, lacks a file, or is damaged or too large.
    """
    with _opened(path) as archive:
        if len(models := _models(archive)) > 1:
            raise BadProgram(f"the archive has the ONNX files {', '.join(sorted(models)[:5])}; one is allowed")
        entries = {info.filename: info for info in archive.infolist()}
        label, total, folder = models[0], 0, PurePosixPath(models[0]).parent

        def read(name: str) -> Tensor:
            nonlocal total
            total += entries[name].file_size
            if total > max_bytes:
                raise BadProgram(f"{label} and its external data have {total:,} bytes; the maximum is {max_bytes:,}")
            return torch.from_numpy(np.frombuffer(bytearray(archive.read(entries[name])), np.uint8))

        tensors = {MODEL: read(label)}
        for name in external_files(label, tensors[MODEL]):
            if (entry := str(folder / name)) not in entries:
                raise BadProgram(f"{label}: external data {name!r} is not in the archive, where {entry!r} is expected")
            tensors[f"{EXTERNAL}{name}"] = read(entry)
        return tensors


def _models(archive: zipfile.ZipFile) -> list[str]:
    """Return the names of the ONNX files, without the copies that macOS adds."""
    names = [name for name in archive.namelist() if name.endswith(".onnx")]
    return [name for name in names if not name.startswith("__MACOSX/")]


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive. Raises BadProgram if reading fails, and BadArchive for a wrong list of entries."""
    with path.open("rb") as file:
        try:
            check_directory(file, MAX_DIRECTORY_BYTES)
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    check_offset(archive, entry)
                yield archive
        except DAMAGED as error:
            raise BadProgram(f"the archive cannot be read: {error}") from None
