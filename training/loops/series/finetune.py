"""Fine-tune a published forecaster on the series of a table, and compare it with the unchanged version.

The command ``quartet train lstm --csv`` uses this module. The validation part decides whether fine-tuning helps.
If fine-tuning does not help, nothing is published without ``--force``. Before publishing, the network is trained again
on all rows, unless ``--no-refit`` is given; see ``training.refit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from app.networks.series_reader import ForecasterSizes
from app.tasks.covariates import covariate_effect
from app.tasks.forecasting import GlobalForecaster
from app.tasks.seasonality import fill_missing, yearly_pattern
from training import lineage, refit
from training.configs.series import ForecasterFinetuneConfig
from training.data.series.windows import Source, WindowSampler
from training.data.tables import Series, to_json_lines
from training.evaluation import backtest
from training.evaluation.leaderboard import Leaderboard
from training.loops.fit import fit
from training.loops.forecaster import FinetuneRecipe
from training.loops.series.evaluation import evaluate
from training.loops.series.own_series import (
    OwnSeries,
    Validation,
    label,
    print_table,
    read,
    traits_of_all_rows,
    with_traits,
)
from training.options import Options
from training.run import Budget, Run

MIN_STEPS_PER_EPOCH, MAX_STEPS_PER_EPOCH = 8, 40  # each epoch ends with a validation
MAX_VALIDATION_FORECASTS = 1000


def train(options: Options, config: ForecasterFinetuneConfig, argv: Sequence[str] | None) -> Leaderboard:
    """Read the table, fine-tune a network, measure it, fine-tune a second network on all rows, and publish it.

    Return the leaderboard of the last measured part.
    """
    own = read(options, config.horizon)
    lineage.reject_seen(own.base.card, f"--from {label(own.base)}", own.data)
    print_table(own.table)
    run = Run(options, config, argv, own.sha256)
    run.write_file("remarks.txt", "".join(f"{remark}\n" for remark in own.table.remarks))
    run.write_file("series.jsonl", to_json_lines(own.table))
    network, budget = finetune(run, config, own)
    card, reason, publishes, board = evaluate(run, own, network)
    if publishes and refit.is_planned(options):
        network = finetune_on_all(run, config, own, budget)
        card = refit.describe({**card, "series": traits_of_all_rows(own).model_dump()}, budget.steps)
    finish(run, card, network, publishes)
    print(board.text())
    unpublished = " Nothing was published; --force publishes anyway." if options.publish and not publishes else ""
    print(f"{reason}.{unpublished}")
    return board


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


def finetune(run: Run, config: ForecasterFinetuneConfig, own: OwnSeries) -> tuple[Any, Budget]:
    """Fine-tune the base network on the training parts.

    Return the averaged network with the lowest validation loss, and the budget of a second training on all rows.
    """
    options, season = run.options, own.table.season
    network: Any = own.base.network()
    ends = [split.validation for split in own.splits]
    validation = Validation(
        GlobalForecaster(with_traits(own.base, own.traits), torch.device(options.device)),
        backtest.origins(own.splits, season, own.horizon, "validation").subset(MAX_VALIDATION_FORECASTS),
    )
    recipe = FinetuneRecipe(network, window_sampler(own, network.sizes, ends), config, options, validation)
    steps_per_epoch = min(max(sum(ends) // config.batch, MIN_STEPS_PER_EPOCH), MAX_STEPS_PER_EPOCH)
    fit(run, recipe, run.budget(config.epochs * steps_per_epoch, refit.is_planned(options)), config.epochs)
    return recipe.best.network, Budget(int(recipe.best.steps), total=run.step)


def finetune_on_all(run: Run, config: ForecasterFinetuneConfig, own: OwnSeries, budget: Budget) -> Any:
    """Fine-tune the base network on all rows; return the averaged network."""
    network: Any = own.base.network()
    sampler = window_sampler(own, network.sizes, [len(split.series.values) for split in own.splits])
    recipe = FinetuneRecipe(network, sampler, config, run.options)
    run.begin_refit()
    fit(run, recipe, budget, config.epochs)
    return recipe.average.module


def finish(run: Run, card: dict[str, Any], network: Any, publishes: bool) -> None:
    """Write the card and, if ``publishes``, publish the network with its pictures."""
    drawn = [run.folder / name for name in ("samples.png", "backtest.png") if (run.folder / name).exists()]
    run.finish(card, network, *drawn, publish=publishes)
    if (run.folder / "backtest.html").exists():
        print(f"wrote {run.folder / 'backtest.html'}")
