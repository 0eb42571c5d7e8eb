"""How the next character is chosen, what some texts ask for besides, and what is noted of a choice."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


class Sampler:
    """How to draw one index from each row of logits; every argument is [N].

    Temperature 0 is greedy. Top-k keeps the k likeliest (Fan et al. 2018), top-p the smallest set of likeliest
    whose probability reaches p (Holtzman et al. 2020); both after the temperature. No row depends on another.
    """

    def __init__(self, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, vocabulary: int) -> None:
        self.greedy = np.flatnonzero(temperature == 0)
        self.temperature = np.where(temperature == 0, 1.0, temperature)[:, None]
        self.narrow = np.flatnonzero((top_k < vocabulary) | (top_p < 1))
        self.top_k, self.top_p = top_k[self.narrow, None], top_p[self.narrow, None]

    def __call__(self, logits: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """logits [N, V], float64, and numbers in [0, 1) that decide, [N] -> indices [N]."""
        away = logits - logits.max(axis=1, keepdims=True)  # at most 0: no temperature can overflow it
        with np.errstate(over="ignore"):
            weights = np.exp(away / self.temperature)  # the likeliest has weight 1
        if len(self.narrow):
            weights[self.narrow] = self._likeliest(weights[self.narrow])
        total = weights.cumsum(axis=1)
        drawn: np.ndarray = (total <= uniform[:, None] * total[:, -1:]).sum(axis=1)
        if len(self.greedy):
            drawn[self.greedy] = logits[self.greedy].argmax(axis=1)
        return drawn

    def _likeliest(self, weights: np.ndarray) -> np.ndarray:
        """Weights [N, V] with 0 for all that top-k and top-p leave out."""
        order = np.argsort(-weights, axis=1, kind="stable")
        ranked = np.take_along_axis(weights, order, axis=1)
        total = ranked.cumsum(axis=1)
        kept = (np.arange(weights.shape[1]) < self.top_k) & (total - ranked < self.top_p * total[:, -1:])
        kept[:, 0] = True
        narrowed = np.zeros_like(weights)
        np.put_along_axis(narrowed, order, ranked * kept, axis=1)
        return narrowed


@dataclass(eq=False)
class LogProbs:
    """How likely characters were, in their order: the log-probability of each, and the ``top`` likeliest in its place,
    as (index, log-probability), likeliest first. At least the first ``most`` are noted, where there are so many.

    They are those of the network, before temperature and all else that a caller asks for. ``<unk>`` is never written,
    so its probability is 0 and those of the others sum to 1.
    """

    ranks: int
    top: int = sys.maxsize
    tokens: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass(eq=False)
class SamplingOptions:
    """What few texts ask for. ``bias`` [V] is added to the logits; for each character that the text has written already
    ``presence`` is taken off them, and ``frequency`` for each time that it has (OpenAI's definitions).
    """

    bias: np.ndarray
    presence: float = 0.0
    frequency: float = 0.0
    notes: LogProbs | None = None
    counts: np.ndarray = field(init=False)  # [V], of the characters written; a row of whatever draws it

    def __post_init__(self) -> None:
        self.counts = np.zeros_like(self.bias)


class HasOptions(Protocol):
    @property
    def extras(self) -> SamplingOptions | None: ...


class OptionRows:
    """The texts of a drawing that ask for extras, all at once; no row depends on another. M are they, of N texts."""

    def __init__(self, texts: Sequence[HasOptions]) -> None:
        asked = [(row, text.extras) for row, text in enumerate(texts) if text.extras]
        self.rows = np.array([row for row, _ in asked])
        self.bias = np.stack([extras.bias for _, extras in asked])  # [M, V]
        self.presence = np.array([[extras.presence] for _, extras in asked])
        self.frequency = np.array([[extras.frequency] for _, extras in asked])
        self.counts = np.stack([extras.counts for _, extras in asked])
        for (_, extras), counts in zip(asked, self.counts, strict=True):
            extras.counts = counts
        noting = [(row, extras.notes) for row, extras in asked if extras.notes]
        noting = [(row, notes) for row, notes in noting if len(notes.tokens) < notes.top]
        self.notes = [notes for _, notes in noting]
        self.noted = np.array([row for row, _ in noting], dtype=np.int64)

    def likely(self, logits: np.ndarray) -> np.ndarray:
        """logits [N, V] -> the log-probabilities of those texts that have them noted."""
        return log_probabilities(logits[self.noted])

    def steer(self, logits: np.ndarray) -> None:
        """Change logits [N, V] in place as is asked for."""
        written = self.frequency * self.counts + self.presence * (self.counts > 0)
        logits[self.rows] += self.bias - written

    def take(self, drawn: np.ndarray, likely: np.ndarray) -> None:
        """Count and note the characters drawn, [N], with what ``likely`` gave."""
        self.counts[np.arange(len(self.rows)), drawn[self.rows]] += 1
        record_log_probs(self.notes, likely, drawn[self.noted])
        left = [i for i, notes in enumerate(self.notes) if len(notes.tokens) < notes.top]
        if len(left) < len(self.notes):  # what nobody asked for is not noted
            self.notes, self.noted = [self.notes[i] for i in left], self.noted[left]


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """logits [N, V] -> log-probabilities [N, V], each row summed in its own order: none depends on another."""
    away = logits - logits.max(axis=1, keepdims=True)
    logs: np.ndarray = away - np.log(np.exp(away).cumsum(axis=1)[:, -1:])
    return logs


def record_log_probs(notes: Sequence[LogProbs], likely: np.ndarray, characters: np.ndarray) -> None:
    """Note one character of each text, [N], with log-probabilities [N, V]."""
    most = max((each.ranks for each in notes), default=0)
    order = np.argsort(-likely, axis=1, kind="stable")[:, :most].tolist() if most else [[]] * len(notes)
    rows = zip(notes, likely, characters.tolist(), order, strict=True)
    for each, logs, character, best in rows:
        each.tokens.append(float(logs[character]))
        each.likeliest.append([(index, float(logs[index])) for index in best[: each.ranks]])
