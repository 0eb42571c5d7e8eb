"""Export a version as a zip archive of the files in its folder, and import the archive into another store.

An imported archive may contain only the files that a version has. Archives with links, with entries in folders, or with
too many bytes are rejected. The version is verified before it becomes visible in the store.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import IO, cast

from app import store
from app.store import CARD, PICTURE, WEIGHTS, StoreError
from app.store.atomic_files import scratch_folder
from app.store.rollout import RolloutRefused, check_version, shorten, stored_versions

PNG = b"\x89PNG\r\n\x1a\n"
MAX_PICTURES = 32
MAX_CARD_BYTES = 4 * 2**20  # a card with a long vocabulary takes a few thousand bytes
MAX_DIRECTORY_BYTES = 2**16  # more than enough for the allowed 34 entries
END_BYTES, LOCATOR_BYTES, ZIP64_END_BYTES = 22, 20, 56  # the end records of zip and zip64 (APPNOTE.TXT 4.3.14 to 16)
CHUNK_BYTES = 2**20
ENCRYPTED = 0x1  # flag bit
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
DAMAGED = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, zlib.error)  # an OSError is not damage


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


def export_version(models: Path, name: str, version: int) -> Iterator[bytes]:
    """Yield the archive of a version in chunks.

    Raises:
        VersionNotFound: the version does not exist.
        BadArchive: ``import_archive`` would reject the archive because of the card or the pictures.
        StoreError: the version is invalid.
    """
    folder = check_version(models, name, version).folder
    pictures = store.version_pictures(models, name, version)
    chunks = _packed([folder / entry for entry in (CARD, WEIGHTS, *pictures)])
    try:
        next(chunks)  # opens all files, because an error is not reported properly after the first chunk was sent
    except OSError as error:
        file = Path(error.filename).name
        raise StoreError(f"{name}/{version}/{file} cannot be read: {error.strerror}") from error
    return chunks


def _packed(paths: Sequence[Path]) -> Iterator[bytes]:
    """Open and check the files and yield an empty chunk, then yield the archive in chunks."""
    sink = _Sink()
    with ExitStack() as stack:
        sources = [
            (zipfile.ZipInfo.from_file(path, path.name, strict_timestamps=False), stack.enter_context(path.open("rb")))
            for path in paths
        ]
        _check_pictures(sum(entry.filename.endswith(".png") for entry, _ in sources))
        for entry, source in sources:
            if entry.filename == CARD:
                _check_card_size(entry.file_size)
            _check_start(entry.filename, source.read(len(PNG)))
            source.seek(0)
        yield b""
        archive = stack.enter_context(zipfile.ZipFile(cast(IO[bytes], sink), "w", zipfile.ZIP_STORED))
        for entry, source in sources:
            with archive.open(entry, "w") as target:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
                    yield sink.take()
        archive.close()
        yield sink.take()


def import_archive(
    models: Path,
    file: IO[bytes],
    max_bytes: int,
    renumber: bool = False,
    check: store.Check | None = None,
) -> store.Card:
    """Publish the version in an archive and return its card.

    The version keeps its name and its number. If ``renumber`` is true, the version gets the next free number instead.
    The unpacked files may have at most ``max_bytes`` bytes. ``check`` is called before the version is moved into the
    store, and raises StoreError to reject it.

    Raises:
        BadArchive: the file is not the archive of a version, or is too large.
        RolloutRefused: the store already has a version with this number.
        StoreError: the version is invalid.
    """
    check_directory(file)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:  # NotImplementedError: unsupported features
        raise BadArchive(f"the file is not a zip archive: {error}") from None
    with archive:
        entries = _entries(archive, max_bytes)
        card = _card(archive, entries[CARD])
        with scratch_folder(models) as scratch:
            folder = scratch / card.name / str(card.version)
            folder.mkdir(parents=True)
            _unpack(archive, entries, folder, max_bytes)
            return _move_into_store(models, folder, card, renumber, check)


def check_directory(file: IO[bytes], max_bytes: int = MAX_DIRECTORY_BYTES) -> None:
    """Raise BadArchive if the central directory of a zip file has more than ``max_bytes`` bytes.

    This check comes before ``zipfile`` reads the directory into memory. The end record of the file states the length of
    the directory (APPNOTE.TXT 4.3.16). The function finds the end record in the same way as ``zipfile``.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - END_BYTES - 2**16 - LOCATOR_BYTES - ZIP64_END_BYTES))
    tail = file.read()
    plain = tail[-END_BYTES:].startswith(b"PK\5\6") and tail.endswith(b"\0\0")  # no comment after the end record
    end = len(tail) - END_BYTES if plain else tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) - end < END_BYTES:
        return  # not a zip archive; ``zipfile`` raises an error when it opens the file
    sizes = list(struct.unpack_from("<I", tail, end + 12))
    locator = end - LOCATOR_BYTES
    if locator >= 0 and tail[locator:end].startswith(b"PK\6\7"):
        sizes = []  # zip64: its record is before the locator, or at the offset in the locator
        (offset,) = struct.unpack_from("<Q", tail, locator + 8)
        file.seek(min(offset, length))
        for record in (tail[max(0, locator - ZIP64_END_BYTES) : locator], file.read(ZIP64_END_BYTES)):
            if len(record) == ZIP64_END_BYTES and record.startswith(b"PK\6\6"):
                sizes += struct.unpack_from("<Q", record, 40)
    file.seek(0)
    if (size := max(sizes, default=0)) > max_bytes:
        raise BadArchive(f"the central directory of the archive has {size:,} bytes; the maximum is {max_bytes:,}")


