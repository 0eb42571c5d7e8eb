"""Texts to their continuation, many at once, each with its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from app.networks.rnn import Steps
from app.predictors.measured import Pace, padded, steady
from app.store import UNKNOWN, StoreError, Version

READ_SECONDS = 0.002  # in which prompts are read before the texts beside them draw on, so that none holds up others
MOST_READ = 256  # characters in that time, so that nobody waits for a caller who is gone
AHEAD = 64  # characters for which a drawing has its random numbers ready


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
    """One text under way. ``draws`` are its random numbers, one for each character."""

    prompt: Prompt
    draws: np.ndarray
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]
    seed: int
    text: str = ""
    finish_reason: str | None = None
    last: int = field(init=False)
    drawing: Drawing | None = None  # where it is drawn, once its prompt is read ...
    row: int = 0  # ... and which row of it

    def __post_init__(self) -> None:
        self.last = int(self.prompt.characters[-1])

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def state(self) -> Tensor:
        """After all characters but the last, [layers, hidden]."""
        return self.prompt.state if self.drawing is None else self.drawing.state[self.row]

    @property
    def settled(self) -> str:
        """The text so far without an end that may yet turn out to begin a stop string: what a stream may show."""
        if self.finished or not self.stop:
            return self.text
        text = self.text
        held = (size for stop in self.stop for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size]))
        return text[: len(text) - max(held, default=0)]

    def add(self, character: str) -> None:
        """Take one more character; ends at a stop string, which is left out, or when the draws are used up."""
        text = self.text + character
        for stop in self.stop:
            if text.endswith(stop):
                self.text, self.finish_reason = text[: -len(stop)], "stop"
                return
        self.text = text
        if len(text) == len(self.draws):
            self.finish_reason = "length"


class Drawing:
    """Texts that are drawn together: row i of everything is text i. Made anew when a text joins or leaves."""

    def __init__(self, texts: Sequence[Continuation], device: torch.device) -> None:
        self.texts = list(texts)
        self.state = padded(torch.stack([text.state for text in texts]))  # [N, layers, hidden]
        self.characters = padded(torch.tensor([text.last for text in texts], device=device))  # [N]
        self.temperature = np.array([text.temperature for text in texts])
        self.top_k = np.array([text.top_k for text in texts])
        self.top_p = np.array([text.top_p for text in texts])
        self.uniform = np.zeros((AHEAD, len(texts)))  # one row for each character to come
        for i, text in enumerate(texts):
            coming = text.draws[len(text.text) : len(text.text) + AHEAD]
            self.uniform[: len(coming), i] = coming
        self.drawn = 0
        for i, text in enumerate(texts):
            text.drawing, text.row = self, i

    def draws(self, texts: Sequence[Continuation]) -> bool:
        """Whether it can go on for just these texts."""
        return self.drawn < AHEAD and self.texts == texts


class TextContinuer:
    """A character RNN of the store.

    A seed gives the same text whatever else is running: where the processor's rounding depends on how many texts are
    computed together, which is tried at the start, it computes in double precision, in which no draw is tipped by it.
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
        self.network = network.to(device)
        self.steps = Steps(self.network)
        self.pace = Pace(READ_SECONDS / MOST_READ, 0.0)
        self._drawing: Drawing | None = None

    def parse(self, text: str) -> tuple[Prompt, list[str]]:
        """What a text begins with -> its prompt, never empty, and which characters the network does not know.

        An empty prompt is read as a line break where the network knows one: texts start on a new line.
        """
        state = self.network.zero_state(1)[0]
        if not text:
            return Prompt(np.array([self.index.get("\n", self.unknown)]), state), []
        indices = np.fromiter((self.index.get(character, self.unknown) for character in text), np.int64, len(text))
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
        reading = list(dict.fromkeys(text.prompt for text in texts if text.prompt.unread))
        with torch.inference_mode():
            if reading:
                self._read(reading)
                texts = [text for text in texts if text.prompt not in reading]
            if texts:
                self._draw(texts)

    def _read(self, prompts: list[Prompt]) -> None:
        """The same number of characters of each, as many as the time allows and the shortest has."""
        most = max(1, min(int(READ_SECONDS / self.pace(len(prompts))), MOST_READ // len(prompts)))
        count = min(most, *(prompt.unread for prompt in prompts))
        pieces = np.stack([prompt.characters[prompt.read : prompt.read + count] for prompt in prompts])
        state = padded(torch.stack([prompt.state for prompt in prompts]))
        for characters in padded(torch.from_numpy(pieces).to(self.device)).unbind(1):
            state = self.steps.read(characters, state)
        for prompt, own in zip(prompts, state.unbind(0), strict=False):  # what was padded is left over
            prompt.state = own
            prompt.read += count

    def _draw(self, texts: Sequence[Continuation]) -> None:
        drawing = self._drawing
        if drawing is None or not drawing.draws(texts):
            drawing = self._drawing = Drawing(texts, self.device)
        state = self.steps.read(drawing.characters, drawing.state)
        logits = self.steps.logits(state)[: len(texts)].cpu().numpy().astype(np.float64)
        logits[:, self.unknown] = -np.inf  # read, never written
        uniform = drawing.uniform[drawing.drawn]
        drawn = choose(logits, drawing.temperature, drawing.top_k, drawing.top_p, uniform)
        # nothing has changed before this line: a step that fails can be taken again
        drawing.state, drawing.drawn = state, drawing.drawn + 1
        drawing.characters = padded(torch.from_numpy(drawn).to(self.device))
        for text, character in zip(texts, drawn.tolist(), strict=True):
            text.last = character
            text.add(self.vocabulary[character])
        if all(text.finished for text in texts):
            self._drawing = None

    def warm_up(self, rows: int) -> None:
        """Choose the precision, and measure a step alone and with all rows."""
        generator = torch.Generator().manual_seed(0)
        characters = torch.randint(0, self.unknown, (rows,), generator=generator).to(self.device)

        def logits(state: Tensor) -> Tensor:
            return self.steps.logits(self.steps.read(characters[: len(state)], state))

        if not steady(
            logits, torch.rand(rows, *self.network.zero_state(1).shape[1:], generator=generator).to(self.device)
        ):
            self.network = self.network.double()
            self.steps = Steps(self.network)

        def draw(count: int) -> None:
            prompts = [Prompt(np.full(1, self.unknown), self.network.zero_state(1)[0]) for _ in range(count)]
            self.step([self.begin(prompt, 1, 1.0, 2, 0.9, (), 0) for prompt in prompts])

        self.pace = Pace.measure(draw, rows)


def choose(
    logits: np.ndarray, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """Draw one index from each row of logits [N, V], float64; every other argument is [N]. Gives [N].

    Temperature 0 is greedy. Top-k keeps the k likeliest (Fan et al. 2018), top-p the smallest set of likeliest
    whose probability reaches p (Holtzman et al. 2020); both after the temperature. ``uniform`` in [0, 1) decides.
    No row depends on another.
    """
    greedy = temperature == 0
    away = logits - logits.max(axis=1, keepdims=True)  # at most 0: no temperature can overflow it
    weights = np.exp(away / np.where(greedy, 1.0, temperature)[:, None])  # the likeliest has weight 1
    narrow = np.flatnonzero((top_k < logits.shape[1]) | (top_p < 1))
    if len(narrow):
        weights[narrow] = _likeliest(weights[narrow], top_k[narrow], top_p[narrow])
    total = weights.cumsum(axis=1)
    drawn = (total <= uniform[:, None] * total[:, -1:]).sum(axis=1)
    return np.where(greedy, away.argmax(axis=1), drawn)


def _likeliest(weights: np.ndarray, top_k: np.ndarray, top_p: np.ndarray) -> np.ndarray:
    """Weights [N, V] with 0 for all that top-k and top-p leave out."""
    order = np.argsort(-weights, axis=1, kind="stable")
    ranked = np.take_along_axis(weights, order, axis=1)
    before = ranked.cumsum(axis=1) - ranked
    kept = (np.arange(weights.shape[1]) < top_k[:, None]) & (
        before < top_p[:, None] * ranked.sum(axis=1, keepdims=True)
    )
    kept[:, 0] = True
    narrowed = np.zeros_like(weights)
    np.put_along_axis(narrowed, order, ranked * kept, axis=1)
    return narrowed
