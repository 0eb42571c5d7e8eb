"""The scripts of docs/how-to/networks/export-a-model.md run without this project, and give the service's answers."""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from support.service import ROOT

from app.cli import models
from app.networks import KINDS, is_imported
from app.store import Card, Store

pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
PAGE = (ROOT / "docs" / "how-to" / "networks" / "export-a-model.md").read_text("utf-8")
SCRIPTS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
STORE = Store(ROOT / "models_store")
CARDS = [STORE.card(*key) for key in STORE.versions()]
TASK_SCRIPTS = {  # one script of each task also reads the other files of its task
    "classify": "cifar10-whitened-1.onnx",
    "continue": "shakespeare-rnn-1.onnx",
    "forecast": "series-lstm-3.onnx",
    "sample": "mnist-cgan-1.onnx",
}
HOURS = np.arange(200)


def file_name(card: Card) -> str:
    return f"{card.name}-{card.version}.onnx"


def file_of(script: str) -> str:
    return next(iter(re.findall(r'"([\w-]+\.(?:onnx|pt2))"', script)))


OTHERS = [card for card in CARDS if file_name(card) not in map(file_of, SCRIPTS)]


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    exported: Callable[[str], Path],
) -> Callable[[str, str], list[str]]:
    """Run a script of the page, if given with another file, and return its output."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "docs" / "sine.json", tmp_path)

    def run(name: str, other: str = "") -> list[str]:
        (script,) = (script for script in SCRIPTS if file_of(script) == name)
        shutil.copy(
            ROOT / "tests" / "images" / ("mnist/0000-7.png" if "mnist" in other else "cifar10/0013-horse.png"),
            "photo.png",
        )
        (tmp_path / (other or name)).symlink_to(exported(other or name))
        capsys.readouterr()
        exec(script.replace(name, other or name), {})
        return capsys.readouterr().out.splitlines()

    return run


def test_no_script_uses_this_project() -> None:
    for script in SCRIPTS:
        assert not re.search(r"^\s*(import|from) (app|training|deploy)", script, re.MULTILINE)
        assert len(script.splitlines()) <= 24


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=map(file_of, SCRIPTS))
def test_a_script_prints_the_values_in_its_comments(script: str, run: Callable[..., list[str]]) -> None:
    expected = [line.split("  # ", 1)[1] for line in script.splitlines() if line.startswith("print(")]
    assert run(file_of(script)) == expected


@pytest.mark.slow  # an export takes up to 30 seconds
@pytest.mark.parametrize("card", OTHERS, ids=file_name)
def test_a_script_also_reads_the_other_files_of_its_task(
    card: Card, run: Callable[..., list[str]], shipped: httpx.Client
) -> None:
    printed, *rest = run(TASK_SCRIPTS[card.task], file_name(card))
    if card.task == "forecast":
        assert_forecast(shipped, f"{card.name}@{card.version}", [printed, *rest])
    elif card.task == "continue":
        body = {"model": f"{card.name}@{card.version}", "prompt": "ROMEO:", "max_characters": 40, "temperature": 0}
        answer = shipped.post("/v1/text/continue", json=body).json()["results"][0]["text"]
        assert printed == repr(f"ROMEO:{answer}")
    else:
        assert printed.split()[0] in ("horse", "7", "(1,")


def assert_forecast(shipped: httpx.Client, model: str, printed: list[str]) -> None:
    """Check that a script printed the means and the first interval of the service's forecast."""
    values = 100 + 10 * np.sin(2 * np.pi * HOURS / 24) + HOURS % 7
    body = {"model": model, "horizon": 4, "levels": [80], "seasonality": 24, "values": values.tolist()}
    result = shipped.post("/v1/series/forecast", json=body).json()["results"][0]
    means, interval = map(ast.literal_eval, printed)
    assert means == pytest.approx(result["mean"], abs=0.06)
    assert interval == pytest.approx([result["intervals"]["80"][side][0] for side in ("lower", "upper")], abs=0.06)


@pytest.mark.slow
def test_an_exported_classifier_is_imported_again_with_the_options_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Callable[[str], Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"^```py\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    path = exported(file_of(script))
    exec(script.replace(file_of(script), str(path)), {})
    (options,) = re.findall(r"^`(--task classify .*)`\. This script", PAGE, re.MULTILINE)
    command = ["add", str(path), "--name", "again", "--store", str(tmp_path)]
    assert models.main([*command, *shlex.split(options)]) == 0
    assert Store(tmp_path).card("again", 1).labels == STORE.card("cifar10-lenet", 1).labels


def test_the_page_names_every_kind() -> None:
    assert not [kind for kind in KINDS if not is_imported(kind) and f"`{kind}`" not in PAGE]


@pytest.mark.slow
def test_the_scripts_give_the_answers_of_the_service(
    tmp_path: Path, run: Callable[..., list[str]], shipped: httpx.Client
) -> None:
    body = {"model": "shakespeare-rnn@1", "prompt": "ROMEO:", "max_characters": 40, "temperature": 0}
    text = shipped.post("/v1/text/continue", json=body).json()["results"][0]["text"]
    assert run("shakespeare-rnn-1.onnx") == [repr(f"ROMEO:{text}")]

    body = {**json.loads((ROOT / "docs" / "sine.json").read_text()), "model": "sine-lstm", "horizon": 5}
    mean = shipped.post("/v1/series/forecast", json=body).json()["results"][0]["mean"]
    assert ast.literal_eval(run("sine-lstm-1.onnx")[0]) == pytest.approx(mean, abs=0.006)

    assert_forecast(shipped, "series-lstm@3", run("series-lstm-3.onnx"))

    run("mnist-cgan-1.onnx")
    body = {"model": "mnist-cgan", "count": 1, "label": "7", "seed": 3}
    answer = shipped.post("/v1/images/sample", json=body, headers={"accept": "image/png"})
    sheet = np.asarray(Image.open(io.BytesIO(answer.content)).convert("L"), int)[2:-2, 2:-2]
    assert abs(np.asarray(Image.open(tmp_path / "digit.png"), int) - sheet).max() <= 1


@pytest.mark.slow
def test_the_commands_print_the_output_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models_store").symlink_to(ROOT / "models_store")
    (block,) = re.findall(r"^```console\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, expected = example.strip().split("\n")
        assert models.main(shlex.split(command.split("quartet models", 1)[1])) == 0
        printed = capsys.readouterr().out.strip()
        assert re.sub(r"[\d,]+ bytes", "", printed) == re.sub(r"[\d,]+ bytes", "", expected)  # sizes depend on torch
