"""The command ``quartet``."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
from support.service import ROOT

from app.cli.quartet import COMMANDS, TRAININGS, python_arguments


def test_each_sub_command_runs_a_module_with_the_other_arguments() -> None:
    for name, (module, _) in COMMANDS.items():
        assert python_arguments([name, "--help", "train"]) == ["-m", module, "--help", "train"]
        assert find_spec(module)
    for name, (module, _) in TRAININGS.items():
        assert python_arguments(["train", name, "--seed", "1"]) == ["-m", module, "--seed", "1"]
        assert find_spec(module)


@pytest.mark.parametrize("arguments", [[], ["train"], ["delete"], ["train", "svm"]])
def test_an_unknown_sub_command_is_an_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        python_arguments(arguments)
    assert error.value.code == 2


def test_the_command_replaces_its_process_and_names_itself_in_the_help() -> None:
    command = [sys.executable, "-m", "app.cli.quartet", "keys", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: quartet keys ")
