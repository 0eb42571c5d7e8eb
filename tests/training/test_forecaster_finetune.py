"""Fine-tuning the forecaster on a user's series: held-out values, metrics and publishing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.networks import FORECASTER, publish_network
from support.service import TEST, serving
from support.trainings import set_limits

from app import store
from app.networks.series_reader import ForecasterSizes
from app.settings import Settings
from app.store import Store
from app.tasks.classification import ImageClassifier
from app.tasks.forecasting import SCORES, GlobalForecaster
from training import lstm
from training.data.datasets import DataError
from training.data.tables import TableOptions, read_table, without_gaps
from training.evaluation import backtest, generation, leaderboard
from training.evaluation.classical import CLASSICAL, NAIVE
from training.evaluation.forecaster import served
from training.evaluation.leaderboard import Leaderboard
from training.loops import own_series
from training.loops.own_series import Validation
from training.options import base_version

SHORT = ["--season", "4", "--epochs", "8", "--set", "batch=32", "learning_rate=0.02", "--threads", "1"]


def sales(seed: int, count: int = 120) -> np.ndarray:
    """Return sales with a season of four days, and so much noise that the seasonal naive forecast is poor."""
    return 50 + 10 * np.sin(np.pi * np.arange(count) / 2) + np.random.default_rng(seed).normal(0, 4, count)


def write_csv(path: Path, **series: Any) -> Path:
    """Write a CSV file with a column for each series. None is an empty cell."""
    count = max(len(values) for values in series.values())
    rows = [
        [(date(2024, 1, 1) + timedelta(days=i)).isoformat()]
        + ["" if i >= len(values) or values[i] is None else f"{values[i]:.6g}" for values in series.values()]
        for i in range(count)
    ]
    path.write_text("\n".join(",".join(row) for row in [["day", *series], *rows]) + "\n")
    return path


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with sales of two shops, and a store with a tiny, untrained forecaster."""
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "sales.csv", north=sales(1), south=sales(2))
    publish_network(tmp_path / "models_store", "series-lstm", seed=3)
    return tmp_path


def train(*options: str, file: str = "sales.csv") -> None:
    lstm.main(["--csv", file, "--name", "sales", *SHORT, *options])


