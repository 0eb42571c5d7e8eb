"""The recipes of the included versions, which ``make train`` runs."""

from __future__ import annotations

import importlib
import shlex
import subprocess

from support.service import ROOT

from app.store import Store


def test_every_included_version_has_a_recipe_whose_commands_are_accepted() -> None:
    for name, number in Store(ROOT / "models_store").versions():
        make = ["make", "-n", "-f", "recipes/Makefile", f"{name}@{number}"]
        printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        models = set()
        for line in printed.splitlines():
            if " -m training." in line:
                _, _, module, *words = shlex.split(line)
                models.add(importlib.import_module(module).arguments(words)[0].name)
        assert name in models
