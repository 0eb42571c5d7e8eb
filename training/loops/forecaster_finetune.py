"""The caller's own series: the forecaster goes on learning from a table, and is held against what it was before.

The loop of ``python -m training.lstm --csv``, its figures and its verdict: when tuning does not help, nothing is
published unless ``--force``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app import store
from app.networks.forecaster import QUANTILES, Forecaster, ForecasterSizes, in_order
from app.tasks.forecasting import GlobalForecaster
from app.tasks.latency_model import fast_bfloat16
from training.configs import ForecasterFinetuneConfig
from training.data import tables
from training.data.datasets import DataError
from training.data.tables import Table
from training.data.windows import Batch, Kind, Windows
from training.evaluation import backtest, forecasting
from training.evaluation.backtest import Origins, Parts
from training.loops import distributed, time_budget
from training.loops.best_weights import Best
from training.loops.forecaster import Shown, draw_samples, losses, outlooks
from training.options import Options, origin
from training.run import Run, derive, schedule, set_learning_rate

STEPS = (8, 40)  # of an epoch, at least and at most: then it is validated
WITHOUT_SEASON = 12  # steps that are learnt and tested, where the caller names none
CHECKED, TESTED = 1000, 5000  # forecasts at most that validate, and that test
GAIN = 0.01  # share of the loss that tuning must save to have helped


@dataclass(frozen=True)
class Own:
    """The caller's series, each in three parts, how far they are forecast, and the network to begin with."""

    table: Table
    parts: list[Parts]
    horizon: int
    base: store.Version

    @property
    def sha256(self) -> str:
        """Of the table's values."""
        return self.table.sha256


def read(chosen: Options, horizon: int) -> Own:
    """What the options name. ``horizon`` 0: a season, at most as far as the network looks. Raises DataError."""
    own = chosen.own
    table = tables.read(own["csv"], own["column"], own["time"], own["group"], own["season"], own["by_rows"])
    base = origin(chosen, ("forecaster",))
    if base is None:
        raise DataError("--from scratch: series are learnt by going on with a network that knows others; leave it out")
    if horizon < 0:
        raise DataError(f"--horizon is {horizon}; it must be at least 1")
    horizon = horizon or min(table.season if table.season > 1 else WITHOUT_SEASON, base.card.sizes["horizon"])
    return Own(table, backtest.cut(table, horizon), horizon, base)