def test_a_forecaster_that_improves_is_published_and_served(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    *_, last_line = capsys.readouterr().out.splitlines()
    assert last_line.startswith("Fine-tuning helped on the decision part: quantile loss 0.")
    version = Store(workspace / "models_store").read("sales", 1)
    card = version.card
    losses = [card.metrics[f"{name}quantile_loss"].value for name in ("", "naive_", "untuned_")]
    assert losses == sorted(losses)
    assert set(card.metrics) == {
        f"{name}{key}"
        for name in ("", "untuned_", "naive_", "autoets_", "autotheta_")
        for key in ("mase", "quantile_loss", "coverage_95")
    }
    split = "14 forecasts of 4 steps, from 2 series, on values held out of training"
    assert card.metrics["mase"].split == card.metrics["naive_mase"].split == split
    assert (card.metrics["mase"].weights, card.metrics["naive_mase"].weights) == ("before refit", "other method")
    assert card.metrics["mase"].interval[0] < card.metrics["mase"].value < card.metrics["mase"].interval[1]  # type: ignore[index]
    assert "Fine-tuned from series-lstm@1. Fine-tuning helped on the decision part" in card.notes
    with serving(Settings(store=workspace / "models_store", **TEST)) as client:
        body: dict[str, Any] = {"values": sales(9).tolist(), "horizon": 4, "seasonality": 4}
        answers = {
            model: client.post("/v1/series/forecast", json={**body, "model": model}).json()
            for model in ("sales", "series-lstm")
        }
        assert answers["sales"]["version"] == 1
        middle, before = (np.array(answer["results"][0]["median"]) for answer in answers.values())
        tuned = GlobalForecaster(version, torch.device("cpu"))
        assert middle == pytest.approx(tuned.predict([tuned.parse(body["values"], 4, seasonality=4)])[0].median)
        assert not np.allclose(middle, before)
        assert client.get("/v1/models/sales").json()["card"]["metrics"]["mase"]["value"] == card.metrics["mase"].value


@pytest.mark.slow
def test_without_improvement_only_force_publishes(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("--set", "learning_rate=1e-9")
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("Fine-tuning did not help on the decision part: quantile loss ")
    assert last_line.endswith("Nothing was published; --force publishes anyway.")
    assert not (workspace / "models_store" / "sales").exists()
    (folder,) = (workspace / "runs" / "sales").iterdir()
    assert (folder / "finished").exists()
    card = json.loads((folder / "card.json").read_text())
    assert "Fine-tuning did not help" in card["notes"]
    assert {metric["split"].rpartition(", ")[2] for metric in card["metrics"].values()} == {"on values for validation"}
    train("--set", "learning_rate=1e-9", "--no-publish")
    assert "force" not in capsys.readouterr().out
    train("--set", "learning_rate=1e-9", "--force")
    assert "Fine-tuning did not help" in Store(workspace / "models_store").card("sales", 1).notes


def board(path: Path, **losses: float) -> Leaderboard:
    """Return a leaderboard of methods with these quantile losses, by the prefix of their metrics."""
    table = read_table(write_csv(path / "one.csv", north=sales(1)), TableOptions(season=4))
    splits = backtest.split(table, 4)

    def method(prefix: str, loss: float) -> backtest.Method:
        """Return a method that forecasts the actual values plus an error."""

        def forecast(origins: backtest.Origins) -> list[Any]:
            forecasts = NAIVE.forecast(origins)
            medians = origins.actual + loss * origins.mase_scale[:, None]
            return [
                replace(each, median=median, quantiles=np.repeat(median[:, None], len(SCORES), axis=1))
                for each, median in zip(forecasts, medians, strict=True)
            ]

        return backtest.Method("seasonal naive" if prefix == "naive_" else f"the {prefix}", prefix, "", forecast)

    methods = [method(prefix, loss) for prefix, loss in losses.items()]
    origins = backtest.origins(splits, 4, 4, "decision")
    forecasts = {each.name: each.forecast(origins) for each in methods}
    return Leaderboard(table, splits, 1, "decision", origins, methods, forecasts)


@pytest.mark.parametrize(
    ("losses", "start"),
    [
        ((0.7, 0.6, 0.5), "Fine-tuning helped on the decision part: quantile loss 0.500; the untuned_ 0.600, "),
        ((0.7, 0.6, 0.597), "Fine-tuning did not help on the decision part: "),
        ((0.7, 0.5, 0.6), "Fine-tuning did not help on the decision part: "),
        # losses that are equal or different only after they are rounded to three decimals
        ((1, 0.05051, 0.05049), "Fine-tuning did not help on the decision part: quantile loss 0.0505; "),
        ((1, 0.0504, 0.0496), "Fine-tuning helped on the decision part: quantile loss 0.0496; "),
        ((0.7, 0.9, 0.5, 0.5), "Fine-tuning did not help on the decision part: "),  # nor did it with covariates
        ((0.7, 0.8, 0.7), "Fine-tuning helped, but repeating the last season is at least as good on the decision part"),
    ],
)
def test_fine_tuning_helped_if_it_beats_the_base_version_and_seasonal_naive(
    tmp_path: Path, losses: Any, start: str
) -> None:
    names = ("naive_", "untuned_", *(("untuned_known_",) if len(losses) > 3 else ()), "own")
    helped, sentence = own_series.verdict(board(tmp_path, **dict(zip(names, losses, strict=True))))
    assert sentence.startswith(start)
    assert helped == start.startswith("Fine-tuning helped on the decision part: ")


def test_a_leaderboard_says_which_method_is_best_and_how_certain_it_is(tmp_path: Path) -> None:
    """All windows have the same error here, so the bootstrap intervals have no width."""
    own_best = board(tmp_path, naive_=0.8, own=0.5)
    assert not own_best.classical_wins
    assert own_best.verdict().startswith(
        "the own has the lowest quantile loss. The loss of seasonal naive differs by +60"
    )
    naive_best = board(tmp_path, own=0.5, naive_=0.4)
    naive_best = replace(naive_best, methods=naive_best.methods[::-1])
    assert naive_best.classical_wins
    assert "seasonal naive has the lowest quantile loss, so use seasonal naive instead" in naive_best.verdict()
    assert naive_best.change("seasonal naive") == "-20.0% (90 % interval -20.0% to -20.0%)"


def test_the_bootstrap_draws_windows_with_the_losses_of_both_methods() -> None:
    other = np.random.default_rng(1).lognormal(size=200)
    assert leaderboard.change(0.9 * other, other) == "-10.0% (90 % interval -10.0% to -10.0%)"
    noisy = leaderboard.change(np.random.default_rng(2).permutation(other), other)
    assert re.fullmatch(r"\+0\.0% \(90 % interval -1\d\.\d% to \+[12]\d\.\d%\)", noisy)
    assert leaderboard.change(other[:1], other[:1]) == "+0.0% (one forecast, no interval)"


@pytest.mark.parametrize("options", [[], ["--no-refit"]])
def test_values_of_the_test_part_change_the_kind_of_values_after_the_refit_only(
    workspace: Path, options: list[str]
) -> None:
    write_csv(workspace / "sales.csv", north=np.concatenate([sales(1)[:92].round(), [-0.5], sales(1)[93:].round()]))
    train("--force", "--epochs", "1", *options)
    series = Store(workspace / "models_store").card("sales", 1).series
    assert series is not None
    assert series.integer == series.non_negative == bool(options)


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["0.02", "1e-9"])
def test_the_test_part_does_not_influence_whether_a_network_is_published(workspace: Path, rate: str) -> None:
    train("--set", f"learning_rate={rate}")
    (first,) = (workspace / "runs" / "sales").iterdir()
    published = (workspace / "models_store" / "sales" / "1").exists()
    assert published == (rate == "0.02")
    # The last 28 of 120 values are the test part. Noise in this part makes the tuned network worse than the others.
    noise = [np.concatenate([sales(seed)[:92], 500 * np.random.default_rng(seed).random(28)]) for seed in (1, 2)]
    write_csv(workspace / "sales.csv", north=noise[0], south=noise[1])
    train("--set", f"learning_rate={rate}", "--no-refit")
    second = max((workspace / "runs" / "sales").iterdir())
    assert (workspace / "models_store" / "sales" / "2").exists() == published
    verdicts = [
        re.findall(r"Fine-tuning .*?\. ", json.loads((folder / "card.json").read_text())["notes"])
        for folder in (first, second)
    ]
    assert verdicts[0] == verdicts[1] != []


def test_backtest_metrics_equal_a_plain_loop_over_all_origins(tmp_path: Path) -> None:
    values = sales(1).tolist()
    values[100] = None
    table = without_gaps(read_table(write_csv(tmp_path / "one.csv", north=values), TableOptions(season=4)))
    (parts,) = backtest.split(table, 4)
    assert (parts.validation, parts.decision, parts.test) == (68, 80, 92)
    evaluation_set = backtest.origins([parts], 4, 4, "test")
    assert [len(past) for past in evaluation_set.past] == list(range(92, 120, 4))
    series = table.series[0].values
    unit = np.mean([abs(series[i] - series[i - 4]) for i in range(4, 68)])
    scaled = []
    for origin in range(92, 120, 4):
        observed = [i for i in range(origin, origin + 4) if values[i] is not None]
        scaled.append(np.mean([abs(series[i] - series[i - 4]) for i in observed]) / unit)
    assert evaluation_set.errors(NAIVE.forecast(evaluation_set)).mase == pytest.approx(np.mean(scaled))
    validation_set = backtest.origins([parts], 4, 4, "validation")
    assert [len(past) for past in validation_set.past] == list(range(68, 77))
    assert [len(past) for past in validation_set.subset(3).past] == [68, 72, 76]
    assert [len(past) for past in backtest.origins([parts], 4, 4, "decision").past] == [80, 84, 88]


def test_all_series_of_a_table_are_cut_at_the_same_times(tmp_path: Path) -> None:
    """One series is long, one is short, and one ends early. No series is trained on days on which another is tested."""
    old, new, ended = sales(1, 400), [None] * 260 + sales(2, 140).tolist(), [*sales(3, 250), *([None] * 150)]
    path = write_csv(tmp_path / "shops.csv", old=old, new=new, ended=ended)
    splits = backtest.split(read_table(path, TableOptions(season=4)), 4)
    by_name = {split.series.name: split for split in splits}
    assert set(by_name) == {"old", "new", "ended"}
    for part in ("validation", "decision", "test"):
        starts = {name: getattr(by_name[name], part) for name in ("old", "new")}
        assert len({by_name[name].series.times[at] for name, at in starts.items()}) == 1
    assert by_name["ended"].bounds("test") == (250, 250)
    assert backtest.origins(splits, 4, 4, "test").series_count == 2


def split_with_gaps(path: Path, changed_from: int | None = None) -> backtest.Split:
    """Return the split of a series with missing values before position 68, where validation begins, 76 and 92.

    From the position ``changed_from``, the values are changed.
    """
    values = sales(1).round(3).tolist()
    for position in (changed_from and range(changed_from, 120)) or ():
        values[position] = 500.0 + position
    for position in (20, 66, 67, 73, 74, 75, 91):
        values[position] = None  # type: ignore[call-overload]
    table = without_gaps(read_table(write_csv(path, north=values), TableOptions(season=4)))
    (parts,) = backtest.split(table, 4)
    assert (parts.validation, parts.test) == (68, 92)
    return parts


@pytest.mark.parametrize(
    ("part", "position"), [("validation", 68), ("validation", 75), ("validation", 76), ("test", 92)]
)
def test_a_missing_value_before_an_origin_does_not_show_the_values_after_it(
    workspace: Path, part: Any, position: int
) -> None:
    forecaster = GlobalForecaster(Store(workspace / "models_store").read("series-lstm", 1), torch.device("cpu"))
    seen = []
    for changed_from in (None, position):
        origins = backtest.origins([split_with_gaps(workspace / "one.csv", changed_from)], 4, 4, part)
        at = [place for _, place in origins.places].index(position)
        one = replace(origins.subset(1), past=[origins.past[at]], covariates=[origins.covariates[at]])
        own = served("own", forecaster, "")
        seen.append([one.past[0], *(each.forecast(one)[0].quantiles for each in (own, *CLASSICAL))])
    missing = [place for place in (20, 66, 67, 73, 74, 75, 91) if place < position]
    assert np.isnan(seen[0][0]).nonzero()[0].tolist() == missing
    for before, after in zip(*seen, strict=True):
        assert np.array_equal(before, after, equal_nan=True)
    assert all(quantiles.shape == (4, 11) and np.isfinite(quantiles).all() for quantiles in seen[0][1:])


def origins_of(*pasts: Any, season: int = 1, horizon: int = 4) -> backtest.Origins:
    """Return one origin after each past."""
    places, actual = [(number, len(past)) for number, past in enumerate(pasts)], np.ones((len(pasts), horizon))
    return backtest.Origins([np.array(past) for past in pasts], actual, np.ones(len(pasts)), season, places, [])


def test_intervals_of_the_naive_forecast_contain_the_trend() -> None:
    """The mean of the differences between seasons counts: they are 9, 11, 9, 11, ..."""
    (forecast,) = NAIVE.forecast(origins_of(np.cumsum([10.0 + (-1) ** i for i in range(41)])))
    deviation = np.diff(forecast.quantiles[:, [SCORES.argmin(), SCORES.argmax()]], axis=1)[:, 0] / np.ptp(SCORES)
    assert deviation == pytest.approx(np.sqrt((9**2 + 11**2) / 2 * np.arange(1, 5)))


def test_the_naive_forecast_continues_the_season_after_a_gap() -> None:
    pasts = [0.0, 5, 2, 1, np.nan, 2, np.nan, np.nan], [4.0, np.nan, 3, np.nan]
    medians = [forecast.median.tolist() for forecast in NAIVE.forecast(origins_of(*pasts, season=3))]
    assert medians == [[2, 1, 1.5, 2], [3, 3, 3, 3]]  # the second series is not longer than a season


@pytest.mark.parametrize("method", CLASSICAL, ids=lambda method: method.name)
def test_classical_methods_forecast_every_series(method: backtest.Method) -> None:
    """The seasonal naive forecast replaces a model that cannot be fitted."""
    trend = 50 + 0.2 * np.arange(120) + 10 * np.sin(np.pi * np.arange(120) / 2)
    noise = np.random.default_rng(0).normal(0, 1, 120)
    huge = np.where(np.arange(60) % 4, 1e149, -1e149)
    forecasts = method.forecast(origins_of(trend + noise, np.arange(6.0), huge, np.full(40, 3.0), season=4))
    assert all(np.isfinite(forecast.quantiles).all() for forecast in forecasts)
    assert forecasts[0].median == pytest.approx(trend[:4] + 24, abs=3 if method is not NAIVE else 7)


def test_the_validation_loss_is_that_of_the_served_forecasts_at_gaps_too(workspace: Path) -> None:
    version = Store(workspace / "models_store").read("series-lstm", 1)
    forecaster = GlobalForecaster(version, torch.device("cpu"))
    origins = backtest.origins([split_with_gaps(workspace / "one.csv")], 4, 4, "validation")
    loss = origins.errors(served("own", forecaster, "").forecast(origins)).quantile_loss
    assert Validation(forecaster, origins)(forecaster.network) == pytest.approx(loss, rel=1e-6)


def test_training_windows_end_with_known_values_before_the_validation_part(workspace: Path) -> None:
    options, config = lstm.arguments(["--csv", "one.csv", "--name", "one", "--season", "4"])
    values, batches = split_with_gaps(workspace / "one.csv").series, []
    for changed_from in (None, 68):
        split_with_gaps(workspace / "one.csv", changed_from)
        own = own_series.read(options, config.horizon)
        sampler = own_series.window_sampler(
            own, ForecasterSizes(**FORECASTER), [split.validation for split in own.splits]
        )
        batches.append(sampler.sample(500, 0.0, False, torch.Generator().manual_seed(0)))
    for before, after in zip(*batches, strict=True):
        assert torch.equal(before.nan_to_num(-1), after.nan_to_num(-1))
    assert set(batches[0].values[:, -1].tolist()) < set(values.values[values.observed].tolist())


@pytest.mark.slow
def test_a_horizon_beyond_that_of_the_network_is_tested_too(workspace: Path) -> None:
    train("--horizon", "9", "--force")
    card = Store(workspace / "models_store").card("sales", 1)
    assert card.metrics["mase"].split.startswith("6 forecasts of 9 steps")


@pytest.mark.slow
def test_short_and_constant_series_are_skipped_by_name(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = 100 + 10 * np.sin(np.pi / 2 * np.arange(120))  # repeats except for rounding
    assert len(set(steps)) > 4
    new = [None] * 72 + sales(2, 48).tolist()
    write_csv(workspace / "sales.csv", north=sales(1), new=new, still=steps, old=sales(3, 12))
    train("--horizon", "12", "--force")
    output = capsys.readouterr().out
    assert "new: 12 values before the validation part; season 4 and horizon 12 need at least 20" in output
    assert re.search(r"still: its first \d+ values repeat exactly with season 4", output)
    assert "old: 12 values before the validation part; season 4 and horizon 12 need at least 20" in output
    assert "from 1 series" in Store(workspace / "models_store").card("sales", 1).metrics["mase"].split


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--horizon", "60"], "sales.csv: no series can be used for training and testing; south: 0 values before the"),
        (["--from", "nobody"], "--from nobody: there is no model 'nobody' in the store"),
        (["--from", "scratch"], "--from scratch: own series need a published forecaster"),
        (["--column", "east"], "sales.csv: there is no column 'east'; its columns are: day, north, south"),
    ],
)  # fmt: skip
def test_unusable_data_and_options_are_rejected_before_a_run_starts(
    workspace: Path, options: list[str], sentence: str
) -> None:
    with pytest.raises(DataError) as rejection:
        train(*options)
    assert sentence in str(rejection.value)
    assert "use --from scratch" not in str(rejection.value)
    assert not (workspace / "runs").exists()


