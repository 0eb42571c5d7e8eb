"""Export a version as a ZIP archive of the files in its folder, and import the archive into another store.

An imported archive may contain only the files that a version has. The version is verified before it becomes visible in
the store.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from app.store.card import CARD, Card, StoreError, parse, shorten
from app.store.store import PICTURE, WEIGHTS, Store

CHUNK_BYTES = 2**20
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may need much memory
DAMAGED = (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, OSError, zlib.error)


def export_version(store: Store, name: str, version: int) -> Iterator[bytes]:
    """Verify a version, and return its archive in chunks. Raises VersionNotFound and StoreError."""
    chunks = _packed(store, store.verify(name, version).folder, [CARD, WEIGHTS, *store.pictures(name, version)])
    next(chunks)  # writes the archive, because an error is not reported properly after the first chunk was sent
    return chunks


def _packed(store: Store, folder: Path, files: Sequence[str]) -> Iterator[bytes]:
    """Write the archive to a temporary file and yield an empty chunk, then yield the archive in chunks."""
    with TemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for each in files:
                entry = zipfile.ZipInfo.from_file(folder / each, each, strict_timestamps=False)
                archive.writestr(entry, store.read_file(f"{folder.relative_to(store.folder)}/{each}"))
        file.seek(0)
        yield b""
        yield from iter(partial(file.read, CHUNK_BYTES), b"")


def import_archive(
    store: Store, file: IO[bytes], max_bytes: int, renumber: bool = False, activate: bool | None = None
) -> Card:
    """Publish the version in an archive and return its card.

    The version keeps its name and its number. If ``renumber`` is true, the version gets the next free number instead.
    The unpacked files may have at most ``max_bytes`` bytes. ``activate``: see ``Store.add``.

    Raises:
        RolloutRefused: the store already has a version with this number.
        StoreError: the file is not the archive of a version, or is too large, or the version is invalid.
    """
    try:
        archive = zipfile.ZipFile(file)
    except DAMAGED as error:
        raise StoreError(f"the file is not a ZIP archive: {error}") from None
    with archive, store.disk.scratch(store.folder) as scratch:
        entries = _entries(archive, max_bytes)
        content = b"".join(_chunks(archive, entries.pop(CARD)))
        card = parse(Card, content, f"the archive's {CARD}")
        for entry in entries.values():
            store.disk.write(scratch / entry.filename, _chunks(archive, entry))
        return store.add(scratch, card, json.loads(content), None if renumber else card.version, activate).card


def _entries(archive: zipfile.ZipFile, max_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries of an archive by name. Raises StoreError if an entry is missing or not allowed."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename
        is_known = name in (CARD, WEIGHTS) or PICTURE.fullmatch(name)
        if not is_known or name in entries or entry.compress_type not in METHODS:
            allowed = f"{CARD}, {WEIGHTS} and pictures such as curves.png are allowed, each once, stored or deflated"
            raise StoreError(f"entry {shorten(name)}: only {allowed}")
        entries[name] = entry
    for name in (CARD, WEIGHTS):
        if name not in entries:
            raise StoreError(f"entry {name!r} is missing")
    if (size := sum(entry.file_size for entry in entries.values())) > max_bytes:
        raise StoreError(f"the archive has {size:,} bytes unpacked; the maximum is {max_bytes:,}")
    return entries


def _chunks(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield the content of an entry, which has at most ``entry.file_size`` bytes. Raises StoreError for damage."""
    try:
        with archive.open(entry) as source:
            yield from iter(partial(source.read, CHUNK_BYTES), b"")
    except DAMAGED as error:
        raise StoreError(f"entry {entry.filename!r} cannot be unpacked: {error}") from None
