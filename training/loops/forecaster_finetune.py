"""Own series: fine-tune a published forecaster on a CSV file, and compare it with the unchanged one.

Used by ``python -m training.lstm --csv``. If fine-tuning does not help, nothing is published without ``--force``.
If it does, the published weights are trained again on all rows; see ``training.refit``.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app import store
from app.networks.forecaster import QUANTILES, Forecaster, ForecasterSizes
from app.tasks.covariates import PRIOR_VALUES, covariate_effect, differences
from app.tasks.forecasting import GlobalForecaster
from app.tasks.seasonality import MIN_YEARS, yearly_pattern
from training import refit
from training.best_weights import BestWeights
from training.configs import ForecasterFinetuneConfig
from training.data.datasets import DataError
from training.data.series_windows import Source, WindowSampler
from training.data.tables.read import ReadOptions, read_table
from training.data.tables.table import Table, describe, summary, to_json_lines, without_gaps
from training.evaluation import backtest, forecast_metrics
from training.evaluation.backtest import Origins, Split
from training.evaluation.forecaster import Example, draw_samples, forecast_series
from training.evaluation.report import page, results
from training.loops import distributed, time_budget
from training.loops.forecaster import Trainer
from training.options import Options, base_version
from training.run import Run, cosine_schedule

MAX_PRINTED_REMARKS = 12  # all remarks are in remarks.txt of the run folder
DEFAULT_HORIZON = 12  # steps, for series without a season
MIN_STEPS_PER_EPOCH, MAX_STEPS_PER_EPOCH = 8, 40  # each epoch ends with a validation
YEARS = {"day": 365.25, "business day": 260.9}  # values per year
MAX_YEAR_FORECASTS = 200  # that decide whether a yearly pattern is removed
MAX_VALIDATION_FORECASTS, MAX_TEST_FORECASTS = 1000, 5000
MAX_ETS_SECONDS = 60.0  # of a backtest report
MIN_IMPROVEMENT = 0.01  # share of the quantile loss by which fine-tuning must reduce it


@dataclass(frozen=True)
class OwnSeries:
    """Own series, split for training, validation and testing; the forecast horizon; and the version to fine-tune.

    ``traits``: season, year and kind of values, for the card. ``references``: for the report of ``--backtest``.
    """

    table: Table
    splits: list[Split]
    horizon: int
    base: store.Version
    traits: store.SeriesTraits
    references: results.References | None = None

    @property
    def sha256(self) -> str:
        """Digest of the table's values."""
        return self.table.sha256


def read_options(options: Options) -> ReadOptions:
    """The options of the command line that say how to read a table."""
    own = options.data_options
    names = {field.name: field.name for field in fields(ReadOptions)} | {"columns": "column"}
    return ReadOptions(**{name: own[flag] for name, flag in names.items()})


def look(options: Options) -> None:
    """Print how the table is read. Exits with status 2 and a message if it is rejected."""
    try:
        table = read_table(options.data_options["csv"], read_options(options))
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    shown = describe(table)
    if options.data_options["json"]:
        print(json.dumps(shown, ensure_ascii=False))
        return
    print(summary(table))
    for series in shown["series"]:
        first, last = (
            ", ".join("missing" if x is None else f"{x:g}" for x in series[key]) for key in ("first", "last")
        )
        print(f"{series['name']}: from {series['start']}: {first} ... {last}; {series['missing']} missing")
    print("".join(f"  {remark}\n" for remark in table.remarks), end="")


def report(table: Table) -> None:
    """Print a summary of the table and its first remarks."""
    distributed.print_once(summary(table))
    for remark in table.remarks[:MAX_PRINTED_REMARKS]:
        distributed.print_once(f"  {remark}")
    if len(table.remarks) > MAX_PRINTED_REMARKS:
        hidden = len(table.remarks) - MAX_PRINTED_REMARKS
        distributed.print_once(f"  ... and {hidden:,} more; all are in remarks.txt in the run folder")


