"""What the README shows is what a reader gets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import httpx
import pytest
from conftest import ROOT

from app import store

README = (ROOT / "README.md").read_text()
SHOWN = [
    tuple(part.strip() for part in command.split("\n", 1))
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
]


def alike(shown: Any, found: Any) -> bool:
    """The same, but for the last digits of what is computed."""
    if isinstance(shown, dict) and isinstance(found, dict):
        return shown.keys() == found.keys() and all(alike(shown[key], found[key]) for key in shown)
    if isinstance(shown, list) and isinstance(found, list):
        return len(shown) == len(found) and all(map(alike, shown, found))
    if isinstance(shown, float) and isinstance(found, float):
        return found == pytest.approx(shown, rel=1e-3, abs=1e-6)
    return bool(shown == found)


@pytest.mark.skipif(not shutil.which("curl"), reason="the README's lines are for curl")
@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command[:60] for command, _ in SHOWN])
def test_each_line_of_the_readme_gives_what_stands_below_it(shipped: httpx.Client, command: str, shown: str) -> None:
    line = command.replace("localhost:8000", shipped.base_url.netloc.decode()).replace("digits.png", "/dev/null")
    found = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    if shown.startswith("{"):
        assert alike(json.loads(shown), json.loads(found)), found
    else:
        assert shown == found


def test_every_endpoint_is_shown() -> None:
    paths = {path for path in re.findall(r"\| `(?:GET|POST) (/[^`]*)` \|", README) if path != "/docs"}
    shown = " ".join(command for command, _ in SHOWN)
    assert not [
        path for path in paths if not re.search(rf":8000{re.sub(r'{[a-z]+}', '[^/ ]+', path)}[ ?']", shown + " ")
    ]


def test_the_measured_figures_are_those_of_the_cards() -> None:
    cards = [store.read_card(ROOT / "models_store" / name / str(number)) for name, number in
             store.versions(ROOT / "models_store")]  # fmt: skip
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| `([a-z0-9_]+)` \| ([\d.,]+) \|", README, re.MULTILINE)
    stated = {(name, metric): value for name, metric, value in rows}
    assert stated == {
        (card.name, name): f"{metric.value:.{metric.decimals}f}"
        for card in cards
        for name, metric in card.metrics.items()
    }
