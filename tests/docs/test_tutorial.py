"""The commands of the tutorial succeed in order. Here, trainings have one or two epochs, so their figures differ."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.processes import start_python
from support.service import ROOT, TEST, serving
from support.waiting import wait_until

from app.settings import Settings
from training.lstm import CLASSICAL_WINS

TUTORIAL = ROOT / "docs" / "tutorial" / "README.md"
QUARTET = ".venv/bin/quartet "


def commands() -> list[tuple[str, list[str]]]:
    """Return each console command of the tutorial with the output lines on the page."""
    blocks = re.findall(r"^```console\n(.*?)^```", TUTORIAL.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    parts = [part.strip().split("\n") for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(command, [line for line in lines if line != "..."]) for command, *lines in parts]


def masked(line: str) -> str:
    """Return a line with # in place of each number, because durations and accuracies differ between runs."""
    return re.sub(r"[\d.,]*\d", "#", " ".join(line.split()))


def shape(value: Any) -> Any:
    """Return the keys and types of a JSON value, without labels and texts, which differ after one epoch."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return type(value).__name__


def table_shape(text: str) -> tuple[list[str], list[str]]:
    """Return the columns of a CSV file, and the cells of its first column."""
    columns, *rows = csv.reader(text.splitlines(keepends=True))
    return columns, [row[0] for row in rows if len(row) == len(columns)]


def shortened(command: str) -> str:
    """Return a training command with little data and, except for images, one epoch. It always publishes its network."""
    if not re.search(r"quartet train (cnn|lstm|rnn) ", command):
        return command
    if "train cnn" not in command:
        command = f"{re.sub(r' --epochs [0-9]+', '', command)} --epochs 1"
    command = command.replace("app/engine/*.py app/tasks/*.py", "app/engine/*.py")
    command = f"{command} --threads 1"  # faster than two threads beside other tests
    return f"{command} --force" if "train lstm" in command else command


def run(command: str, folder: Path) -> str:
    """Run a command and return its output.

    A command of Quartet runs in a process that has already imported the service, other commands run in the shell.
    """
    if not command.startswith(QUARTET):
        return shell(command, folder)
    arguments = shell(f"printf '%s\\0' {command.removeprefix(QUARTET)}", folder).split("\0")[:-1]
    with tempfile.TemporaryFile("w+") as output:
        process = start_python(["-m", "app.cli.quartet", *arguments], folder, output)
        process.join()
        output.seek(0)
        printed = output.read()
    assert process.exitcode in (0, CLASSICAL_WINS), f"{command}\n{printed}"
    return printed


def shell(command: str, folder: Path) -> str:
    result = subprocess.run(["bash", "-c", f"{command} 2>&1"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("curl"), reason="the tutorial uses curl")
def test_the_commands_of_the_tutorial_succeed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "models_store", tmp_path / "models_store")
    for folder in ("app", "training", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    with serving(Settings(store=tmp_path / "models_store", **TEST)) as client:
        for command, expected in commands():
            line = shortened(command).replace("localhost:8000", client.base_url.netloc.decode())
            actual = run(line, tmp_path).strip()
            if command.startswith("curl"):
                assert shape(json.loads(actual)) == shape(json.loads(expected[0])), actual
            elif command.startswith(("head", "cat")):
                assert table_shape(actual) == table_shape("\n".join(expected)), actual
            elif "quartet models" in command:
                assert [text.rstrip() for text in actual.splitlines()] == expected
            else:
                printed = {masked(text) for text in re.split(r"[\r\n]", actual)}
                # Two epochs are too few for the results of the comparison.
                lines = [text for text in expected if not re.search(r"% interval|no interval", text)]
                assert not {masked(text) for text in lines} - printed, actual
                wait_for_published(client, expected)


def wait_for_published(client: httpx.Client, expected: list[str]) -> None:
    """Wait until the service has loaded the version that a training has published."""
    for line in expected:
        if published := re.fullmatch(r"published ([a-z-]+)@(\d+), .*", line):
            wait_until(lambda: client.get(f"/v1/models/{published[1]}@{published[2]}").status_code == 200)
