"""The central directory of an archive is limited before ``zipfile`` reads it into memory."""

from __future__ import annotations

import io
import struct

import pytest

from app.store import archive


def end(size: int, comment: bytes = b"", offset: int = 0) -> bytes:
    """Return the end record of a zip file whose central directory has ``size`` bytes."""
    return struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, size, offset, len(comment)) + comment


def record(size: int) -> bytes:
    """Return the end record of zip64."""
    return struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, 0)


def locator(offset: int) -> bytes:
    """Return the locator of zip64, which states the offset of the end record of zip64."""
    return struct.pack("<4sIQI", b"PK\6\7", 0, offset, 1)


LONGEST = b"x" * 65_535  # comment
DIRECTORIES: list[tuple[str, bytes, int | None]] = [
    ("plain", end(7), 7),
    ("signature in the record", end(7, offset=int.from_bytes(b"PK\5\6", "little")), 7),
    ("comment", end(7, b"text"), 7),
    ("longest comment", bytes(1000) + end(7, LONGEST), 7),
    ("largest", end(2**32 - 1), 2**32 - 1),
    ("beyond the longest comment", end(7) + bytes(70_000), None),
    ("signature in the comment", end(7, b"PK\5\6"), None),
    ("zip64", record(9) + locator(0) + end(7), 9),
    ("largest of zip64", record(2**64 - 1) + locator(0) + end(7), 2**64 - 1),
    ("wrong offset", record(9) + locator(10) + end(7), 9),
    ("wrong offset and longest comment", bytes(1000) + record(9) + locator(10) + end(7, LONGEST), 9),
    ("only at the offset", record(9) + b"\xff" * 100 + locator(0) + end(7), 9),
    ("larger at the offset", record(9) + record(5) + locator(0) + end(7), 9),
    ("larger before the locator", record(5) + record(9) + locator(0) + end(7), 9),
    ("in the comment", locator(42) + end(7, record(9)), 9),
    ("cut at the offset", locator(42) + end(7, record(9)[:-1]), None),
    ("cut before the locator", record(9)[:-1] + locator(10) + end(7), None),
    ("none", locator(2**63) + end(7), None),
    ("cut locator", b"PK\6\7" + bytes(4) + end(0), None),
    ("cut locator of a directory", locator(0)[:-1] + end(7), 7),
    ("other end", end(7)[:-1], None),
    ("empty", b"", None),
]


@pytest.mark.parametrize(("content", "size"), [row[1:] for row in DIRECTORIES], ids=[row[0] for row in DIRECTORIES])
def test_the_stated_length_of_the_central_directory_is_limited(content: bytes, size: int | None) -> None:
    file = io.BytesIO(content)
    if size is None:
        archive.check_directory(file, 0)
        return
    archive.check_directory(file, size)
    assert file.tell() == 0
    with pytest.raises(archive.BadArchive) as raised:
        archive.check_directory(file, size - 1)
    assert str(raised.value) == f"the central directory of the archive has {size:,} bytes; the maximum is {size - 1:,}"
