"""Write the reference of the command line from the parsers of the commands and from the Makefile."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from docs.markdown import code, table

ROOT = Path(__file__).parent.parent
MAKEFILE = ROOT / "Makefile"
COMMANDS = {
    "The service": ("app.models", "app.keys"),
    "Training": (
        "training.cnn",
        "training.rnn",
        "training.lstm",
        "training.gan",
        "training.recalibrate",
        "training.data.shapes",
        "training.evaluation.evaluate",
        "training.evaluation.speed",
        "training.evaluation.compare_forecasters",
    ),
    "Benchmarks and tests": (
        "benchmarks.accuracy.corruptions",
        "benchmarks.accuracy.photos",
        "benchmarks.known_covariates",
        "benchmarks.speed.serving",
        "benchmarks.speed.profile",
        "benchmarks.speed.scaling",
        "benchmarks.speed.protocols",
        "benchmarks.speed.imported",
        "benchmarks.speed.replicas",
        "benchmarks.speed.training",
        "benchmarks.speed.distributed_training",
        "benchmarks.speed.inference_runtimes",
        "benchmarks.reliability.soak",
        "benchmarks.reliability.determinism",
        "benchmarks.reliability.overload",
        "benchmarks.reliability.restarts",
        "benchmarks.reliability.attack",
        "benchmarks.reliability.mutants",
        "deploy.image_check",
    ),
}
# Defaults that depend on the machine. The page shows these texts instead of the values.
OF_THE_MACHINE = {"--threads": "number of cores", "--device": "cuda if available, else cpu"}

HEAD = """# Command line

`make docs` generates this page from the argument parsers of the commands and from the Makefile. `python -m app.main`,
which starts the service, has no options. Its [settings](settings.md) are environment variables. This page does not
describe `make bench-cluster`, because this benchmark needs Ray. `make bench-cluster ARGS=--help` describes its options.
`make fuzz` passes its options to `schemathesis run`.
"""


class Parsed(Exception):
    """Raised to stop the ``main`` of a command before it runs. Contains the command's parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(module: str) -> argparse.ArgumentParser:
    """Return the argument parser that ``main`` of a module creates. The command itself does not run."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Parsed(parser)

    with patch.object(argparse.ArgumentParser, "parse_known_args", stop), patch.object(sys, "argv", [module]):
        try:
            importlib.import_module(module).main()
        except Parsed as parsed:
            return parsed.parser
    raise ValueError(f"{module}.main parses no arguments")


def page() -> str:
    parts = [HEAD, "\n## Make targets\n\n", targets()]
    for title, modules in COMMANDS.items():
        parts.append(f"\n## {title}\n")
        for module in modules:
            parts += describe(parser_of(module), f"python -m {module}")
    return "".join(parts)


def targets() -> str:
    targets = re.findall(r"^([a-z-]+):.*## (.*)", MAKEFILE.read_text("utf-8"), re.MULTILINE)
    return table(("target", "effect"), [(code(f"make {name}"), text) for name, text in targets])


def describe(parser: argparse.ArgumentParser, name: str, level: int = 3) -> Iterator[str]:
    """Yield the section of a command: a table for each group of options, and a section for each subcommand."""
    yield f"\n{'#' * level} {name}\n\n"
    for paragraph in (parser.description or "").strip().split("\n\n") if parser.description else ():
        yield f"{paragraph}\n\n" if paragraph.startswith("    ") else f"{flat(paragraph)}\n\n"
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    commands = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    shown = [action for action in actions if action not in commands and action.help != argparse.SUPPRESS]
    named = parser._action_groups[2:]  # the first two hold positional arguments and options
    grouped = [action for group in named for action in group._group_actions]
    if rows := [row(action, parser) for action in shown if action not in grouped]:
        yield table(("argument", "default", "description"), rows)
    for group in named:
        if rows := [row(action, parser) for action in group._group_actions if action in shown]:
            title = group.title or ""
            yield f"\n{title[:1].upper()}{title[1:]}{'.' if ': ' in title else ':'}\n\n"
            yield table(("argument", "default", "description"), rows)
    for action in commands:
        for command, inner in action.choices.items():
            yield from describe(inner, f"{name} {command}", level + 1)


def flat(text: str) -> str:
    return text.replace("``", "`").strip()


def row(action: argparse.Action, parser: argparse.ArgumentParser) -> tuple[str, str, str]:
    values = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    value = "" if action.nargs == 0 else f" {values}"
    repeated = " ..." if action.nargs in ("+", "*") else ""
    name = f"{', '.join(action.option_strings)}{value}{repeated}" if action.option_strings else f"{values}{repeated}"
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    text = re.sub(r" ?\(default: [^)]*\)", "", text) if action.default not in (None, argparse.SUPPRESS) else text
    return code(name), default_of(action), text


def default_of(action: argparse.Action) -> str:
    for option in action.option_strings:
        if option in OF_THE_MACHINE and "(default: %(default)s)" not in (action.help or ""):  # the default is not fixed
            return OF_THE_MACHINE[option]
    value = action.default
    if action.nargs == 0 or value in (None, argparse.SUPPRESS, "", []):
        return ""
    if isinstance(value, list | tuple):
        return code(",".join(map(str, value)))
    if isinstance(value, Path) and value.is_absolute():  # the page must not depend on the machine
        inside = value.is_relative_to(ROOT)
        return code(value.relative_to(ROOT) if inside else Path("~") / value.relative_to(Path.home()))
    return code(value)
