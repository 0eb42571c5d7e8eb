"""Versions are exported as archives and imported again. The import accepts only archives of valid versions."""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from support.imported.onnx_models import linear_model
from support.networks import publish_tiny, rewrite_card
from support.service import run_models_command

from app import store
from app.importing.add import Description, add
from app.store import archive
from app.store.rollout import RolloutRefused, VersionNotFound, retire, stored_versions

NAME = "tiny-gan"
OTHER_CONTENT = (
    "^tiny-gan@1 is already in the store, with other content; with `renumber`, the import gives it the next number$"
)
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
    assert sorted(path.name for path in other.iterdir()) == [".lock", "defaults.json", NAME]


def many_pictures(folder: Path) -> None:
    for number in range(33):
        (folder / f"{number}.png").write_bytes(PNG)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (many_pictures, "the archive has 33 pictures; the maximum is 32"),
        (lambda folder: (folder / "curves.png").write_bytes(b"GIF8"), "entry 'curves.png' is not a PNG file"),
        (
            lambda folder: rewrite_card(folder, notes="n" * 2**22),
            "entry 'card.json' is too large; the maximum is 4,194,304 bytes",
        ),
    ],
)
def test_a_version_that_could_not_be_imported_is_not_exported(
    tmp_path: Path, change: Callable[[Path], None], problem: str
) -> None:
    change(publish_tiny(tmp_path, NAME).folder)
    with pytest.raises(archive.BadArchive, match=f"^{problem}$"):
        archive.export_version(tmp_path, NAME, 1)


def test_an_existing_version_number_is_rejected_or_renumbered(archive_bytes: bytes, other: Path) -> None:
    import_bytes(other, archive_bytes)
    with pytest.raises(RolloutRefused, match=r"^tiny-gan@1 is already in the store$"):
        import_bytes(other, archive_bytes)
    assert import_bytes(other, archive_bytes, renumber=True).version == 2
    store.read_version(other, NAME, 2).network()
    with pytest.raises(RolloutRefused):  # before the weights are read
        import_bytes(other, repacked(archive_bytes, with_nan))
    (other / NAME / "1").rename(other / NAME / "5")
    (other / NAME / "2").rename(other / NAME / "1")  # now its card does not fit its folder
    with pytest.raises(RolloutRefused, match=OTHER_CONTENT):
        import_bytes(other, archive_bytes)
    rewrite_card(other / NAME / "1", version=1, notes="other")
    with pytest.raises(RolloutRefused, match=OTHER_CONTENT):
        import_bytes(other, archive_bytes)


def test_a_renumbered_card_keeps_its_format(archive_bytes: bytes, other: Path) -> None:
    content = repacked(archive_bytes, lambda e: e.update({"card.json": e["card.json"].replace(b'""', '"é"'.encode())}))
    assert import_bytes(other, content, renumber=True).version == 1
    assert import_bytes(other, content, renumber=True).notes == "é"
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        expected = source.read("card.json").replace(b'"version": 1,', b'"version": 2,')
    assert (other / NAME / "2" / "card.json").read_bytes() == expected


@pytest.mark.parametrize("renumber", [False, True])
def test_a_number_that_is_taken_during_the_import_is_not_replaced(
    archive_bytes: bytes, other: Path, monkeypatch: pytest.MonkeyPatch, renumber: bool
) -> None:
    move, published = store.move_into_store, list[store.Version]()

    def move_later(models: Path, folder: Path, check: store.Check | None) -> bool:
        if not published:
            published.append(publish_tiny(other, NAME))
        return move(models, folder, check)

    monkeypatch.setattr(store, "move_into_store", move_later)
    if renumber:
        assert import_bytes(other, archive_bytes, renumber=True).version == 2
    else:
        with pytest.raises(RolloutRefused, match=r"^tiny-gan@1 is already in the store"):
            import_bytes(other, archive_bytes)
    content = (published[0].folder / store.WEIGHTS).read_bytes()
    assert (other / NAME / "1" / store.WEIGHTS).read_bytes() == content