@pytest.mark.parametrize(
    ("count", "frequency", "season", "horizon"),
    [(36, "MS", 12, 5), (104, "W-MON", 52, 6), (90, "D", 7, 6), (14, "QS", 4, 1)],
)
@pytest.mark.usefixtures("workspace")
def test_short_business_series_can_be_tuned_and_tested(count: int, frequency: str, season: int, horizon: int) -> None:
    days = pd.date_range("2021-01-04" if season == 52 else "2021-01-01", periods=count, freq=frequency)
    values = np.random.default_rng(0).poisson(50 + 40 * np.sin(2 * np.pi * np.arange(count) / season))
    pd.DataFrame({"day": days, "sold": values}).to_csv("short.csv", index=False)
    options, config = lstm.arguments(["--csv", "short.csv", "--name", "short"])
    own = own_series.read(options, config.horizon)
    assert (own.table.season, own.horizon) == (season, horizon)
    assert own.traits == store.SeriesTraits(season=season, non_negative=True, integer=True)
    for part in ("validation", "decision", "test"):
        assert backtest.origins(own.splits, season, own.horizon, part).past


@pytest.mark.usefixtures("workspace")
def test_a_yearly_pattern_of_days_is_used_if_it_helps() -> None:
    random, years = np.random.default_rng(0), np.arange(1300) / 365.25
    for strength, year in ((40, 365.25), (0, None)):
        values = 100 + strength * np.sin(2 * np.pi * years) + 5 * (np.arange(1300) % 7) + random.normal(0, 8, 1300)
        days = pd.date_range("2021-01-01", periods=1300)
        pd.DataFrame({"day": days, "sold": values}).to_csv("days.csv", index=False)
        options, config = lstm.arguments(["--csv", "days.csv", "--name", "days"])
        assert own_series.read(options, config.horizon).traits.year == year