def read(options: Options, horizon: int) -> OwnSeries:
    """Read the file and the version that the options name.

    ``horizon`` 0: one season, or DEFAULT_HORIZON without a season; at most the horizon of the network, and so much that
    short series can be split.

    Raises:
        DataError: the table or the version cannot be used.
    """
    own = options.data_options
    table = without_gaps(read_table(own["csv"], read_options(options)))
    base = base_version(options, ("forecaster",))
    if base is None:
        raise DataError("--from scratch: own series need a published forecaster to fine-tune; omit --from")
    needed = base.card.series.known if base.card.series else None
    names = [column.name for column in needed.columns] if needed else []
    if needed and names != list(table.covariates):
        calendar = f" --holidays {needed.calendar.country}" if needed.calendar else ""
        known = f" --known {','.join(needed.named)}" if needed.named else ""
        raise DataError(f"{_label(base)} reads the known columns {', '.join(names)}; type{known}{calendar}")
    if horizon < 0:
        raise DataError(f"--horizon is {horizon}; allowed are 1 or more, or 0 for one season")
    default = min(table.season if table.season > 1 else DEFAULT_HORIZON, base.card.sizes["horizon"])
    horizon = horizon or min(default, backtest.longest_horizon(table))
    splits = backtest.split(table, horizon)
    return OwnSeries(table, splits, horizon, base, _traits(table, splits, horizon, base))


def _traits(table: Table, splits: list[Split], horizon: int, base: store.Version) -> store.SeriesTraits:
    """The season and the kind of the values; covariates; the year, if the base version forecasts better without it.

    The effects of covariates are proportional if the base version then has the lower validation loss.
    """
    values = np.concatenate([split.series.values[split.series.known] for split in splits])
    integer = bool((values % 1 == 0).all())
    traits = store.SeriesTraits(season=table.season, non_negative=bool((values >= 0).all()), integer=integer)
    year = YEARS.get(table.frequency)
    if min(split.validation for split in splits) < MIN_YEARS * (year or np.inf):
        year = None
    if year is None and not table.covariates:
        return traits
    origins = backtest.origins(splits, table.season, horizon, "validation").subset(MAX_YEAR_FORECASTS)

    def loss(tried: store.SeriesTraits) -> float:
        forecaster = GlobalForecaster(_with_traits(base, tried), torch.device("cpu"))
        return Validation(forecaster, origins)(forecaster.network)

    if table.covariates:
        forms = [traits.model_copy(update={"known": _known(table, splits, form)}) for form in (False, True)]
        without, *losses = map(loss, (traits, *forms))
        traits = forms[losses[1] < losses[0]]
        form = "shares of the usual value" if losses[1] < losses[0] else "sums"
        table.remarks.append(
            f"known columns: {', '.join(table.covariates)}; effects are {form}; validation loss of {base.card.name} "
            f"{min(losses):.3f}, without them {without:.3f}"
        )
        if min(losses) > (1 - MIN_IMPROVEMENT) * without:
            table.remarks.append("the known columns hardly lower this loss: compare with a training without --known")
    yearly = traits.model_copy(update={"year": year})
    return yearly if year and loss(yearly) < loss(traits) else traits


def _known(table: Table, splits: list[Split], proportional: bool) -> store.KnownCovariates:
    """The known columns with their means, deviations and coefficients in the training parts of all series.

    Raises:
        DataError: a column does not vary there.
    """
    parts = [(split.series.values[: split.validation], split.series.covariates[: split.validation]) for split in splits]
    together = np.concatenate([covariates for _, covariates in parts])
    unit = np.abs(together).max(axis=0) + (together == 0).all(axis=0)  # scale first, so that no square overflows
    means, scales = ((together / unit).mean(axis=0) * unit, (together / unit).std(axis=0) * unit)
    for name, scale, largest in zip(table.covariates, scales, unit, strict=True):
        if scale <= 1e-9 * largest:
            raise DataError(f"{table.name}: known column {name!r} does not vary in the training part; leave it out")
    columns = [
        store.KnownColumn(name=name, mean=mean, scale=scale, coefficient=0.0)
        for name, mean, scale in zip(table.covariates, means.tolist(), scales.tolist(), strict=True)
    ]
    known = store.KnownCovariates(columns=columns, proportional=proportional, calendar=table.calendar)
    precision, product = PRIOR_VALUES * np.eye(len(columns)), np.zeros(len(columns))
    for values, covariates in parts:
        _, inputs_change, change = differences(values, covariates, table.season, known)
        precision += inputs_change.T @ inputs_change
        product += inputs_change.T @ change
    coefficients = np.linalg.solve(precision, product).tolist()
    fitted = [
        column.model_copy(update={"coefficient": value}) for column, value in zip(columns, coefficients, strict=True)
    ]
    return known.model_copy(update={"columns": fitted})


