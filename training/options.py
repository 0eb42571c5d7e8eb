"""The command-line options of the training scripts."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from app import store
from app.store import Store
from app.store.card import is_model_name
from app.store.version import Version
from training.configs.numbers import Count, Described
from training.data.datasets import DataError

INCLUDED = Path(__file__).parents[1] / "models_store"
STORE = Path(os.environ.get("QUARTET_STORE") or "models_store")  # the same default as that of the service
STORE_HELP = "model store; QUARTET_STORE sets another default"
TASKS = {"training.cnn": "classify", "training.rnn": "continue", "training.lstm": "forecast", "training.gan": "sample"}
C = TypeVar("C", bound=Described)  # the class of a preset
Part = Literal["test", "validation"]  # part of the data on which a trained network is measured
FROM_SCRATCH = "; or use --from scratch"
SHOWN = (  # by --help; --help-all shows all options
    *("--images", "--csv", "--text", "--preset", "--name", "--minutes", "--from", "--size", "--horizon"),
    *("--preview", "--backtest", "--resume"),
)
SHORT = ("epochs", "horizon")  # numbers that also have an option of their own: --epochs 5 is --set epochs=5
Name = typing.NewType("Name", str)
METAVARS: dict[Any, str] = {int: "N", float: "N", Path: "PATH", Name: "NAME"}
Models = Annotated[Path, Field(description=STORE_HELP)]
Refit = Annotated[
    bool | None,
    Field(
        description="train a second network on all data, and publish it; it cannot be tested. Otherwise publish the "
        "tested network"
    ),
]


class TrainingOptions(Described):
    """The options that all training commands have."""

    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """duration of the training in minutes, without reading the data and the evaluation"""
    preview: bool = False
    """print how the data are read, and do not train"""
    resume: bool = False
    """resume the last unfinished run of this model"""
    publish: bool = True
    """do not publish; measure on the validation data, and do not read the test data"""
    activate: bool | None = None
    """activate the new version in any case, or in no case (default: unless it is worse than the active one)"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """random seed"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda or cuda:N"""
    threads: Count = os.cpu_count() or 1
    """CPU threads of PyTorch"""
    runs: Path = Path("runs")
    """folder for logs and checkpoints"""
    store: Models = STORE


class Options(argparse.Namespace):
    """The options of a training command: those of ``TrainingOptions``, and those for the user's data.

    ``own`` has the names of the options for the user's data, which differ between the commands.
    """

    @property
    def part(self) -> Part:
        """The part of the data on which networks are measured.

        If the network is published, or with --backtest, this is the test part. With --no-publish alone, it is the
        validation part, and the test part is not read.
        """
        return "test" if self.publish or vars(self).get("backtest") else "validation"

    @property
    def refits(self) -> bool:
        """Whether the command trains a second network on all data before it publishes (refit).

        This is the default for series, whose last values matter most. For images and texts, --refit requests it.
        """
        return self.publish and bool(self.refit)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Formats the help: keeps the line breaks of the description, and appends the default values of the options."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.nargs == 0 or action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parses the options of a command. ``--help`` shows the options in ``shown``, and ``--help-all`` shows all."""

    def __init__(self, command: str, description: str, shown: Sequence[str], argv: Sequence[str] | None) -> None:
        super().__init__(
            f"quartet {command}", description=description, formatter_class=HelpFormatter, allow_abbrev=False
        )
        self._shown, self.shows_all = shown, "--help-all" in (sys.argv if argv is None else argv)
        self.add_argument("--help-all", action="help", help="show all options and exit")

    def option(self, flag: str, group: Any = None, **settings: Any) -> None:
        """Add an option with the arguments of ``add_argument``."""
        if flag not in self._shown and not self.shows_all:
            settings["help"] = argparse.SUPPRESS
        (group or self).add_argument(flag, **settings)

    def options(self, flags: Mapping[str, dict[str, Any]], title: str = "") -> None:
        """Add options or, with a title, a group of options."""
        group = self.add_argument_group(title) if title else self
        for flag, settings in flags.items():
            self.option(flag, group, **settings)


def parsed(hint: Any) -> Callable[[str], Any]:
    """Return a function that converts the text of an option into a type, such as ``Annotated[int, Field(ge=1)]``."""

    def parse(text: str) -> Any:
        try:
            return TypeAdapter(hint).validate_python(text)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].replace("Input should", "it should")
            raise argparse.ArgumentTypeError(f"{text}; {reason}") from None

    return parse


