"""A version as one file, to carry it to another store: a zip archive of the files in its folder, nothing else.

What comes in is checked before anybody sees it: only the names that a version has, nothing that is a link or a path,
no more bytes than allowed, and then all that is checked of a version that is read.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from app import store
from app.store import CARD, WEIGHTS, StoreError
from app.store.files import scratch_folder
from app.store.rollout import RolloutRefused, check_version, shorten, stored_versions

PICTURE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.png")
PNG = b"\x89PNG\r\n\x1a\n"
MOST_PICTURES = 32
MOST_CARD = 4 * 2**20  # bytes; a card with a long vocabulary takes a few thousand
MOST_DIRECTORY = 2**16  # bytes: of some 40 entries
END, LOCATOR, WIDE = 22, 20, 56  # bytes of the record at an archive's end, and of the two before it in a zip64
PIECE = 2**20
ENCRYPTED = 0x1
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of packing, whose failures are DAMAGED
DAMAGED = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, zlib.error)  # an OSError is the disk's own


class BadArchive(StoreError):
    """A file that is no version: the sentence says which entry, and what is wrong with it."""


class _Sink:
    """A file that is taken away piece by piece while it is written."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, piece: bytes) -> int:
        self._written += piece
        return len(piece)

    def flush(self) -> None:
        """There is nothing to wait for."""

    def take(self) -> bytes:
        taken = bytes(self._written)
        self._written.clear()
        return taken


def export_version(models: Path, name: str, version: int) -> Iterator[bytes]:
    """A whole version as one archive, piece by piece. Raises Missing, and StoreError for one that is not whole."""
    folder = check_version(models, name, version).folder
    pictures = sorted(path.name for path in folder.iterdir() if PICTURE.fullmatch(path.name))
    return _packed([folder / entry for entry in (CARD, WEIGHTS, *pictures)])


def _packed(paths: Sequence[Path]) -> Iterator[bytes]:
    sink = _Sink()
    with zipfile.ZipFile(cast(IO[bytes], sink), "w", zipfile.ZIP_STORED) as archive:
        for path in paths:
            entry = zipfile.ZipInfo.from_file(path, path.name, strict_timestamps=False)
            with path.open("rb") as source, archive.open(entry, "w") as target:
                while piece := source.read(PIECE):
                    target.write(piece)
                    yield sink.take()
    yield sink.take()


def import_archive(models: Path, file: IO[bytes], most: int, renumber: bool = False) -> store.Card:
    """Publish the version of an archive, under its own name and number, or with ``renumber`` under the next one.

    ``most``: bytes that it may have unpacked. Raises BadArchive, Refused when the store has another version of this
    number, and StoreError for a version that is not whole. Nothing is visible before all of it is checked.
    """
    _check_directory(file)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:  # or a kind of zip it lacks
        raise BadArchive(f"this is not a zip archive: {error}") from None
    with archive:
        entries = _entries(archive, most)
        card = _card(archive, entries[CARD])
        with scratch_folder(models) as aside:
            folder = aside / card.name / str(card.version)
            folder.mkdir(parents=True)
            _unpack(archive, entries, folder, most)
            return _place(models, folder, card, renumber)