def test_a_version_is_checked_before_it_is_placed(tmp_path: Path, archive_bytes: bytes, other: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(linear_model()[0].SerializeToString())
    add(tmp_path / "first", tmp_path / "net.onnx", Description("net"), max_bytes=2**20)
    checked: list[store.Version] = []

    def check(version: store.Version) -> None:
        assert not (other / version.card.name).exists()
        checked.append(version)
        if len(checked) == 1:
            raise store.StoreError("too much memory")

    content = io.BytesIO(b"".join(archive.export_version(tmp_path / "first", "net", 1)))
    with pytest.raises(store.StoreError, match="too much memory"):
        archive.import_archive(other, content, 2**20, check=check)
    assert list(other.iterdir()) == []
    assert archive.import_archive(other, content, 2**20, check=check).name == "net"
    archive.import_archive(other, io.BytesIO(archive_bytes), 2**20, check=check)
    with pytest.raises(RolloutRefused):
        archive.import_archive(other, io.BytesIO(archive_bytes), 2**20)
    assert [version.label for version in checked] == ["net@1", "net@1", "tiny-gan@1"]
    assert list(checked[0].tensors) == ["model"]


def test_an_archive_holds_the_files_of_a_version_without_compression(tmp_path: Path) -> None:
    folder = publish_tiny(tmp_path, NAME).folder
    for file in ("b.png", "a.png", "Upper.png", "notes.txt"):
        (folder / file).write_bytes(PNG)
    os.utime(folder / "a.png", (0, 0))  # zip cannot state times before 1980
    with zipfile.ZipFile(io.BytesIO(b"".join(archive.export_version(tmp_path, NAME, 1)))) as exported:
        assert exported.namelist() == ["card.json", "model.safetensors", "a.png", "b.png"]
        assert {entry.compress_type for entry in exported.infolist()} == {zipfile.ZIP_STORED}
        assert exported.getinfo("a.png").date_time == (1980, 1, 1, 0, 0, 0)
    with pytest.raises(VersionNotFound, match=r"^there is no tiny-gan@2 in the store; versions in the store: 1$"):
        archive.export_version(tmp_path, NAME, 2)


def test_a_picture_that_cannot_be_read_is_named_before_the_first_chunk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish_tiny(tmp_path, NAME).folder
    (folder / "folder.png").mkdir()  # not a picture
    (folder / "curves.png").write_bytes(PNG)
    with zipfile.ZipFile(io.BytesIO(b"".join(archive.export_version(tmp_path, NAME, 1)))) as exported:
        assert exported.namelist() == ["card.json", "model.safetensors", "curves.png"]
    open_file = Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == "curves.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    file = tmp_path / "gan.zip"
    assert run_models_command(capsys, tmp_path, "export", f"{NAME}@1", str(file)) == (
        *(1, "", "error: tiny-gan/1/curves.png cannot be read: Permission denied\n"),
    )
    assert not file.exists()


def test_a_version_is_exported_and_imported_in_chunks(
    tmp_path: Path, archive_bytes: bytes, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first" / NAME / "1" / "curves.png").write_bytes(PNG + bytes(range(100)))
    monkeypatch.setattr(archive, "CHUNK_BYTES", 16)
    chunks = list(archive.export_version(tmp_path / "first", NAME, 1))
    assert max(map(len, chunks[:-1])) < 100  # headers, and 16 bytes
    with zipfile.ZipFile(io.BytesIO(b"".join(chunks))) as source:
        assert max(map(len, archive._chunks(source, source.getinfo("card.json")))) == 16
    import_bytes(other, b"".join(chunks))
    assert (other / NAME / "1" / "curves.png").read_bytes() == PNG + bytes(range(100))


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
        "imported tiny-gan@1; tiny-gan@1 is active (latest)\n",
    )
    assert run_models_command(capsys, other, "import", str(file))[2] == "error: tiny-gan@1 is already in the store\n"
    publish_tiny(other, NAME)
    retire(other, NAME, 1)
    (other / NAME / "1").rename(tmp_path / "removed")  # version 1 stays retired, and answers no requests
    assert run_models_command(capsys, other, "import", str(file))[:2] == (
        *(0, "imported tiny-gan@1; tiny-gan@2 is active (latest); retired: 1\n"),
    )


@pytest.mark.parametrize("command", ["import nothing.zip", "export tiny-gan@1 nothing/gan.zip"])
@pytest.mark.parametrize("absolute", [True, False])
def test_an_error_of_a_file_that_is_not_in_the_store_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, absolute: bool
) -> None:
    publish_tiny(tmp_path, NAME)
    monkeypatch.chdir(tmp_path)
    result = run_models_command(capsys, tmp_path if absolute else Path(), *command.split())
    assert result == (1, "", f"error: {command.split()[-1]}: No such file or directory\n")


