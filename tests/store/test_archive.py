"""Exporting versions as archives and importing them; only archives of valid versions are accepted."""

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
from support.command_line import run_models_command
from support.networks import publish_tiny

from app import store
from app.store import archive
from app.store.rollout import RolloutRefused, stored_versions

NAME = "tiny-gan"
PNG = b"\x89PNG\r\n\x1a\n..."


@pytest.fixture
def packed(tmp_path: Path) -> bytes:
    """A version with a picture, as an archive."""
    folder = publish_tiny(tmp_path / "first", NAME).folder
    (folder / "curves.png").write_bytes(PNG)
    return b"".join(archive.export_version(tmp_path / "first", NAME, 1))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """An empty store."""
    (tmp_path / "other").mkdir()
    return tmp_path / "other"


def bring_in(folder: Path, content: bytes, most: int = 10**6, renumber: bool = False) -> store.Card:
    with tempfile.TemporaryFile() as file:  # which fails in other ways than memory does
        file.write(content)
        return archive.import_archive(folder, file, most, renumber)


def test_an_exported_version_can_be_imported_into_another_store(packed: bytes, other: Path, tmp_path: Path) -> None:
    assert bring_in(other, packed).version == 1
    for file in ("model.safetensors", "card.json", "curves.png"):
        assert (other / NAME / "1" / file).read_bytes() == (tmp_path / "first" / NAME / "1" / file).read_bytes()
    assert store.read_defaults(other) == {"sample": NAME}
    assert sorted(path.name for path in other.iterdir()) == ["defaults.json", NAME]


def test_an_existing_version_number_is_rejected_or_renumbered(packed: bytes, other: Path) -> None:
    bring_in(other, packed)
    with pytest.raises(RolloutRefused, match=r"^tiny-gan@1 is already in the store$"):
        bring_in(other, packed)
    assert bring_in(other, packed, renumber=True).version == 2
    store.read_version(other, NAME, 2).network()
    (other / NAME / "1").rename(other / NAME / "5")
    (other / NAME / "2").rename(other / NAME / "1")
    with pytest.raises(RolloutRefused, match="is already in the store, with other content"):
        bring_in(other, packed)


