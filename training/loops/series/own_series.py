"""Read a user's series, split them, determine their traits such as the season, and find the version to fine-tune."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from app import store
from app.networks.forecaster import Forecaster
from app.store.version import Version
from app.tasks.covariates import PRIOR_VALUES, differences
from app.tasks.forecasting import GlobalForecaster
from app.tasks.seasonality import MIN_YEARS
from training.data.datasets import DataError
from training.data.tables import Table, describe, read_table, reader_options, summary, without_gaps
from training.evaluation import backtest, forecast_metrics
from training.evaluation.backtest import Origins, Split
from training.options import Options, base_version

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

    @property
    def data(self) -> dict[str, str]:
        """The digest of the table by its key in the field ``data`` of a card."""
        return {f"csv:{self.table.name}": self.sha256}


def preview(options: Options) -> None:
    """Print how the table is read. If the table is rejected, exit with status 2 and a message."""
    try:
        table = read_table(options.data_options["csv"], reader_options(options.data_options))
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


def print_table(table: Table) -> None:
    """Print a summary of the table and its first remarks."""
    print(summary(table))
    for remark in table.remarks[:MAX_PRINTED_REMARKS]:
        print(f"  {remark}")
    if len(table.remarks) > MAX_PRINTED_REMARKS:
        hidden = len(table.remarks) - MAX_PRINTED_REMARKS
        print(f"  ... and {hidden:,} more; all are in remarks.txt in the run folder")


def read(options: Options, horizon: int) -> OwnSeries:
    """Read the table given by --csv and the version given by --from or --version.

    ``horizon``: 0 means one season or, without a season, DEFAULT_HORIZON. This default is reduced to the horizon of the
    network, and to the longest horizon for which the series can be split.

    Raises:
        DataError: the table or the version cannot be used.
    """
    own = options.data_options
    table = without_gaps(read_table(own["csv"], reader_options(own)))
    base = base_version(options, ("forecaster",), advice="")
    if base is None:
        raise DataError("--from scratch: own series need a published forecaster to fine-tune; omit --from")
    needed = base.card.series.known if base.card.series else None
    names = [column.name for column in needed.columns] if needed else []
    if needed and names != list(table.covariates):
        calendar = f" --holidays {needed.calendar.country}" if needed.calendar else ""
        known = f" --known-covariates {shlex.quote(','.join(needed.named))}" if needed.named else ""
        raise DataError(f"{label(base)} reads the known covariates {', '.join(names)}; use{known}{calendar}")
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


def traits_of_all_rows(own: OwnSeries) -> store.SeriesTraits:
    """Return the traits of the series for a network that was trained on all rows, the test parts included."""
    values = [split.series.values[split.series.observed] for split in own.splits]
    return own.traits.model_copy(update=_kind_of(values))


def _kind_of(parts: Sequence[np.ndarray]) -> dict[str, bool]:
    """Return whether all values [T] of all parts are non-negative, and whether all are integers."""
    values = np.concatenate(parts)
    return {"non_negative": bool((values >= 0).all()), "integer": bool((values % 1 == 0).all())}


def _known(table: Table, splits: list[Split], proportional: bool) -> store.KnownCovariates:
    """Return the known covariates with their means, deviations and coefficients in the training parts of all series.

    Raises:
        DataError: a column does not vary in the training parts.
    """
    ends = [backtest.observed_end(split.series, split.validation) for split in splits]
    parts = [
        (split.series.values[:end], split.series.covariates[:end], split.series.observed[:end])
        for split, end in zip(splits, ends, strict=True)
    ]
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


def label(version: Version) -> str:
    return f"{version.card.name}@{version.card.version}"


class Validation:
    """Computes the quantile loss of a network on forecast origins."""

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
        # The forecast of a series with missing values at its end begins with these values.
        steps = np.array([item.gap for item in items])[:, None] + np.arange(horizon)  # [N, horizon]
        self.steps, self.horizon = steps[..., None], int(steps.max()) + 1

    @torch.inference_mode()
    def __call__(self, network: Forecaster) -> float:
        """Set the network to evaluation mode; return its quantile loss."""
        network.eval()
        batches = zip(self.values.split(256), self.seasons.split(256), strict=True)
        quantiles = torch.cat([network.forecast(values, seasons, self.horizon) for values, seasons in batches])
        levels = np.take_along_axis(quantiles[..., 1:-1].cpu().numpy(), self.steps, axis=1) + self.added
        return float(forecast_metrics.quantile_loss(self.origins.actual, levels, self.origins.mase_scale).mean())
