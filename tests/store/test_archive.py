"""Versions are exported as archives and imported again. The import accepts only archives of valid versions."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from support.disk import failing
from support.networks import publish_tiny

from app.store import Card, RolloutRefused, Store, StoreError, VersionNotFound, archive
from app.store.version import Version

NAME = "tiny-gan"
PNG = b"\x89PNG\r\n\x1a\n..."


@pytest.fixture
def archive_bytes(tmp_path: Path) -> bytes:
    """Return an archive of a version with a picture."""
    folder = publish_tiny(tmp_path / "first", NAME).folder
    (folder / "curves.png").write_bytes(PNG)
    return b"".join(archive.export_version(Store(tmp_path / "first"), NAME, 1))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Return a second, empty store."""
    (tmp_path / "other").mkdir()
    return tmp_path / "other"


def import_bytes(folder: Path, content: bytes, max_bytes: int = 10**6, renumber: bool = False) -> Card:
    with tempfile.TemporaryFile() as file:  # a real file gives other errors than BytesIO
        file.write(content)
        return archive.import_archive(Store(folder), file, max_bytes, renumber)


def test_an_exported_version_can_be_imported_into_another_store(
    archive_bytes: bytes, other: Path, tmp_path: Path
) -> None:
    assert import_bytes(other, archive_bytes).version == 1
    for file in ("model.safetensors", "card.json", "curves.png"):
        assert (other / NAME / "1" / file).read_bytes() == (tmp_path / "first" / NAME / "1" / file).read_bytes()
    assert Store(other).defaults() == {"sample": NAME}
    assert sorted(path.name for path in other.iterdir()) == [".lock", "defaults.json", NAME]


def test_an_existing_version_number_is_rejected_or_renumbered(archive_bytes: bytes, other: Path) -> None:
    import_bytes(other, archive_bytes)
    sentence = "^tiny-gan@1 is already in the store; with `renumber`, the import gives the version the next number$"
    with pytest.raises(RolloutRefused, match=sentence):
        import_bytes(other, archive_bytes)
    assert import_bytes(other, archive_bytes, renumber=True).version == 2
    first, second = ((other / NAME / number / "card.json").read_bytes() for number in "12")
    assert second == first.replace(b'"version": 1,', b'"version": 2,')


def test_fields_of_a_newer_service_are_kept(archive_bytes: bytes, other: Path) -> None:
    newer = repacked(archive_bytes, lambda e: e.update({"card.json": b'{"colour": "red",' + e["card.json"][1:]}))
    assert import_bytes(other, newer, renumber=True).version == 1
    assert b'"colour": "red"' in (other / NAME / "1" / "card.json").read_bytes()


def test_a_version_is_checked_before_it_is_placed(archive_bytes: bytes, other: Path) -> None:
    def check(version: Version) -> None:
        assert (version.label, list(Store(other).versions())) == ("tiny-gan@1", [])
        raise StoreError("too much memory")

    with pytest.raises(StoreError, match="too much memory"):
        archive.import_archive(Store(other, check), io.BytesIO(archive_bytes), 2**20)
    assert list(other.iterdir()) == []


def test_an_archive_holds_the_files_of_a_version_without_compression(tmp_path: Path) -> None:
    folder = publish_tiny(tmp_path, NAME).folder
    for file in ("b.png", "a.png", "Upper.png", "notes.txt"):
        (folder / file).write_bytes(PNG)
    os.utime(folder / "a.png", (0, 0))  # zip cannot state times before 1980
    with zipfile.ZipFile(io.BytesIO(b"".join(archive.export_version(Store(tmp_path), NAME, 1)))) as exported:
        assert exported.namelist() == ["card.json", "model.safetensors", "a.png", "b.png"]
        assert {entry.compress_type for entry in exported.infolist()} == {zipfile.ZIP_STORED}
        assert exported.getinfo("a.png").date_time == (1980, 1, 1, 0, 0, 0)


