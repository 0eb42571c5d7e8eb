"""Sampling of the next token: temperature, top-k, top-p, bias, penalties and log-probabilities."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

MIN_TEMPERATURE = 1e-100  # lower temperatures also give weights of 0 and 1, but dividing logits by them could overflow


class Sampler:
    """Samples one token index from each row of logits. ``temperature``, ``top_k`` and ``top_p`` are arrays [N].

    Temperature 0 means greedy decoding. Top-k keeps the k most likely tokens (Fan et al. 2018). Top-p keeps the
    smallest set of most likely tokens whose total probability reaches p (Holtzman et al. 2020). Top-k and top-p are
    applied after the temperature. The result for a row does not depend on other rows.
    """

    def __init__(self, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, vocabulary: int) -> None:
        self.greedy = np.flatnonzero(temperature == 0)
        self.temperature = np.where(temperature == 0, 1.0, np.maximum(temperature, MIN_TEMPERATURE))[:, None]
        self.restricted = np.flatnonzero((top_k < vocabulary) | (top_p < 1))
        self.top_k, self.top_p = top_k[self.restricted, None], top_p[self.restricted, None]

    def __call__(self, logits: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Return indices [N], given logits float64 [N, V] and uniform random numbers [N] in [0, 1)."""
        shifted = logits - logits.max(axis=1, keepdims=True)  # at most 0, so the exponential cannot overflow
        weights = np.exp(shifted / self.temperature)  # the most likely token has weight 1
        if len(self.restricted):
            weights[self.restricted] = self._top_weights(weights[self.restricted])
        total = weights.cumsum(axis=1)
        indices: np.ndarray = (total <= uniform[:, None] * total[:, -1:]).sum(axis=1)
        if len(self.greedy):
            indices[self.greedy] = logits[self.greedy].argmax(axis=1)
        return indices

    def _top_weights(self, weights: np.ndarray) -> np.ndarray:
        """Return weights [N, V] that are 0 for the tokens excluded by top-k and top-p."""
        order = np.argsort(-weights, axis=1, kind="stable")
        ranked = np.take_along_axis(weights, order, axis=1)
        total = ranked.cumsum(axis=1)
        included = (np.arange(weights.shape[1]) < self.top_k) & (total - ranked < self.top_p * total[:, -1:])
        included[:, 0] = True
        result = np.zeros_like(weights)
        np.put_along_axis(result, order, ranked * included, axis=1)
        return result


@dataclass(eq=False)
class LogProbs:
    """Recorded log-probabilities of the tokens of one text, and of the ``top`` most likely tokens at each position.

    The log-probabilities are those of the network, before temperature, bias and penalties. ``<unk>`` is never
    generated, so its probability is 0, and the other probabilities sum to 1. Only the first ``max_tokens`` tokens are
    recorded. Another thread may read the positions recorded so far while a further position is added.
    """

    top: int
    max_tokens: int = sys.maxsize
    width: int = field(default=0, init=False)  # number of most likely tokens at each position; at most V
    tokens: array[float] = field(default_factory=lambda: array("d"))  # the last array to which a position is added
    top_indices: array[int] = field(default_factory=lambda: array("i"))  # position by position
    top_values: array[float] = field(default_factory=lambda: array("d"))

    def likeliest(self, start: int = 0, end: int | None = None) -> Iterator[list[tuple[int, float]]]:
        """Yield one list for each position: the most likely tokens and their log-probabilities, in descending order."""
        for position in range(*slice(start, end).indices(len(self.tokens))):
            row = slice(position * self.width, (position + 1) * self.width)
            yield list(zip(self.top_indices[row], self.top_values[row], strict=True))

    def memory_bytes(self, tokens: int) -> int:
        """Return the number of bytes that the record of ``tokens`` tokens takes."""
        return min(tokens, self.max_tokens) * (8 + 12 * self.top)


@dataclass(eq=False)
class SamplingOptions:
    """Options that few texts use: bias, penalties and log-probabilities.

    ``bias`` [V] is added to the logits. If a token was generated before, ``presence`` is subtracted from its logit,
    and ``frequency`` is subtracted for each time that it was generated. OpenAI's API defines the options the same way.
    """

    bias: np.ndarray
    presence: float = 0.0
    frequency: float = 0.0
    log_probs: LogProbs | None = None
    counts: np.ndarray = field(init=False)  # [V], how often each token was generated; see ``OptionRows.counts``

    def __post_init__(self) -> None:
        self.counts = np.zeros_like(self.bias)


class HasOptions(Protocol):
    @property
    def options(self) -> SamplingOptions | None: ...


class OptionRows:
    """The options of the M texts that have options, in a batch of N texts. No row depends on another row."""

    def __init__(self, texts: Sequence[HasOptions]) -> None:
        pairs = [(row, text.options) for row, text in enumerate(texts) if text.options]
        self.rows = np.array([row for row, _ in pairs])  # [M]
        self.bias = np.stack([options.bias for _, options in pairs])  # [M, V]
        self.presence = np.array([[options.presence] for _, options in pairs])  # [M, 1]
        self.frequency = np.array([[options.frequency] for _, options in pairs])  # [M, 1]
        self.counts = np.stack([options.counts for _, options in pairs])  # [M, V]
        for (_, options), counts in zip(pairs, self.counts, strict=True):
            options.counts = counts
        records = [(row, options.log_probs) for row, options in pairs if options.log_probs]
        records = [(row, log_probs) for row, log_probs in records if len(log_probs.tokens) < log_probs.max_tokens]
        self.log_probs = [log_probs for _, log_probs in records]
        self.log_prob_rows = np.array([row for row, _ in records], dtype=np.int64)

    def log_probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return the log-probabilities of the rows whose texts record them, given logits [N, V]."""
        return log_probabilities(logits[self.log_prob_rows])

    def apply(self, logits: np.ndarray) -> None:
        """Apply bias and penalties to logits [N, V] in place."""
        penalties = self.frequency * self.counts + self.presence * (self.counts > 0)
        logits[self.rows] += self.bias - penalties

    def record(self, tokens: np.ndarray, log_probabilities: np.ndarray) -> None:
        """Count the sampled tokens [N]. Record the log-probabilities of tokens if their request asked for these."""
        self.counts[np.arange(len(self.rows)), tokens[self.rows]] += 1
        record_log_probs(self.log_probs, log_probabilities, tokens[self.log_prob_rows])
        unfinished = [i for i, own in enumerate(self.log_probs) if len(own.tokens) < own.max_tokens]
        if len(unfinished) < len(self.log_probs):
            self.log_probs = [self.log_probs[i] for i in unfinished]
            self.log_prob_rows = self.log_prob_rows[unfinished]


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities [N, V] of logits [N, V]. The result for a row does not depend on other rows."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).cumsum(axis=1)[:, -1:])
    return result


def record_log_probs(records: Sequence[LogProbs], log_probabilities: np.ndarray, tokens: np.ndarray) -> None:
    """Record the next token of each of N texts, given tokens [N] and log-probabilities [N, V]."""
    max_top = max((record.top for record in records), default=0)
    order: list[list[int]] = [[]] * len(records)
    if max_top:
        order = np.argsort(-log_probabilities, axis=1, kind="stable")[:, :max_top].tolist()
    for record, row, token, best in zip(records, log_probabilities, tokens.tolist(), order, strict=True):
        likeliest = best[: record.top]
        record.width = len(likeliest)
        record.top_indices.extend(likeliest)
        record.top_values.extend([float(row[index]) for index in likeliest])
        record.tokens.append(float(row[token]))
