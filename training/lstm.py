"""Train a network that forecasts series.

    python -m training.lstm                    # the workshop's LSTM on its noisy sine: sine-lstm
    python -m training.lstm --csv FILE --name sales   # your own series: series-lstm goes on learning from them
    python -m training.lstm --preset strong    # one network for any series, from M4 and synthetic ones: series-lstm

Measured results stand in the README's table and on each card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app.networks.lstm import SeriesLSTM, SeriesLSTMSizes
from app.tasks.forecasting import GlobalForecaster
from app.tasks.window_forecasting import WindowForecaster
from training.configs import LSTM_PRESETS, ForecasterConfig, ForecasterFinetuneConfig, LstmConfig
from training.data import datasets
from training.loops import forecaster as strong
from training.loops import forecaster_finetune
from training.options import Options, options
from training.run import Run, metric, schedule, set_learning_rate

AHEAD = 50  # steps of the free-running forecasts that are measured


OPTIONS: dict[str, dict[str, Any]] = {
    "--csv": {"metavar": "FILE", "type": Path, "help": "a column or a row for each series, or a column that names it"},
    "--column": {"metavar": "Y", "nargs": "+", "help": "columns with values; otherwise all that hold numbers"},
    "--time": {"metavar": "TS", "help": "column of time stamps; otherwise the first that holds some"},
    "--group": {"metavar": "ID", "help": "column that names the series of each row"},
    "--season": {"metavar": "N", "type": int, "help": "steps after which the series repeat; otherwise found"},
    "--from": {
        "metavar": "NAME",
        "dest": "origin",
        "default": "series-lstm",
        "help": "network to begin with",
    },
    "--force": {"action": "store_true", "help": "publish also when tuning did not help"},
    "--by-rows": {"action": "store_true", "help": "each row is a series, its first cell the name"},
}
NAMES = {"workshop": "sine-lstm", "strong": "series-lstm"}


def one_step(forecaster: WindowForecaster, series: datasets.Sine, begin: int, end: int) -> np.ndarray:
    """Forecasts of the values [begin, end), each from all values before it."""
    values = series.values.tolist()
    answers = forecaster.predict([forecaster.parse(values[:i], 1) for i in range(begin, end)])
    return np.concatenate(answers)


def free_running(
    forecaster: WindowForecaster, series: datasets.Sine, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From every start in [begin, end - 50]: forecasts, actual and noiseless values, each [starts, 50]."""
    values = series.values.tolist()
    starts = range(begin, end - AHEAD + 1)
    forecasts = np.stack(forecaster.predict([forecaster.parse(values[:i], AHEAD) for i in starts]))
    places = np.arange(AHEAD) + np.array(starts)[:, None]
    return forecasts, series.values.numpy()[places], series.noiseless.numpy()[places]


def evaluate(forecaster: WindowForecaster | GlobalForecaster) -> dict[str, Any]:
    """The metrics of a published network: on the last fifth of the sine and on fresh noise there, or on M4."""
    if isinstance(forecaster, GlobalForecaster):
        return strong.evaluate(forecaster)
    series = datasets.sine()
    begin, end = series.split, len(series.values)
    split = f"the last {end - begin} values of the series"
    actual = series.values.numpy()[begin:end]
    errors = one_step(forecaster, series, begin, end) - actual
    realised = np.mean((series.values - series.noiseless).numpy()[begin:end] ** 2)
    ratios = []
    for seed in range(1, 51):
        fresh = datasets.sine(seed)
        ratios.append(np.mean((one_step(forecaster, fresh, begin, end) - fresh.values.numpy()[begin:end]) ** 2))
    forecasts, future, noiseless = free_running(forecaster, series, begin, end)
    item = forecaster.parse(series.values.tolist()[:begin], AHEAD)
    inside = np.abs(forecasts - future) <= forecaster.half_widths(item, 95)
    return {
        "one_step_mse": metric(np.mean(errors**2), split),
        "one_step_mse_over_noise": metric(np.mean(errors**2) / series.noise**2, f"{split}; noise variance 0.04", 3),
        "one_step_mse_over_realised_noise": metric(
            np.mean(errors**2) / realised, f"{split}; their noise has variance {realised:.4f}", 3
        ),
        "one_step_mse_over_noise_fresh": metric(
            np.mean(ratios) / series.noise**2, "the same values under 50 other realisations of the noise, mean", 3
        ),
        "free_running_rmse": metric(
            np.sqrt(np.mean((forecasts - noiseless) ** 2)),
            f"{split}: all 50-step forecasts against the noiseless sine",
            3,
        ),
        "coverage_95": metric(inside.mean(), f"{split}: all 50-step forecasts, 95 % intervals", 3),
    }


def residuals(forecaster: WindowForecaster, series: datasets.Sine, begin: int, end: int) -> list[float]:
    """The root mean square error of each of 50 steps ahead on the validation part, in units of the scale."""
    forecasts, future, _ = free_running(forecaster, series, begin, end)
    scale = float(forecaster.network.scale)
    return [round(float(error), 4) for error in np.sqrt(np.mean((forecasts - future) ** 2, axis=0)) / scale]


