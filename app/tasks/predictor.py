"""Predictors turn the input of a request into tensors, and the output of a network into results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from app.store import Card
from app.tasks.latency_model import LatencyModel


class Predictor(Protocol):
    """The base class of all predictors. A predictor runs one version of a model for a task."""

    card: Card
    latency: LatencyModel = LatencyModel(0.0, 0.0)  # predicts the seconds of a batch from its number of rows

    def prepare(self, job: Any) -> Sequence[Any]:
        """Return the items of a job for the engine. Raises BadValue."""

    def finish(self, job: Any, items: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Return the answer to a job, given its items and one output for each item."""

    def dummy_run(self, rows: int) -> None:
        """Compute a batch of ``rows`` dummy rows."""

    def warm_up(self, rows: int) -> None:
        """Measure the duration of batches of 1 to ``rows`` rows. Some predictors first choose their precision."""
        self.latency = LatencyModel.measure(self.dummy_run, rows)


class BatchPredictor(Predictor, Protocol):
    """A predictor that ``Batcher`` runs. One call of ``predict`` computes a batch of items."""

    def predict(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return one result per item."""

    def rows(self, item: Any) -> int:
        """Return the number of batch rows that an item takes."""
        return 1

    def seconds(self, items: Sequence[Any]) -> float:
        """Return the expected duration of a batch in seconds."""
        return self.latency(sum(map(self.rows, items)))


class SplittingPredictor(BatchPredictor, Protocol):
    """A predictor that can compute a large item in parts. The joined results equal the result of the whole item."""

    def split(self, item: Any, rows: int) -> Sequence[Any]:
        """Split an item into parts of at most ``rows`` rows."""

    def join(self, results: Sequence[Any]) -> Any:
        """Join the results of all parts of an item."""


class TextPredictor(Predictor, Protocol):
    """A predictor that ``TextEngine`` runs. Repeated calls of ``step`` generate texts token by token."""

    max_prompt_seconds: float  # longest time in seconds to read a prompt; infinite by default

    def step(self, texts: Sequence[Any]) -> None:
        """Add one token to each text whose prompt has been read, and read the next part of all other prompts."""

    def seconds(self, texts: Sequence[Any]) -> float:
        """Return the expected duration of a step in seconds."""

    def dummy_texts(self, rows: int, characters: int) -> Sequence[Any]:
        """Return ``rows`` dummy texts for ``step``, each of which takes ``characters`` steps."""
