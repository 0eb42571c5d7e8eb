"""Texts: files and encodings, the vocabulary, and held-out parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app import store
from training.configs.text import RNN_OWN
from training.data import texts
from training.data.datasets import DataError
from training.loops import language_model


def test_validation_parts_are_spread_over_the_text_and_not_trained_on() -> None:
    characters = torch.arange(200_003)
    training, validation, _ = texts.hold_out(characters, 0.05, 10, False)
    assert [len(part) for part in validation] == [1000] * 10
    assert torch.equal(torch.cat([training, *validation]).sort().values, characters)
    assert [round(part[500].item() / 20_000, 1) for part in validation] == [i + 0.5 for i in range(10)]
    everything, nothing, _ = texts.hold_out(characters, 0.0, 10, False)
    assert torch.equal(everything, characters)
    assert nothing == []
    (middle,) = texts.hold_out(characters, 0.1, 1, False)[1]
    assert (len(middle), middle[0]) == (20_000, 90_001)


def test_the_vocabulary_ends_with_the_unknown_character() -> None:
    vocabulary = texts.vocabulary_of("banana")
    assert vocabulary == ["a", "b", "n", store.UNKNOWN_CHARACTER]
    assert texts.encode("bax", vocabulary).tolist() == [1, 0, 3]


def test_an_unreadable_text_is_rejected_with_the_position(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_bytes(b"one\ntwo\ncaf\xe9\n" * 1000)
    with pytest.raises(
        DataError, match=r"novel.txt is not UTF-8: byte 0xe9 in line 3, byte offset 11; give .*--encoding cp1252"
    ):
        texts.read([path])
    path.write_text("short")
    with pytest.raises(DataError, match=r"novel.txt: 6 characters; at least 10,000 are needed"):
        texts.read([path])
    with pytest.raises(DataError, match=r"nothing\.txt: No such file"):
        texts.read([tmp_path / "nothing.txt"])


def test_files_with_any_line_breaks_are_divided_each(tmp_path: Path) -> None:
    """The test part has the end of each file, so that one file of several is not tested alone."""
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\r" * 2000)
    (tmp_path / "b").write_text("grüße" * 10, "utf-8")
    text = texts.read([tmp_path / "a", tmp_path / "b"])
    assert text.train == "one\ntwo\n" * 1800 + "grüße" * 9
    assert text.test == "one\ntwo\n" * 200 + "grüße\n"
    assert texts.vocabulary_of("aaabbc", 2) == ["a", "b", store.UNKNOWN_CHARACTER]


def test_folders_and_any_encoding_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "letters"
    (folder / "old").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, encoding in (("a.txt", "utf-8"), ("b.txt", "utf-16"), ("old/c.txt", "utf-8-sig"), (".git/x", "utf-8")):
        (folder / name).write_text(f"grüße {name[0]}\n" * 1000, encoding)
    (folder / "photo.png").write_bytes(b"\x89PNG\0\0\0\r")
    text = texts.read([folder])
    assert text.train == "".join(f"grüße {name}\n" * 900 for name in "abo")
    assert text.test == "".join(f"grüße {name}\n" * 100 for name in "abo")
    assert "3 texts; 1 binary files are skipped" in capsys.readouterr().out
    russian = tmp_path / "russian.txt"
    russian.write_text("война и мир\n" * 1000, "koi8-r")
    with pytest.raises(DataError, match=r"is not UTF-8: byte .* give its encoding, for example --encoding cp1252"):
        texts.read([russian])
    text = texts.read([russian], "koi8-r")
    assert (text.train + text.test).startswith("война и мир\n")
    with pytest.raises(DataError, match="--encoding nonsense: Python knows no such encoding"):
        texts.read([russian], "nonsense")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-be"])
def test_a_text_with_bytes_of_0_needs_its_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "russian.txt"
    path.write_text("война и мир\n" * 1000, encoding)
    with pytest.raises(
        DataError, match=r"has bytes of 0, so it is a binary file, or .* for example --encoding utf-16-le"
    ):
        texts.read([path])
    assert texts.read([path], encoding).train.startswith("война и мир\n")


def test_the_working_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letters").mkdir()
    monkeypatch.chdir(tmp_path / "letters")
    assert [texts.name_of(Path(path)) for path in (".", "../letters", "a.txt")] == ["letters", "letters", "a.txt"]


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        (0, "the training part has only 0 characters, which is too short for batch=32"),
        (50, "the training part has only 50 characters, which is too short for batch=32"),
        (640, "bptt=64 is too large: with batch=32 each stream has 20 characters, so at most 19 are possible"),
    ],
)
def test_a_training_part_that_is_too_short_is_rejected(characters: int, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        language_model.count_steps(RNN_OWN, characters)


@pytest.mark.parametrize("count", [9_000, 200_000])
def test_weights_for_own_texts_are_selected_on_at_least_20_windows(count: int) -> None:
    train, validation, window = texts.hold_out(torch.arange(count), 0.05, 10, True)
    windows = sum((len(part) - 1) // window for part in validation)
    assert texts.MIN_WINDOWS <= windows <= texts.MAX_WINDOWS
    assert window == texts.WINDOW or count < 40_000
    assert len(train) >= 0.84 * count
    assert torch.equal(torch.cat([train, *validation]).sort().values, torch.arange(count))


def test_more_held_out_parts_than_a_short_text_has_are_rejected() -> None:
    with pytest.raises(SystemExit, match=r"validation_parts is 2000; the text is too short for so many held-out parts"):
        texts.hold_out(torch.arange(9_000), 0.05, 2000, True)
