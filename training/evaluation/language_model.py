"""A text as characters: what of it is held out, how well a network knows it, and how it goes on."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.store import UNKNOWN_CHARACTER
from app.tasks.text_generation import TextGenerator
from training.data import datasets
from training.run import metric, saved

WINDOW = 256  # characters, as in nanoGPT, so that the loss compares with published ones
PLACES = 10  # where characters are held out: the end of the text alone is one play, and not like the others


def vocabulary_of(text: str) -> list[str]:
    """The characters of a text, sorted, and ``<unk>`` for all others."""
    return [*sorted(set(text)), UNKNOWN_CHARACTER]


def encode(text: str, vocabulary: Sequence[str]) -> Tensor:
    """A text -> the indices [len(text)] of its characters."""
    index = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([index.get(character, len(vocabulary) - 1) for character in text])


def held_apart(characters: Tensor, share: float, places: int = PLACES) -> tuple[Tensor, list[Tensor]]:
    """Characters to learn from, and a share of them held out in places spread evenly over the text."""
    length, part = int(len(characters) * share / places), len(characters) // places
    if share and length <= WINDOW:
        raise SystemExit(
            f"--validation {share} holds out {length} characters in each of {places} places; "
            f"it takes {WINDOW + 1} to measure a window"
        )
    parts = [characters[i * part : (i + 1) * part if i < places - 1 else None] for i in range(places)]
    middle = (part - length) // 2
    learn = torch.cat([piece for part in parts for piece in (part[:middle], part[middle + length :])])
    return learn, [part[middle : middle + length] for part in parts]


def window_loss(network: Any, *parts: Tensor) -> float:
    """Nats a character over all whole windows of 256 characters of each part, each window read from a zero state."""
    windows = torch.stack(
        [part[start : start + WINDOW + 1] for part in parts for start in range(0, len(part) - WINDOW, WINDOW)]
    )
    total = 0.0
    with torch.inference_mode():
        for part in windows.split(64):
            logits, _ = network(part[:, :-1], network.zero_state(len(part)))
            total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / (len(windows) * WINDOW)


def stream_loss(network: Any, characters: Tensor) -> float:
    """Nats a character over one reading of the whole text, the state carried on."""
    total, state = 0.0, network.zero_state(1)
    with torch.inference_mode():
        for start in range(0, len(characters) - 1, 4096):
            part = characters[start : start + 4097]
            logits, state = network(part[None, :-1], state)
            total += F.cross_entropy(logits[0], part[1:], reduction="sum").item()
    return total / (len(characters) - 1)


def measure(continuer: TextGenerator, text: datasets.Text) -> dict[str, Any]:
    """The metrics of a published network on the test part of a text."""
    characters = encode(text.test, continuer.vocabulary).to(continuer.device)
    split = f"the last 10 % of the text, {len(text.test):,} characters"
    window = window_loss(continuer.network, characters)
    return {
        "nats_per_character": metric(window, f"{split}, in windows of {WINDOW} from a zero state"),
        "bits_per_character": metric(window / math.log(2), f"{split}, in windows of {WINDOW} from a zero state"),
        "nats_per_character_carried": metric(stream_loss(continuer.network, characters), f"{split}, read in one go"),
    }


def continued(continuer: TextGenerator, prompt: str, seed: int, characters: int = 400) -> str:
    """A prompt and its continuation, as the service gives it at temperature 0.8."""
    begun, _ = continuer.parse(prompt)
    text = continuer.begin(begun, characters, 0.8, None, None, (), seed)
    while not text.finished:
        continuer.step([text])
    return prompt + text.text


def draw_samples(path: Path, continuer: TextGenerator, prompts: Sequence[str]) -> Path:
    """Three continuations as a picture, and as text beside it."""
    from matplotlib.figure import Figure

    drawn = [continued(continuer, prompt, seed) for seed, prompt in enumerate(prompts)]
    path.with_suffix(".txt").write_text("\n\n----\n\n".join(drawn), "utf-8")
    figure = Figure(figsize=(13, 4.5))
    for i, text in enumerate(drawn):
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 52) or [""]]
        figure.text(0.02 + i * 0.33, 0.97, "\n".join(lines), family="monospace", fontsize=8, va="top", parse_math=False)
    return saved(figure, path)