def check_offset(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Raise BadArchive for an entry outside the archive. ``zipfile`` would raise an OSError for such an entry."""
    if not 0 <= entry.header_offset < archive.start_dir:
        raise BadArchive(f"entry {entry.filename!r} cannot be unpacked: its offset is outside the archive")


def _entries(archive: zipfile.ZipFile, max_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries of an archive by name. Raises BadArchive if an entry is missing or not allowed."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename
        if name not in (CARD, WEIGHTS) and not PICTURE.fullmatch(name):
            raise BadArchive(
                f"entry {shorten(name)}: only {CARD}, {WEIGHTS} and pictures such as curves.png are allowed"
            )
        if name in entries:
            raise BadArchive(f"entry {name!r} occurs twice")
        mode = entry.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise BadArchive(f"entry {name!r} is not a regular file")
        if entry.flag_bits & ENCRYPTED:
            raise BadArchive(f"entry {name!r} is encrypted")
        if entry.compress_type not in METHODS:
            problem = f"its method is {entry.compress_type}; allowed values: 0 (stored), 8 (deflated)"
            raise BadArchive(f"entry {name!r} cannot be unpacked: {problem}")
        check_offset(archive, entry)
        entries[name] = entry
    for name in (CARD, WEIGHTS):
        if name not in entries:
            raise BadArchive(f"entry {name!r} is missing")
    _check_pictures(len(entries) - 2)
    if (total := sum(entry.file_size for entry in entries.values())) > max_bytes:
        raise BadArchive(f"the archive has {total:,} bytes unpacked; the maximum is {max_bytes:,}")
    return entries


def _check_pictures(count: int) -> None:
    if count > MAX_PICTURES:
        raise BadArchive(f"the archive has {count} pictures; the maximum is {MAX_PICTURES}")


def _check_card_size(size: int) -> None:
    if size > MAX_CARD_BYTES:
        raise BadArchive(f"entry {CARD!r} is too large; the maximum is {MAX_CARD_BYTES:,} bytes")


def _check_start(name: str, start: bytes) -> None:
    """Raise BadArchive if a picture, whose first bytes are ``start``, is not a PNG file."""
    if name.endswith(".png") and not start.startswith(PNG):
        raise BadArchive(f"entry {name!r} is not a PNG file")


def _chunks(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield the content of an entry. Raises BadArchive if it is damaged."""
    try:
        with archive.open(entry) as source:
            while chunk := source.read(CHUNK_BYTES):
                yield chunk
    except DAMAGED as error:
        raise BadArchive(f"entry {entry.filename!r} cannot be unpacked: {error}") from None


def _card(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> store.Card:
    content = b""
    for chunk in _chunks(archive, entry):
        content += chunk
        _check_card_size(len(content))
    return store.parse_card(content, f"the archive's {CARD}")


def _unpack(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], folder: Path, max_bytes: int) -> None:
    """Write the entries to ``folder``. Count their bytes, because the sizes stated in the archive may be wrong."""
    remaining = max_bytes
    for name, entry in entries.items():
        with (folder / name).open("wb") as target:
            chunks = _chunks(archive, entry)
            first = next(chunks, b"")
            _check_start(name, first)
            for chunk in chain([first], chunks):
                remaining -= len(chunk)
                if remaining < 0:
                    raise BadArchive(f"the archive is too large unpacked; the maximum is {max_bytes:,} bytes")
                target.write(chunk)


def _move_into_store(
    models: Path, folder: Path, card: store.Card, renumber: bool, check: store.Check | None
) -> store.Card:
    """Move the unpacked version into the store. If ``renumber`` is true, give it the next free number."""
    numbers = stored_versions(models).get(card.name, [])
    if not renumber:
        if card.version in numbers or not store.move_into_store(models, folder, check):
            raise RolloutRefused(_conflict(models, card))
        return card
    while True:
        number = store.next_number(models, card.name)
        content = json.loads((folder / CARD).read_bytes()) | {"version": number}
        (folder / CARD).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        folder = folder.rename(folder.parent / str(number))
        if store.move_into_store(models, folder, check):
            return store.read_card(models / card.name / str(number))


def _conflict(models: Path, card: store.Card) -> str:
    """Return the error message for a version with a number that the store already has."""
    label = f"{card.name}@{card.version}"
    try:
        same = store.read_card(models / card.name / str(card.version)) == card
    except StoreError:
        same = False
    return f"{label} is already in the store" + (
        "" if same else ", with other content; with `renumber`, the import gives it the next number"
    )
