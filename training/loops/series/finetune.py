"""Fine-tune a published forecaster on the series of a table, and compare it with the unchanged version.

The command ``python -m training.lstm --csv`` uses this module. The validation part decides whether fine-tuning helps.
If fine-tuning does not help, nothing is published without ``--force``. Before publishing, the network is trained again
on all rows, unless ``--no-refit`` is given; see ``training.refit``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from app.networks.series_reader import ForecasterSizes
from app.tasks.covariates import covariate_effect
from app.tasks.forecasting import GlobalForecaster
from app.tasks.seasonality import fill_missing, yearly_pattern
from training import refit
from training.configs import ForecasterFinetuneConfig
from training.data.series.windows import Source, WindowSampler
from training.data.tables.table import Series, to_json_lines
from training.evaluation import backtest
from training.loops import distributed, time_budget
from training.loops.best_weights import BestWeights
from training.loops.forecaster import Trainer
from training.loops.series.evaluation import evaluate, references
from training.loops.series.own_series import OwnSeries, label, read, report, traits_of_all_rows, with_traits
from training.loops.series.validation import Validation
from training.options import Options
from training.run import Run, cosine_schedule

MIN_STEPS_PER_EPOCH, MAX_STEPS_PER_EPOCH = 8, 40  # each epoch ends with a validation
MAX_VALIDATION_FORECASTS = 1000


def train(options: Options, config: ForecasterFinetuneConfig, argv: Sequence[str] | None) -> None:
    """Read the table, fine-tune a network, measure it, fine-tune a second network on all rows, and publish it."""
    own = read(options, config.horizon)
    refit.reject_seen(own.base.card, f"--from {label(own.base)}", own.data)
    report(own.table)
    run = Run(options, config, argv, own.sha256)
    run.write_file("remarks.txt", "".join(f"{remark}\n" for remark in own.table.remarks))
    run.write_file("series.jsonl", to_json_lines(own.table))
    if options.data_options["backtest"] and distributed.rank() == 0:
        own = replace(own, references=references(options, own))
    network, steps = finetune(run, config, own)
    card, reason, publishes = distributed.from_rank_zero(lambda: evaluate(run, own, network))
    if publishes and refit.is_planned(options):
        network = finetune_again(run, config, own, *steps)
        card = refit.describe({**card, "series": traits_of_all_rows(own).model_dump()}, steps[0])
    if distributed.rank() == 0:
        finish(run, card, network, publishes)
        unpublished = " Nothing was published; --force publishes anyway." if options.publish and not publishes else ""
        print(f"{reason}.{unpublished}")
    distributed.exit_process()


def window_sampler(own: OwnSeries, sizes: ForecasterSizes, ends: Sequence[int]) -> WindowSampler:
    """Return a sampler of training windows. ``ends``: position of the first unused value of each series.

    Interpolated values at these ends are not used either, because they depend on the values after the ends.

    Before windows are drawn, two components are subtracted from the values: the effects of the covariates, and the
    yearly pattern.
    """
    parts = [
        (split.series, backtest.observed_end(split.series, end)) for split, end in zip(own.splits, ends, strict=True)
    ]
    pasts = [series.values[:end] for series, end in parts]
    if own.traits.known:
        pasts = [_without_covariates(own, series, end) for series, end in parts]
    if own.traits.year:
        pasts = [values - yearly_pattern(values, own.traits.year, 0) for values in pasts]
    series = [torch.from_numpy(values) for values in pasts]
    observed = [torch.from_numpy(series.observed[:end]) for series, end in parts]
    source = Source(series, own.table.season, min(own.horizon, sizes.horizon), share=1.0, observed=observed)
    return WindowSampler([source], sizes.context, sizes.horizon)


def _without_covariates(own: OwnSeries, series: Series, end: int) -> np.ndarray:
    """Return the first ``end`` values of a series without the effects of the covariates. Gaps are filled afterwards."""
    values, covariates, observed = series.values[:end], series.covariates[:end], series.observed[:end]
    assert own.traits.known
    effect = covariate_effect(values, covariates, own.table.season, own.traits.known, observed)
    return fill_missing(np.where(observed, values - effect, np.nan), own.table.season)


def _averaged(config: ForecasterFinetuneConfig, steps: int) -> ForecasterFinetuneConfig:
    """Return a copy of the config that averages the weights over at most 5 % of the training steps.

    The batch size is reduced until it is divisible by the number of processes.
    """
    ema_decay = max(0.0, min(config.ema_decay, 1 - 20 / steps))
    return replace(config, batch=distributed.divisible_batch(config.batch), ema_decay=ema_decay)


def finetune(run: Run, config: ForecasterFinetuneConfig, own: OwnSeries) -> tuple[Any, tuple[int, int]]:
    """Fine-tune the base network on the training parts.

    Return the averaged network with the lowest validation loss, and a pair: the number of steps after which the network
    had this loss, and the number of all steps.
    """
    options, season = run.options, own.table.season
    network: Any = own.base.network()
    ends = [split.validation for split in own.splits]
    sampler = window_sampler(own, network.sizes, ends)
    steps_per_epoch = min(max(sum(ends) // config.batch, MIN_STEPS_PER_EPOCH), MAX_STEPS_PER_EPOCH)

    def start_dummy_run() -> Callable[[int], object]:
        discarded = Trainer(copy.deepcopy(network), sampler, _averaged(config, 1), options.seed, options.device)
        return lambda step: discarded.update(step, config.learning_rate)

    def timed_evaluation() -> float:
        finish(run, evaluate(run, own, network)[0], network, publishes=True)
        return 0.0

    steps = config.epochs * steps_per_epoch
    budget = time_budget.plan(run, steps, start_dummy_run, timed_evaluation, refit.is_planned(options))
    config = _averaged(config, budget.steps)
    validation = Validation(
        GlobalForecaster(with_traits(own.base, own.traits), torch.device(options.device)),
        backtest.origins(own.splits, season, own.horizon, "validation").subset(MAX_VALIDATION_FORECASTS),
    )
    trainer = Trainer(network, sampler, config, options.seed, options.device)
    best = BestWeights(trainer.average.module)
    best.update(trainer.average.module, validation(trainer.average.module))
    run.track(network=trainer.network, average=trainer.average, optimizer=trainer.optimizer, best=best)
    for step in run.steps(budget):
        total = budget()
        loss = trainer.update(step, config.learning_rate * cosine_schedule(step, total))
        if (step + 1) % steps_per_epoch == 0 or step + 1 == total:
            validation_loss = validation(trainer.average.module)
            best.update(trainer.average.module, validation_loss, step + 1)
            run.log(epoch=-(-(step + 1) // steps_per_epoch), loss=loss, validation_loss=validation_loss)
    trainer.average.module.load_state_dict(best.weights)
    # The refit of all processes must have the same number of steps, but rounding may change the validation losses.
    return trainer.average.module, (distributed.from_rank_zero(lambda: int(best.steps)), budget.steps)


def finetune_again(run: Run, config: ForecasterFinetuneConfig, own: OwnSeries, steps: int, total: int) -> Any:
    """Fine-tune the base network on all rows for ``steps`` of ``total`` steps; return the averaged network.

    The learning rate follows the schedule of ``total`` steps, as in the first training.
    """
    network: Any = own.base.network()
    sampler = window_sampler(own, network.sizes, [len(split.series.values) for split in own.splits])
    trainer = Trainer(network, sampler, _averaged(config, total), run.options.seed, run.options.device)
    run.begin_refit()
    run.track(network=trainer.network, average=trainer.average, optimizer=trainer.optimizer)
    for step in run.steps(steps):
        loss = trainer.update(step, config.learning_rate * cosine_schedule(step, total))
        if (step + 1) % MAX_STEPS_PER_EPOCH == 0 or step + 1 == steps:
            run.log(loss=loss)
    return trainer.average.module


def finish(run: Run, card: dict[str, Any], network: Any, publishes: bool) -> None:
    """Write the card and, if ``publishes``, publish the network with its pictures."""
    drawn = [run.folder / name for name in ("samples.png", "backtest.png") if (run.folder / name).exists()]
    pictures = {"curves.png": run.plot_curves()} | {path.name: path for path in drawn}
    run.finish(card, network, pictures, publish=publishes)
    if (run.folder / "backtest.html").exists() and not run.is_timing:
        print(f"wrote {run.folder / 'backtest.html'}")
