"""The command ``quartet``. Each sub-command runs the module of the same task, such as ``python -m app.models``.

This module imports nothing else of this project, so that it starts quickly.
"""

from __future__ import annotations

import argparse
import runpy
import sys

COMMANDS = {
    "serve": ("app.main", "start the service; its settings are environment variables"),
    "models": ("app.models", "manage the versions of models: list, activate, roll back, import, export"),
    "keys": ("app.keys", "manage the API keys"),
    "capture": ("app.cli.capture", "show and delete captured requests"),
    "predict": ("training.predict", "compute predictions for files and folders"),
}
TRAININGS = {
    "cnn": ("training.cnn", "train an image classifier"),
    "rnn": ("training.rnn", "train a network that continues texts"),
    "lstm": ("training.lstm", "train a forecaster"),
    "gan": ("training.gan", "train an image generator"),
    "shapes": ("training.data.shapes", "draw example images"),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="quartet", description="Serve and train small PyTorch networks.")
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    train = commands.add_parser("train", help="train a network on public data or on your own data")
    for group, entries in ((commands, COMMANDS), (train.add_subparsers(metavar="KIND", required=True), TRAININGS)):
        for name, (module, text) in entries.items():
            group.add_parser(name, help=text, add_help=False).set_defaults(module=module)
    return made


def main() -> None:
    """Run the module of a sub-command. Exits with status 2 if there is no such command."""
    arguments = sys.argv[1:]
    words = 2 if arguments[:1] == ["train"] else 1
    module = parser().parse_args(arguments[:words]).module
    sys.argv[1:] = arguments[words:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
