"""The command ``quartet``."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
from support.service import ROOT

from app.cli.quartet import COMMANDS, TRAININGS, main


def test_each_sub_command_has_a_module() -> None:
    for module, _ in (*COMMANDS.values(), *TRAININGS.values()):
        assert find_spec(module)


@pytest.mark.parametrize("arguments", [[], ["train"], ["delete"], ["train", "svm"]])
def test_an_unknown_sub_command_is_an_error(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quartet", *arguments])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2


def test_the_command_passes_on_the_other_arguments_and_names_itself_in_the_help() -> None:
    command = [sys.executable, "-m", "app.cli.quartet", "keys", "new", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: quartet keys new ")