def flags(options: type[BaseModel], omit: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the options of a command for the fields of a class, with the keyword arguments of ``add_argument``."""
    found: dict[str, dict[str, Any]] = {}
    hints = typing.get_type_hints(options, include_extras=True)
    for name, field in options.model_fields.items():
        if name in omit:
            continue
        hint = hints[name]
        kinds = [getattr(part, "__origin__", part) for part in (hint, *typing.get_args(hint))]
        metavar = next((text for kind, text in METAVARS.items() if kind in kinds), None)
        settings: dict[str, Any] = {"type": parsed(hint), "metavar": metavar}
        if hint is bool:
            settings = {"action": "store_false" if field.default else "store_true"}
        elif field.annotation == bool | None:
            settings = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(field.annotation) is list:
            settings |= {"type": parsed(typing.get_args(field.annotation)[0]), "nargs": "+"}
        required = field.is_required()
        settings |= {"required": required, "default": None if required or field.default == [] else field.default}
        flag = ("no_" if hint is bool and field.default else "") + (field.alias or name)
        text = " ".join((field.description or "").split()).replace("%", "%%")
        found[f"--{flag.replace('_', '-')}"] = {**settings, "dest": name, "help": text}
    return found


def parse_options(
    script: str,
    description: str,
    presets: dict[str, C],
    names: dict[str, str],
    argv: Sequence[str] | None,
    data_flags: dict[str, dict[str, Any]] | None = None,
) -> tuple[Options, C]:
    """Parse the command line; return the options and the preset's config with all changed numbers.

    Exits with a message if options contradict each other.

    Args:
        script: module of the command.
        description: text above the options in the help.
        presets: config by preset; the first one is the default.
        names: model name by preset.
        argv: the arguments; None for the arguments of this process.
        data_flags: the options for the user's data with the keyword arguments of ``add_argument``. The first option is
            the path of the data, which selects the preset own.
    """
    data_flags = data_flags or {}
    parser = Parser(script.replace("training.", "train "), description, SHOWN, argv)
    help_text = f"network and data, as listed above (default: {next(iter(presets))})"
    parser.option("--preset", choices=list(presets), help=help_text)
    help_text = "model name in the store (default: that of the preset; required for own data)"
    parser.option("--name", type=_name, help=help_text)
    parser.options(flags(TrainingOptions))
    parser.options(data_flags, "own data")
    numbers = _numbers(presets)
    parser.option("--set", metavar="KEY=VALUE", nargs="+", action="extend", help="change numbers of a preset")
    for name in filter(numbers.get, SHORT):
        word = (name + "={}").format
        parser.option(f"--{name}", dest="set", action="append", type=word, metavar="N", help=numbers[name])
    keys = "".join(f"\n  {name}: {text}" for name, text in numbers.items())
    parser.epilog = f"numbers for --set, with their values in the presets:{keys}" if parser.shows_all else None
    arguments: dict[str, Any] = vars(parser.parse_args(argv))
    flag = next(iter(data_flags), "")
    if not arguments["preview"]:
        _check_utf8(parser, sys.argv[1:] if argv is None else argv, arguments.get(flag.removeprefix("--")))
    words = arguments.pop("set") or []
    if flag:
        _check_data_options(parser, data_flags, arguments)
    if arguments["minutes"] is not None and any(word.startswith("epochs=") for word in words):
        parser.error("--minutes and --epochs cannot be combined")
    preset = arguments["preset"] = arguments["preset"] or next(iter(presets))
    arguments["name"] = arguments["name"] or names[preset]
    config = _changed(parser, presets[preset], preset, words)
    _check_device(parser, arguments["device"])
    if arguments["publish"] and not arguments["preview"] and (task := TASKS.get(script)):
        _check_task(parser, task, arguments["store"], arguments["name"])
    own = ["preview", *(settings["dest"] for settings in data_flags.values())]
    return Options(script=script, own=own, **arguments), config


def _numbers(presets: Mapping[str, Described]) -> dict[str, str]:
    """Return the help of each number, with its value in each preset that has it."""
    helps: dict[str, str] = {}
    values: dict[str, list[str]] = {}
    for preset, config in presets.items():
        for name, field in type(config).model_fields.items():
            if field.description:
                helps.setdefault(name, " ".join(field.description.split()))
                values.setdefault(name, []).append(f"{preset} {getattr(config, name)}")
    return {name: f"{text} ({', '.join(values[name])})" for name, text in helps.items()}


def _changed(parser: Parser, config: C, preset: str, words: Sequence[str]) -> C:
    """Return the config with the numbers in ``words``, such as "batch=16"."""
    hints, changes = typing.get_type_hints(type(config), include_extras=True), {}
    numbers = _numbers({preset: config})
    for word in words:
        name, _, text = word.partition("=")
        if name not in numbers:
            parser.error(f"{word}: the preset {preset} has the numbers {', '.join(numbers)}")
        try:
            changes[name] = parsed(hints[name])(text)
        except argparse.ArgumentTypeError as error:
            parser.error(f"{name} is {error}")
    return config.model_copy(update=changes)


def _check_utf8(parser: argparse.ArgumentParser, words: Sequence[str], data: Path | Sequence[Path] | None) -> None:
    """Exit with a message if a word of the command or the name of the data is not UTF-8, because the card has both."""
    paths = [data] if isinstance(data, Path) else data or []
    names = [os.path.basename(full(path)) for path in paths for full in (os.path.abspath, os.path.realpath)]
    for text in (*words, *names):
        try:
            text.encode()
        except UnicodeEncodeError:
            parser.error(f"{text!r} is not UTF-8; rename the file or folder")


def _check_device(parser: argparse.ArgumentParser, device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        parser.error(f"--device is {device!r}: {str(error).splitlines()[0]}")


def _check_data_options(
    parser: argparse.ArgumentParser, data_flags: dict[str, dict[str, Any]], options: dict[str, Any]
) -> None:
    """Exit with a message if the options for the user's data contradict each other, or if one is missing."""
    flag = next(iter(data_flags))
    path = flag.removeprefix("--")
    has_data = options[path] is not None
    if has_data:
        options["preset"] = options["preset"] or "own"
        if options["preset"] != "own":
            parser.error(f"{flag} cannot be combined with --preset {options['preset']}, which has its own data")
    elif options["preset"] == "own":
        parser.error(f"the preset own needs {flag}")
    # options that the other presets have, too
    public = ("origin", "teachers") if flag == "--text" else ("calibration",)
    for option, settings in data_flags.items():
        name = settings["dest"]
        if not has_data and name not in public and options[name] != settings["default"]:
            parser.error(f"{option} needs {flag}")
    for option, needed in (("as_json", "preview"), ("preview", path), ("version", "backtest"), ("backtest", path)):
        if options.get(option) and not options[needed]:
            parser.error(f"--{option.removeprefix('as_')} needs --{needed}")
    if options["preview"]:
        options["name"] = options["name"] or "preview"
    if options.get("backtest"):
        if not options["publish"]:
            parser.error("--backtest cannot be combined with --no-publish. To write only the report, omit --name")
        if not options["name"]:  # without a name, only a report is written
            options |= {"name": "backtest", "publish": False}
    if has_data and not options["name"]:
        parser.error(f"{flag} needs --name, the name of the new model")


def _check_task(parser: argparse.ArgumentParser, task: str, models: Path, name: str) -> None:
    """Exit with a message if the network could not be published, because the model has versions for another task."""
    try:
        Store(models).check_task(name, None, task)
    except store.StoreError as error:
        parser.error(str(error))


def _name(text: str) -> str:
    if not is_model_name(text):
        allowed = "at most 64 lower-case letters, digits and hyphens, not starting with a hyphen; stats is reserved"
        raise argparse.ArgumentTypeError(f"name {text!r} is not allowed; use {allowed}")
    return text


def base_version(
    options: Options, kinds: Sequence[str], default: str = "", advice: str = FROM_SCRATCH
) -> Version | None:
    """Return the published version given by ``--version`` or ``--from``; None for ``--from scratch``.

    NAME stands for the active version of a model, and NAME@VERSION for the given version. If the folder of ``--store``
    does not have the version, the models that are included in the repository are searched.

    With ``--from``, ``options.origin`` becomes NAME@VERSION. So the config of the run contains the
    version, and the run is not resumed from another version that was published or activated in the meantime.

    Args:
        options: the options of the command.
        kinds: the network kinds that the command accepts.
        default: the version without ``--from``.
        advice: end of the message if the version of ``--from`` does not exist; empty if ``scratch`` is not accepted.

    Raises:
        DataError: the version does not exist, is damaged, or its network kind is not one of ``kinds``.
    """
    other, origin = vars(options).get("version"), options.origin or default
    flag, text, advice = ("--version", other, "") if other else ("--from", origin, advice)
    if text == "scratch":
        return None
    try:
        version = read_version(options.store, text)
    except store.StoreError as error:
        raise DataError(f"{flag} {text}: {error}{advice}") from error
    if version.card.kind not in kinds:
        raise DataError(
            f"{flag} {text}: the network kind is {version.card.kind}; this command can start from {' or '.join(kinds)}"
        )
    if not other:
        options.origin = version.label
    return version


def read_version(models: Path, label: str) -> Version:
    """Return the version NAME@VERSION, or the active version of the model NAME, after verifying it.

    If the store ``models`` does not have the version, the included store is searched. Raises StoreError.
    """
    name, _, number = label.partition("@")
    if number and not number.isdecimal():
        raise store.StoreError("expected NAME or NAME@VERSION")
    found = Store(store_of(models, name, int(number) if number else None), Version.network)
    try:
        return found.verify(name, int(number) if number else found.roles(name).active or max(found.numbers(name)))
    except OSError as error:
        raise store.StoreError(f"{found.folder}: {error.strerror}") from error


def store_of(models: Path, name: str, number: int | None) -> Path:
    """Return the store that has a version of a model: ``models`` or the included store.

    If neither store has the version, return ``models``.
    """
    for folder in (models, INCLUDED):
        numbers = Store(folder).numbers(name) if folder.is_dir() else []
        if numbers and number in (None, *numbers):
            return folder
    return models
