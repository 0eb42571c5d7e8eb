"""A fake network that generates images of one pixel, and that tests can hold and let run out of memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from app.networks import KINDS, Kind
from app.store import Store
from app.store.version import Version
from support.networks import tiny_card


@dataclass(frozen=True)
class FakeSizes:
    latent: int = 1
    channels: int = 1
    image: int = 1


class FakeNetwork(nn.Module):
    """Answers with its number, which is its only weight."""

    control: Control

    def __init__(self, sizes: FakeSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.number = nn.Parameter(torch.zeros(1))

    def forward(self, latents: Tensor) -> Tensor:
        return latents * 0 + self.number

    def pixels(self, latents: Tensor) -> Tensor:
        self.control.rows.append(len(latents))
        self.control.compute(int(self.number))
        return (self(latents) % 256).to(torch.uint8).reshape(-1, 1, 1, 1)


@dataclass
class Control:
    """Controls all fake networks by their numbers.

    Attributes:
        held: networks that wait until ``release`` is called, also when they are warmed up.
        full: networks for which there is too little memory.
        broken: networks that fail on every input.
        rows: the number of rows of each batch.
    """

    held: set[int] = field(default_factory=set)
    full: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    rows: list[int] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: set[int] = field(default_factory=set)

    def compute(self, number: int) -> None:
        if number in self.full:
            raise MemoryError
        if number in self.broken:
            raise RuntimeError(f"broken on {threading.current_thread().name}")
        with self.changed:
            if number in self.held:
                self.waiting.add(number)
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: number not in self.held, 60)
                self.waiting.discard(number)

    def wait_until_held(self, number: int) -> None:
        """Wait until a held network computes."""
        with self.changed:
            assert self.changed.wait_for(lambda: number in self.waiting, 60)

    def release(self, number: int) -> None:
        with self.changed:
            self.held.discard(number)
            self.changed.notify_all()


@contextmanager
def fake_networks() -> Iterator[Control]:
    """Register the kind ``fake``, and yield the control of its networks."""
    KINDS["fake"] = Kind(FakeNetwork, FakeSizes, "sample")
    FakeNetwork.control = control = Control()
    try:
        yield control
    finally:
        for number in list(control.held):
            control.release(number)
        del KINDS["fake"]


def publish_fake(folder: Path, name: str, number: int) -> Version:
    """Publish a further version of a model, whose network answers with ``number`` modulo 256."""
    card = tiny_card(name, "sample", "fake", {}, {})
    return Store(folder).publish(card, {"number": torch.full((1,), float(number))})
