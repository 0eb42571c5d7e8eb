"""Versions are exported as archives and imported again. The import accepts only archives of valid versions."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from support.disk import failing
from support.networks import publish_tiny

from app.store import Card, RolloutRefused, Store, StoreError, archive
from app.store.version import Version

NAME = "tiny-gan"
PNG = b"\x89PNG\r\n\x1a\n..."
DIRECTORY = b"PK\x01\x02"  # the beginning of an entry in the directory of an archive


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


def import_bytes(folder: Path, content: bytes, max_bytes: int = 10**7, renumber: bool = False) -> Card:
    with tempfile.TemporaryFile() as file:  # a real file gives other errors than BytesIO
        file.write(content)
        return archive.import_archive(Store(folder), file, max_bytes, renumber)


def test_an_exported_version_keeps_its_number_or_gets_the_next_one(
    archive_bytes: bytes, other: Path, tmp_path: Path
) -> None:
    assert import_bytes(other, archive_bytes).version == 1
    for file in ("model.safetensors", "card.json", "curves.png"):
        assert (other / NAME / "1" / file).read_bytes() == (tmp_path / "first" / NAME / "1" / file).read_bytes()
    assert Store(other).defaults() == {"sample": NAME}
    assert sorted(path.name for path in other.iterdir()) == [".lock", "defaults.json", NAME]
    sentence = "^tiny-gan@1 is already in the store; with `renumber`, the import gives the version the next number$"
    with pytest.raises(RolloutRefused, match=sentence):
        import_bytes(other, archive_bytes)
    newer = repacked(archive_bytes, lambda e: e.update({"card.json": b'{"colour": "red",' + e["card.json"][1:]}))
    assert import_bytes(other, newer, renumber=True).version == 2
    second = json.loads((other / NAME / "2" / "card.json").read_bytes())
    first = json.loads((other / NAME / "1" / "card.json").read_bytes())
    assert second == {**first, "version": 2, "colour": "red"}  # a field of a newer service is kept


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


def test_a_version_that_cannot_be_read_is_not_exported(archive_bytes: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path / "first", disk=failing(("open", tmp_path / "first" / NAME / "1" / "curves.png")))
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


def with_entry(content: bytes, name: str) -> bytes:
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as target:
        target.writestr(name, PNG)
    return file.getvalue()


def with_wrong_size(content: bytes) -> bytes:
    """Return an archive that states 8 bytes for a picture of two million bytes."""
    big = repacked(content, lambda entries: entries.update({"curves.png": PNG + bytes(2 * 10**6)}))
    return big.replace((len(PNG) + 2 * 10**6).to_bytes(4, "little"), (8).to_bytes(4, "little"))


def with_nan(entries: dict[str, bytes]) -> None:
    tensors = load(entries["model.safetensors"])
    tensors["layers.0.bias"][0] = torch.nan
    entries["model.safetensors"] = save(tensors)


def with_huge_sizes(entries: dict[str, bytes]) -> None:
    """Write sizes of a network to the card that would need terabytes of memory."""
    entries["card.json"] = entries["card.json"].replace(b'"latent": 4', b'"latent": 400000000000')


def with_method(content: bytes, method: int) -> bytes:
    """Return an archive that states this compression method for the card."""
    data, directory = bytearray(content), content.index(DIRECTORY)
    data[8] = data[directory + 10] = method
    return bytes(data)


def twice(content: bytes) -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return with_entry(content, "curves.png")


INVALID: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("not a zip", lambda content: b"PK" + content[:50], "^the file is not a ZIP archive: File is not a zip file$"),
    ("parent folder", lambda content: with_entry(content, "../x.png"),
     r"^entry '\.\./x\.png': only card\.json, model\.safetensors and pictures such as curves\.png are allowed, each once"),
    ("twice", twice, "^entry 'curves.png': only .* are allowed, each once, stored or deflated$"),
    ("no weights", lambda c: repacked(c, lambda entries: entries.pop("model.safetensors")), "^entry 'model.safetensors' is missing$"),
    ("wrong size", with_wrong_size, "'curves.png' cannot be unpacked: Bad CRC"),
    ("name", lambda c: repacked(c, lambda e: e.update({"card.json": e["card.json"].replace(b"tiny-gan", b"../gan")})),
     r"^the archive's card\.json: name: .* found '\.\./gan'"),
    ("other weights", lambda c: repacked(c, with_nan), "sha256 is .*, expected .* as on the card"),
    ("lzma", lambda c: with_method(c, 14), "^entry 'card.json': only .* stored or deflated$"),
    ("sizes", lambda c: repacked(c, with_huge_sizes), r"'layers\.0\.weight' has shape \(8, 4\), expected \(8, 400000000000\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID])
def test_an_invalid_archive_is_rejected_and_leaves_nothing(
    archive_bytes: bytes, other: Path, change: Callable[[bytes], bytes], sentence: str
) -> None:
    with pytest.raises(StoreError, match=sentence):
        import_bytes(other, change(archive_bytes))
    assert list(other.iterdir()) == []


def test_an_archive_with_a_wrong_byte_raises_no_other_error(archive_bytes: bytes, other: Path) -> None:
    def check(_: Version) -> None:
        raise StoreError("a valid version")

    deflated = repacked(archive_bytes, dict.copy)
    for position in (*range(40), *range(deflated.index(DIRECTORY), len(deflated))):
        for change in (1, 255):
            changed = bytearray(deflated)
            changed[position] ^= change
            with pytest.raises(StoreError):
                archive.import_archive(Store(other, check), io.BytesIO(changed), 2**20)


def test_the_size_of_an_archive_is_limited(archive_bytes: bytes, other: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(archive_bytes)) as source:
        size = sum(entry.file_size for entry in source.infolist())
    sentence = f"^the archive has {size:,} bytes unpacked; the maximum is {size - 1:,}$"
    with pytest.raises(StoreError, match=sentence):
        import_bytes(other, archive_bytes, max_bytes=size - 1)
    assert import_bytes(other, archive_bytes, max_bytes=size).name == NAME
