"""Export a version as a ZIP archive of the files in its folder, and import the archive into another store.

An imported archive may contain only the files that a version has. The version is verified before it becomes visible in
the store.
"""

from __future__ import annotations

import json
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast

from app.store.card import CARD, MAX_BYTES, Card, StoreError, parse, shorten
from app.store.store import PICTURE, WEIGHTS, Store

PNG = b"\x89PNG\r\n\x1a\n"
MAX_PICTURES = 32
MAX_DIRECTORY_BYTES = 2**16  # more than enough for the allowed 34 entries
CHUNK_BYTES = 2**20
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may need much memory
DAMAGED = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError, zlib.error)


class BadArchive(StoreError):
    """The file is not the archive of a version. The message states what is wrong."""


class _Sink:
    """A write-only file in memory. ``take`` returns its content in chunks while the file is still being written."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, chunk: bytes) -> int:
        self._written += chunk
        return len(chunk)

    def flush(self) -> None:
        """Do nothing. ``zipfile`` requires this method."""

    def take(self) -> bytes:
        """Return everything written since the last call."""
        chunk = bytes(self._written)
        self._written.clear()
        return chunk


def export_version(store: Store, name: str, version: int) -> Iterator[bytes]:
    """Verify a version, and yield its archive in chunks. Raises VersionNotFound and StoreError before the first."""
    chunks = _packed(store, store.verify(name, version).folder, [CARD, WEIGHTS, *store.pictures(name, version)])
    try:
        next(chunks)  # opens all files, because an error is not reported properly after the first chunk was sent
    except OSError as error:
        raise StoreError(f"{name}/{version}/{Path(error.filename).name} cannot be read: {error.strerror}") from error
    return chunks


def _packed(store: Store, folder: Path, files: Sequence[str]) -> Iterator[bytes]:
    """Open the files and yield an empty chunk, then yield the archive in chunks."""
    sink = _Sink()
    with ExitStack() as stack:
        sources = [stack.enter_context(store.disk.open(folder / file)) for file in files]
        yield b""
        with zipfile.ZipFile(cast(IO[bytes], sink), "w", zipfile.ZIP_STORED) as archive:
            for file, source in zip(files, sources, strict=True):
                entry = zipfile.ZipInfo.from_file(folder / file, file, strict_timestamps=False)
                with archive.open(entry, "w") as target:
                    while chunk := source.read(CHUNK_BYTES):
                        target.write(chunk)
                        yield sink.take()
        yield sink.take()


def import_archive(
    store: Store, file: IO[bytes], max_bytes: int, renumber: bool = False, activate: bool | None = None
) -> Card:
    """Publish the version in an archive and return its card.

    The version keeps its name and its number. If ``renumber`` is true, the version gets the next free number instead.
    The unpacked files may have at most ``max_bytes`` bytes. ``activate``: see ``Store.add``.

    Raises:
        BadArchive: the file is not the archive of a version, or is too large.
        RolloutRefused: the store already has a version with this number.
        StoreError: the version is invalid.
    """
    with open_zip(file) as archive, store.disk.scratch(store.folder) as scratch:
        entries = _entries(archive, max_bytes)
        content = b"".join(_chunks(archive, entries.pop(CARD)))
        card = parse(Card, content, f"the archive's {CARD}")
        for entry in entries.values():
            store.disk.write(scratch / entry.filename, _chunks(archive, entry))
        return store.add(scratch, card, json.loads(content), None if renumber else card.version, activate).card


def open_zip(file: IO[bytes], max_bytes: int = MAX_DIRECTORY_BYTES) -> zipfile.ZipFile:
    """Open a ZIP archive whose central directory has at most ``max_bytes`` bytes. Raises BadArchive.

    Otherwise ``zipfile`` would read a central directory of any length into memory.
    """
    reader = _LimitedReader(file, max_bytes)
    try:
        archive = zipfile.ZipFile(cast(IO[bytes], reader))
    except DAMAGED as error:
        raise BadArchive(f"the file is not a ZIP archive: {error}") from None
    reader.max_bytes = sys.maxsize
    return archive


class _LimitedReader:
    """A file that is read in pieces of at most ``max_bytes`` bytes."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file = file
        self.max_bytes = max_bytes

    def read(self, size: int = -1) -> bytes:
        if size > self.max_bytes:
            raise BadArchive(
                f"the central directory of the archive has {size:,} bytes; the maximum is {self.max_bytes:,}"
            )
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _entries(archive: zipfile.ZipFile, max_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries of an archive by name. Raises BadArchive if an entry is missing or not allowed."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename
        if name not in (CARD, WEIGHTS) and not PICTURE.fullmatch(name):
            problem = f"only {CARD}, {WEIGHTS} and pictures such as curves.png are allowed"
            raise BadArchive(f"entry {shorten(name)}: {problem}")
        if name in entries:
            raise BadArchive(f"entry {name!r} occurs twice")
        if entry.compress_type not in METHODS:
            problem = f"its method is {entry.compress_type}; allowed values: 0 (stored), 8 (deflated)"
            raise BadArchive(f"entry {name!r} cannot be unpacked: {problem}")
        entries[name] = entry
    for name in (CARD, WEIGHTS):
        if name not in entries:
            raise BadArchive(f"entry {name!r} is missing")
    if (count := len(entries) - 2) > MAX_PICTURES:
        raise BadArchive(f"the archive has {count} pictures; the maximum is {MAX_PICTURES}")
    for size, what, limit in (
        (entries[CARD].file_size, f"entry {CARD!r}", MAX_BYTES),
        (sum(entry.file_size for entry in entries.values()), "the archive", max_bytes),
    ):
        if size > limit:
            raise BadArchive(f"{what} has {size:,} bytes unpacked; the maximum is {limit:,}")
    return entries


def _chunks(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield the content of an entry, which has at most ``entry.file_size`` bytes. Raises BadArchive for damage."""
    try:
        with archive.open(entry) as source:
            start = source.read(len(PNG))
            if entry.filename.endswith(".png") and start != PNG:
                raise BadArchive(f"entry {entry.filename!r} is not a PNG file")
            yield start
            while chunk := source.read(CHUNK_BYTES):
                yield chunk
    except DAMAGED as error:
        raise BadArchive(f"entry {entry.filename!r} cannot be unpacked: {error}") from None
