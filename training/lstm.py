"""Train a network that forecasts time series.

    quartet train lstm                           # sine-lstm: the workshop's LSTM on its noisy sine
    quartet train lstm --preset strong           # series-lstm: one network for any series
    quartet train lstm --csv FILE --preview      # show how the program reads your table
    quartet train lstm --csv FILE --name sales   # preset own: fine-tune series-lstm on your series
    quartet train lstm --csv FILE --backtest     # compare the fine-tuned network with ETS and seasonal naive

A training on a table ends with a leaderboard of the network, the network before fine-tuning, exponential smoothing,
Theta and the repeated season. The exit status is 3 if one of the last three has the lowest error.

docs/measurements.md and the model cards contain the measured results.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from app import store
from app.networks.lstm import SeriesLSTM, SeriesLSTMSizes
from app.networks.series_reader import ForecasterSizes
from app.tasks.forecasting import GlobalForecaster, QuantileForecast, WindowForecaster
from training import cards
from training.configs.numbers import Described
from training.configs.series import LSTM_PRESETS, ForecasterConfig, ForecasterFinetuneConfig, LstmConfig
from training.data import datasets
from training.data.tables import TableOptions
from training.evaluation import forecaster as m4
from training.loops import own_series
from training.loops.fit import AveragedRecipe, fit
from training.loops.forecaster import pretrain
from training.options import Name, Options, Refit, flags, parse_options
from training.run import Run, metric, run_command

CLASSICAL_WINS = 3  # exit status
SINE_REPORTS = 120  # validations of a training on the sine
FREE_RUNNING_STEPS = 50  # length of the free-running forecasts that are measured


class DataOptions(Described):
    """The options that name the user's table and say how its preview is printed."""

    csv: Path | None = None
    """CSV, Excel or Parquet file with your series"""
    as_json: bool = Field(False, alias="json")
    """with --preview: print JSON"""


class LstmOptions(Described):
    """The options of a training on the user's table."""

    origin: Name = Field(Name("series-lstm"), alias="from")
    """model to fine-tune: NAME or NAME@VERSION"""
    refit: Refit = True
    backtest: bool = False
    """write a report with plots of the rolling forecasts of all methods in the leaderboard"""
    version: Name | None = None
    """with --backtest: evaluate the model NAME or NAME@VERSION; do not train"""
    force: bool = False
    """publish even if fine-tuning does not reduce the validation error"""


NAMES = {"workshop": "sine-lstm", "strong": "series-lstm"}


def main(argv: Sequence[str] | None = None) -> int:
    """Train a network; return the exit status, which is CLASSICAL_WINS if a classical method forecasts a table best."""
    options, config = arguments(argv)
    if options.preview:
        own_series.preview(options)
        return 0
    if isinstance(config, ForecasterFinetuneConfig):
        if options.version:
            board = own_series.backtest_version(options, config)
        else:
            board = own_series.train(options, config, argv)
        return CLASSICAL_WINS if board.classical_wins else 0
    if isinstance(config, ForecasterConfig) and options.part == "validation":
        # otherwise the last steps train on the values that are measured
        config = config.model_copy(update={"held_out_share": 1.0})
    run = Run(options, config, argv)
    if isinstance(config, ForecasterConfig):
        publish_forecaster(run, config, pretrain(run, config))
    else:
        series = datasets.sine()
        recipe = SineRecipe(config, series, options.device)
        fit(run, recipe, run.budget(config.steps), SINE_REPORTS)
        publish_sine(run, config, series, recipe.average.module)
    return 0


def arguments(argv: Sequence[str] | None) -> tuple[Options, LstmConfig | ForecasterConfig | ForecasterFinetuneConfig]:
    """Parse the command line; return the options, and the preset's config with all overrides."""
    own = flags(DataOptions) | flags(TableOptions) | flags(LstmOptions)
    return parse_options("training.lstm", __doc__ or "", LSTM_PRESETS, NAMES, argv, own)


def evaluate(forecaster: WindowForecaster | GlobalForecaster) -> dict[str, Any]:
    """Return the metrics of a published network: series-lstm on M4, sine-lstm on the test part of the sine."""
    return m4.evaluate(forecaster) if isinstance(forecaster, GlobalForecaster) else evaluate_sine(Forecasts(forecaster))


def read_own(options: Options, config: ForecasterFinetuneConfig, card: store.Card) -> own_series.OwnSeries:
    """Read the user's series, and the version that the training of ``card`` started from."""
    options.origin = (card.ancestors or [])[-1].name
    return own_series.read(options, config.horizon)


