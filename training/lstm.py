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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app.networks.lstm import SeriesLSTM, SeriesLSTMSizes
from app.networks.series_reader import ForecasterSizes
from app.tasks.forecasting import GlobalForecaster, WindowForecaster
from training import cards, refit
from training.configs.series import LSTM_PRESETS, ForecasterConfig, ForecasterFinetuneConfig, LstmConfig
from training.data import datasets
from training.data.tables import READER_OPTIONS
from training.evaluation import forecaster as m4
from training.loops.fit import AveragedRecipe, fit
from training.loops.forecaster import pretrain
from training.loops.series import evaluation, finetune, own_series
from training.options import Options, parse_options
from training.run import Run, metric, run_command

CLASSICAL_WINS = 3  # exit status
SINE_REPORTS = 120  # validations of a training on the sine
FREE_RUNNING_STEPS = 50  # length of the free-running forecasts that are measured
OPTIONS: dict[str, dict[str, Any]] = {
    "--csv": {"metavar": "FILE", "type": Path, "help": "CSV, Excel or Parquet file with your series"},
    "--json": {"action": "store_true", "help": "with --preview: print JSON"},
    **READER_OPTIONS,
    "--known-covariates": {
        "metavar": "NAME",
        "help": "columns whose future values are known in advance, such as price,promo. Requests then contain their "
        "future values",
    },
    "--holidays": {
        "metavar": "COUNTRY",
        "help": "use the public holidays of a country, such as DE, or of a subdivision, such as DE-BY",
    },
    "--from": {
        "metavar": "NAME",
        "dest": "origin",
        "default": "series-lstm",
        "help": "model to fine-tune: NAME or NAME@VERSION",
    },
    **refit.option(True),
    "--backtest": {
        "action": "store_true",
        "help": "write a report with plots of the rolling forecasts of all methods in the leaderboard",
    },
    "--version": {"metavar": "NAME", "help": "with --backtest: evaluate the model NAME or NAME@VERSION; do not train"},
    "--force": {
        "action": "store_true",
        "help": "publish even if fine-tuning does not reduce the validation error",
    },
}
NAMES = {"workshop": "sine-lstm", "strong": "series-lstm"}


def main(argv: Sequence[str] | None = None) -> int:
    """Train a network; return the exit status, which is CLASSICAL_WINS if a classical method forecasts a table best."""
    options, config = arguments(argv)
    if options.data_options["preview"]:
        own_series.preview(options)
        return 0
    if isinstance(config, ForecasterFinetuneConfig):
        if options.data_options["version"]:
            board = evaluation.backtest_version(options, config)
        else:
            board = finetune.train(options, config, argv)
        return CLASSICAL_WINS if board.classical_wins else 0
    if isinstance(config, ForecasterConfig) and options.part == "validation":
        config = replace(config, held_out_share=1.0)  # otherwise the last steps train on the values that are measured
    run = Run(options, config, argv)
    if isinstance(config, ForecasterConfig):
        publish_forecaster(run, config, pretrain(run, config))
    else:
        series = datasets.sine()
        publish_sine(run, config, series, train_sine(run, config, series))
    return 0


def arguments(argv: Sequence[str] | None) -> tuple[Options, LstmConfig | ForecasterConfig | ForecasterFinetuneConfig]:
    """Parse the command line; return the options, and the preset's config with all overrides."""
    return parse_options("training.lstm", __doc__ or "", LSTM_PRESETS, NAMES, argv, OPTIONS)


def evaluate(forecaster: WindowForecaster | GlobalForecaster) -> dict[str, Any]:
    """Return the metrics of a published network: series-lstm on M4, sine-lstm on the test part of the sine."""
    return m4.evaluate(forecaster) if isinstance(forecaster, GlobalForecaster) else evaluate_sine(forecaster)


# --- series-lstm


