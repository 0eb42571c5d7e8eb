"""Text generation with an imported network."""

from __future__ import annotations

import codecs
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from app.store import StoreError, TensorSpec, Version
from app.tasks.imported.tensors import TaskPredictor
from app.tasks.text_generation import Continuation, Prompt, TextGenerator

BYTES = [chr(byte) for byte in range(256)]  # the characters on the card of a network that reads bytes
UNKNOWN = "unknown"  # option: index of the character that stands for all characters without an index


class ImportedTextGenerator(TextGenerator):
    """Prompts to continuations, with a network that reads one character at a time, or a window of characters.

    The card's ``vocabulary`` has a character for each value of the logits, and ``<unk>``. A seed gives the same text at
    any load if the network computes each row alike in batches of any size; most do only up to rounding.

    Options:
        tokens, logits: names of the input of indices and of the output.
        states, next_states: names of the inputs and outputs that hold the state, if the network has one. It then reads
            tokens [N] or [N, 1], and states of any shape with N rows, which are zero at the beginning. Otherwise it
            reads a window [N, T], and its logits [N, T, V] at a position depend on no later one.
        context: length of the window; by default that of the input.
        unknown: index of the character that stands for unknown ones; 0 by default.
        bytes: whether the vocabulary are the 256 bytes of UTF-8. ``max_characters`` then counts bytes.
    """

    reads_bytes = False

    def __init__(self, version: Version, device: torch.device) -> None:
        self.tensors = TaskPredictor(version, device)
        network = StateNetwork if self.tensors.options.get("states") else WindowNetwork
        if not version.card.vocabulary:
            raise StoreError(f"{version.label}: the task 'continue' needs a vocabulary")
        cpu = torch.device("cpu")  # of states and sampling; the tensors of the network are on ``device``
        super().__init__(version, cpu, network(self.tensors, len(version.card.vocabulary)))

        if self.tensors.options.get("bytes"):
            if self.vocabulary[:-1] != BYTES:
                raise StoreError(f"{version.label}: the vocabulary of a network that reads bytes should be the bytes")
            self.continuation = ByteContinuation
            self.reads_bytes = True

    def parse(self, text: str) -> tuple[Prompt, list[str]]:
        """As in the base class. A network that reads bytes knows every character."""
        if not self.reads_bytes or not text:
            return super().parse(text)
        indices = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64)
        self.check_prompt(len(indices))
        return Prompt(indices, self.initial_state), []

    def warm_up(self, rows: int) -> None:
        """Measure steps of 1 to ``rows`` texts, and batches of tensors."""
        super().warm_up(rows)
        self.tensors.warm_up(rows)


@dataclass(eq=False)
class ByteContinuation(Continuation):
    """A text that is generated in bytes. ``text`` has the characters whose bytes are complete."""

    written: int = 0  # bytes
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    @property
    def generated(self) -> int:
        """The number of bytes generated so far."""
        return self.written

    def add(self, character: str) -> None:
        """Append a byte. The text ends before a stop string, or at its maximum length."""
        self.written += 1
        ends = self.written == len(self.uniforms)
        text = self.text + self.decoder.decode(character.encode("latin-1"), final=ends)
        for stop in self.stop:
            if text.endswith(stop):
                self.text, self.finish_reason = text[: -len(stop)], "stop"
                return
        self.text = text
        if ends:
            self.finish_reason = "length"


class _CharacterNetwork:
    """The part that both networks have in common. It has the methods of ``CharacterRNN`` that are used to serve."""

    def __init__(self, tensors: TaskPredictor, vocabulary: int) -> None:
        self.tensors = tensors
        self.sizes = SimpleNamespace(vocabulary=vocabulary)
        self.values = vocabulary - 1  # of the logits: all characters but ``<unk>``
        self.unknown = int(tensors.options.get(UNKNOWN, 0))
        if not 0 <= self.unknown < max(self.values, 1):
            raise StoreError(
                f"{tensors.card.name}: option unknown is {self.unknown}; allowed are 0 to {self.values - 1}"
            )

    def to(self, device: torch.device) -> Self:
        """Return the network, which is on its device already."""
        return self

    def steps(self) -> Self:
        """Return the object with ``read`` and ``logits``."""
        return self

    def double(self) -> Self:
        """Return the network, whose precision cannot be changed."""
        return self

    def _indices(self, characters: Tensor, dtype: str) -> np.ndarray:
        known = torch.where(characters < self.values, characters, self.unknown)
        return known.cpu().numpy().astype(dtype)

    def _check_logits(self, spec: TensorSpec) -> None:
        if spec.shape[-1] != self.values:
            expected = f"should end with {self.values} values, one for each character of the vocabulary"
            raise self.tensors.mismatch(spec.name, expected)

    def _with_unknown(self, logits: np.ndarray) -> Tensor:
        """Return logits [N, V] with a column for ``<unk>``, which is never generated."""
        return torch.from_numpy(np.pad(logits, ((0, 0), (0, 1))))