measure_own = own_series.measure

# --- series-lstm


def publish_forecaster(run: Run, config: ForecasterConfig, network: Any) -> None:
    """Evaluate the network on the test parts of M4, and publish it.

    With --no-publish, evaluate it on the held-out horizons, and do not publish it.
    """
    sizes: ForecasterSizes = network.sizes
    card = {
        **cards.fields("forecaster", network),
        "title": f"A forecaster for any series: {sizes.members} LSTMs with exponential smoothing, averaged",
        "series": {"season": None, "non_negative": True},
        "data": {collection.name: collection.sha256 for collection in (datasets.m4_hourly(), datasets.m4_weekly())},
        "notes": (
            "Trained on the training parts of M4, on sums of these series and on synthetic series, so its metrics on "
            "M4 are in-domain. The last horizon of each series was held out for the first "
            f"{config.held_out_share:.0%} of the steps. {sizes.members} members of one run, averaged by quantile."
        ),
    }
    held_out = run.options.part == "validation"
    examples = [collection.past[::2] for collection in (datasets.m4_hourly(), datasets.m4_weekly())]
    card, forecaster = run.measure(card, network, lambda own, _: m4.evaluate(own, held_out), examples=examples)
    samples = m4.draw_samples(run.folder / "samples.png", m4.examples(forecaster, held_out))
    run.finish(card, network, samples)


# --- sine-lstm


class SineRecipe(AveragedRecipe):
    """The recipe of the workshop's LSTM; see ``training.loops.fit.Recipe``. It trains on random windows of the sine."""

    def __init__(self, config: LstmConfig, series: datasets.Sine, device: str) -> None:
        values = series.values[: series.split].float().to(device)
        network = SeriesLSTM(SeriesLSTMSizes(config.window, config.hidden)).to(device)
        network.store_statistics(values)
        super().__init__(network, config)
        standardised = (values - network.location) / network.scale
        self.train = standardised[: -config.validation]
        self.held_out = standardised[-config.validation - config.window :]

    def update(self, step: int, done: float) -> dict[str, Tensor]:
        """Train on random windows for one step; return the one-step and free-running losses."""
        config, network = self.config, self.network
        length = config.window + config.horizon
        starts = torch.randint(len(self.train) - length + 1, (config.batch, 1))
        windows = self.train[(starts + torch.arange(length)).to(self.train.device)]  # [batch, window + horizon]
        inputs = windows + config.input_noise * torch.randn(windows.shape).to(windows.device)
        target = windows[:, config.window :]
        outputs, state = network.steps(inputs[:, : config.window])
        first = outputs[:, -1:]
        later, _ = network.steps(inputs[:, config.window : -1], state)
        one_step = F.mse_loss(torch.cat([first, later], dim=1), target)  # each forecast from actual values
        free_running = F.mse_loss(network.free_running(first, state, config.horizon), target)  # from own forecasts
        self.descend(0.5 * (one_step + free_running), done)
        return {"one_step": one_step, "free_running": free_running}

    def validate(self, steps: int) -> dict[str, float]:
        """Return the mean squared error of one-step forecasts on the validation part."""
        return {"validation": validation_mse(self.average.module, self.held_out)}


def validation_mse(network: Any, values: Tensor) -> float:
    """Return the one-step mean squared error on standardised values [window + T]. Each forecast reads one window."""
    windows = values.unfold(0, network.sizes.window, 1)[:-1]
    with torch.inference_mode():
        return F.mse_loss(network(windows, 1)[:, 0], values[network.sizes.window :]).item()


def publish_sine(run: Run, config: LstmConfig, series: datasets.Sine, network: Any) -> None:
    """Measure the residuals on the validation part, evaluate the network, and publish it."""
    card = {
        **cards.fields("series-lstm", network),
        "title": "The workshop's LSTM: one layer that forecasts its noisy sine, value after value",
        "residuals": [1.0] * FREE_RUNNING_STEPS,
        "data": {"sine": series.sha256},
        "notes": (
            f"The last {config.validation} values of the training part were used for validation. Weights averaged over "
            "steps."
        ),
    }
    card["residuals"] = Forecasts(run.predictor(card, network), config.validation).residuals()
    held_out = config.validation if run.options.part == "validation" else 0
    card, forecaster = run.measure(card, network, lambda own, _: evaluate_sine(Forecasts(own, held_out)))
    examples = Forecasts(forecaster, held_out).examples()
    run.finish(card, network, m4.draw_samples(run.folder / "samples.png", examples))


