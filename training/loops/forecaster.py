"""The training of the forecaster: members that learn side by side, what they are worth, and the card.

Called by ``python -m training.lstm --preset strong``.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app.networks.forecaster import MEDIAN, QUANTILES, Forecaster, ForecasterSizes, Member, Reader, Reading, in_order
from app.tasks.forecasting import GlobalForecaster
from app.tasks.quantile_forecast import QuantileForecast
from app.tasks.seasonality import SEASONS
from training.configs import ForecasterConfig
from training.data import datasets
from training.data.synthetic_series import synthetic
from training.data.windows import Batch, Kind, Windows
from training.evaluation import forecasting
from training.run import Run, derive, metric, saved, schedule, set_learning_rate

LARGEST = 50  # units that a value may be off the naive path, in the loss
LONG = 700  # values of a synthetic series
MISTAKEN = 5  # every so many synthetic series without a season are also shown with each, as if it had been found
NEAR = 6  # steps before and after, whose errors widen an interval as well
NAMES = {"m4_hourly": "hourly", "m4_weekly": "weekly"}


@dataclass(frozen=True)
class Shown:
    """A series that is drawn: the values before its end [T], those of its end [horizon], and their forecast."""

    name: str
    past: np.ndarray
    actual: np.ndarray
    answer: QuantileForecast


def kinds(config: ForecasterConfig, seed: int) -> list[Kind]:
    """What is learnt from: M4's hourly and weekly series alike, and synthetic ones of every season."""
    real = (1 - config.invented) / 2
    collections = [datasets.m4_hourly(), datasets.m4_weekly()]
    found = [Kind(one.past, one.season, one.future.shape[1], real) for one in collections]
    plain = synthetic(1, 2 * config.series, LONG, derive(seed, "synthetic", 1))
    share = config.invented / (len(SEASONS) + 2)
    found.append(Kind(list(plain), 1, ForecasterSizes().horizon, 2 * share))
    for season in SEASONS:
        own = synthetic(season, config.series, LONG, derive(seed, "synthetic", season))
        found.append(Kind([*own, *plain[::MISTAKEN]], season, ForecasterSizes().horizon, share))
    return found


def losses(quantiles: Tensor, reading: Reading, batch: Batch) -> tuple[Tensor, Tensor]:
    """The pinball losses of quantiles in units [N, horizon, QUANTILES], over what is known of the future: their
    weighted sum, and the sum of the weights.

    The units being the usual step of MASE, the mean loss of the middle is the MASE of the windows.
    """
    known = ~batch.future.isnan() & (reading.scale > 0)
    unit = torch.where(reading.scale > 0, reading.scale, 1.0)
    target = ((batch.future - reading.naive) / unit).nan_to_num(0.0).clamp(-LARGEST, LARGEST).float()
    over = target.unsqueeze(2) - quantiles
    levels = torch.tensor(QUANTILES, device=over.device)
    each = torch.maximum(levels * over, (levels - 1) * over).mean(2)  # [N, horizon]
    weights = batch.weights * known
    return (each * weights).sum(), weights.sum()


def backward(member: Member, reader: Reader, batch: Batch, kept: Tensor) -> float:
    """Add the gradient of a batch to a member's, and give its loss.

    Products are computed in bfloat16, which takes 0.6 of the time; the last layer and the loss in float32.
    """
    device = member.head.weight.device
    batch = batch.to(device)
    reading = reader(batch.values, batch.seasons)
    with torch.autocast(device.type, torch.bfloat16):
        hidden = member.hidden(reading.patches, reading.ahead, kept.to(device))
    total, weight = losses(in_order(member.head(hidden.float())), reading, batch)
    loss = total / weight.clamp(min=1)
    loss.backward()
    return loss.item()


