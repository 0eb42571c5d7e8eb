"""Fine-tune a published forecaster on the series of a table, and compare it with the unchanged version.

The command ``quartet train lstm --csv`` uses this module. The decision part decides whether fine-tuning helped. The
test part is measured only if the network is published. If fine-tuning does not help, nothing is published without
``--force``. Before publishing, the network is trained again on all rows, unless ``--no-refit`` is given; see
``Options.refits``.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from app import store
from app.networks.forecaster import Forecaster
from app.networks.series_reader import ForecasterSizes
from app.store.version import Version
from app.tasks.covariates import PRIOR_VALUES, covariate_effect, differences
from app.tasks.forecasting import GlobalForecaster
from app.tasks.seasonality import MIN_YEARS, fill_missing, yearly_pattern
from training import cards
from training.configs.series import ForecasterFinetuneConfig
from training.data.datasets import DataError, print_first, shorten
from training.data.series.windows import Source, WindowSampler
from training.data.tables import (
    Table,
    describe,
    read_table,
    reader_options,
    summary,
    to_json_lines,
    without_gaps,
)
from training.evaluation import backtest, leaderboard, report
from training.evaluation.backtest import HeldOut, Origins, Split
from training.evaluation.classical import NAIVE
from training.evaluation.forecaster import draw_samples, parse, predict, served
from training.evaluation.leaderboard import Leaderboard
from training.loops.fit import fit
from training.loops.forecaster import FinetuneRecipe
from training.options import Options, base_version
from training.run import Budget, Run

MAX_PRINTED_REMARKS = 12  # largest number of remarks that are printed; remarks.txt in the run folder has all
DEFAULT_HORIZON = 12  # steps, for series without a season
YEARS = {"day": 365.25, "business day": 260.9}  # time step -> values per year
MAX_YEAR_FORECASTS = 200  # number of forecasts that decide whether a yearly pattern is removed
MIN_IMPROVEMENT = 0.01  # smallest relative decrease of the quantile loss that counts as an improvement


@dataclass(frozen=True)
class OwnSeries:
    """A user's series, with the forecast horizon and the version to fine-tune.

    ``splits``: the series, split for training, validation and testing. ``traits``: season, yearly pattern, kind of
    values and known covariates, for the card.
    """

    table: Table
    splits: list[Split]
    horizon: int
    base: Version
    traits: store.SeriesTraits

    @property
    def sha256(self) -> str:
        """The digest of the table."""
        return self.table.sha256

    def past(self) -> list[np.ndarray]:
        """Return the values [T] of up to 1,000 series before the test part, with NaN for missing values."""
        return [np.where(each.series.observed, each.series.values, np.nan)[: each.test] for each in self.splits[:1000]]

    @property
    def data(self) -> dict[str, str]:
        """The digest of the table by its key in the field ``data`` of a card."""
        return {f"csv:{self.table.name}": self.sha256}


def preview(options: Options) -> None:
    """Print how the table is read. If the table is rejected, exit with status 2 and a message."""
    try:
        table = read_table(options.csv, reader_options(vars(options)))
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    shown = describe(table)
    if options.as_json:
        print(json.dumps(shown, ensure_ascii=False))
        return
    print(summary(table))
    for series in shown["series"]:
        first, last = (
            ", ".join("missing" if x is None else f"{x:g}" for x in series[key]) for key in ("first", "last")
        )
        print(f"{series['name']}: from {series['start']}: {first} ... {last}; {series['missing']} missing")
    print("".join(f"  {remark}\n" for remark in table.remarks), end="")


def print_table(table: Table) -> None:
    """Print a summary of the table and its first remarks."""
    print(summary(table))
    print_first(table.remarks, MAX_PRINTED_REMARKS, "remarks.txt")


def read(options: Options, horizon: int) -> OwnSeries:
    """Read the table given by --csv and the version given by --from or --version.

    ``horizon``: 0 means one season or, without a season, DEFAULT_HORIZON. This default is reduced to the horizon of the
    network, and to the longest horizon for which the series can be split.

    Raises:
        DataError: the table or the version cannot be used.
    """
    table = without_gaps(read_table(options.csv, reader_options(vars(options))))
    base = base_version(options, ("forecaster",), advice="")
    if base is None:
        raise DataError("--from scratch: own series need a published forecaster to fine-tune; omit --from")
    needed = base.card.series.known if base.card.series else None
    names = [column.name for column in needed.columns] if needed else []
    if needed and names != list(table.covariates):
        calendar = f" --holidays {needed.calendar.country}" if needed.calendar else ""
        known = f" --known-covariates {shlex.quote(','.join(needed.named))}" if needed.named else ""
        raise DataError(f"{base.label} reads the known covariates {', '.join(names)}; use{known}{calendar}")
    default = min(table.season if table.season > 1 else DEFAULT_HORIZON, base.card.sizes["horizon"])
    horizon = horizon or min(default, backtest.longest_horizon(table))
    splits = backtest.split(table, horizon)
    return OwnSeries(table, splits, horizon, base, _traits(table, splits, horizon, base))


def _traits(table: Table, splits: list[Split], horizon: int, base: Version) -> store.SeriesTraits:
    """Return the traits of the series: season, kind of values, effects of covariates, and yearly pattern.

    The test parts are only used for the season, which is detected when the table is read. The effects of covariates may
    be additive or proportional. The yearly pattern may be removed or kept. For each of these two decisions, the choice
    with the lower validation loss of the base version is returned.
    """
    parts = [split.series.values[: split.test][split.series.observed[: split.test]] for split in splits]
    traits = store.SeriesTraits(season=table.season).model_copy(update=_kind_of(parts))
    year = YEARS.get(table.frequency)
    if min(split.validation for split in splits) < MIN_YEARS * (year or np.inf):
        year = None
    if year is None and not table.covariates:
        return traits
    origins = backtest.origins(splits, table.season, horizon, "validation").subset(MAX_YEAR_FORECASTS)

    def loss(tried: store.SeriesTraits) -> float:
        forecaster = GlobalForecaster(with_traits(base, tried), torch.device("cpu"))
        return Validation(forecaster, origins)(forecaster.network)

    if table.covariates:
        forms = [traits.model_copy(update={"known": _known(table, splits, form)}) for form in (False, True)]
        without, *losses = map(loss, (traits, *forms))
        traits = forms[losses[1] < losses[0]]
        form = "shares of the usual value" if losses[1] < losses[0] else "absolute amounts"
        table.remarks.append(
            f"known covariates: {', '.join(table.covariates)}; their effects are {form}; validation loss of "
            f"{base.card.name}: {min(losses):.3f} with these columns, {without:.3f} without them"
        )
        if min(losses) > (1 - MIN_IMPROVEMENT) * without:
            table.remarks.append(
                "the known covariates hardly lower this loss: compare with a training without --known-covariates"
            )
    yearly = traits.model_copy(update={"year": year})
    return yearly if year and loss(yearly) < loss(traits) else traits


def _kind_of(parts: Sequence[np.ndarray]) -> dict[str, bool]:
    """Return whether all values [T] of all parts are non-negative, and whether all are integers."""
    values = np.concatenate(parts)
    return {"non_negative": bool((values >= 0).all()), "integer": bool((values % 1 == 0).all())}


def _known(table: Table, splits: list[Split], proportional: bool) -> store.KnownCovariates:
    """Return the known covariates with their means, deviations and coefficients in the training parts of all series.

    Raises:
        DataError: a column does not vary in the training parts.
    """
    ends = [(split.series, backtest.observed_end(split.series, split.validation)) for split in splits]
    parts = [(series.values[:end], series.covariates[:end], series.observed[:end]) for series, end in ends]
    together = np.concatenate([covariates for _, covariates, _ in parts])
    # The columns are first divided by their largest absolute value, so that no square overflows.
    unit = np.abs(together).max(axis=0) + (together == 0).all(axis=0)
    means, scales = ((together / unit).mean(axis=0) * unit, (together / unit).std(axis=0) * unit)
    for name, scale, largest in zip(table.covariates, scales, unit, strict=True):
        if scale <= 1e-9 * largest:
            raise DataError(f"{table.name}: known covariate {name!r} does not vary in the training part; leave it out")
    columns = [
        store.KnownCovariate(name=name, mean=mean, scale=scale, coefficient=0.0)
        for name, mean, scale in zip(table.covariates, means.tolist(), scales.tolist(), strict=True)
    ]
    known = store.KnownCovariates(columns=columns, proportional=proportional, calendar=table.calendar)
    precision, product = PRIOR_VALUES * np.eye(len(columns)), np.zeros(len(columns))
    for values, covariates, observed in parts:
        _, inputs_change, change = differences(values, covariates, table.season, known, observed)
        precision += inputs_change.T @ inputs_change
        product += inputs_change.T @ change
    coefficients = np.linalg.solve(precision, product).tolist()
    fitted = [
        column.model_copy(update={"coefficient": value}) for column, value in zip(columns, coefficients, strict=True)
    ]
    return known.model_copy(update={"columns": fitted})


def with_traits(version: Version, traits: store.SeriesTraits) -> Version:
    return replace(version, card=version.card.model_copy(update={"series": traits}))


class Validation:
    """Computes the quantile loss of a network on forecast origins, with the serving code."""

    def __init__(self, forecaster: GlobalForecaster, origins: Origins) -> None:
        self.forecaster, self.origins = forecaster, origins
        items = parse(forecaster, origins, origins.season)
        self.items = [replace(item, non_negative=False) for item in items]  # so that negative quantiles count

    def __call__(self, network: Forecaster) -> float:
        """Set the network to evaluation mode; return its quantile loss, NaN if it has diverged."""
        self.forecaster.network = network.eval()
        try:
            return self.origins.errors(predict(self.forecaster, self.items, 256)).quantile_loss
        except ArithmeticError:  # a forecast is not finite
            return math.nan


MIN_STEPS_PER_EPOCH, MAX_STEPS_PER_EPOCH = 8, 40  # each epoch ends with a validation
MAX_VALIDATION_FORECASTS = 1000


def train(options: Options, config: ForecasterFinetuneConfig, argv: Sequence[str] | None) -> Leaderboard:
    """Read the table, fine-tune a network, measure it, fine-tune a second network on all rows, and publish it.

    Return the leaderboard of the last measured part.
    """
    own = read(options, config.horizon)
    cards.reject_seen(own.base.card, f"--from {own.base.label}", own.data)
    print_table(own.table)
    run = Run(options, config, argv, own.sha256)
    run.write_lines("remarks.txt", own.table.remarks)
    run.write_lines("series.jsonl", to_json_lines(own.table))
    ends = [split.validation for split in own.splits]
    steps = min(max(sum(ends) // config.batch, MIN_STEPS_PER_EPOCH), MAX_STEPS_PER_EPOCH)
    validation = Validation(
        GlobalForecaster(with_traits(own.base, own.traits), torch.device(options.device)),
        backtest.origins(own.splits, own.table.season, own.horizon, "validation").subset(MAX_VALIDATION_FORECASTS),
    )
    budget = run.budget(config.epochs * steps, options.refits)
    best = finetune(run, config, own, ends, budget, validation).best
    network = best.network
    card, reason, publishes, board = evaluate(run, own, network)
    if publishes and options.refits:
        budget, ends = Budget(int(best.steps), total=run.step), [len(split.series.values) for split in own.splits]
        run.begin_refit()
        network = finetune(run, config, own, ends, budget).average.module
        # The kind of the values is that of all rows, the test parts included.
        kind = _kind_of([split.series.values[split.series.observed] for split in own.splits])
        card = cards.after_refit({**card, "series": {**card["series"], **kind}}, budget.steps)
    pictures = ["samples.png", *(["backtest.png"] if options.backtest else [])]
    run.finish(card, network, *map(run.folder.joinpath, pictures), publish=publishes)
    if options.backtest:
        print(f"wrote {run.folder / 'backtest.html'}")
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
    season, traits = own.table.season, own.traits
    pasts, masks = [], []
    for split, end in zip(own.splits, ends, strict=True):
        end = backtest.observed_end(split.series, end)
        values, observed = split.series.values[:end], split.series.observed[:end]
        if traits.known:
            effect = covariate_effect(values, split.series.covariates[:end], season, traits.known, observed)
            values = fill_missing(np.where(observed, values - effect, np.nan), season)
        if traits.year:
            values = values - yearly_pattern(values, traits.year, 0)
        pasts.append(torch.from_numpy(values))
        masks.append(torch.from_numpy(observed))
    source = Source(pasts, season, min(own.horizon, sizes.horizon), share=1.0, observed=masks)
    return WindowSampler([source], sizes.context, sizes.horizon)


def finetune(
    run: Run,
    config: ForecasterFinetuneConfig,
    own: OwnSeries,
    ends: Sequence[int],
    budget: Budget,
    validation: Validation | None = None,
) -> FinetuneRecipe:
    """Fine-tune the base network on the values before ``ends``; return the recipe with the averaged weights.

    With ``validation``, the recipe also has the averaged weights with the lowest validation loss.
    """
    network: Any = own.base.network().train().requires_grad_(True)
    sampler = window_sampler(own, network.sizes, ends)
    recipe = FinetuneRecipe(network, sampler, config, run.options, short=True, validation=validation)
    fit(run, recipe, budget, config.epochs)
    return recipe


def compare(forecaster: GlobalForecaster, own: OwnSeries, part: HeldOut) -> Leaderboard:
    """Compare the fine-tuned forecaster with the base version and with classical methods.

    The base version is compared without and, if the series have known covariates, with their effects.
    """
    base, device = own.base.label, forecaster.device
    networks = [served(f"{base}, not tuned", GlobalForecaster(own.base, device), "the published network", "untuned_")]
    if own.traits.known:
        known = GlobalForecaster(with_traits(own.base, own.traits), device)
        explanation = "the same, with the effects of the known covariates"
        networks.append(served(f"{base} with known covariates", known, explanation, "untuned_known_"))
    networks.append(served(f"{forecaster.card.name}, tuned", forecaster, f"{base}, fine-tuned on the training part"))
    return leaderboard.compare(own.table, own.splits, own.horizon, part, networks)


def measure(forecaster: GlobalForecaster, own: OwnSeries) -> dict[str, Any]:
    """Return the metrics on the test part for the card."""
    return compare(forecaster, own, "test").card_metrics()


def verdict(board: Leaderboard) -> tuple[bool, str]:
    """Return whether fine-tuning helped, and a sentence about it.

    Fine-tuning helped if the quantile loss is lower than that of the seasonal naive forecast, and lower than that of
    the base version by at least the share MIN_IMPROVEMENT. If there are known covariates, the base version may use
    them, too.
    """
    losses = {name: errors.quantile_loss for name, errors in board.errors.items()}
    bases = [method.name for method in board.methods if method.prefix.startswith("untuned_")]
    base = min(bases, key=lambda name: losses[name])
    shown = {name: f"{losses[name]:.{backtest.decimals(losses[name])}f}" for name in losses}
    change = leaderboard.change(board.errors[board.own].losses, board.errors[base].losses)
    others = ", ".join(f"{name} {shown[name]}" for name in (*bases, NAIVE.name))
    facts = f"on the {board.part} part: quantile loss {shown[board.own]}; {others}; change by fine-tuning {change}"
    if losses[board.own] > (1 - MIN_IMPROVEMENT) * losses[base]:
        return False, f"Fine-tuning did not help {facts}"
    if losses[board.own] >= losses[NAIVE.name]:
        return False, f"Fine-tuning helped, but repeating the last season is at least as good {facts}"
    return True, f"Fine-tuning helped {facts}"


def card_of(own: OwnSeries, network: Any, verdict: str) -> dict[str, Any]:
    """Return the card without its metrics."""
    table, base, count = own.table, own.base.card, len(own.splits)
    names = shorten([split.series.name for split in own.splits])
    season = f"season {table.season}" if table.season > 1 else "no season"
    season += f", yearly pattern of {own.traits.year:g} values" if own.traits.year else ""
    season += f", known covariates {', '.join(table.covariates)}" if table.covariates else ""
    shares = "; ".join(
        f"{part} part: {share:.0%} of a series, at most {most} horizons of {own.horizon} steps"
        for part, (share, most) in backtest.SHARES.items()
    )
    return {
        **cards.fields("forecaster", network),
        "title": f"Forecasts of {names}, one value per {table.frequency}"[:200],
        "series": own.traits.model_dump(),
        "data": own.data,
        "ancestors": cards.ancestors(base, "base"),
        "notes": (
            f"Fine-tuned from {base.name}@{base.version}. {verdict}. {count:,} series, one value per "
            f"{table.frequency}, {season}. All series were cut at the same times. {shares}. Of the averaged weights, "
            f"those with the lowest loss on the validation part were kept. The decision part, which is later, decided "
            f"whether fine-tuning helped. {len(table.remarks):,} repairs or omissions in the table."
        ),
    }


def evaluate(run: Run, own: OwnSeries, network: Any) -> tuple[dict[str, Any], str, bool, Leaderboard]:
    """Evaluate with the serving code on the decision part and, if the network is to be published, on the test part.

    Return the card, a sentence that states whether fine-tuning helped, whether to publish the network, and the
    leaderboard of the last measured part. The network is published if fine-tuning helped, or with --force.
    """
    forecaster = run.predictor(card_of(own, network, "Not measured yet"), network)
    board = compare(forecaster, own, "decision")
    helped, reason = verdict(board)
    publishes = helped or run.options.force
    tests = run.options.part == "test" and (publishes or run.options.backtest)
    if tests:
        board = compare(forecaster, own, "test")
    card = card_of(own, network, reason)
    card, _ = run.measure(card, network, lambda *_: board.card_metrics(), tests, [own.past()])
    draw_samples(run.folder / "samples.png", board.examples())
    if run.options.backtest:
        report.write(run.folder, board, run.command)
    return card, reason, publishes, board


def backtest_version(options: Options, config: ForecasterFinetuneConfig) -> Leaderboard:
    """Write the report on the published version given by ``--version``, without training; return its leaderboard.

    Raises:
        DataError: the table or the version cannot be used, or the version was trained on all rows of the table.
    """
    own = read(options, config.horizon)
    print_table(own.table)
    card, version = own.base.card, own.base.label
    if cards.seen_data(card, own.data):
        raise DataError(
            f"--version {version}: this version was trained on all rows of {own.table.name}, so its errors on these "
            "rows would be too low. Its backtest.png shows errors that were measured before this training. Type "
            "--backtest without --version to train and measure again"
        )
    folder = options.runs / card.name / f"backtest-{datetime.now(UTC).strftime('%Y-%m-%dT%H-%M-%S')}"
    folder.mkdir(parents=True)
    command = shlex.join(["python", "-m", options.script, *sys.argv[1:]])
    forecaster = GlobalForecaster(own.base, torch.device(options.device))
    networks = [served(version, forecaster, "the published network")]
    board = leaderboard.compare(own.table, own.splits, own.horizon, "test", networks)
    report.write(folder, board, command)
    print(board.text())
    print(f"wrote {folder / 'backtest.html'} and backtest.png")
    return board