class Forecasts:
    """Forecasts of the last fifth of the sine or of ``validation`` values before it.

    Attributes:
        start, end: the positions of the first forecast value and after the last.
        actual: the actual values [end - start].
        noiseless: the values without noise [end - start].
        quantiles: forecasts of 50 steps. Each continues from its own forecasts. Their origins, the positions of the
            first forecast values, are start, start + 1, ..., end - 50.
        free_running: the means [origins, 50] of these forecasts.
    """

    def __init__(self, forecaster: WindowForecaster, validation: int = 0, seed: int = 0) -> None:
        self.forecaster, self.series = forecaster, datasets.sine(seed)
        split, count = self.series.split, len(self.series.values)
        self.part = "validation" if validation else "test"
        self.start, self.end = (split - validation, split) if validation else (split, count)
        self.actual, self.noiseless = (
            values.numpy()[self.start : self.end] for values in (self.series.values, self.series.noiseless)
        )

    def _predict(self, horizon: int) -> list[QuantileForecast]:
        values, origins = self.series.values.tolist(), range(self.start, self.end - horizon + 1)
        return self.forecaster.predict([self.forecaster.parse(values[:at], horizon) for at in origins])

    def one_step(self) -> np.ndarray:
        """Return one-step forecasts [end - start]. Each forecast reads all values before its own position."""
        return np.concatenate([forecast.mean for forecast in self._predict(1)])

    @cached_property
    def quantiles(self) -> list[QuantileForecast]:
        return self._predict(FREE_RUNNING_STEPS)

    @cached_property
    def free_running(self) -> np.ndarray:
        return np.stack([forecast.mean for forecast in self.quantiles])

    def residuals(self) -> list[float]:
        """Return 50 root mean squared errors, one for each number of steps ahead, divided by the network's scale."""
        errors = self.free_running - windows(self.actual)
        scale = float(self.forecaster.network.scale)
        return [round(float(error), 4) for error in np.sqrt(np.mean(errors**2, axis=0)) / scale]

    def examples(self) -> list[m4.Example]:
        """Return free-running forecasts for a plot. Each begins where the one before it ends."""
        return [
            m4.Example(
                f"sine, from value {self.start + at + 1}",
                self.series.values.numpy()[: self.start + at],
                self.actual[at : at + FREE_RUNNING_STEPS],
                self.quantiles[at],
            )
            for at in range(0, len(self.quantiles), FREE_RUNNING_STEPS)
        ]


def windows(values: np.ndarray) -> np.ndarray:
    """Return all windows [N, 50] of values."""
    return np.lib.stride_tricks.sliding_window_view(values, FREE_RUNNING_STEPS)


def evaluate_sine(forecasts: Forecasts) -> dict[str, Any]:
    """Return the metrics of forecasts. One metric is a mean over 50 series with the same sine but different noise."""
    forecaster, noise, count = forecasts.forecaster, forecasts.series.noise, len(forecasts.actual)
    is_test = forecasts.part == "test"
    split = f"the last {count} values of the series" if is_test else f"{count} values for validation"
    errors = (forecasts.one_step() - forecasts.actual) ** 2
    fresh = [Forecasts(forecaster, 0 if is_test else count, seed) for seed in range(1, 51)]
    fresh_error = np.mean([np.mean((each.one_step() - each.actual) ** 2) for each in fresh])
    future, noiseless = windows(forecasts.actual), windows(forecasts.noiseless)
    lower, upper = forecasts.quantiles[0].interval(95)
    inside = np.abs(forecasts.free_running - future) <= (upper - lower) / 2
    return {
        "one_step_mse": metric(errors, split),
        "one_step_mse_over_noise": metric(errors.mean() / noise**2, f"{split}; noise variance 0.04", 3),
        "one_step_mse_over_noise_fresh": metric(
            fresh_error / noise**2, "the same values under 50 other realisations of the noise, mean", 3
        ),
        "free_running_rmse": metric(
            np.sqrt(np.mean((forecasts.free_running - noiseless) ** 2)),
            f"{split}: all 50-step forecasts against the noiseless sine",
            3,
        ),
        "coverage_95": metric(inside.mean(), f"{split}: all 50-step forecasts, 95 % intervals", 3),
    }


if __name__ == "__main__":
    run_command(main)
