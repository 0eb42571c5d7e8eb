"""Read a user's files and folders as one text, split the text, and encode it as character indices."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from app.store import UNKNOWN_CHARACTER
from app.store.version import Version
from app.tables import encodings
from training.data.datasets import DataError, Text, is_hidden

MIN_CHARACTERS = 10_000  # smallest length of a text. Its test part then holds three evaluation windows
MIN_KNOWN_SHARE = 0.5  # share of a text's characters that the vocabulary of the base network must cover
WINDOW = 256  # characters of an evaluation window, as in nanoGPT, so that losses are comparable
MIN_WINDOWS, MAX_WINDOWS = 20, 400  # limits of the number of validation windows; their loss selects the best weights
MAX_SHARE = 0.15  # largest share of the training part that is held out to reach MIN_WINDOWS


def read(paths: Sequence[Path], encoding: str | None = None) -> Text:
    """Read the files. The first 90 % of each file belong to the training part, the rest to the test part.

    The files of a folder are read in the order of their paths. Hidden files are skipped. Binary files are skipped too,
    unless ``encoding`` is given. ``encoding`` is any encoding that Python knows. If it is None, UTF-16 and UTF-32 are
    detected, and all other files must be UTF-8. Byte order marks are dropped, and all line breaks become ``\\n``.

    Raises:
        DataError: a file cannot be read, or the text has fewer than MIN_CHARACTERS characters.
    """
    files = [read_file(path, encoding).rstrip("\n") + "\n" for path in _files(paths, encoding)]
    text = "".join(files)
    if len(text) < MIN_CHARACTERS:
        names = ", ".join(str(path) for path in paths)
        raise DataError(f"{names}: {len(text):,} characters; at least {MIN_CHARACTERS:,} are needed")
    train = "".join(file[: int(len(file) * 0.9)] for file in files)
    test = "".join(file[int(len(file) * 0.9) :] for file in files)
    return Text(train, test, hashlib.sha256(text.encode()).hexdigest())


def name_of(path: Path) -> str:
    """Return the name of a file or folder, also for paths such as ``.`` and ``..``. Links are not followed."""
    return os.path.basename(os.path.abspath(path))


def vocabulary_of(text: str, min_count: int = 1) -> list[str]:
    """Return the sorted characters that occur at least ``min_count`` times, then ``<unk>`` for all other characters."""
    return [*sorted(each for each, count in Counter(text).items() if count >= min_count), UNKNOWN_CHARACTER]


def own_vocabulary(text: str, min_count: int) -> list[str]:
    """Return the vocabulary of a user's text. Raises DataError if fewer than two characters occur often enough."""
    vocabulary = vocabulary_of(text, min_count)
    if len(vocabulary) < 3:
        raise DataError(
            f"--min-count is {min_count:,}, but only {len(vocabulary) - 1} characters occur so often in the training "
            "part of the text; at least two are needed"
        )
    return vocabulary