class Team:
    """The members of a network, each computing its own gradient on a thread of its own: small products share badly."""

    def __init__(
        self, network: Forecaster, windows: Windows, config: ForecasterConfig, seed: int, threads: int
    ) -> None:
        self.network, self.windows, self.config, self.seed = network, windows, config, seed
        self.pool = ThreadPoolExecutor(threads, initializer=_alone)

    def backward(self, step: int, held_out: bool) -> float:
        """The gradients of all members, each from windows of its own; gives their mean loss."""

        def one(number: int) -> float:
            generator = Generator().manual_seed(derive(self.seed, "member", number, step))
            batch = self.windows.draw(self.config.batch, self.config.mixed, held_out, generator)
            kept = torch.rand(self.config.batch, self.config.hidden, generator=generator) >= self.config.dropout
            member: Any = self.network.members[number]
            loss = backward(member, self.network.read, batch, kept.float() / (1 - self.config.dropout))
            nn.utils.clip_grad_norm_(member.parameters(), self.config.clip)
            return loss

        return sum(self.pool.map(one, range(self.config.members))) / self.config.members


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def learn(run: Run, config: ForecasterConfig) -> Any:
    """Learn with the last horizons held out, measure the intervals on them, and go on with nothing held out."""
    sizes = ForecasterSizes(hidden=config.hidden, layers=config.layers, members=config.members)
    windows = Windows(kinds(config, run.options.seed), sizes.context, sizes.horizon)
    network = Forecaster(sizes).to(run.options.device)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.average))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True)
    run.track(network=network, average=average, optimizer=optimizer)
    team = Team(network, windows, config, run.options.seed, run.options.threads)

    first = round(config.updates * config.held_out)
    for step in run.steps(config.updates):
        held_out = step < first
        factor = schedule(step, first) if held_out else 0.5 * schedule(step - first, config.updates - first)
        set_learning_rate(optimizer, config.learning_rate * factor)
        optimizer.zero_grad()
        loss = team.backward(step, held_out)
        optimizer.step()
        average.update_parameters(network)
        if (step + 1) % max(config.updates // 25, 1) == 0:
            run.log(loss=loss, **(validation(average.module, windows) if held_out else {}))
        if step + 1 == first:
            run.tensors["widening"] = widening(average.module, windows)
    learnt: Any = average.module
    learnt.widening.copy_(run.tensors["widening"])
    return learnt


@torch.inference_mode()
def validation(network: Any, windows: Windows) -> dict[str, float]:
    """The MASE of the medians on the last horizons of M4's series; the usual step is that of the context."""
    found = {}
    for kind, name in enumerate(NAMES.values()):
        batch = windows.held_out(kind).to(network.widening.device)
        reading = network.read(batch.values, batch.seasons)
        off = (network(batch.values, batch.seasons)[..., MEDIAN] - batch.future).abs() / reading.scale
        found[f"{name}_mase"] = float(off[:, : windows.judged[kind]].mean())
    return found


@torch.inference_mode()
def widening(network: Any, windows: Windows) -> Tensor:
    """By how much to stretch the intervals [2, horizon] so that 95 % hold what was held out: weekly, then hourly.

    At each step from the errors there and at the steps beside it; beyond the last step that is judged as there.
    """
    found = torch.ones(2, windows.horizon)
    for kind, row in ((1, 0), (0, 1)):
        batch = windows.held_out(kind).to(network.widening.device)
        quantiles = network(batch.values, batch.seasons)
        middle, known = quantiles[..., MEDIAN], int(windows.judged[kind])
        below = (middle - batch.future) / (middle - quantiles[..., 0])
        above = (batch.future - middle) / (quantiles[..., -1] - middle)
        needed = torch.maximum(below, above)[:, :known]  # 1: just inside
        for step in range(windows.horizon):
            place = min(step, known - 1)
            near = needed[:, max(place - NEAR, 0) : place + NEAR + 1].flatten()
            found[row, step] = near[near.isfinite()].quantile(QUANTILES[-1] - QUANTILES[0])
    return found


def outlooks(forecaster: GlobalForecaster, past: list[np.ndarray], season: int, horizon: int) -> list[QuantileForecast]:
    """The forecasts of many series, as the service gives them."""
    items = [forecaster.parse(values.tolist(), horizon, seasonality=season) for values in past]
    return [outlook for at in range(0, len(items), 64) for outlook in forecaster.predict(items[at : at + 64])]


def figures(
    name: str, past: list[np.ndarray], actual: np.ndarray, season: int, answers: list[QuantileForecast]
) -> dict[str, float]:
    """How good forecasts of series [N, horizon] are."""
    usual = np.array([forecasting.usual_step(values, season) for values in past])
    medians = np.stack([answer.median for answer in answers])
    lower, upper = (np.stack(side) for side in zip(*(answer.interval(95) for answer in answers), strict=True))
    quantiles = np.stack([answer.quantiles for answer in answers])[..., 1:-1]
    found = {
        "smape": forecasting.smape(actual, medians),
        "mase": forecasting.mase(actual, medians, usual),
        "wql": forecasting.wql(actual, list(np.moveaxis(quantiles, 2, 0))),
        "msis": forecasting.msis(actual, lower, upper, usual),
        "coverage_95": forecasting.coverage(actual, lower, upper),
    }
    if name in forecasting.NAIVE2:
        found["owa"] = forecasting.owa(name, found["smape"], found["mase"])
    return found


DECIMALS = {"smape": 3, "mase": 3, "owa": 3, "wql": 4, "msis": 2, "coverage_95": 3}


def evaluate(forecaster: GlobalForecaster, held_out: bool = False) -> dict[str, Any]:
    """The metrics of a forecaster on the test parts of M4, or on the last horizons of the training parts."""
    found: dict[str, Any] = {}
    for collection in (datasets.m4_hourly(), datasets.m4_weekly()):
        past, actual = [series.numpy() for series in collection.past], collection.future.numpy()
        horizon, part = actual.shape[1], "test part"
        if held_out:
            actual, past = np.stack([series[-horizon:] for series in past]), [series[:-horizon] for series in past]
            part = "last horizon of the training part"
        answers = outlooks(forecaster, past, collection.season, horizon)
        split = f"{collection.name} {part}, {len(past)} series, {horizon} steps"
        for key, value in figures(collection.name, past, actual, collection.season, answers).items():
            found[f"{NAMES[collection.name]}_{key}"] = metric(value, split, DECIMALS[key])
    return found


def examples(forecaster: GlobalForecaster) -> list[Shown]:
    """Four series of each collection."""
    found = []
    for collection in (datasets.m4_hourly(), datasets.m4_weekly()):
        horizon = collection.future.shape[1]
        for number in range(0, len(collection.past), -(-len(collection.past) // 4)):
            past, actual = collection.past[number].numpy(), collection.future[number].numpy()
            (answer,) = outlooks(forecaster, [past], collection.season, horizon)
            found.append(Shown(f"{collection.name}, series {number + 1}", past, actual, answer))
    return found


def draw_samples(path: Path, shown: Sequence[Shown]) -> Path:
    """The end of each of up to eight series, what followed, and the forecast with its intervals."""
    from matplotlib.figure import Figure

    columns = min(len(shown), 4)
    figure = Figure(figsize=(3 * columns, 3 * -(-len(shown) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(shown) // 4), columns, squeeze=False)
    for axis, one in zip(axes.flat, shown, strict=False):
        horizon = len(one.actual)
        past, ahead = one.past[-4 * horizon :], np.arange(horizon)
        axis.plot(np.arange(-len(past), 0), past, color="gray", linewidth=1)
        axis.plot(ahead, one.actual, color="black", linewidth=1)
        axis.plot(ahead, one.answer.median, color="tab:blue")
        for level in (50, 95):
            axis.fill_between(ahead, *one.answer.interval(level), color="tab:blue", alpha=0.15, linewidth=0)
        axis.set_title(one.name, fontsize=9)
    return saved(figure, path)


def card_of(sizes: ForecasterSizes, config: ForecasterConfig) -> dict[str, Any]:
    """All of the card but its metrics."""
    return {
        "task": "forecast",
        "title": f"A forecaster for any series: {sizes.members} LSTMs over pieces of {sizes.patch} values, averaged",
        "kind": "forecaster",
        "sizes": asdict(sizes),
        "inputs": [{"name": "values", "dtype": "float64", "shape": [-1, -1]}],
        "outputs": [
            {"name": "mean", "dtype": "float64", "shape": [-1, -1]},
            {"name": "quantiles", "dtype": "float64", "shape": [-1, -1, len(QUANTILES)]},
        ],
        "data": {collection.name: collection.sha256 for collection in (datasets.m4_hourly(), datasets.m4_weekly())},
        "notes": (
            "Learnt from the training parts of M4 and from synthetic series, so its figures on M4 are in-domain. The "
            f"last horizon of each series was held out for the first {config.held_out:.0%} of the updates, and the "
            f"intervals were widened until 95 % held it. {sizes.members} members of one run, averaged by quantile."
        ),
    }


def train(run: Run, config: ForecasterConfig) -> None:
    """Learn, read the test parts once - not at all unless the network is to be published - and write the card."""
    network = learn(run, config)
    card = card_of(network.sizes, config)
    forecaster = run.predictor(GlobalForecaster, card, network)
    card["metrics"] = evaluate(forecaster, held_out=not run.options.publish)
    samples = draw_samples(run.folder / "samples.png", examples(forecaster))
    run.finish(card, network, {"curves.png": run.curves(), "samples.png": samples})
