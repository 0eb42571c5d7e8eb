"""Series that nobody measured: trends, seasons, slow cycles, shifts and noise of many shapes, put together at random.

A forecaster that has seen only hourly and weekly measurements would take every series for one of those. The parts are
those of Chronos' KernelSynth (Ansari et al. 2024) - periodic, linear, smooth and white, added and multiplied - drawn as
sums of waves instead of from a Gaussian process, which costs a thousandth.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor


class Draws:
    """Random numbers for ``count`` series at a time, from one seed."""

    def __init__(self, count: int, length: int, seed: int) -> None:
        self.count, self.length = count, length
        self.generator = Generator().manual_seed(seed)
        self.time = torch.arange(length, dtype=torch.float64)

    def uniform(self, low: float = 0.0, high: float = 1.0, *more: int) -> Tensor:
        """[count, more or 1]"""
        shape = (self.count, *(more or (1,)))
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *more: int) -> Tensor:
        """[count, more or 1]"""
        return torch.randn((self.count, *(more or (1,))), generator=self.generator, dtype=torch.float64)

    def some(self, share: float) -> Tensor:
        """1 for so many of the series, else 0: [count, 1]"""
        return (self.uniform() < share).double()

    def spread(self, low: float, high: float, *more: int) -> Tensor:
        """Uniform on a logarithmic scale."""
        return self.uniform(math.log(low), math.log(high), *more).exp()


def synthetic(season: int, count: int, length: int, seed: int) -> Tensor:
    """Series [count, length] that repeat themselves, more or less, after ``season`` values; 1: after none or others."""
    draw = Draws(count, length, seed)
    smooth = draw.some(0.4) * draw.spread(0.1, 3) * _waves(draw, draw.spread(20, 1000, 6))
    trend = draw.some(0.5) * draw.normal() * _trend(draw)
    if season > 1:
        repeated = draw.spread(0.3, 3) * _season(draw, torch.full((count, 1), float(season), dtype=torch.float64))
        weekly = draw.some(0.5) * draw.spread(0.1, 1) * _season(draw, torch.full((count, 1), 7.0 * season).double())
        repeated = (repeated + weekly * (season in (4, 24))) * (1 + 0.3 * draw.some(0.3) * smooth.tanh())
    else:
        year = draw.some(0.25) * draw.spread(0.2, 3) * _season(draw, torch.full((count, 1), 52.0).double())
        repeated = year + draw.some(0.35) * draw.spread(0.5, 5) * _waves(draw, draw.spread(30, 700, 1))
    whole = trend + smooth + repeated + draw.spread(0.02, 0.6) * _noise(draw) + _walk(draw, season) + _shifts(draw)
    return _shaped(draw, whole)


def _waves(draw: Draws, periods: Tensor) -> Tensor:
    """A sum of waves with periods [count, K], of variance 1."""
    phase, weight = draw.uniform(0, 2 * math.pi, periods.shape[1]), draw.normal(periods.shape[1])
    weight = weight / weight.square().mean(1, keepdim=True).sqrt() / (periods.shape[1] / 2) ** 0.5
    whole = torch.zeros(draw.count, draw.length, dtype=torch.float64)
    for k in range(periods.shape[1]):
        one = slice(k, k + 1)
        whole += weight[:, one] * (2 * math.pi * draw.time / periods[:, one] + phase[:, one]).sin()
    return whole


def _season(draw: Draws, period: Tensor) -> Tensor:
    """A profile that repeats: some harmonics, for some series with sharp peaks."""
    harmonics = torch.arange(1, 9, dtype=torch.float64)
    weight = draw.normal(8) * harmonics ** -draw.uniform(0.3, 2.0) * (harmonics <= period / 2)
    weight = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-3) * 2**0.5
    phase = draw.uniform(0, 2 * math.pi, 8)
    whole = torch.zeros(draw.count, draw.length, dtype=torch.float64)
    for k in range(8):
        whole += weight[:, k : k + 1] * (2 * math.pi * (k + 1) * draw.time / period + phase[:, k : k + 1]).sin()
    peaked = whole.clamp(max=4).exp() / 2
    return torch.where(draw.some(0.3) > 0, peaked, whole)


def _trend(draw: Draws) -> Tensor:
    """A straight line, bent somewhere for half of the series, from -1 to 1 or so."""
    place = draw.time / draw.length
    bend = draw.some(0.5) * draw.normal() * (place - draw.uniform()).clamp(min=0)
    return 3 * (place + bend)


def _noise(draw: Draws) -> Tensor:
    """Noise of variance about 1: normal or with long tails, white or remembering, even or in bursts."""
    white = draw.normal(draw.length)
    tails = white / draw.normal(draw.length).abs().clamp(min=0.3)
    white = torch.where(draw.some(0.25) > 0, tails / 1.5, white)
    memory = draw.some(0.4) * draw.uniform(0.2, 0.95)
    bursts = (0.8 * draw.some(0.3) * _waves(draw, draw.spread(30, 500, 3))).exp()
    return _remembered(white, memory) * (1 - memory**2).sqrt() * bursts


def _walk(draw: Draws, season: int) -> Tensor:
    """A random walk, with a drift for some: most series without a season are one."""
    share = 0.7 if season == 1 else 0.25
    steps = draw.normal(draw.length) + 0.2 * draw.some(0.3) * draw.normal()
    steps = _remembered(steps, draw.some(0.5) * draw.uniform(-0.3, 0.7))
    return draw.some(share) * draw.spread(0.01, 0.5) * steps.cumsum(1)


def _remembered(white: Tensor, memory: Tensor) -> Tensor:
    """x[t] = memory * x[t - 1] + white[t], for each row [count, 1] its own."""
    found = white.clone()
    for t in range(1, white.shape[1]):
        found[:, t] += memory[:, 0] * found[:, t - 1]
    return found


def _shifts(draw: Draws) -> Tensor:
    """Steps up or down at random places, in some series."""
    steps = (draw.uniform(0, 1, draw.length) < 2 / draw.length) * draw.normal(draw.length)
    return draw.some(0.2) * steps.cumsum(1)


def _shaped(draw: Draws, whole: Tensor) -> Tensor:
    """Some series grow by their own size, some cannot fall below zero, some stand still at times."""
    deviation = whole.std(1, keepdim=True).clamp(min=1e-6)
    grown = ((whole - whole.mean(1, keepdim=True)) / deviation * draw.spread(0.1, 0.8)).exp()
    whole = torch.where(draw.some(0.35) > 0, grown, whole / deviation)
    floor = whole.quantile(0.3, dim=1, keepdim=True)
    whole = torch.where(draw.some(0.06) > 0, whole.maximum(floor) - floor, whole)
    counted = (whole * draw.spread(2, 50)).round()
    whole = torch.where(draw.some(0.08) > 0, counted, whole)
    asleep = draw.some(0.04) * (_waves(draw, draw.spread(50, 400, 2)) > 1)
    return torch.where(asleep > 0, whole[:, :1], whole)