def encode(text: str, vocabulary: Sequence[str]) -> Tensor:
    """Return the vocabulary indices int32 [len(text)] of the characters of a text."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    indices = np.full(int(codes.max(initial=0)) + 1, len(vocabulary) - 1, np.int32)
    for index, character in enumerate(vocabulary[:-1]):
        if ord(character) < len(indices):
            indices[ord(character)] = index
    return torch.from_numpy(indices[codes])


def decode(characters: Tensor, vocabulary: Sequence[str]) -> str:
    """Return the text of vocabulary indices [N]. ``<unk>`` becomes U+FFFF, which no text contains."""
    entries = [*vocabulary[:-1], "\uffff"]
    return "".join([entries[index] for index in characters.tolist()])


def hold_out(characters: Tensor, share: float, parts: int, limited: bool) -> tuple[Tensor, list[Tensor], int]:
    """Split characters [N] into a training part and ``parts`` validation parts, spread evenly over the text.

    Return the training part, the validation parts and the length of an evaluation window. The validation parts hold
    ``share`` of the characters in total. If this is shorter than MIN_WINDOWS windows, up to MAX_SHARE of the text is
    held out. If even MAX_SHARE is too short, the windows are shorter than WINDOW. If ``share`` is 0, nothing is held
    out.

    ``limited``: whether at most MAX_WINDOWS windows are held out.
    """
    if not share:
        return characters, [], WINDOW
    held_out = max(share * len(characters), min(MIN_WINDOWS * (WINDOW + 1), MAX_SHARE * len(characters)))
    if limited:
        held_out = min(held_out, MAX_WINDOWS * (WINDOW + 1))
    part, windows = int(held_out / parts), -(-MIN_WINDOWS // parts)
    window = min(WINDOW, (part - 1) // windows)
    if window < 1:
        raise SystemExit(f"validation_parts is {parts}; the text is too short for so many held-out parts")
    section = len(characters) // parts
    starts = [at * section + (section - part) // 2 for at in range(parts)]  # in the middle of each section
    kept = torch.ones(len(characters), dtype=torch.bool)
    for start in starts:
        kept[start : start + part] = False
    return characters[kept], [characters[start : start + part] for start in starts], window


def chunks(text: str) -> list[str]:
    """Return up to 1,000 parts of a text with 100 characters each, evenly spaced."""
    step = max(100, len(text) // 1000)
    return [text[start : start + 100] for start in range(0, len(text) - 99, step)][:1000]


def prompts(text: str) -> list[str]:
    """Return three prompts of 24 characters from a text. Each prompt begins at the start of a line if possible."""
    result = []
    for place in (0, len(text) // 3, 2 * len(text) // 3):
        start = text.find("\n", place, place + 500) + 1 or place
        result.append(text[start : start + 24])
    return result


def report(text: Text, vocabulary: Sequence[str]) -> None:
    """Print the size of a text and its vocabulary, and the characters that are not in the vocabulary."""
    print(f"{len(text.train) + len(text.test):,} characters; vocabulary of {len(vocabulary) - 1:,} characters")
    rare = {*text.train, *text.test} - set(vocabulary)
    if rare:
        names = " ".join(character if character.isprintable() else repr(character) for character in sorted(rare)[:20])
        more = f" and {len(rare) - 20:,} more" if len(rare) > 20 else ""
        print(f"  too rare, replaced by {UNKNOWN_CHARACTER}: {names}{more}")


def check_known(base: Version, text: str) -> None:
    """Print the share of a text's characters that are in the vocabulary of ``base``.

    Raises:
        DataError: the share is below MIN_KNOWN_SHARE.
    """
    vocabulary = set(base.card.vocabulary or [])
    known = sum(count for character, count in Counter(text).items() if character in vocabulary) / len(text)
    if known < MIN_KNOWN_SHARE:
        raise DataError(
            f"--from {base.card.name}: its vocabulary covers {known:.0%} of the text's characters; at least "
            f"{MIN_KNOWN_SHARE:.0%} are needed; omit --from to train from scratch"
        )
    print(f"the vocabulary of {base.label} covers {known:.1%} of the text")


def _files(paths: Sequence[Path], encoding: str | None) -> list[Path]:
    """Return the files in ``paths``, and the text files in the folders in ``paths``.

    Raises DataError for a folder without text files.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not is_hidden(file, path)]
        own = [file for file in inside if encoding or not _is_binary(file)]
        if not own:
            raise DataError(f"{path} holds no texts")
        skipped = f"; {len(inside) - len(own):,} binary files are skipped" if len(own) < len(inside) else ""
        print(f"{path}: {len(own):,} texts{skipped}")
        files += own
    return files


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    return b"\0" in start and encodings.detected(start) is None


def read_file(path: Path, encoding: str | None = None) -> str:
    """Return the text of a file. Raises DataError; see ``read``."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    chosen = encoding or encodings.detected(content)
    if chosen is None and b"\0" in content:
        raise DataError(
            f"{path} has bytes of 0, so it is a binary file, or UTF-16 or UTF-32 without a byte order mark; give its "
            "encoding, for example --encoding utf-16-le"
        )
    chosen = chosen or "utf-8"
    try:
        text = content.decode(chosen)
    except LookupError as error:
        raise DataError(f"--encoding {encoding}: Python knows no such encoding") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not {chosen.upper()}: byte 0x{content[error.start]:02x} in line {line:,}, byte offset "
            f"{error.start:,}; give its encoding, for example --encoding cp1252"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
