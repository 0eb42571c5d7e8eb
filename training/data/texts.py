"""The caller's own texts: files of UTF-8 read as one text, its vocabulary, and a network that knows another's."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from app import store
from app.store import UNKNOWN_CHARACTER
from training.data.datasets import DataError, Text
from training.loops import distributed

LEAST = 10_000  # characters: a test part of four windows of 256
KNOWN = 0.5  # share of a text's characters that a network must know to be worth beginning with


def read(paths: Sequence[Path]) -> Text:
    """The files one after the other: the first 90 % to train on, the last 10 % to test on. Raises DataError.

    A byte order mark is dropped, and line breaks of all kinds are read as one.
    """
    parts = [_decoded(path) for path in paths]
    text = "".join(part.rstrip("\n") + "\n" for part in parts)
    if len(text) < LEAST:
        named = ", ".join(str(path) for path in paths)
        raise DataError(f"{named}: {len(text):,} characters; it takes {LEAST:,} to learn from and to test on")
    split = int(len(text) * 0.9)
    return Text(text[:split], text[split:], hashlib.sha256(text.encode()).hexdigest())


def vocabulary_of(text: str, least: int) -> list[str]:
    """The characters that come up ``least`` times or more, sorted, and ``<unk>`` for all others."""
    return [*sorted(character for character, count in Counter(text).items() if count >= least), UNKNOWN_CHARACTER]


def prompts(text: str) -> list[str]:
    """Three beginnings for samples, from three places of a text, of the start of a line where there is one."""
    chosen = []
    for place in (0, len(text) // 3, 2 * len(text) // 3):
        line = text.find("\n", place, place + 500) + 1 or place
        chosen.append(text[line : line + 24])
    return chosen


def report(text: Text, vocabulary: Sequence[str]) -> None:
    """Print what was read, and which characters are too rare."""
    distributed.say(
        f"{len(text.train) + len(text.test):,} characters; {len(vocabulary) - 1:,} different ones are learnt"
    )
    rare = Counter(text.train + text.test).keys() - set(vocabulary)
    if rare:
        shown = " ".join(character if character.isprintable() else repr(character) for character in sorted(rare)[:20])
        more = f" and {len(rare) - 20:,} more" if len(rare) > 20 else ""
        distributed.say(f"  too rare to learn, so {UNKNOWN_CHARACTER}: {shown}{more}")


def check_known(base: store.Version, text: str) -> None:
    """Say how much of a text's characters a network knows. Raises DataError when it is too little to begin with."""
    index = set(base.card.vocabulary or [])
    known = sum(count for character, count in Counter(text).items() if character in index) / len(text)
    if known < KNOWN:
        raise DataError(
            f"--from {base.card.name}: it knows {known:.0%} of the text's characters, and {KNOWN:.0%} are needed; "
            "leave out --from"
        )
    distributed.say(f"{base.card.name} {base.card.version} knows {known:.1%} of the text")


def transplanted(network: Any, vocabulary: Sequence[str], base: store.Version) -> Any:
    """The network with all that ``base`` knows; characters that are new to it begin as its ``<unk>``."""
    before = base.card.vocabulary or []
    index = {character: place for place, character in enumerate(before)}
    places = torch.tensor([index.get(character, len(before) - 1) for character in vocabulary])
    state = dict(base.network().state_dict())
    for key in ("embedding.weight", "head.weight", "head.bias"):
        state[key] = state[key][places]
    network.load_state_dict(state)
    return network


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        hint = "; it begins like UTF-16" if marked else ""
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} in line {line:,}, "
            f"at {error.start:,} bytes from the start{hint}"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
