"""Give the speakers of plays other names in each epoch of training.

A network soon memorises the names in its training text, but the names in another play are new to the network. If the
names change, the network learns to copy names from the preceding text. It also learns to be uncertain about names that
have not occurred yet.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from training.data import texts
from training.data.datasets import DataError
from training.run import derive_seed

SPEAKER = re.compile(r"^([A-Z][A-Z ]+):$", re.MULTILINE)  # a line such as "LADY CAPULET:"
MIN_LETTERS, MAX_LETTERS = 4, 11  # smallest and largest length of a name
MAX_TRIES = 100  # attempts to invent a name
ORDER = 2  # number of letters on which the next letter of an invented name depends
SECTION = 120_000  # number of characters in which a speaker keeps the same invented name; about the length of a play


class RenamedSpeakers:
    """A text that gives a share of its speakers new invented names in each epoch.

    A name is a word of at least MIN_LETTERS capital letters in a line such as ``ROMEO:``. Words that also occur in
    small letters, such as ``king``, are not names. The spelling ``Romeo`` is replaced as well.

    Args:
        text: the training text.
        vocabulary: the characters, as for ``texts.encode``.
        share: the probability that a speaker gets an invented name.
        seed: the seed of the run.

    Raises:
        DataError: the text has no names.
    """

    def __init__(self, text: str, vocabulary: Sequence[str], share: float, seed: int) -> None:
        known = set(re.findall(r"\b[a-z]+\b", text))
        words = {word for speaker in SPEAKER.findall(text) for word in speaker.split()}
        self.names = sorted(word for word in words if len(word) >= MIN_LETTERS and word.lower() not in known)
        if not self.names:
            raise DataError("renamed_share needs lines with the name of a speaker, such as ROMEO:; the text has none")
        self.vocabulary, self.share, self.seed = vocabulary, share, seed
        self._sections = [text[start : start + SECTION] for start in range(0, len(text), SECTION)]
        self._pattern = re.compile(rf"\b(?:{'|'.join([*self.names, *map(str.title, self.names)])})\b")
        self._following: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            padded = " " * ORDER + name + " "
            for end in range(ORDER, len(padded)):
                self._following[padded[end - ORDER : end]].append(padded[end])
        self._epoch, self._characters = -1, texts.encode("", vocabulary)

    def characters(self, epoch: int) -> Tensor:
        """Return the vocabulary indices int32 [N] of the text of an epoch. N differs between epochs."""
        if epoch != self._epoch:
            self._epoch, self._characters = epoch, texts.encode(self.text(epoch), self.vocabulary)
        return self._characters

    def text(self, epoch: int) -> str:
        """Return the text of an epoch."""
        generator = random.Random(derive_seed(self.seed, "speakers", epoch))
        return "".join(self._renamed(section, generator) for section in self._sections)

    def _renamed(self, section: str, generator: random.Random) -> str:
        names = {name: self._invented(generator) for name in self.names if generator.random() < self.share}

        def rename(match: re.Match[str]) -> str:
            word = match[0]
            if word.isupper():
                return names.get(word, word)
            return names.get(word.upper(), word).title()

        return self._pattern.sub(rename, section)

    def _invented(self, generator: random.Random) -> str:
        """Invent a name letter by letter.

        Each letter is drawn from the letters that follow the same ORDER letters in the names of the text.
        """
        for _ in range(MAX_TRIES):
            name = " " * ORDER
            while not (name := name + generator.choice(self._following[name[-ORDER:]])).endswith(" "):
                pass
            if MIN_LETTERS <= len(name.strip()) <= MAX_LETTERS and name.strip() not in self.names:
                return name.strip()
        return generator.choice(self.names)  # the text has too few names to invent others
