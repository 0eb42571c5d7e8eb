"""What every training does, whatever it trains: publish, resume, refit, leave the test part alone, and report."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.fake_device import fake_device
from support.processes import start_python
from support.trainings import KINDS, SALES, TEXT, log_of, of_kinds, only_entry, set_limits
from support.trainings import save_public_data as save_data

from app import store
from app.store.version import Version
from training.evaluation import evaluate, speed

IN_MAKE_TEST = (("cnn", signal.SIGKILL), ("own-rnn", signal.SIGINT))  # the other interruptions are slow tests


def every_kind(*main: str) -> pytest.MarkDecorator:
    """Parametrise a test by ``kind``. All kinds but ``main`` are slow."""
    return pytest.mark.parametrize(
        "kind", [pytest.param(name, marks=() if name in main else pytest.mark.slow) for name in KINDS]
    )


def published(folder: Path, kind: str, number: int = 1) -> Version:
    return store.Store(folder / "models_store").read(KINDS[kind].model, number)


def same_tensors(first: Version, second: Version) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items()
    )


@of_kinds()
def test_a_run_publishes_a_version_with_its_origin_figures_and_pictures(
    kind: str, finished: Callable[[str], Path]
) -> None:
    whole, model = finished(kind), KINDS[kind].model
    run, card = only_entry(whole / "runs" / model), published(whole, kind).card
    for file in ("config.json", "metrics.jsonl", "curves.png", "samples.png", "card.json"):
        assert (run / file).stat().st_size > 50, file
    assert card.command
    assert card.command.startswith(f"python -m {KINDS[kind].script.__name__} ")
    assert "--seed 3" in card.command
    assert card.seed == 3
    assert card.metrics
    assert all(math.isfinite(metric.value) for metric in card.metrics.values())
    if kind != "own-gan":  # its main figure has no better direction
        low, high = next(iter(card.metrics.values())).interval or (1, 0)
        assert low <= next(iter(card.metrics.values())).value <= high
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in card.data.values())
    assert {"curves.png", "samples.png"} <= {path.name for path in published(whole, kind).folder.iterdir()}
    assert card.speed
    assert speed.describe(card.speed.model_dump(), card.task) in (whole / "output").read_text()
    records = log_of(run)
    assert [record["step"] for record in records] == sorted({record["step"] for record in records})
    assert records[-1]["progress"] == 1
    assert len((whole / "runs" / "test_measurements.jsonl").read_text().splitlines()) == 1


@of_kinds()
def test_evaluation_confirms_the_figures_of_a_card_and_reports_other_figures(
    kind: str, finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = shutil.copytree(finished(kind) / "models_store", tmp_path / "copy")
    model = KINDS[kind].model
    assert evaluate.main([f"{model}@1", "--store", str(models)]) == 0
    path = models / model / "1" / "card.json"
    changed = json.loads(path.read_text())
    metric = next(iter(changed["metrics"].values()))
    metric["value"] += evaluate.MAX_BFLOAT16_DIFFERENCE + 3 * 10 ** -metric["decimals"]
    path.write_text(json.dumps(changed))
    capsys.readouterr()
    refitted = changed.get("refit_steps") is not None
    assert evaluate.main([model, "--store", str(models)]) == (0 if refitted else 1)
    assert ("not measured: the metrics are those before the refit" if refitted else "✗") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        pytest.param(kind, number, marks=() if (kind, number) in IN_MAKE_TEST else pytest.mark.slow)
        for kind in KINDS
        for number in (signal.SIGINT, signal.SIGKILL)
    ],
)
def test_an_interrupted_run_publishes_nothing_and_ends_like_an_uninterrupted_one(
    kind: str, number: signal.Signals, finished: Callable[[str], Path], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished(kind)
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("QUARTET_DATA_DIR", str(workspace / "data"))
    first = KINDS[kind]
    steps = log_of(only_entry(whole / "runs" / first.model))[-1]["step"]
    places = [steps // 2, *([steps + 1] if first.refits and published(whole, kind).card.refit_steps else [])]
    for place in places:  # in the first training, and in the second training on all data
        shutil.rmtree(workspace / "runs", ignore_errors=True)
        with monkeypatch.context() as patch:
            set_limits(patch, signal=number, signal_steps=place)
            command = first.command(workspace)
            with (workspace / "output").open("w+") as output:
                process = start_python(["-m", first.script.__name__, *command], workspace, output)
                process.join(300)
                output.seek(0)
                text = output.read()
        if number == signal.SIGINT:
            assert process.exitcode == 1, text
            assert re.search(r"saved .* at step \d+; resume with: \S+ -m training\.\w+ .* --resume", text)
        else:
            assert process.exitcode == -signal.SIGKILL, text
        run = only_entry(workspace / "runs" / first.model)
        (run / "state.tmp").write_bytes(b"a checkpoint half written")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 10000, "loss": 1}\n{"step": 1')
        assert not (workspace / "models_store" / first.model).exists() or first.model == "base-lstm"
        first.train(workspace, "--resume")
        resumed, uninterrupted = published(workspace, kind), published(whole, kind)
        assert same_tensors(resumed, uninterrupted)
        assert resumed.card.metrics == uninterrupted.card.metrics
        assert log_of(run) == log_of(only_entry(whole / "runs" / first.model))
        assert uninterrupted.card.resumed is None
        assert resumed.card.resumed
        (run / "finished").unlink()  # as if the run had been killed right after it published
        first.train(workspace, "--resume")
        assert store.Store(workspace / "models_store").numbers(first.model) == [1]
        shutil.rmtree(workspace / "models_store" / first.model)


@of_kinds(refits=True)
def test_the_published_network_is_trained_again_on_all_data(
    kind: str, finished: Callable[[str], Path], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = published(finished(kind), kind)
    monkeypatch.chdir(workspace)
    KINDS[kind].train(workspace, "--no-refit")
    first = published(workspace, kind)
    assert first.card.refit_steps is None
    assert whole.card.refit_steps
    assert not same_tensors(whole, first)
    for key, metric in first.card.metrics.items():
        assert whole.card.metrics[key].value == metric.value
        other = key.startswith(("untuned", "naive", "auto"))
        assert metric.weights == ("other method" if other else "published")
        assert whole.card.metrics[key].weights == ("other method" if other else "before refit")


def change_test_part(workspace: Path) -> None:
    """Change the test parts of all data sets, and nothing else."""
    save_data(workspace / "data", seed=1)
    lines, end = SALES.splitlines(), len(TEXT) * 9 // 10
    (workspace / "sales.csv").write_text("\n".join([*lines[:73], *("7" for _ in lines[73:])]) + "\n")
    (workspace / "novel.txt").write_text(TEXT[:end] + "?" * (len(TEXT) - end - 1) + "\n")
    for path in (workspace / "shapes" / "test").rglob("*.png"):
        other = next(
            file for file in sorted((workspace / "more").rglob("*.png")) if file.parent.name == path.parent.name
        )
        other.replace(path)


def split_by_folders(workspace: Path) -> None:
    """Divide the drawings into the folders train, val and test. Keep some drawings in the folder ``more``."""
    for path in sorted((workspace / "shapes").glob("*/*.png")):
        number, label = int(path.stem), path.parent.name
        part = "more" if number >= 22 else f"shapes/{'train' if number < 16 else 'val' if number < 20 else 'test'}"
        target = workspace / part / label / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    for label in ("circle", "square", "triangle"):
        (workspace / "shapes" / label).rmdir()


@every_kind("cnn", "own-rnn", "own-lstm")
def test_no_publish_reads_no_test_part(kind: str, workspace: Path) -> None:
    if kind == "lstm":
        return  # the sine is computed, so no file has its test part
    split_by_folders(workspace)
    KINDS[kind].train(workspace, "--no-publish")
    change_test_part(workspace)
    KINDS[kind].train(workspace, "--no-publish")
    first, second = sorted((workspace / "runs" / KINDS[kind].model).iterdir())
    metrics = [json.loads((run / "card.json").read_text())["metrics"] for run in (first, second)]
    assert metrics[0] == metrics[1]
    assert metrics[0]
    assert not any(re.search(r"\btest\b", metric["split"]) for metric in metrics[0].values())
    assert (first / "samples.png").read_bytes() == (second / "samples.png").read_bytes()
    assert not (workspace / "models_store" / KINDS[kind].model).exists()
    assert not (workspace / "runs" / "test_measurements.jsonl").exists()


@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")  # all forecasts are NaN
@pytest.mark.parametrize(
    "kind",
    [
        *("cnn", "own-lstm"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("lstm", "forecaster", "own-cnn", "own-rnn")),
    ],
)
def test_a_training_that_diverges_publishes_nothing(kind: str, workspace: Path) -> None:
    with pytest.raises(SystemExit, match=r"^the training diverged: at step .* has [0-9,]+ weights that are NaN or inf"):
        KINDS[kind].train(workspace, "--set", "learning_rate=1e30")
    assert not (workspace / "models_store" / KINDS[kind].model).exists()


@pytest.mark.parametrize(
    "kind",
    ["own-cnn", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("own-rnn", "own-gan", "own-lstm"))],
)
def test_a_training_may_have_a_duration_instead_of_epochs(kind: str, workspace: Path) -> None:
    own = KINDS[kind]
    options, place = list(own.command(workspace)), own.options.index("--epochs")
    del options[place : place + 2]
    own.script.main([*options, "--minutes", "0.02"])
    (last,) = log_of(only_entry(workspace / "runs" / own.model))[-1:]
    assert last["progress"] == 1
    assert last["step"] > 1
    assert published(workspace, kind).card.metrics


@pytest.mark.slow
@every_kind()
def test_a_network_is_trained_on_another_device(kind: str, workspace: Path) -> None:
    """The device stands in for a GPU. Operators fail if tensors are created on the wrong device."""
    with fake_device.enabled() as device:
        KINDS[kind].train(workspace, "--no-publish", "--device", str(device))
        assert fake_device.operators > 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "gated", "forecaster", "conditional"])
def test_a_version_is_evaluated_on_another_device(kind: str, finished: Callable[[str], Path]) -> None:
    whole = finished(kind)
    with fake_device.enabled() as device:
        lines = evaluate.check(published(whole, kind), whole / "models_store", str(device))
        assert fake_device.operators > 20
    assert lines
    assert all(line.endswith("✓") for line in lines), lines
