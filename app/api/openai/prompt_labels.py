"""Find the labels in a prompt for image generation, such as "three sevens and a 2"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest

from app.errors import BadValue, quote_value

NUMBERS = {
    word: value
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    )
}
UNITS = {"pair": 2, "couple": 2, "dozen": 12}
IGNORED_WORDS = {
    *("a", "an", "the", "and", "of", "me", "please", "draw", "with", "handwritten"),
    *("digit", "digits", "number", "numbers", "image", "images", "picture", "pictures"),
}
COUNTED_WORDS = {"digits", "numbers", "images", "pictures"}
LINKING_WORDS = {"of", "the", "handwritten", "digit", "number", "image", "picture"}  # between number and counted word
ONE_PICTURE = re.compile(r"\b(?:one|1)(?= (?:handwritten )?(?:image|picture) of\b)")  # a count, not a label
LIST_COMMA = re.compile(r"(?<=\d),(?=\d)(?!\d{3}(?!\d))")  # a comma as in "1,2,3", but not as in "1,024"
MAX_COUNT = 10**5  # largest number of images of one label; larger numbers are replaced by this number


def prompt_labels(prompt: str, labels: Sequence[str], model: str) -> list[tuple[str, int]]:
    """Return the labels in a prompt, each with its number of images. For a prompt without labels, the list is empty.

    A number before a plural or a unit is a count, as in "three sevens" or "2 dozen cats". "One picture of" is a count,
    too. Any other number is a label, or one label for each of its digits, as in "42". ``model`` is the model's name for
    error messages.

    Raises:
        BadValue: a word is not a label, a number or an ignored word. Or a word can mean several labels, which differ
            only in upper and lower case. Or a number counts images instead of labels, as in "3 handwritten digits" or
            "5 pictures of a 7".
    """
    if prompt.strip() in labels:
        return [(prompt.strip(), 1)]
    singulars, plurals = _names(labels)
    _reject_ambiguous_words(prompt, labels, plurals | singulars)
    if prompt.strip().lower() in singulars:
        return [(singulars[prompt.strip().lower()], 1)]
    _reject_counted_images(prompt, singulars, plurals)
    words = [word for word in _words(prompt) if word not in IGNORED_WORDS or word in singulars]
    label_counts: list[tuple[str, int]] = []
    count = 1
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        value = _number(word)
        if value is not None and (following in plurals or following in UNITS):
            count = min(count * value, MAX_COUNT)
        elif word in plurals:
            label_counts.append((plurals[word], count))
            count = 1
        elif word in singulars:
            label_counts.append((singulars[word], 1))
        elif word.isdigit() and all(digit in singulars for digit in word):
            label_counts += [(singulars[digit], 1) for digit in word]
        else:
            labelled = f"cannot generate {quote_value(word)}; allowed labels: {', '.join(labels)}"
            unlabelled = "has no labels, so none can be chosen; send the prompt 'digits'"
            raise BadValue(f"prompt is {quote_value(prompt)}; {model} {labelled if labels else unlabelled}", "prompt")
    return label_counts


def _reject_ambiguous_words(prompt: str, labels: Sequence[str], names: Mapping[str, str]) -> None:
    """Raise BadValue if a word of the prompt, or all of it, can mean several labels, such as "A" and "a"."""
    counts = Counter(label.lower() for label in dict.fromkeys(labels))
    for word in (prompt.strip().lower(), *_words(prompt)):
        name = names.get(word, "").lower()
        if counts[name] > 1:
            same = " and ".join(quote_value(label) for label in dict.fromkeys(labels) if label.lower() == name)
            problem = f"{quote_value(word)} can mean the labels {same}"
            advice = "send only one label, exactly as written here, as the prompt and the number of images as n"
            raise BadValue(f"prompt is {quote_value(prompt)}; {problem}; {advice}", "prompt")


def _reject_counted_images(prompt: str, singulars: Collection[str], plurals: Collection[str]) -> None:
    """Raise BadValue if a number counts images or digits in general, as in "3 handwritten digits"."""
    words, number = iter(_words(prompt)), ""  # the last number, if only linking words follow it
    for word in words:
        if number and word in COUNTED_WORDS and word not in singulars:
            break
        if _number(word) is not None:
            number = word
        elif word not in LINKING_WORDS or word in singulars:
            number = ""
    else:
        return
    names = [name for later in words for name in (later if later.isdigit() else [later])]
    label = next((name for name in names if name in singulars or name in plurals), None)
    problem, advice = "but no label", "for random labels, send the prompt 'digits' and the number as n"
    if label:
        problem, plural = f"before the label {quote_value(label)}", label if label in plurals else f"{label}s"
        advice = f"write '{number} {plural}', or send only the label as the prompt and the number as n"
    raise BadValue(f"prompt is {quote_value(prompt)}, with {number} {word} {problem}; {advice}", "prompt")


def _words(prompt: str) -> list[str]:
    plain = ONE_PICTURE.sub("", re.sub(r"['’]", "", prompt.lower()))
    return re.findall(r"-?\d+(?:[.,-]\d+)+|-\d+|\d+s?|[^\W\d_]+", LIST_COMMA.sub(" ", plain))


def _number(word: str) -> int | None:
    """Return the number that a word means, or None."""
    if word in UNITS:
        return UNITS[word]
    return min(int(word), MAX_COUNT) if word.isascii() and word.isdigit() else NUMBERS.get(word)


def _names(labels: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return two dictionaries: the labels by their singular names, and the labels by their plural names."""
    words = {str(value): word for word, value in NUMBERS.items()}
    singulars = {label.lower(): label for label in labels} | {words[label]: label for label in labels if label in words}
    plurals = {name + ending: label for name, label in singulars.items() for ending in ("s", "es")}
    return singulars, {name: label for name, label in plurals.items() if name not in singulars}