def _with_traits(version: store.Version, traits: store.SeriesTraits) -> store.Version:
    return replace(version, card=version.card.model_copy(update={"series": traits}))


def train(options: Options, config: ForecasterFinetuneConfig, argv: Sequence[str] | None) -> None:
    """Read, fine-tune, measure, fine-tune again on all rows, and publish."""
    own = read(options, config.horizon)
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
        card = refit.describe(card, steps[0])
    if distributed.rank() == 0:
        finish(run, card, network, publishes)
        print(f"{reason}." if publishes else f"{reason}. Nothing was published; --force publishes anyway.")
    distributed.exit_process()


def window_sampler(own: OwnSeries, sizes: ForecasterSizes, ends: Sequence[int]) -> WindowSampler:
    """Windows of the values of each series up to an end, without the effect of covariates and the yearly pattern."""
    parts = [(split.series, end) for split, end in zip(own.splits, ends, strict=True)]
    pasts = [series.values[:end] for series, end in parts]
    if own.traits.known:
        pasts = [
            values - covariate_effect(values, series.covariates[:end], own.table.season, own.traits.known)
            for values, (series, end) in zip(pasts, parts, strict=True)
        ]
    if own.traits.year:
        pasts = [values - yearly_pattern(values, own.traits.year, 0) for values in pasts]
    series = [torch.from_numpy(values) for values in pasts]
    source = Source(series, own.table.season, min(own.horizon, sizes.horizon), share=1.0)
    return WindowSampler([source], sizes.context, sizes.horizon)


def _averaged(config: ForecasterFinetuneConfig, steps: int) -> ForecasterFinetuneConfig:
    """The config with a batch for all processes, and an average that covers at most 5 % of the steps."""
    ema_decay = max(0.0, min(config.ema_decay, 1 - 20 / steps))
    return replace(config, batch=distributed.divisible_batch(config.batch), ema_decay=ema_decay)


