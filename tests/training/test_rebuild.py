"""Recipes of the included versions, and ``python -m training.rebuild``."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from support.service import ROOT
from support.trainings import TINY_TEXT

from app.store import Store
from training import rebuild


def test_every_included_version_has_a_recipe_whose_commands_are_accepted(tmp_path: Path) -> None:
    versions = {f"{name}@{number}" for name, number in Store(ROOT / "models_store").versions()}
    recipes = {path.stem: path for path in rebuild.RECIPES.glob("*.toml")}
    assert set(recipes) == versions
    for name, recipe in recipes.items():
        models = set()
        for command in rebuild.commands(recipe):
            module, *words = rebuild.arguments(command, tmp_path)
            models.add(importlib.import_module(module).arguments(words)[0].name)
        assert name.partition("@")[0] in models


@pytest.mark.slow
def test_the_steps_of_a_recipe_run_in_turn_and_continue_after_a_failure(
    workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = f"training.rnn --preset gated --set hidden=8 layers=1 --threads 1 {' '.join(TINY_TEXT)}"
    recipe = workspace / "tiny.toml"
    calibrated = f"{tiny.replace('--epochs 2', '--epochs 0')} --from {{version:shakespeare-rnn}}"
    steps = [f"{tiny} --no-publish --name teacher", f"{tiny} --teachers {{run:teacher}}", calibrated]

    def write(commands: list[str]) -> None:
        recipe.write_text("\n".join(["commands = [", *(f'"{command}",' for command in commands), "]"]))

    write([steps[0], f"{steps[1]} --set hidden=-1", steps[2]])
    assert rebuild.main([str(recipe), "--dry-run"]) == 0
    assert not (workspace / "rebuilt").exists()
    assert "--from '{version:shakespeare-rnn}'" in capfd.readouterr().out
    assert rebuild.main([str(recipe)]) != 0
    write(steps)
    assert rebuild.main([str(recipe)]) == 0
    assert capfd.readouterr().out.count("  # done") == 1
    card = Store(workspace / "rebuilt" / "tiny" / "store").card("shakespeare-rnn", 1)
    assert [each.role for each in card.ancestors or []] == ["teacher"]


def test_an_unknown_recipe_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rebuild.main(["none@1"])
    assert "there is no recipe 'none@1'; there are cifar10-accurate@2, " in capsys.readouterr().err
