"""The command-line options of the training scripts."""

from __future__ import annotations

import argparse
import dataclasses
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
from training.configs.numbers import Count
from training.data.datasets import DataError

INCLUDED = Path(__file__).parents[1] / "models_store"
STORE = Path(os.environ.get("QUARTET_STORE") or "models_store")  # the same default as that of the service
STORE_HELP = "model store; QUARTET_STORE sets another default (default: %(default)s)"
TASKS = {"training.cnn": "classify", "training.rnn": "continue", "training.lstm": "forecast", "training.gan": "sample"}
C = TypeVar("C", bound=object)  # the dataclass of a preset
Part = Literal["test", "validation"]  # part of the data on which a trained network is measured
FROM_SCRATCH = "; or use --from scratch"
SHOWN = (  # by --help; --help-all shows all options
    *("--images", "--csv", "--text", "--preset", "--name", "--minutes", "--from", "--size", "--horizon"),
    *("--preview", "--backtest", "--resume"),
)
SHORT = ("epochs", "horizon")  # numbers that also have an option of their own: --epochs 5 is --set epochs=5


class Options(argparse.Namespace):
    """The options of a training command: those that all commands have, and those for the user's data.

    ``own`` has the names of the options for the user's data, which differ between the commands.
    """

    script: str  # module of the command, as in "training.cnn"
    preset: str
    name: str
    seed: int
    device: str
    threads: int
    resume: bool
    publish: bool
    runs: Path
    store: Path
    activate: bool | None
    minutes: float | None
    own: list[str]

    @property
    def part(self) -> Part:
        """The part of the data on which networks are measured.

        If the network is published, or with --backtest, this is the test part. With --no-publish alone, it is the
        validation part, and the test part is not read.
        """
        return "test" if self.publish or vars(self).get("backtest") else "validation"


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

    def options(self, title: str, flags: Mapping[str, dict[str, Any]]) -> None:
        """Add a group of options with a title."""
        group = self.add_argument_group(title)
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
    for name, field in options.model_fields.items():
        if name in omit:
            continue
        hint: Any = field.annotation
        settings: dict[str, Any] = {"type": parsed(hint)}
        if hint is bool:
            settings = {"action": "store_true"}
        elif typing.get_origin(hint) is list:
            settings = {"type": parsed(typing.get_args(hint)[0]), "nargs": "+"}
        text = " ".join((field.description or "").split()).replace("%", "%%")
        found[f"--{name.replace('_', '-')}"] = {**settings, "help": text}
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
    _add_common_options(parser, list(presets))
    parser.options("own data", data_flags)
    numbers = _numbers(presets)
    parser.option(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="change numbers of a preset"
    )
    for name in filter(numbers.get, SHORT):
        word = (name + "={}").format
        parser.option(f"--{name}", dest="set", action="append", type=word, metavar="N", help=numbers[name])
    keys = "".join(f"\n  {name}: {text}" for name, text in numbers.items())
    parser.epilog = f"numbers for --set, with their values in the presets:{keys}" if parser.shows_all else None
    arguments: dict[str, Any] = vars(parser.parse_args(argv))
    flag = next(iter(data_flags), "")
    if not arguments["preview"]:
        _check_utf8(parser, sys.argv[1:] if argv is None else argv, arguments.get(flag.removeprefix("--")))
    words = arguments.pop("set")
    if flag:
        _check_data_options(parser, data_flags, arguments)
    if arguments["minutes"] is not None and any(word.startswith("epochs=") for word in words):
        parser.error("--minutes and --epochs cannot be combined")
    preset = arguments.setdefault("preset", next(iter(presets)))
    if "name" not in arguments:
        arguments["name"] = names[preset]
    config = _changed(parser, presets[preset], preset, words)
    _check_device(parser, arguments["device"])
    if arguments["publish"] and not arguments["preview"] and (task := TASKS.get(script)):
        _check_task(parser, task, arguments["store"], arguments["name"])
    own = ["preview", *(settings.get("dest") or _name_of(option) for option, settings in data_flags.items())]
    return Options(script=script, own=own, **arguments), config