def test_a_random_walk_has_no_season(tmp_path: Path) -> None:
    walks = {f"w{seed}": np.random.default_rng(seed).normal(size=400).cumsum() for seed in range(4)}
    assert read_table(write_csv(tmp_path / "walks.csv", **walks)).season == 1


# --- the base version and the published version


def test_fine_tuning_starts_from_the_active_version(workspace: Path) -> None:
    publish_network(workspace / "models_store", "series-lstm")
    arguments = ["--csv", "sales.csv", "--name", "sales"]

    def base_number(*options: str) -> int:
        version = base_version(lstm.arguments([*arguments, *options])[0], ("forecaster",))
        assert version is not None
        return version.card.version

    assert base_number() == 2
    Store(workspace / "models_store").activate("series-lstm", 1)
    assert base_number() == 1
    assert base_number("--from", "series-lstm@2") == 2


def publish_reference_classifier(folder: Path, held_out: int | None) -> None:
    fields = {"labels": list("0123456789"), "held_out": held_out}
    publish_network(folder, generation.REFERENCE_CLASSIFIER, "digit-net", {"conv": [2, 3]}, **fields)


@pytest.mark.parametrize(("held_out", "stated"), [(4999, "4,999"), (None, "0")])
def test_a_classifier_that_was_trained_on_the_unseen_images_is_rejected(
    tiny_store: Path, held_out: int | None, stated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, unseen_images=5000)
    publish_reference_classifier(tiny_store, held_out)
    with pytest.raises(SystemExit, match=f"mnist-judge@1 cannot evaluate generators: .* states {stated}"):
        generation.load_reference_classifier(tiny_store, "cpu")


