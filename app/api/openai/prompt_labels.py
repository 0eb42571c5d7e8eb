"""What a prompt for images names: "three sevens and a 2"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest

from app.errors import BadValue, quote_value

NUMBERS = {
    word: value
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    )
}
UNITS = {"pair": 2, "couple": 2, "dozen": 12}
# what says nothing about which
IGNORED_WORDS = {
    *("a", "an", "the", "and", "of", "me", "please", "draw", "with", "handwritten"),
    *("digit", "digits", "number", "numbers", "image", "images", "picture", "pictures"),
}
MOST = 10**5  # of one label


def prompt_labels(prompt: str, labels: Sequence[str], model: str) -> list[tuple[str, int]]:
    """The labels that a prompt names, in its order, and how many images of each; none when it names nothing at all, as
    "digits" does.

    A number before a plural says how many: "three sevens", "2 cats". Any other is a label itself, and several figures
    together are one each: "42". Raises BadValue for a word that is none of these.
    """
    one, many = _names(labels)
    if prompt.strip().lower() in one:
        return [(one[prompt.strip().lower()], 1)]
    words = [word for word in _words(prompt) if word not in IGNORED_WORDS or word in one]
    found: list[tuple[str, int]] = []
    count = 1
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        value = _value(word)
        if value is not None and (following in many or following in UNITS):
            count = min(count * value, MOST)
        elif word in many:
            found.append((many[word], count))
            count = 1
        elif word in one:
            found.append((one[word], 1))
        elif word.isdigit() and all(figure in one for figure in word):
            found += [(one[figure], 1) for figure in word]
        else:
            known = f"cannot draw {quote_value(word)}; there are: {', '.join(labels)}"
            free = "draws without labels, so nothing can be chosen; ask it for 'digits'"
            raise BadValue(f"prompt is {quote_value(prompt)}; {model} {known if labels else free}", "prompt")
    return found


def _words(prompt: str) -> list[str]:
    plain = re.sub(r"['’]", "", prompt.lower())
    return re.findall(r"\d+s?|[^\W\d_]+", plain)


def _value(word: str) -> int | None:
    """How many a word counts, where it does."""
    if word in UNITS:
        return UNITS[word]
    return min(int(word), MOST) if word.isascii() and word.isdigit() else NUMBERS.get(word)


def _names(labels: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What one image of each label is called, and what several are."""
    words = {str(value): word for word, value in NUMBERS.items()}
    one = {label.lower(): label for label in labels} | {words[label]: label for label in labels if label in words}
    many = {name + ending: label for name, label in one.items() for ending in ("s", "es")}
    return one, {name: label for name, label in many.items() if name not in one}