def _hints(config: object) -> dict[str, Any]:
    """Return the types of the numbers of a config, with their limits and help."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    return {name: hint for name, hint in hints.items() if typing.get_origin(hint) is Annotated}


def _numbers(presets: Mapping[str, object]) -> dict[str, str]:
    """Return the help of each number, with its value in each preset that has it."""
    helps: dict[str, str] = {}
    values: dict[str, list[str]] = {}
    for preset, config in presets.items():
        for name, hint in _hints(config).items():
            helps.setdefault(name, hint.__metadata__[-1])
            values.setdefault(name, []).append(f"{preset} {getattr(config, name)}")
    return {name: f"{text} ({', '.join(values[name])})" for name, text in helps.items()}


def _changed(parser: Parser, config: C, preset: str, words: Sequence[str]) -> C:
    """Return the config with the numbers in ``words``, such as "batch=16"."""
    hints, changes = _hints(config), {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in hints:
            parser.error(f"{word}: the preset {preset} has the numbers {', '.join(hints)}")
        try:
            changes[name] = parsed(hints[name])(text)
        except argparse.ArgumentTypeError as error:
            parser.error(f"{name} is {error}")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _check_utf8(parser: argparse.ArgumentParser, words: Sequence[str], data: Path | Sequence[Path] | None) -> None:
    """Exit with a message if a word of the command or the name of the data is not UTF-8, because the card has both."""
    paths = [data] if isinstance(data, Path) else data or []
    names = [os.path.basename(full(path)) for path in paths for full in (os.path.abspath, os.path.realpath)]
    for text in (*words, *names):
        try:
            text.encode()
        except UnicodeEncodeError:
            parser.error(f"{text!r} is not UTF-8; rename the file or folder")


def _add_common_options(parser: Parser, presets: list[str]) -> None:
    add, missing = parser.option, argparse.SUPPRESS
    help_text = f"network and data, as listed above (default: {presets[0]})"
    add("--preset", choices=presets, default=missing, help=help_text)
    help_text = "model name in the store (default: that of the preset; required for own data)"
    add("--name", type=_name, default=missing, help=help_text)
    amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
    help_text = "duration of the training in minutes, without reading the data and the evaluation"
    add("--minutes", type=parsed(amount), metavar="N", help=help_text)
    add("--preview", action="store_true", help="print how the data are read, and do not train")
    add("--resume", action="store_true", help="resume the last unfinished run of this model")
    help_text = "do not publish; measure on the validation data, and do not read the test data"
    add("--no-publish", dest="publish", action="store_false", help=help_text)
    help_text = "activate the new version in any case, or in no case (default: unless it is worse than the active one)"
    add("--activate", action=argparse.BooleanOptionalAction, help=help_text)
    add("--seed", metavar="N", type=parsed(Annotated[int, Field(ge=0, lt=2**63)]), default=0, help="random seed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda or cuda:N")
    add("--threads", metavar="N", type=parsed(Count), default=os.cpu_count() or 1, help="CPU threads of PyTorch")
    add("--runs", metavar="DIR", type=Path, default=Path("runs"), help="folder for logs and checkpoints")
    add("--store", metavar="DIR", type=Path, default=STORE, help=STORE_HELP)


def _check_device(parser: argparse.ArgumentParser, device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        parser.error(f"--device is {device!r}: {str(error).splitlines()[0]}")


def _name_of(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _check_data_options(
    parser: argparse.ArgumentParser, data_flags: dict[str, dict[str, Any]], options: dict[str, Any]
) -> None:
    """Exit with a message if the options for the user's data contradict each other, or if one is missing."""
    flag = next(iter(data_flags))
    path = flag.removeprefix("--")
    has_data = options[path] is not None
    if has_data and options.setdefault("preset", "own") != "own":
        parser.error(f"{flag} cannot be combined with --preset {options['preset']}, which has its own data")
    if not has_data and options.get("preset") == "own":
        parser.error(f"the preset own needs {flag}")
    # options that the other presets have, too
    public = ("origin", "teachers") if flag == "--text" else ("calibration",)
    for option, settings in data_flags.items():
        name = settings.get("dest") or _name_of(option)
        usual = settings.get("default", settings.get("action") == "store_false" or None)
        if not has_data and name not in public and options[name] not in (usual, False, None):
            parser.error(f"{option} needs {flag}")
    for option, needed in (("json", "preview"), ("preview", path), ("version", "backtest"), ("backtest", path)):
        if options.get(option) and not options[needed]:
            parser.error(f"--{option} needs --{needed}")
    if options["preview"]:
        options.setdefault("name", "preview")
    if options.get("backtest"):
        if not options["publish"]:
            parser.error("--backtest cannot be combined with --no-publish. To write only the report, omit --name")
        if "name" not in options:  # without a name, only a report is written
            options |= {"name": "backtest", "publish": False}
    if has_data and "name" not in options:
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
        options.origin = f"{version.card.name}@{version.card.version}"
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
