"""Versions are exported as archives and imported again. The import accepts only archives of valid versions."""

from __future__ import annotations

import io
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from support.networks import publish_tiny
from support.service import run_models_command

from app import store
from app.store import archive
from app.store.rollout import RolloutRefused, stored_versions

NAME = "tiny-gan"
PNG = b"\x89PNG\r\n\x1a\n..."


@pytest.fixture
def archive_bytes(tmp_path: Path) -> bytes:
    """Return an archive of a version with a picture."""
    folder = publish_tiny(tmp_path / "first", NAME).folder
    (folder / "curves.png").write_bytes(PNG)
    return b"".join(archive.export_version(tmp_path / "first", NAME, 1))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Return a second, empty store."""
    (tmp_path / "other").mkdir()
    return tmp_path / "other"


def import_bytes(folder: Path, content: bytes, max_bytes: int = 10**6, renumber: bool = False) -> store.Card:
    with tempfile.TemporaryFile() as file:  # a real file gives other errors than BytesIO
        file.write(content)
        return archive.import_archive(folder, file, max_bytes, renumber)


def test_an_exported_version_can_be_imported_into_another_store(
    archive_bytes: bytes, other: Path, tmp_path: Path
) -> None:
    assert import_bytes(other, archive_bytes).version == 1
    for file in ("model.safetensors", "card.json", "curves.png"):
        assert (other / NAME / "1" / file).read_bytes() == (tmp_path / "first" / NAME / "1" / file).read_bytes()
    assert store.read_defaults(other) == {"sample": NAME}
    assert sorted(path.name for path in other.iterdir()) == ["defaults.json", NAME]


def test_an_existing_version_number_is_rejected_or_renumbered(archive_bytes: bytes, other: Path) -> None:
    import_bytes(other, archive_bytes)
    with pytest.raises(RolloutRefused, match=r"^tiny-gan@1 is already in the store$"):
        import_bytes(other, archive_bytes)
    assert import_bytes(other, archive_bytes, renumber=True).version == 2
    store.read_version(other, NAME, 2).network()
    (other / NAME / "1").rename(other / NAME / "5")
    (other / NAME / "2").rename(other / NAME / "1")
    with pytest.raises(RolloutRefused, match="is already in the store, with other content"):
        import_bytes(other, archive_bytes)


def test_the_command_line_exports_and_imports_a_version(
    tmp_path: Path, archive_bytes: bytes, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gan.zip"
    assert run_models_command(capsys, tmp_path / "first", "export", "tiny-gan@1", str(file)) == (
        0,
        f"{file}: {len(archive_bytes):,} bytes\n",
        "",
    )
    # The destination exists now.
    assert run_models_command(capsys, tmp_path / "first", "export", "tiny-gan@1", str(file))[0] == 1
    assert run_models_command(capsys, other, "import", str(file))[:2] == (
        0,
        "imported tiny-gan@1; tiny-gan@1 is active (newest)\n",
    )


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


def with_link(content: bytes) -> bytes:
    entry = zipfile.ZipInfo("samples.png")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return with_entry(content, entry, b"/etc/passwd")


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


INVALID: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("not a zip", lambda content: b"PK" + content[:50], "the file is not a zip archive"),
    ("cut", lambda content: content[:-30], "the file is not a zip archive"),
    ("parent folder", lambda c: with_entry(c, zipfile.ZipInfo("../x.png"), PNG), r"entry '\.\./x\.png': allowed are card\.json"),
    ("absolute", lambda c: with_entry(c, zipfile.ZipInfo("/etc/x.png"), PNG), "entry '/etc/x.png': allowed are"),
    ("folder", lambda c: with_entry(c, zipfile.ZipInfo("a/"), b""), "entry 'a/': allowed are"),
    ("pickle", lambda c: with_entry(c, zipfile.ZipInfo("model.pt"), b"x"), r"entry 'model\.pt': allowed are"),
    ("link", with_link, "entry 'samples.png' is not a regular file"),
    ("no card", lambda c: repacked(c, lambda entries: entries.pop("card.json")), "entry 'card.json' is missing"),
    ("too large", lambda c: repacked(c, lambda e: e.update({"curves.png": PNG + bytes(10**6)})), "allowed are 1,000"),
    ("wrong size", with_wrong_size, "cannot be unpacked|more than 1,000,000 bytes"),
    ("no picture", lambda c: repacked(c, lambda e: e.update({"curves.png": b"<svg>"})), "'curves.png' is not a PNG"),
    ("card", lambda c: repacked(c, lambda e: e.update({"card.json": b"{}"})), r"card\.json: name: Field required"),
    ("name", lambda c: repacked(c, lambda e: e.update({"card.json": e["card.json"].replace(b"tiny-gan", b"../gan")})),
     r"card\.json: name: .* found '\.\./gan'"),
    ("other weights", lambda c: repacked(c, with_nan), "sha256 is .*, expected .* as on the card"),
    ("damaged", with_damaged_data, "cannot be unpacked: Bad CRC"),
    ("a name that is not UTF-8", lambda c: patched(c, (6, b"\0\x08"), (30, b"\xff")), "'card.json' cannot be unpacked: 'utf-8' codec"),
    ("lzma", lambda c: with_method(c, 14), "'card.json' cannot be unpacked: its method is 14; allowed are 0 \\(stored\\) and 8"),
    ("bzip2", lambda c: with_method(c, 12), "'card.json' cannot be unpacked: its method is 12"),
    ("negative offset", lambda c: patched(c, (-5, b"\xff")), "'card.json' cannot be unpacked: its offset is outside the archive"),
    ("offset beyond the end", with_far_offset, "'card.json' cannot be unpacked: its offset is outside the archive"),
    ("sizes", lambda c: repacked(c, with_huge_sizes), r"'layers\.0\.weight' has shape \(8, 4\), expected \(8, 400000000000\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID])
def test_an_invalid_archive_is_rejected_and_leaves_nothing(
    archive_bytes: bytes, other: Path, change: Callable[[bytes], bytes], sentence: str
) -> None:
    with pytest.raises(store.StoreError, match=sentence):
        import_bytes(other, change(archive_bytes))
    assert stored_versions(other) == {}
    assert list(other.iterdir()) == []


@pytest.mark.parametrize("comment", [b"", b"an archive", b"PK"])
def test_a_long_central_directory_is_rejected_before_it_is_read(
    other: Path, comment: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for i in range(2000):
            file.writestr(f"{i}.png", b"")
        file.comment = comment
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(archive.BadArchive, match=r"^its central directory has 1\d\d,\d{3} bytes; allowed are 65,536$"):
        import_bytes(other, content.getvalue())


def test_a_zip64_archive_is_read_and_its_central_directory_is_limited(other: Path, archive_bytes: bytes) -> None:
    position = archive_bytes.rindex(b"PK\5\6")
    entries, size, offset = struct.unpack_from("<HII", archive_bytes, position + 10)

    def zip64_with_size(stated_size: int) -> bytes:
        record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, stated_size, offset)
        return (
            archive_bytes[:position]
            + record
            + struct.pack("<4sIQI", b"PK\6\7", 0, position, 1)
            + archive_bytes[position:]
        )

    with pytest.raises(archive.BadArchive, match="its central directory has 70,000 bytes; allowed are 65,536"):
        import_bytes(other, zip64_with_size(70_000))
    assert import_bytes(other, zip64_with_size(size)).version == 1
