"""Synthetic training series of two kinds. They supplement the real training series, which are only hourly and weekly.

``structural`` simulates exponential smoothing models. ``synthetic`` draws random sums of trends, seasons, slow waves,
shifts and noise of many kinds. The components of these sums follow KernelSynth of Chronos (Ansari et al. 2024): they
are periodic, linear, smooth or white noise, and are added and multiplied. KernelSynth draws the components from a
Gaussian process. In this module, the components are sums of sine waves, which take a thousandth of the time.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor


class Draws:
    """Draws random numbers for ``count`` series of ``length`` values each. One seed determines all numbers."""

    def __init__(self, count: int, length: int, seed: int) -> None:
        self.count, self.length = count, length
        self.generator = Generator().manual_seed(seed)
        self.time = torch.arange(length, dtype=torch.float64)

    def uniform(self, low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
        """Return uniform numbers [count, *shape], by default [count, 1]."""
        size = (self.count, *(shape or (1,)))
        return low + (high - low) * torch.rand(size, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers [count, *shape], by default [count, 1]."""
        return torch.randn((self.count, *(shape or (1,))), generator=self.generator, dtype=torch.float64)

    def bernoulli(self, probability: float) -> Tensor:
        """Return numbers [count, 1] that are 1 with the given probability, otherwise 0."""
        return (self.uniform() < probability).double()

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return random numbers [count, *shape] whose logarithms are uniformly distributed."""
        return self.uniform(math.log(low), math.log(high), *shape).exp()


def synthetic(season: int, count: int, length: int, seed: int) -> Tensor:
    """Return ``count`` random series [count, length] that repeat approximately every ``season`` values.

    If ``season`` is 1, some series have no season, and the others have a season of at least 30 values.
    """
    draw = Draws(count, length, seed)
    smooth = draw.bernoulli(0.4) * draw.log_uniform(0.1, 3) * _waves(draw, draw.log_uniform(20, 1000, 6))
    trend = draw.bernoulli(0.5) * draw.normal() * _trend(draw)
    if season > 1:
        seasonal = draw.log_uniform(0.3, 3) * _season(draw, season)
        weekly = draw.bernoulli(0.5) * draw.log_uniform(0.1, 1)
        weekly = weekly * _season(draw, 7 * season)
        seasonal = (seasonal + weekly * (season in (4, 24))) * (1 + 0.3 * draw.bernoulli(0.3) * smooth.tanh())
    else:
        yearly = draw.bernoulli(0.25) * draw.log_uniform(0.2, 3)
        yearly = yearly * _season(draw, 52)
        seasonal = yearly + draw.bernoulli(0.35) * draw.log_uniform(0.5, 5) * _waves(draw, draw.log_uniform(30, 700, 1))
    series = trend + smooth + seasonal + draw.log_uniform(0.02, 0.6) * _noise(draw) + _walk(draw, season)
    return _transform(draw, series + _level_shifts(draw))


def structural(season: int, count: int, length: int, seed: int) -> Tensor:
    """Return ``count`` random series [count, length] from exponential smoothing models, as in business statistics.

    In such a model, random errors (innovations) of variance about 1 change the level, the slope and the season at every
    step (Hyndman et al. 2008, table 2.2). In some series, the slope or the level changes suddenly. For half of the
    series, the exponential function is applied to the values.
    """
    draw = Draws(count, length, seed)
    kind = draw.uniform()
    alpha = torch.where(kind < 0.15, 0.0, torch.where(kind < 0.35, 1.0, draw.uniform(0.02, 1) ** 1.5))
    kind = draw.uniform()
    size = draw.log_uniform(0.1, 6.0) / season**0.5  # of the slope; 80 % of the slopes are positive
    slope = torch.where(kind < 0.2, 0.0, torch.where(draw.uniform() < 0.8, size, -size))
    beta = torch.where(kind < 0.5, 0.0, alpha * draw.uniform(0, 1) ** 2)
    damping = torch.where((kind >= 0.5) & (draw.uniform() < 0.5), draw.uniform(0.8, 0.99), 1.0)
    gamma = draw.bernoulli(0.5) * (1 - alpha) * draw.uniform(0, 0.4)
    profile = draw.bernoulli(0.9) * draw.log_uniform(0.3, 12) * _profile(draw, season)
    innovations = _innovations(draw)
    bends = (draw.uniform(0, 1, length) < 2 / length) & (draw.uniform() < 0.3)
    redrawn = draw.normal(length) * size
    series, level = torch.empty_like(innovations), torch.zeros(count, 1, dtype=torch.float64)
    for t in range(length):
        error, position = innovations[:, t : t + 1], slice(t % season, t % season + 1)
        slope = torch.where(bends[:, t : t + 1], redrawn[:, t : t + 1], damping * slope)
        series[:, t : t + 1] = level + slope + profile[:, position] + error
        level = level + slope + alpha * error
        slope = slope + beta * error
        profile[:, position] += gamma * error
    shifts = (draw.uniform(0, 1, length) < 2 / length) * draw.normal(length) * draw.log_uniform(1, 10)
    series = series + draw.bernoulli(0.25) * shifts.cumsum(1)
    return _demand(draw, _transform(draw, series, exponential=0.5, largest=3.0 / season**0.25))


def _innovations(draw: Draws) -> Tensor:
    """Return innovations [count, length] with a variance of about 1. Each series has one of three distributions.

    The distributions are normal, heavy-tailed, and normal with outliers. The innovations of some series are
    autocorrelated.
    """
    white = draw.normal(draw.length)
    heavy_tailed = white / draw.normal(draw.length).abs().clamp(min=0.3) / 1.5
    outliers = (draw.uniform(0, 1, draw.length) < 0.02) * draw.normal(draw.length) * 8
    kind = draw.uniform()
    white = torch.where(kind < 0.6, white, torch.where(kind < 0.8, heavy_tailed, white + outliers))
    coefficient = draw.bernoulli(0.3) * draw.uniform(-0.5, 0.8)
    return _autoregressive(white, coefficient) * (1 - coefficient**2).sqrt()


def _profile(draw: Draws, season: int) -> Tensor:
    """Return seasonal profiles [count, season] with mean 0 and variance 1.

    A profile is smooth, irregular, or has one peak. For season 1, all profiles are 0.
    """
    if season == 1:
        return torch.zeros(draw.count, 1, dtype=torch.float64)
    angle = 2 * math.pi * (torch.arange(season, dtype=torch.float64) / season + draw.uniform())
    smooth = angle.sin() + draw.uniform(0, 0.7) * (2 * angle + draw.uniform(0, 6.3)).sin()
    irregular, kind = draw.normal(season), draw.uniform()
    peak = (3 * (angle.cos() - 1)).exp() + 0.2 * irregular
    profile = torch.where(kind < 0.4, smooth, torch.where(kind < 0.75, irregular + draw.uniform(0, 1) * smooth, peak))
    profile = profile - profile.mean(1, keepdim=True)
    return profile / profile.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)


def _demand(draw: Draws, series: Tensor) -> Tensor:
    """Return the series, but replace 5 % of the series by intermittent series: small counts with many zeros."""
    rate = (0.5 * (series - series.mean(1, keepdim=True))).clamp(-3, 2).exp() * draw.log_uniform(0.2, 4)
    counts = torch.poisson(rate, generator=draw.generator)
    return torch.where(draw.bernoulli(0.05) > 0, counts, series)


def _waves(draw: Draws, periods: Tensor) -> Tensor:
    """Return sums [count, length] of sine waves with periods [count, K]. The sums have a variance of about 1."""
    phase, weight = draw.uniform(0, 2 * math.pi, periods.shape[1]), draw.normal(periods.shape[1])
    weight = weight / weight.square().mean(1, keepdim=True).sqrt() / (periods.shape[1] / 2) ** 0.5
    total = torch.zeros(draw.count, draw.length, dtype=torch.float64)
    for k in range(periods.shape[1]):
        column = slice(k, k + 1)
        total += weight[:, column] * (2 * math.pi * draw.time / periods[:, column] + phase[:, column]).sin()
    return total


def _season(draw: Draws, period: int) -> Tensor:
    """Return periodic series [count, length] with up to eight harmonics. 30 % of the series have sharp peaks."""
    harmonics = torch.arange(1, 9, dtype=torch.float64)
    weight = draw.normal(8) * harmonics ** -draw.uniform(0.3, 2.0) * (harmonics <= period / 2)
    weight = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-3) * 2**0.5
    phase = draw.uniform(0, 2 * math.pi, 8)
    total = torch.zeros(draw.count, draw.length, dtype=torch.float64)
    for k in range(8):
        total += weight[:, k : k + 1] * (2 * math.pi * (k + 1) * draw.time / period + phase[:, k : k + 1]).sin()
    peaked = total.clamp(max=4).exp() / 2
    return torch.where(draw.bernoulli(0.3) > 0, peaked, total)


def _trend(draw: Draws) -> Tensor:
    """Return straight lines [count, length] that rise from 0 to 3. Half of the lines change their slope once."""
    position = draw.time / draw.length
    bend = draw.bernoulli(0.5) * draw.normal() * (position - draw.uniform()).clamp(min=0)
    return 3 * (position + bend)


def _noise(draw: Draws) -> Tensor:
    """Return noise [count, length] with a variance of about 1.

    The noise of a series is normal or heavy-tailed, and white or autocorrelated. For some series, the scale of
    the noise varies over time.
    """
    white = draw.normal(draw.length)
    heavy_tailed = white / draw.normal(draw.length).abs().clamp(min=0.3)
    white = torch.where(draw.bernoulli(0.25) > 0, heavy_tailed / 1.5, white)
    coefficient = draw.bernoulli(0.4) * draw.uniform(0.2, 0.95)
    volatility = (0.8 * draw.bernoulli(0.3) * _waves(draw, draw.log_uniform(30, 500, 3))).exp()
    return _autoregressive(white, coefficient) * (1 - coefficient**2).sqrt() * volatility


def _walk(draw: Draws, season: int) -> Tensor:
    """Return random walks, some of them with drift.

    The walk is 0 for 30 % of the series without a season, and for 75 % of the series with a season.
    """
    share = 0.7 if season == 1 else 0.25
    steps = draw.normal(draw.length) + 0.2 * draw.bernoulli(0.3) * draw.normal()
    steps = _autoregressive(steps, draw.bernoulli(0.5) * draw.uniform(-0.3, 0.7))
    return draw.bernoulli(share) * draw.log_uniform(0.01, 0.5) * steps.cumsum(1)


def _autoregressive(white: Tensor, coefficient: Tensor) -> Tensor:
    """Return x [count, length] with x[t] = coefficient * x[t - 1] + white[t]. ``coefficient``: [count, 1]."""
    x = white.clone()
    for t in range(1, white.shape[1]):
        x[:, t] += coefficient[:, 0] * x[:, t - 1]
    return x


def _level_shifts(draw: Draws) -> Tensor:
    """Return level shifts at random places for 20 % of the series, and 0 for the others."""
    steps = (draw.uniform(0, 1, draw.length) < 2 / draw.length) * draw.normal(draw.length)
    return draw.bernoulli(0.2) * steps.cumsum(1)


def _transform(draw: Draws, series: Tensor, exponential: float = 0.35, largest: float = 0.8) -> Tensor:
    """Scale the series to variance 1. Then turn some series into series of special kinds.

    The special kinds are exponential series, non-negative series, integer series, and series with constant sections.
    ``exponential``: share of exponential series. ``largest``: largest standard deviation of the logarithm of an
    exponential series.
    """
    deviation = series.std(1, keepdim=True).clamp(min=1e-6)
    powers = ((series - series.mean(1, keepdim=True)) / deviation * draw.log_uniform(0.1, largest)).exp()
    series = torch.where(draw.bernoulli(exponential) > 0, powers, series / deviation)
    floor = series.quantile(0.3, dim=1, keepdim=True)
    series = torch.where(draw.bernoulli(0.06) > 0, series.maximum(floor) - floor, series)
    integer = (series * draw.log_uniform(2, 50)).round()
    series = torch.where(draw.bernoulli(0.08) > 0, integer, series)
    inactive = draw.bernoulli(0.04) * (_waves(draw, draw.log_uniform(50, 400, 2)) > 1)
    return torch.where(inactive > 0, series[:, :1], series)