def draw_samples(path: Path, forecaster: WindowForecaster) -> Path:
    """Actual against predicted on the test part, one step ahead and free-running with its intervals."""
    from matplotlib.figure import Figure

    series = datasets.sine()
    begin, end = series.split, len(series.values)
    x = np.linspace(0, 20, end)[begin:end]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis in (left, right):
        axis.plot(x, series.values.numpy()[begin:end], ".", color="silver", markersize=4, label="actual")
        axis.plot(x, series.noiseless.numpy()[begin:end], color="gray", linewidth=1, label="noiseless sine")
        axis.set(xlabel="x")
        axis.grid(alpha=0.3)
    left.plot(x, one_step(forecaster, series, begin, end), color="tab:blue", label="one step ahead")
    left.set_title("one-step forecasts on the test part")
    for start in range(begin, end - AHEAD + 1, AHEAD):
        item = forecaster.parse(series.values.tolist()[:start], AHEAD)
        mean, width = forecaster.predict([item])[0], forecaster.half_widths(item, 95)
        place = x[start - begin : start - begin + AHEAD]
        first = start == begin
        right.plot(place, mean, color="tab:orange", label="free-running, 50 steps" if first else None)
        right.fill_between(
            place, mean - width, mean + width, color="tab:orange", alpha=0.15, label="95 %" if first else None
        )
    right.set_title("free-running forecasts on the test part")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    return path


def update(
    network: SeriesLSTM,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    windows: Tensor,
    config: LstmConfig,
    rate: float,
) -> tuple[Tensor, Tensor]:
    """One step on standardised windows [N, window + horizon]; gives the one-step and the free-running loss."""
    read = windows + config.jitter * torch.randn(windows.shape).to(windows.device)
    target = windows[:, config.window :]
    outputs, state = network.steps(read[:, : config.window])
    first = outputs[:, -1:]
    following, _ = network.steps(read[:, config.window : -1], state)
    one = F.mse_loss(torch.cat([first, following], dim=1), target)  # each step ahead, from window values on
    free = F.mse_loss(network.free_running(first, state, config.horizon), target)  # reading its own forecasts
    loss = 0.5 * (one + free)
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), config.clip)
    optimizer.step()
    average.update_parameters(network)
    return one, free


def arguments(argv: Sequence[str] | None) -> tuple[Options, LstmConfig | ForecasterConfig | ForecasterFinetuneConfig]:
    """What a command line says."""
    return options("training.lstm", __doc__ or "", LSTM_PRESETS, NAMES, argv, OPTIONS)


def main(argv: Sequence[str] | None = None) -> None:
    chosen, config = arguments(argv)
    if isinstance(config, ForecasterFinetuneConfig):
        forecaster_finetune.train(chosen, config, argv)
        return
    run = Run(chosen, config, argv)
    if isinstance(config, ForecasterConfig):
        strong.train(run, config)
        return

    series = datasets.sine()
    training = series.values[: series.split].float().to(chosen.device)

    network = SeriesLSTM(SeriesLSTMSizes(config.window, config.hidden)).to(chosen.device)
    network.describe(training)
    standardised = (training - network.location) / network.scale
    learn, validate = standardised[: -config.validation], standardised[-config.validation - config.window :]
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.average))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, fused=True)
    run.track(network=network, average=average, optimizer=optimizer)

    length = config.window + config.horizon
    for step in run.steps(config.updates):
        starts = torch.randint(len(learn) - length + 1, (config.batch, 1))
        windows = learn[(starts + torch.arange(length)).to(learn.device)]  # [batch, window + horizon]
        rate = config.learning_rate * schedule(step, config.updates)
        one, free = update(network, average, optimizer, windows, config, rate)
        if (step + 1) % 50 == 0:
            run.log(one_step=one.item(), free_running=free.item(), validation=validation(average.module, validate))

    publish(run, config, series, average.module)


def validation(network: Any, values: Tensor) -> float:
    """The one-step mean squared error on standardised values [window + T], each forecast from a window."""
    windows = values.unfold(0, network.sizes.window, 1)[:-1]
    with torch.inference_mode():
        return F.mse_loss(network(windows, 1)[:, 0], values[network.sizes.window :]).item()


def publish(run: Run, config: LstmConfig, series: datasets.Sine, network: Any) -> None:
    """Measure the residuals on the validation part, read the test part once, and write the card."""
    card = {
        "task": "forecast",
        "title": "The workshop's LSTM: one layer that forecasts its noisy sine, value after value",
        "kind": "series-lstm",
        "sizes": asdict(network.sizes),
        "inputs": [{"name": "values", "dtype": "float64", "shape": [-1, network.sizes.window]}],
        "outputs": [{"name": "mean", "dtype": "float64", "shape": [-1, -1]}],
        "residuals": [1.0] * AHEAD,
        "data": {"sine": series.sha256},
        "notes": f"The last {config.validation} values of the training part validated; weights averaged over steps.",
    }
    held_out = series.split - config.validation
    card["residuals"] = residuals(run.predictor(WindowForecaster, card, network), series, held_out, series.split)
    forecaster = run.predictor(WindowForecaster, card, network)
    card["metrics"] = evaluate(forecaster)
    samples = draw_samples(run.folder / "samples.png", forecaster)
    run.finish(card, network, {"curves.png": run.curves(), "samples.png": samples})


if __name__ == "__main__":
    main()