def test_a_pipe_is_not_imported(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    try:
        result = run_models_command(capsys, other, "import", f"/dev/fd/{reading}")
        assert result == (1, "", f"error: /dev/fd/{reading} is a pipe; the archive should be a file on a disk\n")
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gan.zip", ""),
        ("gan.pt2", "; this is not an archive of `export`; for .pt2 and ONNX files, use `add`"),
        ("gan.onnx", "; this is not an archive of `export`; for .pt2 and ONNX files, use `add`"),
    ],
)
def test_an_error_of_the_command_import_names_the_file(
    name: str, hint: str, tmp_path: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_bytes(b"x")
    assert run_models_command(capsys, other, "import", str(file)) == (
        *(1, "", f"error: {file}: the file is not a zip archive: File is not a zip file{hint}\n"),
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


def with_flag(content: bytes, flag: int) -> bytes:
    """Return an archive that states this flag for the card."""
    return patched(content, (6, bytes([flag])), (content.index(b"PK\x01\x02") + 8, bytes([flag])))


def with_offset_of_directory(content: bytes) -> bytes:
    """Return an archive in which the card begins where the central directory begins."""
    start = content.index(b"PK\x01\x02")
    return patched(content, (start + 42, struct.pack("<I", start)))


def twice(content: bytes) -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return with_entry(content, zipfile.ZipInfo("curves.png"), PNG)


INVALID: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("not a zip", lambda content: b"PK" + content[:50], "^the file is not a zip archive: File is not a zip file$"),
    ("two bytes", lambda content: b"PK", "^the file is not a zip archive: File is not a zip file$"),
    ("cut", lambda content: content[:-30], "the file is not a zip archive"),
    ("parent folder", lambda c: with_entry(c, zipfile.ZipInfo("../x.png"), PNG), r"entry '\.\./x\.png': only card\.json"),
    ("absolute", lambda c: with_entry(c, zipfile.ZipInfo("/etc/x.png"), PNG), "entry '/etc/x.png': only card"),
    ("folder", lambda c: with_entry(c, zipfile.ZipInfo("a/"), b""), "entry 'a/': only card"),
    ("long name", lambda c: with_entry(c, zipfile.ZipInfo("x" * 90), b""), f"^entry '{'x' * 79}…: only card"),
    ("twice", twice, r"^entry 'curves\.png' occurs twice$"),
    ("encrypted", lambda c: with_flag(c, 1), r"^entry 'card\.json' is encrypted$"),
    ("pickle", lambda c: with_entry(c, zipfile.ZipInfo("model.pt"), b"x"),
     r"^entry 'model\.pt': only card\.json, model\.safetensors and pictures such as curves\.png are allowed$"),
    ("link", with_link, "entry 'samples.png' is not a regular file"),
    ("no card", lambda c: repacked(c, lambda entries: entries.pop("card.json")), "^entry 'card.json' is missing$"),
    ("no weights", lambda c: repacked(c, lambda entries: entries.pop("model.safetensors")), "^entry 'model.safetensors' is missing$"),
    ("too large", lambda c: repacked(c, lambda e: e.update({"curves.png": PNG + bytes(10**6)})), "the maximum is 1,000"),
    ("wrong size", with_wrong_size, "cannot be unpacked|more than 1,000,000 bytes"),
    ("no picture", lambda c: repacked(c, lambda e: e.update({"curves.png": b"<svg>"})), "'curves.png' is not a PNG"),
    ("empty picture", lambda c: repacked(c, lambda e: e.update({"curves.png": b""})), "'curves.png' is not a PNG"),
    ("card", lambda c: repacked(c, lambda e: e.update({"card.json": b"{}"})), r"^the archive's card\.json: name: Field required"),
    ("name", lambda c: repacked(c, lambda e: e.update({"card.json": e["card.json"].replace(b"tiny-gan", b"../gan")})),
     r"card\.json: name: .* found '\.\./gan'"),
    ("other weights", lambda c: repacked(c, with_nan), "sha256 is .*, expected .* as on the card"),
    ("damaged", with_damaged_data, "cannot be unpacked: Bad CRC"),
    ("a name that is not UTF-8", lambda c: patched(c, (6, b"\0\x08"), (30, b"\xff")), "'card.json' cannot be unpacked: 'utf-8' codec"),
    ("lzma", lambda c: with_method(c, 14), "'card.json' cannot be unpacked: its method is 14; allowed values: 0 \\(stored\\), 8"),
    ("bzip2", lambda c: with_method(c, 12), "'card.json' cannot be unpacked: its method is 12"),
    ("negative offset", lambda c: patched(c, (-5, b"\xff")), "'card.json' cannot be unpacked: its offset is outside the archive"),
    ("offset of the directory", with_offset_of_directory, "'card.json' cannot be unpacked: its offset is outside the archive$"),
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


def test_the_limits_of_an_archive_are_allowed(
    archive_bytes: bytes, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(io.BytesIO(archive_bytes)) as source:
        total, card = sum(entry.file_size for entry in source.infolist()), source.getinfo("card.json").file_size
    with pytest.raises(archive.BadArchive) as raised:
        import_bytes(other, archive_bytes, max_bytes=total - 1)
    assert str(raised.value) == f"the archive has {total:,} bytes unpacked; the maximum is {total - 1:,}"
    monkeypatch.setattr(archive, "MAX_CARD_BYTES", card - 1)
    with pytest.raises(archive.BadArchive) as raised:
        import_bytes(other, archive_bytes)
    assert str(raised.value) == f"entry 'card.json' is too large; the maximum is {card - 1:,} bytes"
    monkeypatch.setattr(archive, "MAX_CARD_BYTES", card)
    import_bytes(other, archive_bytes, max_bytes=total)


def test_an_archive_may_have_32_pictures(archive_bytes: bytes, other: Path) -> None:
    def with_pictures(count: int) -> bytes:
        return repacked(archive_bytes, lambda e: e.update({f"{i}.png": PNG for i in range(count - 1)}))

    with pytest.raises(archive.BadArchive, match=r"^the archive has 33 pictures; the maximum is 32$"):
        import_bytes(other, with_pictures(33))
    assert import_bytes(other, with_pictures(32)).name == NAME


def test_unpacked_bytes_are_counted_again(archive_bytes: bytes, tmp_path: Path) -> None:
    """``zipfile`` itself stops at the size that the archive states. This test does not rely on it."""
    with zipfile.ZipFile(io.BytesIO(archive_bytes)) as source:
        entries = {entry.filename: entry for entry in source.infolist()}
        total = sum(entry.file_size for entry in entries.values())
        archive._unpack(source, entries, tmp_path, total)
        with pytest.raises(archive.BadArchive) as raised:
            archive._unpack(source, entries, tmp_path, total - 1)
    assert str(raised.value) == f"the archive is too large unpacked; the maximum is {total - 1:,} bytes"


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
    with pytest.raises(
        archive.BadArchive, match=r"^the central directory of the archive has 1\d\d,\d{3} bytes; the maximum is 65,536$"
    ):
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

    with pytest.raises(
        archive.BadArchive, match="the central directory of the archive has 70,000 bytes; the maximum is 65,536"
    ):
        import_bytes(other, zip64_with_size(70_000))
    assert import_bytes(other, zip64_with_size(size)).version == 1