def test_a_version_that_cannot_be_read_is_not_exported(three: Path) -> None:
    with pytest.raises(VersionNotFound, match=r"^there is no tiny-gan@9 in the store; versions in the store: 1, 2, 3$"):
        archive.export_version(Store(three), NAME, 9)
    (three / NAME / "1" / "curves.png").write_bytes(PNG)
    store = Store(three, disk=failing(("open", three / NAME / "1" / "curves.png")))
    with pytest.raises(StoreError, match=r"^tiny-gan/1/curves\.png cannot be read: Input/output error$"):
        archive.export_version(store, NAME, 1)


def repacked(content: bytes, change: Callable[[dict[str, bytes]], object]) -> bytes:
    """Return a copy of an archive in which ``change`` has changed the entries."""
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        entries = {entry.filename: source.read(entry) for entry in source.infolist()}
    change(entries)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in entries.items():
            target.writestr(name, data)
    return file.getvalue()


def with_entry(content: bytes, entry: zipfile.ZipInfo, data: bytes) -> bytes:
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as target:
        target.writestr(entry, data)
    return file.getvalue()


def with_wrong_size(content: bytes) -> bytes:
    """Return an archive that states 8 bytes for a picture of two million bytes."""
    big = repacked(content, lambda entries: entries.update({"curves.png": PNG + bytes(2 * 10**6)}))
    return big.replace((len(PNG) + 2 * 10**6).to_bytes(4, "little"), (8).to_bytes(4, "little"))


def with_nan(entries: dict[str, bytes]) -> None:
    tensors = load(entries["model.safetensors"])
    tensors["layers.0.bias"][0] = torch.nan
    entries["model.safetensors"] = save(tensors)


def with_damaged_data(content: bytes) -> bytes:
    position = content.index(b"layers.0.bias")
    return content[:position] + b"X" + content[position + 1 :]


def with_huge_sizes(entries: dict[str, bytes]) -> None:
    """Write sizes of a network to the card that would need terabytes of memory."""
    entries["card.json"] = entries["card.json"].replace(b'"latent": 4', b'"latent": 400000000000')


def patched(content: bytes, *changes: tuple[int, bytes]) -> bytes:
    """Overwrite bytes at some positions. Negative positions count from the end."""
    data = bytearray(content)
    for position, replacement in changes:
        position %= len(data)
        data[position : position + len(replacement)] = replacement
    return bytes(data)


def with_method(content: bytes, method: int) -> bytes:
    """Return an archive that states this compression method for the card."""
    packing = struct.pack("<H", method)
    return patched(content, (8, packing), (content.index(b"PK\x01\x02") + 10, packing))


def with_far_offset(content: bytes) -> bytes:
    """Return an archive that states the offset 2^63 for the card."""
    entry, end = content.index(b"PK\x01\x02"), len(content) - 22
    extra = struct.pack("<HHQ", 1, 8, 2**63)
    (size,) = struct.unpack_from("<I", content, end + 12)
    stated = patched(content, (entry + 30, struct.pack("<H", len(extra))), (entry + 42, b"\xff" * 4),
                   (end + 12, struct.pack("<I", size + len(extra))))  # fmt: skip
    return stated[: entry + 46 + len("card.json")] + extra + stated[entry + 46 + len("card.json") :]


def with_offset_of_directory(content: bytes) -> bytes:
    """Return an archive in which the card begins where the central directory begins."""
    start = content.index(b"PK\x01\x02")
    return patched(content, (start + 42, struct.pack("<I", start)))


def twice(content: bytes) -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return with_entry(content, zipfile.ZipInfo("curves.png"), PNG)