class Lesson(nn.Module):
    """The loss of each member on windows of its own."""

    def __init__(self, network: Forecaster, low: bool) -> None:
        super().__init__()
        self.network, self.low = network, low

    def forward(self, batches: list[Batch], kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Of each member a batch and its dropout [N, hidden] -> the sums of losses and of weights, both [members]."""
        sums, weights = [], []
        for member, batch, alive in zip(self.network.members, batches, kept, strict=True):
            reading = self.network.read(batch.values, batch.seasons)
            with torch.autocast(batch.values.device.type, torch.bfloat16, enabled=self.low):
                hidden = member.hidden(reading.patches, reading.ahead, alive)  # type: ignore[operator]
            quantiles = in_order(member.head(hidden.float()))  # type: ignore[operator]
            loss, weight = losses(quantiles, reading, batch)
            sums.append(loss)
            weights.append(weight)
        return torch.stack(sums), torch.stack(weights)


class Learner:
    """A forecaster, its average, and how they learn: each member from random windows of all series."""

    def __init__(
        self, network: Forecaster, windows: Windows, config: ForecasterFinetuneConfig, seed: int, device: str
    ) -> None:
        self.windows, self.config, self.seed = windows, config, seed
        self.network = network.to(device).train().requires_grad_(True)
        self.device = torch.device(device)
        self.average: Any = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.average))
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
        )
        low = bool(config.bfloat16) and fast_bfloat16(self.device)
        self.lesson = distributed.together(Lesson(self.network, low))

    def update(self, step: int, rate: float) -> float:
        """One step on a batch for each member, of which this process takes its share; gives the loss of all."""
        drawn = [self._drawn(number, step) for number in range(len(self.network.members))]
        sums, weights = self.lesson([batch for batch, _ in drawn], [kept for _, kept in drawn])
        whole = distributed.total(weights.detach()).clamp(min=1)
        loss = (sums / whole).mean() * distributed.count()  # whose gradient is averaged over the processes
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return float(distributed.total(loss.detach())) / distributed.count()

    def _drawn(self, number: int, step: int) -> tuple[Batch, Tensor]:
        """This process's share of a member's windows at a step, and which of its summary stays alive [N, hidden]."""
        config = self.config
        generator = Generator().manual_seed(derive(self.seed, "member", number, step))
        batch = self.windows.draw(config.batch, config.mixed, False, generator)
        alive = torch.rand(config.batch, self.network.sizes.hidden, generator=generator) >= config.dropout
        kept = distributed.share(alive.float() / (1 - config.dropout)).to(self.device)
        return Batch(*(distributed.share(part) for part in batch)).to(self.device), kept


class Check:
    """What a network is worth on what validates."""

    def __init__(self, forecaster: GlobalForecaster, tried: Origins) -> None:
        self.tried = tried
        items = [forecaster.parse(past.tolist(), 1, seasonality=tried.season) for past in tried.past]
        self.values = torch.from_numpy(np.stack([item.values for item in items])).to(forecaster.device)
        self.seasons = torch.tensor([item.season for item in items], device=forecaster.device)

    @torch.inference_mode()
    def __call__(self, network: Forecaster) -> float:
        """The quantile loss."""
        network.eval()
        horizon = self.tried.actual.shape[1]
        parts = zip(self.values.split(256), self.seasons.split(256), strict=True)
        found = torch.cat([network.forecast(values, seasons, horizon) for values, seasons in parts])
        return forecasting.quantile_loss(self.tried.actual, found[..., 1:-1].cpu().numpy(), self.tried.usual)


def learn_from(run: Run, config: ForecasterFinetuneConfig, own: Own) -> Any:
    """The whole training; gives the averaged network as it was when it did best on what validates."""
    options, season = run.options, own.table.season
    network: Any = own.base.network()
    sizes: ForecasterSizes = network.sizes
    learn = [torch.from_numpy(part.series.values[: part.validate]) for part in own.parts]
    windows = Windows([Kind(learn, season, min(own.horizon, sizes.horizon), 1.0)], sizes.context, sizes.horizon)
    per_epoch = min(max(sum(map(len, learn)) // config.batch, STEPS[0]), STEPS[1])
    config = replace(config, batch=distributed.even(config.batch))

    def trial() -> Callable[[int], object]:
        other = Learner(copy.deepcopy(network), windows, config, options.seed, options.device)
        return lambda step: other.update(step, config.learning_rate)

    total = time_budget.epochs(run, per_epoch, config.epochs, trial) * per_epoch
    config = replace(config, average=max(0.0, min(config.average, 1 - 20 / total)))  # not older than the training
    check = Check(
        GlobalForecaster(own.base, torch.device(options.device)),
        backtest.origins(own.parts, season, own.horizon, "validate").some(CHECKED),
    )
    learner = Learner(network, windows, config, options.seed, options.device)
    best = Best(learner.average.module)
    best.offer(learner.average.module, check(learner.average.module))
    run.track(network=learner.network, average=learner.average, optimizer=learner.optimizer, best=best)
    for step in run.steps(total):
        loss = learner.update(step, config.learning_rate * schedule(step, total))
        if (step + 1) % per_epoch == 0:
            validation = check(learner.average.module)
            best.offer(learner.average.module, validation)
            run.log(epoch=(step + 1) // per_epoch, loss=loss, validation_loss=validation)
    learner.average.module.load_state_dict(best.weights)
    return learner.average.module


def method(forecaster: GlobalForecaster) -> backtest.Method:
    """A forecaster as a contender."""
    return lambda past, season, horizon: outlooks(forecaster, list(past), season, horizon)


def measure(forecaster: GlobalForecaster, own: Own) -> dict[str, Any]:
    """The figures of a tuned forecaster, of what it was before, and of the last season again, where they are tested."""
    tried = backtest.origins(own.parts, own.table.season, own.horizon, "test").some(TESTED)
    contenders = {
        "": method(forecaster),
        "untuned_": method(GlobalForecaster(own.base, forecaster.device)),
        "naive_": backtest.seasonal_naive,
    }
    return backtest.compared(tried, contenders)


def verdict(metrics: dict[str, Any]) -> tuple[bool, str]:
    """Whether tuning helped, and a sentence that says so: it must beat both what it was before and seasonal naive."""
    tuned, before, naive = (metrics[f"{name}quantile_loss"]["value"] for name in ("", "untuned_", "naive_"))
    told = f"a quantile loss of {tuned:.3f}, {before:.3f} before, {naive:.3f} of the last season again"
    if tuned > (1 - GAIN) * before:
        return False, f"Tuning did not help: {told}"
    if tuned >= naive:
        return False, f"Tuning did not help enough: {told}"
    return True, f"Tuning helped: {told}"


def card_of(own: Own, sizes: ForecasterSizes, sentence: str) -> dict[str, Any]:
    """All of the card but its metrics."""
    table, base, count = own.table, own.base.card, len(own.parts)
    names = ", ".join(part.series.name for part in own.parts[:5]) + (", ..." if count > 5 else "")
    season = f"a season of {table.season}: ask with seasonality {table.season}" if table.season > 1 else "no season"
    return {
        "task": "forecast",
        "title": f"Forecasts {names}, a value each {table.frequency}"[:200],
        "kind": "forecaster",
        "sizes": asdict(sizes),
        "inputs": [{"name": "values", "dtype": "float64", "shape": [-1, -1]}],
        "outputs": [
            {"name": "mean", "dtype": "float64", "shape": [-1, -1]},
            {"name": "quantiles", "dtype": "float64", "shape": [-1, -1, len(QUANTILES)]},
        ],
        "data": {f"csv:{table.name}": own.sha256, f"{base.name}@{base.version}": base.weights_sha256},
        "notes": (
            f"Begun with {base.name} {base.version}. {sentence}. {count:,} series, a value each {table.frequency}, "
            f"{season}. Of each the last quarter, at most {backtest.MOST_TESTED} horizons of {own.horizon} steps, "
            f"tested, the fifth before it, at most {backtest.MOST_VALIDATED} horizons, validated: the weights, means "
            f"over steps, are those that did best there. {len(table.remarks):,} things were mended or left out."
        ),
    }


def train(chosen: Options, config: ForecasterFinetuneConfig, argv: Sequence[str] | None) -> None:
    """Read, learn, measure, publish."""
    own = read(chosen, config.horizon)
    tables.report(own.table)
    run = Run(chosen, config, argv, own.sha256)
    run.write("remarks.txt", "".join(f"{remark}\n" for remark in own.table.remarks))
    run.write("series.jsonl", tables.to_json_lines(own.table))
    network = learn_from(run, config, own)
    if distributed.rank() == 0:
        publish(run, own, network)
    distributed.leave()


def publish(run: Run, own: Own, network: Any) -> None:
    """Read the test part once, with the code that serves, say whether tuning helped, and write the card."""
    forecaster = run.predictor(GlobalForecaster, card_of(own, network.sizes, "Not measured yet"), network)
    metrics = measure(forecaster, own)
    helped, sentence = verdict(metrics)
    card = {**card_of(own, network.sizes, sentence), "metrics": metrics}
    samples = draw_samples(run.folder / "samples.png", shown(forecaster, own))
    wanted = helped or run.options.own["force"]
    run.finish(card, network, {"curves.png": run.curves(), "samples.png": samples}, publish=wanted)
    print(f"{sentence}." if wanted else f"{sentence}. Nothing is published; with --force it is all the same.")


def shown(forecaster: GlobalForecaster, own: Own) -> list[Shown]:
    """The last horizon of up to eight series, and its forecast."""
    found = []
    for part in own.parts[:: -(-len(own.parts) // 8)]:
        past, actual = np.split(part.series.values, [len(part.series.values) - own.horizon])
        (answer,) = outlooks(forecaster, [past[-backtest.RECENT :]], own.table.season, own.horizon)
        found.append(Shown(part.series.name, past, actual, answer))
    return found
