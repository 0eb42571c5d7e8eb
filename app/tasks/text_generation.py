"""Texts to their continuation, many at once, each with its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from app.store import UNKNOWN_CHARACTER, StoreError, Version
from app.tasks.latency_model import LatencyModel
from app.tasks.precision import MIN_ROWS, batch_invariant, check_finite, pad
from app.tasks.token_sampling import LogProbs, OptionRows, Sampler, SamplingOptions, log_probabilities, record_log_probs

PREFILL_SECONDS = 0.002  # for which prompts are read in one step, so that whoever comes or goes is noticed
PREFILL_SHARE = 1.0  # of the time of a step, where texts are drawn beside: a long prompt slows them down by so much
MAX_PREFILL = 256  # characters of a prompt in one step
UNIFORMS_AHEAD = 64  # characters for which a drawing has its random numbers ready


@dataclass(eq=False)
class Prompt:
    """Characters [T], read once for all texts that continue them; ``state`` is that after those read so far.

    The last one is not read here: each text begins its drawing with it. ``notes``, where asked for, are of all but the
    first.
    """

    characters: np.ndarray
    state: Tensor
    read: int = 0
    notes: LogProbs | None = None

    @property
    def unread(self) -> int:
        return len(self.characters) - 1 - self.read


@dataclass(eq=False)
class Continuation:
    """One text under way. ``draws`` are its random numbers, one for each character."""

    prompt: Prompt
    uniforms: np.ndarray
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]
    seed: int
    extras: SamplingOptions | None = None
    text: str = ""
    finish_reason: str | None = None
    last: int = field(init=False)
    drawing: DecodeBatch | None = None  # where it is drawn, once its prompt is read ...
    row: int = 0  # ... and which row of it

    def __post_init__(self) -> None:
        self.last = int(self.prompt.characters[-1])

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def generated(self) -> int:
        """Characters so far."""
        return len(self.text)

    @property
    def remaining(self) -> int:
        """Characters that it may yet take: of its prompt to read, and to draw."""
        return self.prompt.unread + len(self.uniforms) - len(self.text)

    @property
    def state(self) -> Tensor:
        """After all characters but the last, [layers, hidden]."""
        return self.prompt.state if self.drawing is None else self.drawing.state[self.row]

    @property
    def settled(self) -> str:
        """The text so far without an end that may yet turn out to begin a stop string: what a stream may show."""
        if self.finished or not self.stop:
            return self.text
        text, held = self.text, 0
        for stop in self.stop:
            at = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
            while at != -1 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            held = max(held, len(text) - at if at != -1 else 0)
        return text[: len(text) - held]

    def add(self, character: str) -> None:
        """Take one more character; ends at a stop string, which is left out, or when the draws are used up."""
        text = self.text + character
        for stop in self.stop:
            if text.endswith(stop):
                self.text, self.finish_reason = text[: -len(stop)], "stop"
                return
        self.text = text
        if len(text) == len(self.uniforms):
            self.finish_reason = "length"


class DecodeBatch:
    """Texts that are drawn together: row i of everything is text i. Made anew when a text joins or leaves."""

    def __init__(self, texts: Sequence[Continuation], vocabulary: int, device: torch.device) -> None:
        self.texts = [ref(text) for text in texts]  # each text knows its drawing: a circle would outlive its answer
        self.state = torch.stack([text.state for text in texts])  # [N, layers, hidden]
        self.characters = torch.tensor([text.last for text in texts], device=device)  # [N]
        self.choose = Sampler(
            np.array([text.temperature for text in texts]),
            np.array([text.top_k for text in texts]),
            np.array([text.top_p for text in texts]),
            vocabulary,
        )
        self.extras = OptionRows(texts) if any(text.extras for text in texts) else None
        self.uniform = np.zeros((UNIFORMS_AHEAD, len(texts)))  # one row for each character to come
        for i, text in enumerate(texts):
            coming = text.uniforms[len(text.text) : len(text.text) + UNIFORMS_AHEAD]
            self.uniform[: len(coming), i] = coming
        self.drawn = 0
        for i, text in enumerate(texts):
            text.drawing, text.row = self, i

    def uniforms(self, texts: Sequence[Continuation]) -> bool:
        """Whether it can go on for just these texts."""
        pairs = zip(self.texts, texts, strict=False)
        same = len(texts) == len(self.texts) and all(known() is text for known, text in pairs)
        return same and self.drawn < UNIFORMS_AHEAD


class TextGenerator:
    """A character RNN of the store.

    A seed gives the same text whatever else is running: where the processor's rounding depends on how many texts are
    computed together, which is tried at the start, it computes in double precision, in which no draw is tipped by it.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        card = version.card
        network = version.network()
        expected = network.sizes.vocabulary
        if not card.vocabulary or card.vocabulary[-1] != UNKNOWN_CHARACTER or len(set(card.vocabulary)) != expected:
            raise StoreError(
                f"{version.label}/card.json: vocabulary must be {expected} distinct entries, {UNKNOWN_CHARACTER} last"
            )
        if any(len(entry) != 1 for entry in card.vocabulary[:-1]):
            raise StoreError(
                f"{version.label}/card.json: vocabulary must be single characters, and {UNKNOWN_CHARACTER}"
            )
        self.card = card
        self.vocabulary = card.vocabulary
        self.index = {character: index for index, character in enumerate(card.vocabulary[:-1])}
        self.unknown = len(card.vocabulary) - 1
        self.device = device
        self.network = network.to(device)
        self.steps = self.network.steps()
        self.blank = self.network.zero_state(1)[0]  # what a text begins from, [layers, hidden]
        self.least = MIN_ROWS  # rows that are computed together: fewer are padded
        self.latency = self.reading = LatencyModel(
            PREFILL_SECONDS / MAX_PREFILL, 0.0
        )  # of a step that draws, and of one that reads
        self._drawing: DecodeBatch | None = None

    def parse(self, text: str) -> tuple[Prompt, list[str]]:
        """What a text begins with -> its prompt, never empty, and which characters the network does not know.

        An empty prompt is read as a line break where the network knows one: texts start on a new line.
        """
        if not text:
            return Prompt(np.array([self.index.get("\n", self.unknown)]), self.blank), []
        indices = np.fromiter((self.index.get(character, self.unknown) for character in text), np.int64, len(text))
        return Prompt(indices, self.blank), sorted(set(text) - self.index.keys())

    def begin(
        self,
        prompt: Prompt,
        max_characters: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        stop: Sequence[str],
        seed: int,
        extras: SamplingOptions | None = None,
    ) -> Continuation:
        """A text that waits to be continued. All its random numbers follow from ``seed``."""
        draws = np.random.Generator(np.random.Philox(seed)).random(max_characters)
        everything = len(self.vocabulary)
        kept = min(top_k or everything, everything)
        return Continuation(prompt, draws, temperature, kept, top_p or 1.0, tuple(stop), seed, extras)

    def step(self, texts: Sequence[Continuation]) -> None:
        """Draw one character for each text whose prompt is read, and read on in the other prompts."""
        reading = list(dict.fromkeys(text.prompt for text in texts if text.prompt.unread))
        drawing = [text for text in texts if text.prompt not in reading] if reading else texts
        with torch.inference_mode():
            if reading:
                share = PREFILL_SHARE * self.latency(len(drawing)) if drawing else PREFILL_SECONDS
                self._prefill(reading, min(share, PREFILL_SECONDS))
            if drawing:
                self._sample(drawing, [prompt for prompt in reading if prompt.unread])

    def _prefill(self, prompts: list[Prompt], seconds: float) -> None:
        """The same number of characters of each, as many as the time allows and the shortest has."""
        noting = any(prompt.notes for prompt in prompts)
        pace = self.latency if noting else self.reading  # to note a character costs what drawing one does
        most = max(1, min(int(seconds / pace(len(prompts))), MAX_PREFILL))
        count = min(most, *(prompt.unread for prompt in prompts))
        pieces = np.stack([prompt.characters[prompt.read : prompt.read + count] for prompt in prompts])
        state = torch.stack([prompt.state for prompt in prompts])
        likely = []
        for characters in torch.from_numpy(pieces).to(self.device).unbind(1):
            above, state = self._after(characters, state)
            likely.append(self._restrict(prompts, above) if noting else None)
        _keep(prompts, state, likely)

    def _restrict(self, prompts: Sequence[Prompt], above: Tensor) -> np.ndarray | None:
        """What was read of the prompts -> log-probabilities of what comes next in those of which it is noted."""
        rows = [row for row, prompt in enumerate(prompts) if prompt.notes]
        return log_probabilities(self._logits(above[rows])) if rows else None

    def _logits(self, above: Tensor) -> np.ndarray:
        """What ``steps.read`` gave of N texts -> logits [N, V], float64; <unk> is read, but never written.

        Raises ArithmeticError.
        """
        logits = self.steps.logits(pad(above, self.least))[: len(above)].cpu().numpy().astype(np.float64)
        check_finite(float(logits.sum()), "logits")
        logits[:, self.unknown] = -np.inf
        return logits

    def _after(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """``steps.read`` of characters [N] and state [N, layers, hidden], in no fewer rows than it needs."""
        above, state = self.steps.read(pad(characters, self.least), pad(state, self.least))
        return above[: len(characters)], state[: len(characters)]

    def _sample(self, texts: Sequence[Continuation], prompts: list[Prompt]) -> None:
        """A character of each text, and one that is read of each of the prompts: beside the others it costs little."""
        drawing = self._drawing
        if drawing is None or not drawing.uniforms(texts):
            drawing = self._drawing = DecodeBatch(texts, len(self.vocabulary), self.device)
        characters, state, count = drawing.characters, drawing.state, len(texts)
        if prompts:
            coming = torch.tensor([int(prompt.characters[prompt.read]) for prompt in prompts], device=self.device)
            characters = torch.cat([characters, coming])
            state = torch.cat([state, torch.stack([prompt.state for prompt in prompts])])
        above, state = self._after(characters, state)
        logits, extras = self._logits(above[:count]), drawing.extras
        if extras:
            likely = extras.likely(logits)
            extras.steer(logits)
        drawn = drawing.choose(logits, drawing.uniform[drawing.drawn])
        in_prompts = self._restrict(prompts, above[count:]) if prompts else None
        # nothing has changed before this line: a step that fails can be taken again
        if extras:
            extras.take(drawn, likely)
        _keep(prompts, state[count:], [in_prompts])
        drawing.state, drawing.drawn = state[:count], drawing.drawn + 1
        drawing.characters = torch.from_numpy(drawn).to(self.device)
        for text, character in zip(texts, drawn.tolist(), strict=True):
            text.last = character
            text.add(self.vocabulary[character])
        if all(text.finished for text in texts):
            self._drawing = None

    def dummy_texts(self, rows: int, characters: int) -> list[Continuation]:
        """Return ``rows`` texts of no meaning that take ``characters`` steps each."""
        prompts = [Prompt(np.full(1, self.unknown), self.blank) for _ in range(rows)]
        return [self.begin(prompt, characters, 1.0, 2, 0.9, (), 0) for prompt in prompts]

    def warm_up(self, rows: int) -> None:
        """Choose the precision, and measure a step alone and with all rows. After it there is no ``network``: what the
        steps read is theirs, and often another copy of its weights.
        """
        generator = torch.Generator().manual_seed(0)
        characters = torch.randint(0, self.unknown, (rows,), generator=generator).to(self.device)
        states = torch.rand(rows, *self.blank.shape, generator=generator).to(self.device)

        def computed(state: Tensor) -> Tensor:
            above, state = self.steps.read(characters[: len(state)], state)
            return torch.cat([self.steps.logits(above), state.flatten(1)], dim=1)

        if batch_invariant(computed, states, 1):
            self.least = 1
        elif not batch_invariant(computed, states, self.least):
            self.steps, self.least = self.network.double().steps(), 1
            self.blank = self.blank.double()
        del self.network

        self.latency = LatencyModel.measure(lambda count: self.step(self.dummy_texts(count, 1)), rows)
        with torch.inference_mode():
            self.reading = LatencyModel.measure(
                lambda count: self._after(characters[:count], states[:count].to(self.blank.dtype)), rows
            )


def _keep(prompts: Sequence[Prompt], state: Tensor, likely: Sequence[np.ndarray | None]) -> None:
    """Note that more characters of each prompt are read: as many as ``likely`` tells of what was to come next."""
    noted = [(prompt, prompt.notes) for prompt in prompts if prompt.notes]
    for step, logs in enumerate(likely):
        if logs is not None:
            following = np.array([prompt.characters[prompt.read + step + 1] for prompt, _ in noted])
            record_log_probs([notes for _, notes in noted], logs, following)
    for prompt, own in zip(prompts, state.unbind(0), strict=True):
        prompt.state = own
        prompt.read += len(likely)