def finetune(run: Run, config: ForecasterFinetuneConfig, own: OwnSeries) -> tuple[Any, tuple[int, int]]:
    """Fine-tune the base network on the training parts.

    Returns the averaged network with the lowest validation loss, the number of steps after which it was reached, and
    the number of all steps.
    """
    options, season = run.options, own.table.season
    network: Any = own.base.network()
    ends = [split.validation for split in own.splits]
    sampler = window_sampler(own, network.sizes, ends)
    steps_per_epoch = min(max(sum(ends) // config.batch, MIN_STEPS_PER_EPOCH), MAX_STEPS_PER_EPOCH)

    def start_dummy_run() -> Callable[[int], object]:
        discarded = Trainer(copy.deepcopy(network), sampler, _averaged(config, 1), options.seed, options.device)
        return lambda step: discarded.update(step, config.learning_rate)

    def rehearse() -> float:
        finish(run, evaluate(run, own, network)[0], network, publishes=True)
        return 0.0

    steps = config.epochs * steps_per_epoch
    budget = time_budget.plan(run, steps, start_dummy_run, rehearse, refit.is_planned(options))
    config = _averaged(config, budget.steps)
    validation = Validation(
        GlobalForecaster(_with_traits(own.base, own.traits), torch.device(options.device)),
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
    return trainer.average.module, (int(best.steps), budget.steps)


def finetune_again(run: Run, config: ForecasterFinetuneConfig, own: OwnSeries, steps: int, total: int) -> Any:
    """Fine-tune the base network on all rows for the first ``steps`` of ``total`` steps; returns the average."""
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


class Validation:
    """The quantile loss of a network on forecast origins."""

    def __init__(self, forecaster: GlobalForecaster, origins: Origins) -> None:
        self.origins = origins
        horizon = origins.actual.shape[1]
        items = [
            forecaster.parse(past.tolist(), horizon, seasonality=origins.season, covariates=known)
            for past, known in zip(origins.past, origins.covariates, strict=True)
        ]
        added = [np.zeros(horizon) if item.added is None else item.added for item in items]
        self.added = np.stack(added)[..., None]  # [N, horizon, 1]
        self.values = torch.from_numpy(np.stack([item.values for item in items])).to(forecaster.device)
        self.seasons = torch.tensor([item.season for item in items], device=forecaster.device)

    @torch.inference_mode()
    def __call__(self, network: Forecaster) -> float:
        """The quantile loss; the network is set to evaluation mode."""
        network.eval()
        horizon = self.origins.actual.shape[1]
        batches = zip(self.values.split(256), self.seasons.split(256), strict=True)
        quantiles = torch.cat([network.forecast(values, seasons, horizon) for values, seasons in batches])
        levels = quantiles[..., 1:-1].cpu().numpy() + self.added
        return forecast_metrics.quantile_loss(self.origins.actual, levels, self.origins.mase_scale)


def as_method(forecaster: GlobalForecaster, origins: Origins) -> backtest.Forecast:
    """A forecaster as a method that can be backtested on these origins."""
    return lambda past, season, horizon: forecast_series(forecaster, list(past), season, horizon, origins.covariates)


def measure(forecaster: GlobalForecaster, own: OwnSeries) -> dict[str, Any]:
    """The test metrics of the fine-tuned forecaster, of the base version, and of seasonal naive."""
    origins = backtest.origins(own.splits, own.table.season, own.horizon, "test").subset(MAX_TEST_FORECASTS)
    untuned = {"untuned_": own.base}
    if own.traits.known:
        untuned["untuned_known_"] = _with_traits(own.base, own.traits)
    methods = {
        "": as_method(forecaster, origins),
        **{
            prefix: as_method(GlobalForecaster(version, forecaster.device), origins)
            for prefix, version in untuned.items()
        },
        "naive_": backtest.seasonal_naive,
    }
    return backtest.card_metrics(origins, methods)


def verdict(metrics: dict[str, Any]) -> tuple[bool, str]:
    """Return whether fine-tuning helped, and a sentence about it.

    It helped if the quantile loss is below that of the base version and that of the seasonal naive forecast.
    """
    tuned, base, naive = (metrics[f"{prefix}quantile_loss"]["value"] for prefix in ("", "untuned_", "naive_"))
    losses = f"quantile loss {tuned:.3f}; before fine-tuning {base:.3f}, seasonal naive {naive:.3f}"
    if known := metrics.get("untuned_known_quantile_loss"):
        losses += f"; before fine-tuning, but with the known columns, {known['value']:.3f}"
    if tuned > (1 - MIN_IMPROVEMENT) * base:
        return False, f"Fine-tuning did not help: {losses}"
    if tuned >= naive:
        return False, f"Fine-tuning did not help enough: {losses}"
    return True, f"Fine-tuning helped: {losses}"


def card_of(own: OwnSeries, sizes: ForecasterSizes, verdict: str) -> dict[str, Any]:
    """The card without its metrics."""
    table, base, count = own.table, own.base.card, len(own.splits)
    names = ", ".join(split.series.name for split in own.splits[:5]) + (", ..." if count > 5 else "")
    season = f"season {table.season}" if table.season > 1 else "no season"
    season += f", yearly pattern of {own.traits.year:g} values" if own.traits.year else ""
    season += f", known columns {', '.join(table.covariates)}" if table.covariates else ""
    return {
        "task": "forecast",
        "title": f"Forecasts of {names}, one value per {table.frequency}"[:200],
        "kind": "forecaster",
        "sizes": asdict(sizes),
        "inputs": [{"name": "values", "dtype": "float64", "shape": [-1, -1]}],
        "outputs": [
            {"name": "mean", "dtype": "float64", "shape": [-1, -1]},
            {"name": "quantiles", "dtype": "float64", "shape": [-1, -1, len(QUANTILES)]},
        ],
        "series": own.traits.model_dump(),
        "data": {f"csv:{table.name}": own.sha256, f"{base.name}@{base.version}": base.weights_sha256},
        "notes": (
            f"Fine-tuned from {base.name}@{base.version}. {verdict}. {count:,} series, one value per "
            f"{table.frequency}, {season}. The last quarter of each series was tested, at most "
            f"{backtest.MAX_TEST_HORIZONS} horizons of {own.horizon} steps. The fifth before it was used for "
            f"validation, at most {backtest.MAX_VALIDATION_HORIZONS} horizons: of the averaged weights, those with "
            f"the lowest validation loss were kept. {len(table.remarks):,} repairs or omissions in the table."
        ),
    }


def evaluate(run: Run, own: OwnSeries, network: Any) -> tuple[dict[str, Any], str, bool]:
    """Evaluate the test part once, with the code that serves.

    Returns the card, a sentence on whether fine-tuning helped, and whether to publish: if it helped, or with --force.
    """
    forecaster = run.predictor(GlobalForecaster, card_of(own, network.sizes, "Not measured yet"), network)
    metrics = measure(forecaster, own)
    helped, reason = verdict(metrics)
    card = {**card_of(own, network.sizes, reason), "metrics": metrics}
    draw_samples(run.folder / "samples.png", examples(forecaster, own))
    if own.references:
        write_backtest(run.folder, own, forecaster, own.base, run.options.name, run.command)
    return card, reason, helped or run.options.data_options["force"]


def finish(run: Run, card: dict[str, Any], network: Any, publishes: bool) -> None:
    """Write the card and, if ``publishes``, publish the network with its pictures."""
    drawn = [run.folder / name for name in ("samples.png", "backtest.png") if (run.folder / name).exists()]
    pictures = {"curves.png": run.plot_curves()} | {path.name: path for path in drawn}
    run.finish(card, network, pictures, publish=publishes)
    if (run.folder / "backtest.html").exists() and not run.rehearsing:
        print(f"wrote {run.folder / 'backtest.html'}")


def references(options: Options, own: OwnSeries) -> results.References:
    """The forecasts without network of a report, within a tenth of ``--minutes``."""
    seconds = MAX_ETS_SECONDS if options.minutes is None else min(MAX_ETS_SECONDS, 6 * options.minutes)
    return results.references(own.splits, own.table.season, own.horizon, seconds)


def _label(version: store.Version) -> str:
    return f"{version.card.name}@{version.card.version}"


def write_backtest(
    folder: Path, own: OwnSeries, forecaster: GlobalForecaster, base: store.Version | None, name: str, command: str
) -> Path:
    """Write the report of a forecaster, and of the version that it was fine-tuned from; return its picture.

    ``name``: of the forecaster.
    """
    assert own.references is not None
    networks, explanations = {}, {}
    tuned = f"{name}, tuned"
    if base is not None:
        untuned = f"{_label(base)}, not tuned"
        networks[untuned] = as_method(GlobalForecaster(base, forecaster.device), own.references.origins)
        explanations[untuned] = "the published network, which has not been trained on this table"
        explanations[tuned] = f"{_label(base)}, fine-tuned on the values before the validation part of each series"
    else:
        tuned = name
        explanations[tuned] = "the published network"
    networks[tuned] = as_method(forecaster, own.references.origins)
    compared = own.references.compare(own.table, len(own.splits), networks)
    return page.write(folder, compared, command, explanations)


def backtest_version(options: Options, config: ForecasterFinetuneConfig) -> None:
    """Write the report of the published version that ``--version`` names, without training.

    Raises:
        DataError: the table or the version cannot be used, or the version was trained on all rows of the table.
    """
    own = read(options, config.horizon)
    report(own.table)
    card, label = own.base.card, _label(own.base)
    same = f"csv:{own.table.name}" in card.data or own.sha256 in card.data.values()
    if same and card.refit_steps is not None:
        raise DataError(
            f"--version {label}: it was trained on all rows of {own.table.name}, so its errors on them would be too "
            "low; its backtest.png shows the errors before that. Type --backtest without --version to train and measure"
        )
    own = replace(own, references=references(options, own))
    folder = options.runs / card.name / f"backtest-{datetime.now(UTC).strftime('%Y-%m-%dT%H-%M-%S')}"
    folder.mkdir(parents=True)
    command = shlex.join(["python", "-m", options.script, *sys.argv[1:]])
    forecaster = GlobalForecaster(own.base, torch.device(options.device))
    write_backtest(folder, own, forecaster, None, label, command)
    print(f"wrote {folder / 'backtest.html'} and backtest.png")


def examples(forecaster: GlobalForecaster, own: OwnSeries) -> list[Example]:
    """The last horizon of up to eight series, with its forecast."""
    result = []
    for split in own.splits[:: -(-len(own.splits) // 8)]:
        past, actual = np.split(split.series.values, [len(split.series.values) - own.horizon])
        covariates = split.series.covariates[-own.horizon - backtest.MAX_PAST :]
        (forecast,) = forecast_series(
            forecaster, [past[-backtest.MAX_PAST :]], own.table.season, own.horizon, [covariates]
        )
        result.append(Example(split.series.name, past, actual, forecast))
    return result