def publish_forecaster(run: Run, config: ForecasterConfig, network: Any) -> None:
    """Evaluate the network on the test parts of M4, and publish it.

    With --no-publish, evaluate it on the held-out horizons, and do not publish it.
    """
    sizes: ForecasterSizes = network.sizes
    card = {
        **cards.forecaster(network),
        "title": f"A forecaster for any series: {sizes.members} LSTMs with exponential smoothing, averaged",
        "series": {"season": None, "non_negative": True},
        "data": {collection.name: collection.sha256 for collection in (datasets.m4_hourly(), datasets.m4_weekly())},
        "notes": (
            "Trained on the training parts of M4, on sums of these series and on synthetic series, so its metrics on "
            "M4 are in-domain. The last horizon of each series was held out for the first "
            f"{config.held_out_share:.0%} of the steps. {sizes.members} members of one run, averaged by quantile."
        ),
    }
    forecaster = run.predictor(GlobalForecaster, card, network)
    held_out = run.options.part == "validation"
    card = run.measure(card, lambda _: m4.evaluate(forecaster, held_out))
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
        self.validation = standardised[-config.validation - config.window :]

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
        return {"validation": validation_mse(self.average.module, self.validation)}


def train_sine(run: Run, config: LstmConfig, series: datasets.Sine) -> Any:
    """Train the workshop's LSTM on the sine's training part; return the averaged network."""
    recipe = SineRecipe(config, series, run.options.device)
    fit(run, recipe, run.budget(config.steps), SINE_REPORTS)
    return recipe.average.module


def validation_mse(network: Any, values: Tensor) -> float:
    """Return the one-step mean squared error on standardised values [window + T]. Each forecast reads one window."""
    windows = values.unfold(0, network.sizes.window, 1)[:-1]
    with torch.inference_mode():
        return F.mse_loss(network(windows, 1)[:, 0], values[network.sizes.window :]).item()


def publish_sine(run: Run, config: LstmConfig, series: datasets.Sine, network: Any) -> None:
    """Measure the residuals on the validation part, evaluate the network, and publish it."""
    card = {
        **cards.window_forecaster(network),
        "title": "The workshop's LSTM: one layer that forecasts its noisy sine, value after value",
        "residuals": [1.0] * FREE_RUNNING_STEPS,
        "data": {"sine": series.sha256},
        "notes": (
            f"The last {config.validation} values of the training part were used for validation. Weights averaged over "
            "steps."
        ),
    }
    start = series.split - config.validation
    card["residuals"] = residuals(run.predictor(WindowForecaster, card, network), series, start, series.split)
    forecaster = run.predictor(WindowForecaster, card, network)
    validation = (start, series.split) if run.options.part == "validation" else None
    card = run.measure(card, lambda _: evaluate_sine(forecaster, validation))
    samples = draw_samples(run.folder / "samples.png", forecaster, validation)
    run.finish(card, network, samples)


def one_step_forecasts(forecaster: WindowForecaster, series: datasets.Sine, start: int, end: int) -> np.ndarray:
    """Return one-step forecasts of the values [start, end). Each forecast reads all values before its own position."""
    values = series.values.tolist()
    return np.concatenate(forecaster.predict([forecaster.parse(values[:i], 1) for i in range(start, end)]))


