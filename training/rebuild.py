"""Rebuild an included version with all steps of its recipe, teachers and calibration included.

    python -m training.rebuild shakespeare-rnn@5             # hours; the same command continues after an interruption
    python -m training.rebuild shakespeare-rnn@5 --dry-run   # print the commands
    python -m training.rebuild                               # all versions

``recipes/NAME@VERSION.toml`` lists the commands. In a command, {run:NAME} stands for the folder of the last run of a
model, and {version:NAME} for its newest version in the store of the rebuild. The result has another version number.
The code and its defaults have changed since some versions were trained, so their figures may differ by more than their
spread between seeds.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from app.store import Store

RECIPES = Path(__file__).parents[1] / "recipes"
PLACEHOLDER = re.compile(r"\{(run|version):([a-z0-9-]+)\}")


def commands(recipe: Path) -> list[str]:
    """Return the commands of a recipe."""
    return list(tomllib.loads(recipe.read_text("utf-8"))["commands"])


def arguments(command: str, folder: Path) -> list[str]:
    """Return the module and the arguments of a command, with the store and the runs in ``folder``."""
    module, *words = shlex.split(PLACEHOLDER.sub(lambda match: _value(match[1], match[2], folder), command))
    return [module, *words, "--store", str(folder / "store"), "--runs", str(folder / "runs"), "--resume"]


def _value(kind: str, name: str, folder: Path) -> str:
    """Return what ``{kind:name}`` in a command stands for, or this text itself before the step that produces it."""
    if kind == "run":
        runs = sorted((folder / "runs" / name).glob("*/finished"))
        return str(runs[-1].parent) if runs else f"{{run:{name}}}"
    store = Store(folder / "store")
    numbers = store.numbers(name) if (folder / "store").is_dir() else []
    return f"{name}@{numbers[-1]}" if numbers else f"{{version:{name}}}"


def rebuild(recipe: Path, folder: Path, dry_run: bool) -> int:
    """Run the commands of a recipe in turn; return the status of the first that fails, or 0.

    The file ``done`` in ``folder`` has the number of completed commands.
    """
    counter = folder / "done"
    done = int(counter.read_text()) if counter.exists() else 0
    for number, command in enumerate(commands(recipe)):
        words = arguments(command, folder)
        print(shlex.join(["python", "-m", *words]) + ("  # done" if number < done else ""), flush=True)
        if dry_run or number < done:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent)}  # this code, in any current folder
        if status := subprocess.run([sys.executable, "-m", *words], env=environment, check=False).returncode:
            return status
        counter.write_text(str(number + 1))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="NAME@VERSION, or the path of a recipe; default: all")
    parser.add_argument(
        "--folder", type=Path, default=Path("rebuilt"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run none")
    options = parser.parse_args(argv)
    included = {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}
    for name in options.names or included:
        recipe = included.get(name, Path(name))
        if not recipe.is_file():
            parser.error(f"there is no recipe {name!r}; there are {', '.join(included)}")
        if status := rebuild(recipe, options.folder / recipe.stem, options.dry_run):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
