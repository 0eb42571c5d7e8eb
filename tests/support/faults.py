"""The tiny networks, with faults that tests choose: errors, wrong outputs, or a wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from app.networks import KINDS

Fault = Callable[..., Tensor]  # maps the outputs [N, ...] and the inputs of a network to other outputs, or raises

METHODS = {"lenet": "maps", "series-lstm": "forward", "forecaster": "forecast", "gan-generator": "forward"}


@contextmanager
def faulty_networks() -> Iterator[dict[str, Fault]]:
    """Yield the faults of each task. They apply to networks that are built in the context."""
    faults: dict[str, Fault] = {}
    originals = dict(KINDS)

    def with_fault(task: str, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            outputs = compute(*arguments)
            return faults[task](outputs, *arguments) if task in faults else outputs

        return call

    def for_generation(network: Any) -> Any:
        steps = originals["character-rnn"].network.for_generation(network)
        steps.logits = with_fault("continue", steps.logits)
        return steps

    for kind, method in METHODS.items():
        base, _, task = originals[kind]
        members = {method: with_fault(str(task), getattr(base, method))}
        KINDS[kind] = originals[kind]._replace(network=type(base.__name__, (base,), members))
    text = originals["character-rnn"]
    members = {"for_generation": for_generation}
    KINDS["character-rnn"] = text._replace(network=type("CharacterRNN", (text.network,), members))
    try:
        yield faults
    finally:
        KINDS.update(originals)


class Hold:
    """A fault that makes a network wait while ``armed`` is set and ``release`` is not.

    ``batches`` lists the number of rows, with padding, of each batch that waited.
    """

    def __init__(self) -> None:
        self.armed, self.entered, self.release = threading.Event(), threading.Event(), threading.Event()
        self.batches: list[int] = []

    def __call__(self, outputs: Tensor, *_: Any) -> Tensor:
        if self.armed.is_set():
            self.batches.append(len(outputs))
            self.entered.set()
            assert self.release.wait(60)
        return outputs


def raising(error: BaseException) -> Fault:
    """Return a fault that raises ``error``."""

    def fail(*_: Any) -> Tensor:
        raise error

    return fail


def raising_after(calls: int, error: BaseException) -> Fault:
    """Return a fault that raises ``error`` in each call after the first ``calls`` calls."""
    remaining = iter(range(calls))

    def fail(outputs: Tensor, *_: Any) -> Tensor:
        if next(remaining, None) is None:
            raise error
        return outputs

    return fail