def free_running_forecasts(
    forecaster: WindowForecaster, series: datasets.Sine, start: int, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return three arrays [origins, 50]: forecasts of 50 steps, the actual values, and the values without noise.

    An origin is the position of the first forecast value. The origins are start, start + 1, ..., end - 50.
    """
    values = series.values.tolist()
    origins = range(start, end - FREE_RUNNING_STEPS + 1)
    forecasts = np.stack(forecaster.predict([forecaster.parse(values[:i], FREE_RUNNING_STEPS) for i in origins]))
    positions = np.arange(FREE_RUNNING_STEPS) + np.array(origins)[:, None]
    return forecasts, series.values.numpy()[positions], series.noiseless.numpy()[positions]


def residuals(forecaster: WindowForecaster, series: datasets.Sine, start: int, end: int) -> list[float]:
    """Return 50 root mean squared errors on the values [start, end): one for each number of steps ahead.

    The errors are divided by the scale of the network.
    """
    forecasts, actual, _ = free_running_forecasts(forecaster, series, start, end)
    scale = float(forecaster.network.scale)
    return [round(float(error), 4) for error in np.sqrt(np.mean((forecasts - actual) ** 2, axis=0)) / scale]


def evaluate_sine(forecaster: WindowForecaster, validation: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return the metrics on the last fifth of the sine or, if given, on the range ``validation``.

    One of the metrics is a mean over 50 series with the same sine but different noise.
    """
    series = datasets.sine()
    start, end = validation or (series.split, len(series.values))
    split = f"{end - start} values for validation" if validation else f"the last {end - start} values of the series"
    actual = series.values.numpy()[start:end]
    errors = one_step_forecasts(forecaster, series, start, end) - actual
    realised = np.mean((series.values - series.noiseless).numpy()[start:end] ** 2)
    fresh_errors = []
    for seed in range(1, 51):
        fresh = datasets.sine(seed)
        forecasts = one_step_forecasts(forecaster, fresh, start, end)
        fresh_errors.append(np.mean((forecasts - fresh.values.numpy()[start:end]) ** 2))
    forecasts, future, noiseless = free_running_forecasts(forecaster, series, start, end)
    item = forecaster.parse(series.values.tolist()[:start], FREE_RUNNING_STEPS)
    inside = np.abs(forecasts - future) <= forecaster.half_widths(item, 95)
    return {
        "one_step_mse": metric(np.mean(errors**2), split),
        "one_step_mse_over_noise": metric(np.mean(errors**2) / series.noise**2, f"{split}; noise variance 0.04", 3),
        "one_step_mse_over_realised_noise": metric(
            np.mean(errors**2) / realised, f"{split}; their noise has variance {realised:.4f}", 3
        ),
        "one_step_mse_over_noise_fresh": metric(
            np.mean(fresh_errors) / series.noise**2, "the same values under 50 other realisations of the noise, mean", 3
        ),
        "free_running_rmse": metric(
            np.sqrt(np.mean((forecasts - noiseless) ** 2)),
            f"{split}: all 50-step forecasts against the noiseless sine",
            3,
        ),
        "coverage_95": metric(inside.mean(), f"{split}: all 50-step forecasts, 95 % intervals", 3),
    }


def draw_samples(path: Path, forecaster: WindowForecaster, validation: tuple[int, int] | None = None) -> Path:
    """Plot the test part, or the range ``validation``, with one-step forecasts, free-running forecasts and intervals.

    A free-running forecast continues from its own forecasts instead of actual values.
    """
    from matplotlib.figure import Figure

    series, part = datasets.sine(), "validation" if validation else "test"
    start, end = validation or (series.split, len(series.values))
    x = np.linspace(0, 20, len(series.values))[start:end]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis in (left, right):
        axis.plot(x, series.values.numpy()[start:end], ".", color="silver", markersize=4, label="actual")
        axis.plot(x, series.noiseless.numpy()[start:end], color="gray", linewidth=1, label="noiseless sine")
        axis.set(xlabel="x")
        axis.grid(alpha=0.3)
    left.plot(x, one_step_forecasts(forecaster, series, start, end), color="tab:blue", label="one step ahead")
    left.set_title(f"one-step forecasts on the {part} part")
    for origin in range(start, end - FREE_RUNNING_STEPS + 1, FREE_RUNNING_STEPS):
        item = forecaster.parse(series.values.tolist()[:origin], FREE_RUNNING_STEPS)
        mean, width = forecaster.predict([item])[0], forecaster.half_widths(item, 95)
        position = x[origin - start : origin - start + FREE_RUNNING_STEPS]
        first = origin == start
        right.plot(position, mean, color="tab:orange", label="free-running, 50 steps" if first else None)
        right.fill_between(
            position, mean - width, mean + width, color="tab:orange", alpha=0.15, label="95 %" if first else None
        )
    right.set_title(f"free-running forecasts on the {part} part")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    return path


if __name__ == "__main__":
    run_command(main)