def test_the_command_line_exports_and_imports_a_version(
    tmp_path: Path, packed: bytes, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gan.zip"
    assert run_models_command(capsys, tmp_path / "first", "export", "tiny-gan@1", str(file)) == (
        0,
        f"{file}: {len(packed):,} bytes\n",
        "",
    )
    assert (
        run_models_command(capsys, tmp_path / "first", "export", "tiny-gan@1", str(file))[0] == 1
    )  # it is there already
    assert run_models_command(capsys, other, "import", str(file))[:2] == (
        0,
        "imported tiny-gan@1; tiny-gan@1 is active (newest)\n",
    )


def repacked(content: bytes, change: Callable[[dict[str, bytes]], object]) -> bytes:
    """The archive with other entries."""
    with zipfile.ZipFile(io.BytesIO(content)) as found:
        entries = {entry.filename: found.read(entry) for entry in found.infolist()}
    change(entries)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in entries.items():
            made.writestr(name, data)
    return file.getvalue()


def with_entry(content: bytes, entry: zipfile.ZipInfo, data: bytes) -> bytes:
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as made:
        made.writestr(entry, data)
    return file.getvalue()


def link(content: bytes) -> bytes:
    entry = zipfile.ZipInfo("samples.png")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return with_entry(content, entry, b"/etc/passwd")


def lying(content: bytes) -> bytes:
    """Says that the picture has 8 bytes, and unpacks to two million."""
    big = repacked(content, lambda entries: entries.update({"curves.png": PNG + bytes(2 * 10**6)}))
    return big.replace((len(PNG) + 2 * 10**6).to_bytes(4, "little"), (8).to_bytes(4, "little"))


def with_nan(entries: dict[str, bytes]) -> None:
    tensors = load(entries["model.safetensors"])
    tensors["layers.0.bias"][0] = torch.nan
    entries["model.safetensors"] = save(tensors)


def damaged(content: bytes) -> bytes:
    place = content.index(b"layers.0.bias")
    return content[:place] + b"X" + content[place + 1 :]


def huge(entries: dict[str, bytes]) -> None:
    """Sizes that would take terabytes."""
    entries["card.json"] = entries["card.json"].replace(b'"latent": 4', b'"latent": 400000000000')


def patched(content: bytes, *changes: tuple[int, bytes]) -> bytes:
    """Other bytes at some places; negative ones count from the end."""
    found = bytearray(content)
    for place, put in changes:
        place %= len(found)
        found[place : place + len(put)] = put
    return bytes(found)


def by_method(content: bytes, method: int) -> bytes:
    """Says that the card is packed in such a way."""
    packing = struct.pack("<H", method)
    return patched(content, (8, packing), (content.index(b"PK\x01\x02") + 10, packing))


def far(content: bytes) -> bytes:
    """Says that the card begins at byte 2^63."""
    entry, end = content.index(b"PK\x01\x02"), len(content) - 22
    extra = struct.pack("<HHQ", 1, 8, 2**63)
    (size,) = struct.unpack_from("<I", content, end + 12)
    told = patched(content, (entry + 30, struct.pack("<H", len(extra))), (entry + 42, b"\xff" * 4),
                   (end + 12, struct.pack("<I", size + len(extra))))  # fmt: skip
    return told[: entry + 46 + len("card.json")] + extra + told[entry + 46 + len("card.json") :]


HOSTILE: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("not a zip", lambda content: b"PK" + content[:50], "the file is not a zip archive"),
    ("cut", lambda content: content[:-30], "the file is not a zip archive"),
    ("up", lambda c: with_entry(c, zipfile.ZipInfo("../x.png"), PNG), r"entry '\.\./x\.png': allowed are card\.json"),
    ("absolute", lambda c: with_entry(c, zipfile.ZipInfo("/etc/x.png"), PNG), "entry '/etc/x.png': allowed are"),
    ("folder", lambda c: with_entry(c, zipfile.ZipInfo("a/"), b""), "entry 'a/': allowed are"),
    ("pickle", lambda c: with_entry(c, zipfile.ZipInfo("model.pt"), b"x"), r"entry 'model\.pt': allowed are"),
    ("link", link, "entry 'samples.png' is not a regular file"),
    ("no card", lambda c: repacked(c, lambda entries: entries.pop("card.json")), "entry 'card.json' is missing"),
    ("too large", lambda c: repacked(c, lambda e: e.update({"curves.png": PNG + bytes(10**6)})), "allowed are 1,000"),
    ("a lie", lying, "cannot be unpacked|more than 1,000,000 bytes"),
    ("no picture", lambda c: repacked(c, lambda e: e.update({"curves.png": b"<svg>"})), "'curves.png' is not a PNG"),
    ("card", lambda c: repacked(c, lambda e: e.update({"card.json": b"{}"})), r"card\.json: name: Field required"),
    ("name", lambda c: repacked(c, lambda e: e.update({"card.json": e["card.json"].replace(b"tiny-gan", b"../gan")})),
     r"card\.json: name: .* found '\.\./gan'"),
    ("other weights", lambda c: repacked(c, with_nan), "sha256 is .*, expected .* as on the card"),
    ("damaged", damaged, "cannot be unpacked: Bad CRC"),
    ("a name that is no text", lambda c: patched(c, (6, b"\0\x08"), (30, b"\xff")), "'card.json' cannot be unpacked: 'utf-8' codec"),
    ("lzma", lambda c: by_method(c, 14), "'card.json' cannot be unpacked: its method is 14; allowed are 0 \\(stored\\) and 8"),
    ("bzip2", lambda c: by_method(c, 12), "'card.json' cannot be unpacked: its method is 12"),
    ("before the beginning", lambda c: patched(c, (-5, b"\xff")), "'card.json' cannot be unpacked: its offset is outside the archive"),
    ("beyond the end", far, "'card.json' cannot be unpacked: its offset is outside the archive"),
    ("sizes", lambda c: repacked(c, huge), r"'layers\.0\.weight' has shape \(8, 4\), expected \(8, 400000000000\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_an_invalid_archive_is_rejected_and_leaves_nothing(
    packed: bytes, other: Path, change: Callable[[bytes], bytes], sentence: str
) -> None:
    with pytest.raises(store.StoreError, match=sentence):
        bring_in(other, change(packed))
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
        bring_in(other, content.getvalue())


def test_a_zip64_archive_is_read_and_its_central_directory_is_limited(other: Path, packed: bytes) -> None:
    at = packed.rindex(b"PK\5\6")
    entries, size, place = struct.unpack_from("<HII", packed, at + 10)

    def wide(told: int) -> bytes:
        record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, told, place)
        return packed[:at] + record + struct.pack("<4sIQI", b"PK\6\7", 0, at, 1) + packed[at:]

    with pytest.raises(archive.BadArchive, match="its central directory has 70,000 bytes; allowed are 65,536"):
        bring_in(other, wide(70_000))
    assert bring_in(other, wide(size)).version == 1
