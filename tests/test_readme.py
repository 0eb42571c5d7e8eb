"""What the README shows is what a reader gets."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.service import ROOT, TEST, serving

from app import store
from app.cli import models
from app.settings import Settings

README = (ROOT / "README.md").read_text()
LIFE = README.split("## The life of a version\n", 1)[1].split("\n## ", 1)[0]


def console(text: str) -> list[tuple[str, ...]]:
    """The commands of a text, and what stands below each."""
    return [
        tuple(part.strip() for part in command.split("\n", 1))
        for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)
        for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    ]


SHOWN = console(README.replace(LIFE, ""))


def alike(shown: Any, found: Any, off: float = 1e-6) -> bool:
    """The same, but for the last digits of what is computed; probabilities hang on whether it is in bfloat16."""
    if isinstance(shown, dict) and isinstance(found, dict):
        offs = {"probability": 0.003}
        return shown.keys() == found.keys() and all(alike(shown[key], found[key], offs.get(key, off)) for key in shown)
    if isinstance(shown, list) and isinstance(found, list):
        return len(shown) == len(found) and all(alike(*pair) for pair in zip(shown, found, strict=True))
    if isinstance(shown, float) and isinstance(found, float):
        return found == pytest.approx(shown, rel=1e-3, abs=off)
    return bool(shown == found)


@pytest.mark.skipif(not shutil.which("curl"), reason="the README's lines are for curl")
@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command[:60] for command, _ in SHOWN])
def test_each_line_of_the_readme_gives_what_stands_below_it(
    shipped: httpx.Client, tmp_path: Path, command: str, shown: str
) -> None:
    line = command.replace("localhost:8000", shipped.base_url.netloc.decode())
    line = line.replace("-o digits.png", f"-o {tmp_path}/digits.png")
    found = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert not [path for path in tmp_path.iterdir() if not path.read_bytes().startswith(b"\x89PNG")]
    if shown.startswith("{"):
        assert alike(json.loads(shown), json.loads(found)), found
    else:
        assert shown == found


@pytest.mark.skipif(not shutil.which("curl"), reason="the README's lines are for curl")
def test_the_life_of_a_version_goes_as_the_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "models_store", tmp_path / "models_store")
    monkeypatch.chdir(tmp_path)
    key = "k" * 32
    for command, shown in (pair for pair in console(LIFE) if "app.models" in pair[0]):
        assert models.main(shlex.split(command.split("app.models", 1)[1])) == 0, command
        assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()
    with serving(Settings(store=tmp_path / "models_store", admin_key=key, **TEST)) as client:  # type: ignore[arg-type]
        for command, shown in (pair for pair in console(LIFE) if "curl" in pair[0]):
            line = command.replace("localhost:8000", client.base_url.netloc.decode()).replace("$KEY", key)
            found = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.strip()
            assert found == shown


def test_every_endpoint_is_shown() -> None:
    paths = {path for path in re.findall(r"\| `(?:GET|POST) (/[^`]*)` \|", README.replace(LIFE, "")) if path != "/docs"}
    shown = " ".join(command for command, _ in SHOWN)
    for names in re.findall(r"for path in ([^;]*);", shown):
        shown += "".join(f" /v2/{name}" for name in names.split())
    named = {path: re.sub(r"\\{[a-z]+\\}", r"[\\w@.-]*", re.escape(path)) for path in paths}
    assert not [path for path, pattern in named.items() if not re.search(pattern + r"(?![\w/])", shown)]


PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("lines", PYTHON, ids=[lines.split("\n", 1)[0] for lines in PYTHON])
def test_each_piece_of_python_in_the_readme_prints_what_stands_beside_it(
    shipped: httpx.Client, lines: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    exec(lines.replace("localhost:8000", shipped.base_url.netloc.decode()), {})
    expected = [line.split("  # ", 1)[1] for line in lines.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == expected
    assert expected


def test_the_speeds_are_those_of_the_cards() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)@(\d+)` \| ([\d.]+) \| ([\d,]+) \|", README, re.MULTILINE)
    stated = {(name, int(number)): (float(alone), int(each.replace(",", ""))) for name, number, alone, each in rows}
    speeds = {(name, number): store.read_card(ROOT / "models_store" / name / str(number)).speed for name, number in
              store.all_versions(ROOT / "models_store")}  # fmt: skip
    assert stated == {key: speed and (speed.milliseconds, speed.per_second) for key, speed in speeds.items()}
    assert {speed and speed.rows for speed in speeds.values()} == {64}


def test_the_measured_figures_are_those_of_the_cards() -> None:
    cards = [store.read_card(ROOT / "models_store" / name / str(number)) for name, number in
             store.all_versions(ROOT / "models_store")]  # fmt: skip
    newest = {card.name: card.version for card in cards}  # of the others the version stands behind the name
    rows = re.findall(r"^\| `([a-z0-9-]+(?:@\d+)?)` \| `([a-z0-9_]+)` \| ([\d.,]+) \|", README, re.MULTILINE)
    stated = {(name, metric): value for name, metric, value in rows}
    labels = [card.name if newest[card.name] == card.version else f"{card.name}@{card.version}" for card in cards]
    assert stated == {
        (label, name): f"{metric.value:.{metric.decimals}f}"
        for label, card in zip(labels, cards, strict=True)
        for name, metric in card.metrics.items()
    }
