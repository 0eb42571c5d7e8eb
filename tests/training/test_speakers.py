"""Invented names for the speakers of plays."""

from __future__ import annotations

import re

import pytest

from training.data import texts
from training.data.datasets import DataError
from training.data.speakers import RenamedSpeakers

PLAY = (
    "MARIO:\nGood Romano, hear me.\n\nLADY ROMANO:\nMario's lady hears; no king may hinder.\n\n"
    "KING:\nROMANO! Where is Mario?\n\nFirst Citizen:\nHere.\n\nROSARIO:\nMarina!\n\nMARINA:\nRosario!\n\n"
) * 3
VOCABULARY = [*map(chr, range(10, 127)), "<unk>"]


def test_names_are_replaced_wherever_they_occur() -> None:
    renamed = RenamedSpeakers(PLAY, VOCABULARY, share=1.0, seed=1)
    assert renamed.names == ["MARINA", "MARIO", "ROMANO", "ROSARIO"]  # no titles, which also occur in small letters
    text = renamed.text(epoch=0)
    speakers = [word for speaker in re.findall(r"^([A-Z ]+):$", text, re.MULTILINE) for word in speaker.split()]
    mario, lady, romano, king, rosario, marina = speakers[:6]
    assert (lady, king) == ("LADY", "KING")
    invented = {"ROMANO": romano, "MARINA": marina, "ROSARIO": rosario, "MARIO": mario}
    assert set(invented.values()).isdisjoint(invented)
    expected = PLAY
    for number, name in enumerate(invented):
        expected = expected.replace(name, f"<{number}>").replace(name.title(), f"({number})")
    for number, name in enumerate(invented.values()):
        expected = expected.replace(f"<{number}>", name).replace(f"({number})", name.title())
    assert text == expected


def test_each_epoch_and_seed_has_its_own_names() -> None:
    first, second = (RenamedSpeakers(PLAY, VOCABULARY, 1.0, seed) for seed in (1, 2))
    versions = [first.text(0), first.text(1), second.text(0)]
    assert len(set(versions)) == 3
    assert texts.decode(first.characters(1), VOCABULARY) == versions[1]
    assert texts.decode(first.characters(0), VOCABULARY) == versions[0]


def test_a_share_of_zero_keeps_the_text() -> None:
    assert RenamedSpeakers(PLAY, VOCABULARY, share=0.0, seed=1).text(0) == PLAY


def test_unknown_characters_stay_unknown() -> None:
    characters = texts.encode("\x07" + PLAY, VOCABULARY)
    renamed = RenamedSpeakers(texts.decode(characters, VOCABULARY), VOCABULARY, share=1.0, seed=1)
    assert int(renamed.characters(0)[0]) == len(VOCABULARY) - 1


def test_a_text_without_speakers_is_rejected() -> None:
    with pytest.raises(DataError, match="renamed_share needs lines with the name of a speaker, such as ROMEO:"):
        RenamedSpeakers("To be, or not to be\n", VOCABULARY, 0.5, 0)