def test_another_store_uses_the_reference_classifier_of_the_included_store(tmp_path: Path) -> None:
    assert generation.load_reference_classifier(tmp_path / "seeds", "cpu").card.name == "mnist-judge"


def test_the_active_version_of_the_reference_classifier_is_used(tiny_store: Path) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        publish_reference_classifier(tiny_store, 5000)

    def load() -> ImageClassifier:
        return generation.load_reference_classifier(tiny_store, "cpu")

    assert load().card.version == 2
    Store(tiny_store).activate(generation.REFERENCE_CLASSIFIER, 1)
    assert load().card.version == 1
    assert generation.load_reference_classifier(tiny_store, "cpu", 2).card.version == 2


@pytest.mark.slow
def test_a_version_published_under_another_active_one_is_reported_as_waiting(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = workspace / "models_store"
    train("--force")
    assert "waits" not in capsys.readouterr().out
    Store(models).activate("sales", 1)
    train("--force", "--seed", "1")
    output = capsys.readouterr().out
    clause = "sales@2, which is not active; sales@1 is (mase "
    assert f"published {clause}" in output
    command = "\nto activate it: quartet models activate sales 2"
    assert f"{command}\n" in output
    train("--force", "--seed", "1", "--store", str(models))
    output = capsys.readouterr().out
    assert f"already published: {clause}" in output
    assert f"{command} --store {models}\n" in output
    assert Store(models).find("sales") == [1, 2]