class StateNetwork(_CharacterNetwork):
    """A network that reads one character and a state, and returns logits and the next state.

    The state of a row is kept as one vector, [1, values of all state tensors].
    """

    def __init__(self, tensors: TaskPredictor, vocabulary: int) -> None:
        super().__init__(tensors, vocabulary)
        options = tensors.options
        states, following = list(options["states"]), list(options.get("next_states") or ())
        if len(states) != len(following):
            raise StoreError(f"{tensors.card.name}: there are {len(states)} states and {len(following)} next_states")
        self.states = [self._state(name, tensors.inputs) for name in states]
        self.following = [self._state(name, tensors.outputs) for name in following]
        others = {name: spec for name, spec in tensors.inputs.items() if name not in states}
        self.token = tensors.tensor("tokens", others, (1, 2), "int")
        outputs = {name: spec for name, spec in tensors.outputs.items() if name not in following}
        self.output = tensors.tensor("logits", outputs, (2, 3), "float")
        self._check_logits(self.output)
        for spec, after in zip(self.states, self.following, strict=True):
            if spec.shape != after.shape:
                raise tensors.mismatch(after.name, f"should have the shape of {spec.name!r}, {spec.shape}")
        if len(others) > 1:
            raise tensors.mismatch(next(name for name in others if name != self.token.name), "is no input of this task")
        self.lengths = [math.prod(spec.shape[1:]) for spec in self.states]

    def _state(self, name: Any, specs: dict[str, TensorSpec]) -> TensorSpec:
        spec = specs.get(name)
        if spec is None or -1 in spec.shape[1:] or not spec.dtype.startswith("float"):
            raise self.tensors.mismatch(str(name), "should be a float state [N, ...] of a fixed size")
        return spec

    def zero_state(self, rows: int) -> Tensor:
        """Return states [rows, 1, values]."""
        return torch.zeros(rows, 1, sum(self.lengths))

    def read(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """characters [N], state [N, 1, values] -> logits [N, V], and the next state."""
        rows = len(characters)
        indices = self._indices(characters, self.token.dtype)
        arrays = {self.token.name: indices.reshape(rows, *self.token.shape[1:])}
        parts = state.reshape(rows, -1).split(self.lengths, dim=1)
        for spec, part in zip(self.states, parts, strict=True):
            arrays[spec.name] = part.numpy().astype(spec.dtype).reshape(rows, *spec.shape[1:])
        outputs = self.tensors.run_rows(arrays, rows)
        following = [outputs[spec.name].reshape(rows, -1) for spec in self.following]
        logits = outputs[self.output.name].reshape(rows, self.values)
        return self._with_unknown(logits), torch.from_numpy(np.concatenate(following, axis=1)).float()[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [N, V] that ``read`` returned."""
        return hidden


class WindowNetwork(_CharacterNetwork):
    """A causal network that reads a window. The state of a row is the number of its characters, and the window."""

    def __init__(self, tensors: TaskPredictor, vocabulary: int) -> None:
        super().__init__(tensors, vocabulary)
        self.input = tensors.tensor("tokens", tensors.inputs, (2,), "int")
        self.output = tensors.tensor("logits", tensors.outputs, (3,), "float")
        self._check_logits(self.output)
        self.fixed = self.input.shape[1] != -1
        rule = tensors.sizes.inputs[self.input.name][1]
        longest = rule if isinstance(rule, int) else tensors.sizes.ranges.get(rule, [1, 1])[1]
        self.context = int(tensors.options.get("context") or longest)
        if self.context < 1 or self.context > longest or (self.fixed and self.context != longest):
            raise tensors.mismatch(self.input.name, f"does not take a context of {self.context} characters")
        self._check_causal()

    def _check_causal(self) -> None:
        """Raises StoreError if the logits at a position depend on a later character."""
        tokens = np.zeros((1, min(self.context, 16) if not self.fixed else self.context), self.input.dtype)
        changed = tokens.copy()
        changed[0, -1] = min(1, self.values - 1)
        first, second = (self._run(each) for each in (tokens, changed))
        if first.shape[1] != tokens.shape[1]:
            raise self.tensors.mismatch(self.output.name, "should have logits for each character, [N, T, V]")
        if not np.allclose(first[0, :-1], second[0, :-1], 1e-3, 1e-4):
            raise self.tensors.mismatch(self.output.name, "should be causal: no logits may depend on later characters")

    def _run(self, tokens: np.ndarray) -> np.ndarray:
        return self.tensors.run_rows({self.input.name: tokens}, len(tokens))[self.output.name]

    def zero_state(self, rows: int) -> Tensor:
        """Return states [rows, 1, 1 + context]."""
        return torch.zeros(rows, 1, 1 + self.context, dtype=torch.int64)

    def read(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """characters [N], state [N, 1, 1 + context] -> the next state as [N, 1 + context] and [N, 1, 1 + context]."""
        state = state[:, 0].long()
        count, window = state[:, :1], state[:, 1:]
        window = torch.where(count >= self.context, window.roll(-1, dims=1), window)
        window = window.scatter(1, count.clamp(max=self.context - 1), characters[:, None])
        state = torch.cat([(count + 1).clamp(max=self.context), window], dim=1)
        return state, state[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [N, V] after the last character of each window."""
        counts, window = hidden[:, 0].long(), hidden[:, 1:].long()
        length = self.context if self.fixed else max(1, int(counts.max()))
        logits = self._run(self._indices(window[:, :length], self.input.dtype))
        last = np.maximum(counts.numpy() - 1, 0)
        return self._with_unknown(logits[np.arange(len(last)), last])