INVALID: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("not a zip", lambda content: b"PK" + content[:50], "^the file is not a ZIP archive: File is not a zip file$"),
    ("two bytes", lambda content: b"PK", "^the file is not a ZIP archive: File is not a zip file$"),
    ("cut", lambda content: content[:-30], "the file is not a ZIP archive"),
    ("parent folder", lambda c: with_entry(c, zipfile.ZipInfo("../x.png"), PNG), r"entry '\.\./x\.png': only card\.json"),
    ("absolute", lambda c: with_entry(c, zipfile.ZipInfo("/etc/x.png"), PNG), "entry '/etc/x.png': only card"),
    ("folder", lambda c: with_entry(c, zipfile.ZipInfo("a/"), b""), "entry 'a/': only card"),
    ("long name", lambda c: with_entry(c, zipfile.ZipInfo("x" * 90), b""), f"^entry '{'x' * 79}…: only card"),
    ("twice", twice, "^entry 'curves.png': only .* are allowed, each once, stored or deflated$"),
    ("encrypted", lambda c: patched(c, (6, b"\1"), (c.index(b"PK\x01\x02") + 8, b"\1")), r"^entry 'card\.json' cannot be unpacked: .* is encrypted"),
    ("pickle", lambda c: with_entry(c, zipfile.ZipInfo("model.pt"), b"x"),
     r"^entry 'model\.pt': only card\.json, model\.safetensors and pictures such as curves\.png are allowed, each once"),
    ("no card", lambda c: repacked(c, lambda entries: entries.pop("card.json")), "^entry 'card.json' is missing$"),
    ("no weights", lambda c: repacked(c, lambda entries: entries.pop("model.safetensors")), "^entry 'model.safetensors' is missing$"),
    ("too large", lambda c: repacked(c, lambda e: e.update({"curves.png": PNG + bytes(10**6)})), "the maximum is 1,000"),
    ("wrong size", with_wrong_size, "'curves.png' cannot be unpacked: Bad CRC"),
    ("card", lambda c: repacked(c, lambda e: e.update({"card.json": b"{}"})), r"^the archive's card\.json: name: Field required"),
    ("name", lambda c: repacked(c, lambda e: e.update({"card.json": e["card.json"].replace(b"tiny-gan", b"../gan")})),
     r"card\.json: name: .* found '\.\./gan'"),
    ("other weights", lambda c: repacked(c, with_nan), "sha256 is .*, expected .* as on the card"),
    ("damaged", with_damaged_data, "cannot be unpacked: Bad CRC"),
    ("a name that is not UTF-8", lambda c: patched(c, (6, b"\0\x08"), (30, b"\xff")), "cannot be unpacked: |not a ZIP archive: "),
    ("lzma", lambda c: with_method(c, 14), "^entry 'card.json': only .* stored or deflated$"),
    ("negative offset", lambda c: patched(c, (-5, b"\xff")), "^the file is not a ZIP archive|'card.json' cannot be unpacked"),
    ("offset of the directory", with_offset_of_directory, "'card.json' cannot be unpacked: "),
    ("offset beyond the end", with_far_offset, "'card.json' cannot be unpacked: "),
    ("sizes", lambda c: repacked(c, with_huge_sizes), r"'layers\.0\.weight' has shape \(8, 4\), expected \(8, 400000000000\)"),
    ("long card", lambda c: repacked(c, lambda e: e.update({"card.json": b" " * (2**22 + 1)})),
     r"^the archive's card\.json is too large; the maximum is 4,194,304 bytes$"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID])
def test_an_invalid_archive_is_rejected_and_leaves_nothing(
    archive_bytes: bytes, other: Path, change: Callable[[bytes], bytes], sentence: str
) -> None:
    with pytest.raises(StoreError, match=sentence):
        import_bytes(other, change(archive_bytes), max_bytes=10**6 if "1,000" in sentence else 10**7)
    assert list(other.iterdir()) == []


def test_the_size_of_an_archive_is_limited(archive_bytes: bytes, other: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(archive_bytes)) as source:
        size = sum(entry.file_size for entry in source.infolist())
    with pytest.raises(archive.BadArchive) as raised:
        import_bytes(other, archive_bytes, max_bytes=size - 1)
    assert str(raised.value) == f"the archive has {size:,} bytes unpacked; the maximum is {size - 1:,}"
    assert import_bytes(other, archive_bytes, max_bytes=size).name == NAME
