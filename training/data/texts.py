"""Your own texts: UTF-8 files are read as one text, split, and encoded as character indices.

``transfer_weights`` starts a network for a new vocabulary from a published one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app import store
from app.store import UNKNOWN_CHARACTER
from training.data.datasets import DataError, Text
from training.loops import distributed

MIN_CHARACTERS = 10_000  # of a text: its test part then holds three evaluation windows
MIN_KNOWN_SHARE = 0.5  # share of a text's characters that the vocabulary of the base network must cover
WINDOW = 256  # characters of an evaluation window, as in nanoGPT, so that losses are comparable
HELD_OUT_PLACES = 10  # of the validation part; the end of tinyshakespeare alone is a single play, unlike the rest


def read(paths: Sequence[Path]) -> Text:
    """Concatenate the files; the first 90 % are the training part, the last 10 % the test part.

    Byte order marks are dropped and all line breaks become ``\\n``.

    Raises:
        DataError: a file cannot be read, or the text has fewer than MIN_CHARACTERS characters.
    """
    parts = [_read_utf8(path) for path in paths]
    text = "".join(part.rstrip("\n") + "\n" for part in parts)
    if len(text) < MIN_CHARACTERS:
        names = ", ".join(str(path) for path in paths)
        raise DataError(f"{names}: {len(text):,} characters; at least {MIN_CHARACTERS:,} are needed")
    split = int(len(text) * 0.9)
    return Text(text[:split], text[split:], hashlib.sha256(text.encode()).hexdigest())


def vocabulary_of(text: str, min_count: int = 1) -> list[str]:
    """The sorted characters that occur at least ``min_count`` times, then ``<unk>`` for all other characters."""
    counts = Counter(text)
    return [*sorted(character for character, count in counts.items() if count >= min_count), UNKNOWN_CHARACTER]


def encode(text: str, vocabulary: Sequence[str]) -> Tensor:
    """A text -> the vocabulary indices int64 [len(text)] of its characters."""
    index = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([index.get(character, len(vocabulary) - 1) for character in text])


def hold_out(characters: Tensor, share: float, places: int = HELD_OUT_PLACES) -> tuple[Tensor, list[Tensor]]:
    """Split characters [N] into a training part and ``places`` validation parts, spread evenly over the text.

    The validation parts hold ``share`` of the characters in total.
    """
    length, section = int(len(characters) * share / places), len(characters) // places
    if share and length <= WINDOW:
        raise SystemExit(
            f"--validation {share} holds out {length} characters in each of {places} places; "
            f"at least {WINDOW + 1} are needed, one evaluation window"
        )
    sections = [characters[i * section : (i + 1) * section if i < places - 1 else None] for i in range(places)]
    middle = (section - length) // 2
    train = torch.cat([part for section in sections for part in (section[:middle], section[middle + length :])])
    return train, [section[middle : middle + length] for section in sections]


def prompts(text: str) -> list[str]:
    """Three prompts of 24 characters from three places of a text, each from the start of a line if possible."""
    result = []
    for place in (0, len(text) // 3, 2 * len(text) // 3):
        start = text.find("\n", place, place + 500) + 1 or place
        result.append(text[start : start + 24])
    return result


def report(text: Text, vocabulary: Sequence[str]) -> None:
    """Print the size of a text and its vocabulary, and the characters that are not in the vocabulary."""
    distributed.print_once(
        f"{len(text.train) + len(text.test):,} characters; vocabulary of {len(vocabulary) - 1:,} characters"
    )
    rare = Counter(text.train + text.test).keys() - set(vocabulary)
    if rare:
        names = " ".join(character if character.isprintable() else repr(character) for character in sorted(rare)[:20])
        more = f" and {len(rare) - 20:,} more" if len(rare) > 20 else ""
        distributed.print_once(f"  too rare, replaced by {UNKNOWN_CHARACTER}: {names}{more}")


def check_known(base: store.Version, text: str) -> None:
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
    distributed.print_once(f"the vocabulary of {base.card.name}@{base.card.version} covers {known:.1%} of the text")


def transfer_weights(network: Any, vocabulary: Sequence[str], base: store.Version) -> Any:
    """Copy the weights of ``base`` into ``network``; characters new to ``base`` get the weights of its ``<unk>``."""
    base_vocabulary = base.card.vocabulary or []
    index = {character: i for i, character in enumerate(base_vocabulary)}
    rows = torch.tensor([index.get(character, len(base_vocabulary) - 1) for character in vocabulary])
    weights = dict(base.network().state_dict())
    for key in ("embedding.weight", "head.weight", "head.bias"):
        weights[key] = weights[key][rows]
    network.load_state_dict(weights)
    return network


def _read_utf8(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        hint = "; the file is probably UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} in line {line:,}, "
            f"byte offset {error.start:,}{hint}"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
