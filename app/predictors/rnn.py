"""Texts to their continuation, many at once, each with its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from app.store import UNKNOWN, StoreError, Version

PIECE = 256  # characters of prompts read in one step, so that a long one does not hold up the texts beside it


@dataclass(eq=False)
class Prompt:
    """Characters [T], read once for all texts that continue them; ``state`` is that after those read so far.

    The last one is not read here: each text begins its drawing with it.
    """

    characters: np.ndarray
    state: Tensor
    read: int = 0

    @property
    def unread(self) -> int:
        return len(self.characters) - 1 - self.read


@dataclass(eq=False)
class Continuation:
    """One text under way."""

    prompt: Prompt
    draws: np.ndarray
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]
    seed: int
    text: str = ""
    finish_reason: str | None = None
    state: Tensor | None = None  # once it draws
    last: int = field(init=False)

    def __post_init__(self) -> None:
        self.last = int(self.prompt.characters[-1])

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def add(self, character: str) -> None:
        """Take one more character; ends at a stop string, which is left out, or when the draws are used up."""
        self.text += character
        for stop in self.stop:
            if self.text.endswith(stop):
                self.text = self.text[: -len(stop)]
                self.finish_reason = "stop"
                return
        if len(self.text) == len(self.draws):
            self.finish_reason = "length"


class TextContinuer:
    """A character RNN of the store.

    It computes in double precision: a batch of another size adds up in another order, and in single precision
    that would now and then tip a draw. So a seed gives the same text whatever else is running.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        card = version.card
        network = version.network()
        expected = network.sizes.vocabulary
        if not card.vocabulary or card.vocabulary[-1] != UNKNOWN or len(set(card.vocabulary)) != expected:
            raise StoreError(
                f"{version.label}/card.json: vocabulary must be {expected} distinct entries, {UNKNOWN} last"
            )
        if any(len(entry) != 1 for entry in card.vocabulary[:-1]):
            raise StoreError(f"{version.label}/card.json: vocabulary must be single characters, and {UNKNOWN}")
        self.card = card
        self.vocabulary = card.vocabulary
        self.index = {character: index for index, character in enumerate(card.vocabulary[:-1])}
        self.unknown = len(card.vocabulary) - 1
        self.device = device
        self.network = network.to(device).double()

    def parse(self, text: str) -> tuple[Prompt, list[str]]:
        """What a text begins with -> its prompt, never empty, and which characters the network does not know.

        An empty prompt is read as a line break where the network knows one: texts start on a new line.
        """
        state = self.network.zero_state(1)[0]
        if not text:
            return Prompt(np.array([self.index.get("\n", self.unknown)]), state), []
        indices = np.fromiter((self.index.get(character, self.unknown) for character in text), np.int32, len(text))
        return Prompt(indices, state), sorted(set(text) - self.index.keys())

    def begin(
        self,
        prompt: Prompt,
        max_characters: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        stop: Sequence[str],
        seed: int,
    ) -> Continuation:
        """A text that waits to be continued. All its random numbers follow from ``seed``."""
        draws = np.random.Generator(np.random.Philox(seed)).random(max_characters)
        everything = len(self.vocabulary)
        kept = min(top_k or everything, everything)
        return Continuation(prompt, draws, temperature, kept, top_p or 1.0, tuple(stop), seed)

    def step(self, texts: Sequence[Continuation]) -> None:
        """Read a piece of the prompts still unread, and draw one character for each of the other texts."""
        with torch.inference_mode():
            reading = list(dict.fromkeys(text.prompt for text in texts if text.prompt.unread))
            for prompt in reading:  # each gets an equal part of what a step may read
                self._read(prompt, max(PIECE // len(reading), 8))
            drawing = [text for text in texts if text.prompt not in reading]
            if drawing:
                self._draw(drawing)

    def _read(self, prompt: Prompt, most: int) -> None:
        count = min(most, prompt.unread)
        piece = torch.from_numpy(prompt.characters[prompt.read : prompt.read + count].astype(np.int64))
        _, state = self.network(piece.unsqueeze(0).to(self.device), prompt.state.unsqueeze(0))
        prompt.state, prompt.read = state[0], prompt.read + count

    def warm_up(self, rows: int) -> None:
        """Read and draw once alone and once in a full batch."""
        for count in (1, rows):
            prompts = [Prompt(np.full(3, self.unknown), self.network.zero_state(1)[0]) for _ in range(count)]
            texts = [self.begin(prompt, 1, 1.0, None, None, (), 0) for prompt in prompts]
            while not all(text.finished for text in texts):
                self.step([text for text in texts if not text.finished])

    def _draw(self, texts: list[Continuation]) -> None:
        characters = torch.tensor([[text.last] for text in texts], device=self.device)
        states = torch.stack([text.prompt.state if text.state is None else text.state for text in texts])
        logits, states = self.network(characters, states)
        logits = logits[:, -1].clone()
        logits[:, self.unknown] = -torch.inf  # read, never written
        drawn = choose(
            logits.cpu(),
            temperature=torch.tensor([text.temperature for text in texts], dtype=torch.float64),
            top_k=torch.tensor([text.top_k for text in texts]),
            top_p=torch.tensor([text.top_p for text in texts], dtype=torch.float64),
            uniform=torch.tensor([text.draws[len(text.text)] for text in texts], dtype=torch.float64),
        ).tolist()
        for text, character, state in zip(texts, drawn, states, strict=True):
            text.last, text.state = character, state
            text.add(self.vocabulary[character])


def choose(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index from each row of logits [N, V]; every other argument is [N]. Gives [N].

    Temperature 0 is greedy. Top-k keeps the k likeliest (Fan et al. 2018), top-p the smallest set of likeliest
    whose probability reaches p (Holtzman et al. 2020); both after the temperature. ``uniform`` in [0, 1) decides.
    """
    greedy = temperature == 0
    away = logits - logits.max(dim=1, keepdim=True).values  # at most 0: no temperature can overflow it
    scaled = away / temperature.masked_fill(greedy, 1.0).unsqueeze(1)
    ranked, index = scaled.sort(dim=1, descending=True, stable=True)
    probability = torch.softmax(ranked, dim=1)
    before = probability.cumsum(dim=1) - probability
    rank = torch.arange(logits.shape[1]).unsqueeze(0)
    kept = (rank < top_k.unsqueeze(1)) & (before < top_p.unsqueeze(1)) & (probability > 0)
    kept &= (rank == 0) | ~greedy.unsqueeze(1)
    kept[:, 0] = True
    total = (probability * kept).cumsum(dim=1)
    place = (total <= uniform.unsqueeze(1) * total[:, -1:]).sum(dim=1)
    place = torch.minimum(place, kept.sum(dim=1) - 1)
    return index.gather(1, place.unsqueeze(1)).squeeze(1)