def _check_directory(file: IO[bytes]) -> None:
    """Raises BadArchive for a list of contents that is longer than any version's, before it is read into memory.

    Where it ends, and how long it is, stands at the end of the file (APPNOTE.TXT 4.3.16), as ``zipfile`` looks for it.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - END - 2**16 - LOCATOR - WIDE))
    tail = file.read()
    at = len(tail) - END if tail[-END:].startswith(b"PK\5\6") and tail.endswith(b"\0\0") else tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < END:
        return  # no archive, which is told when it is opened
    sizes = list(struct.unpack_from("<I", tail, at + 12))
    if tail[max(0, at - LOCATOR) : at].startswith(b"PK\6\7"):  # a zip64: it stands before that, or where that says
        sizes = []
        (place,) = struct.unpack_from("<Q", tail, at - LOCATOR + 8)
        file.seek(min(place, length))
        for record in (tail[max(0, at - LOCATOR - WIDE) : at - LOCATOR], file.read(WIDE)):
            if len(record) == WIDE and record.startswith(b"PK\6\6"):
                sizes += struct.unpack_from("<Q", record, 40)
    file.seek(0)
    if (size := max(sizes, default=0)) > MOST_DIRECTORY:
        raise BadArchive(f"its list of contents has {size:,} bytes; allowed are {MOST_DIRECTORY:,}")


def _entries(archive: zipfile.ZipFile, most: int) -> dict[str, zipfile.ZipInfo]:
    """What is in an archive, by name. Raises BadArchive for anything that a version does not have."""
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename
        if name not in (CARD, WEIGHTS) and not PICTURE.fullmatch(name):
            raise BadArchive(f"entry {shorten(name)}: allowed are {CARD}, {WEIGHTS} and pictures such as curves.png")
        if name in found:
            raise BadArchive(f"entry {name!r} is there twice")
        mode = entry.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise BadArchive(f"entry {name!r} is a link or no plain file")
        if entry.flag_bits & ENCRYPTED:
            raise BadArchive(f"entry {name!r} is encrypted")
        if entry.compress_type not in METHODS:
            told = f"cannot be unpacked: its method is {entry.compress_type}; allowed are 0, stored, and 8, deflated"
            raise BadArchive(f"entry {name!r} {told}")
        if not 0 <= entry.header_offset < archive.start_dir:
            raise BadArchive(f"entry {name!r} cannot be unpacked: it does not lie in the archive")
        found[name] = entry
    for name in (CARD, WEIGHTS):
        if name not in found:
            raise BadArchive(f"entry {name!r} is missing")
    if len(found) - 2 > MOST_PICTURES:
        raise BadArchive(f"it has {len(found) - 2} pictures; allowed are {MOST_PICTURES}")
    if (total := sum(entry.file_size for entry in found.values())) > most:
        raise BadArchive(f"it has {total:,} bytes unpacked; allowed are {most:,}")
    return found


def _pieces(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content of an entry. Raises BadArchive where it is damaged."""
    try:
        with archive.open(entry) as source:
            while piece := source.read(PIECE):
                yield piece
    except DAMAGED as error:
        raise BadArchive(f"entry {entry.filename!r} cannot be unpacked: {error}") from None


def _card(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> store.Card:
    content = b""
    for piece in _pieces(archive, entry):
        content += piece
        if len(content) > MOST_CARD:
            raise BadArchive(f"entry {entry.filename!r} has more than {MOST_CARD:,} bytes, which are allowed")
    return store.parse_card(content, f"the archive's {CARD}")


def _unpack(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], folder: Path, most: int) -> None:
    """Write the entries: never more bytes than allowed, whatever the archive says of their sizes."""
    left = most
    for name, entry in entries.items():
        with (folder / name).open("wb") as target:
            for piece in _pieces(archive, entry):
                left -= len(piece)
                if left < 0:
                    raise BadArchive(f"it has more than {most:,} bytes unpacked, which are allowed")
                if name.endswith(".png") and not target.tell() and not piece.startswith(PNG):
                    raise BadArchive(f"entry {name!r} is not a PNG file")
                target.write(piece)


def _place(models: Path, folder: Path, card: store.Card, renumber: bool) -> store.Card:
    """Make the unpacked version visible, under the number that it is to have."""
    known = stored_versions(models).get(card.name, [])
    if not renumber:
        if card.version in known or not store.place(models, folder):
            raise RolloutRefused(_taken(models, card))
        return card
    while True:
        number = max(stored_versions(models).get(card.name, []), default=0) + 1
        content = json.loads((folder / CARD).read_bytes()) | {"version": number}
        (folder / CARD).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        folder = folder.rename(folder.parent / str(number))
        if store.place(models, folder):
            return store.read_card(models / card.name / str(number))


def _taken(models: Path, card: store.Card) -> str:
    label = f"{card.name}@{card.version}"
    try:
        same = store.read_card(models / card.name / str(card.version)) == card
    except StoreError:
        same = False
    return f"{label} is in the store already" + (
        "" if same else ", and is another one; `--renumber` gives the next number"
    )
