"""Windows of many series, drawn by index from one tensor: no loader, and no copy of a series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from app.tasks.forecasting import MIN_VALUES

FURTHER = 0.25  # weight in the loss of steps beyond the horizon that a kind is judged by
SHORTENED = 0.15  # of the windows begin later than they could


@dataclass(frozen=True)
class Kind:
    """Series [T] of one season. ``horizon`` is what they are judged by, ``share`` how much of a batch they get."""

    series: Sequence[Tensor]
    season: int
    horizon: int
    share: float


class Batch(NamedTuple):
    """Windows: values [N, context], NaN before they begin; what followed [N, horizon], NaN where that is unknown."""

    values: Tensor
    seasons: Tensor
    future: Tensor
    weights: Tensor  # [N, horizon]

    def to(self, device: torch.device) -> Batch:
        """The same windows on a device."""
        return Batch(*(part.to(device) for part in self))


class Windows:
    """All series of all kinds."""

    def __init__(self, kinds: Sequence[Kind], context: int, horizon: int) -> None:
        self.context, self.horizon = context, horizon
        self.values = torch.cat([series for kind in kinds for series in kind.series])
        self.lengths = torch.tensor([len(series) for kind in kinds for series in kind.series])
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.counts = torch.tensor([len(kind.series) for kind in kinds])
        self.firsts = self.counts.cumsum(0) - self.counts
        self.shares = torch.tensor([kind.share for kind in kinds])
        self.seasons = torch.tensor([kind.season for kind in kinds])
        self.judged = torch.tensor([kind.horizon for kind in kinds])

    def draw(self, count: int, mixed: float, held_out: bool, generator: Generator) -> Batch:
        """Random windows, some of them ``mixed``; with ``held_out`` none sees the last horizon of its series."""
        kinds = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        batch = self._random(kinds, held_out, generator)
        other = self._random(kinds[: int(count * mixed)], held_out, generator)
        return self._mixed(batch, other, generator)

    def held_out(self, kind: int) -> Batch:
        """The last horizon of every series of a kind, and what came before."""
        series = torch.arange(int(self.counts[kind])) + self.firsts[kind]
        ends = self.lengths[series] - self.judged[kind]
        return self._at(torch.full_like(series, kind), series, ends, ends, self.lengths[series])

    def _random(self, kinds: Tensor, held_out: bool, generator: Generator) -> Batch:
        """A random window of a random series of each of the kinds [N]: half of them anywhere, half rather recent."""
        random = torch.rand(5, len(kinds), generator=generator, dtype=torch.float64)
        series = self.firsts[kinds] + (random[0] * self.counts[kinds]).long()
        until = self.lengths[series] - self.judged[kinds] * held_out
        first = (self.seasons[kinds] + 2).clamp(min=MIN_VALUES)  # where it can end at the earliest
        reach = (until - self.judged[kinds] - first).clamp(min=0)
        ago = torch.where(random[1] < 0.5, random[2], random[2] ** 3)
        ends = (first + reach - (ago * (reach + 1)).long()).minimum(until - 1)
        known = ends.clamp(max=self.context)
        short = first + (random[3] * (known - first + 1)).long()
        known = torch.where(random[4] < SHORTENED, short.minimum(known), known)
        return self._at(kinds, series, ends, known, until)

    def _at(self, kinds: Tensor, series: Tensor, ends: Tensor, known: Tensor, until: Tensor) -> Batch:
        """Of each series the ``known`` values before ``ends``, and what followed before ``until``; all [N]."""
        places = ends.unsqueeze(1) + torch.arange(-self.context, self.horizon)
        inside = places.clamp(min=0).minimum(self.lengths[series].unsqueeze(1) - 1)
        there = (places >= (ends - known).unsqueeze(1)) & (places < until.unsqueeze(1))
        found = self.values[self.starts[series].unsqueeze(1) + inside].masked_fill(~there, torch.nan)
        weights = torch.where(torch.arange(self.horizon) < self.judged[kinds].unsqueeze(1), 1.0, FURTHER)
        return Batch(found[:, : self.context], self.seasons[kinds], found[:, self.context :], weights)

    def _mixed(self, batch: Batch, other: Batch, generator: Generator) -> Batch:
        """The first windows each added to one of its kind, both in their own units: series that there might have been.

        As Chronos' TSMixup does (Ansari et al. 2024).
        """
        count = len(other.values)
        share = 0.5 + 0.5 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
        whole = [torch.cat([values[:count], future[:count]], dim=1) for values, _, future, _ in (batch, other)]
        first, second = (self._in_its_units(window) for window in whole)
        found = share * first + (1 - share) * second
        values = torch.cat([found[:, : self.context], batch.values[count:]])
        future = torch.cat([found[:, self.context :], batch.future[count:]])
        return Batch(values, batch.seasons, future, batch.weights)

    def _in_its_units(self, windows: Tensor) -> Tensor:
        """windows [N, context + horizon] from their last known value, in units of their mean distance from it."""
        moved = windows - windows[:, self.context - 1 : self.context]
        size = moved[:, : self.context].abs().nanmean(dim=1, keepdim=True)
        return moved / torch.where(size > 0, size, 1.0)
