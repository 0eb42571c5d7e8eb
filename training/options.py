"""The command-line options of the training scripts."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from app import store
from app.store import Store
from app.store.version import Version
from training.configs import SWITCH
from training.data.datasets import DataError

INCLUDED = Path(__file__).parents[1] / "models_store"
STORE = Path(os.environ.get("QUARTET_STORE") or "models_store")  # the same default as that of the service
STORE_HELP = "model store; QUARTET_STORE sets another default (default: %(default)s)"
TASKS = {"training.cnn": "classify", "training.rnn": "continue", "training.lstm": "forecast", "training.gan": "sample"}
C = TypeVar("C")  # the dataclass of a preset
Part = Literal["test", "validation"]  # part of the data on which a trained network is measured
FROM_SCRATCH = "; or use --from scratch"
# Numbers that the training scripts check, with messages that name the allowed range.
CHECKED_LATER = (
    *("epochs", "horizon", "validation", "validation_parts"),
    *("depth", "selected", "cutout", "corrupted", "warm_up"),
)
AT_LEAST_ONE = (
    *("threads", "batch", "finetune_batch", "r1_interval", "epochs", "steps"),
    *("hidden", "layers", "members", "bptt", "window", "latent"),
    *("first_width", "second_width", "third_width", "later_width"),
)
BELOW_ONE = ("dropout", "ema_decay", "beta1")
AT_MOST_ONE = (
    *("mixup", "reset_state", "unknown_share", "renamed_share"),
    *("summed_share", "structural_share", "synthetic_share"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that all training commands have.

    ``data_options``: the options for the user's data, which differ between the commands.
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
    log_dir: Path | None = None
    minutes: float | None = None
    data_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def part(self) -> Part:
        """The part of the data on which networks are measured.

        If the network is published, or with --backtest, this is the test part. With --no-publish alone, it is the
        validation part, and the test part is not read.
        """
        return "test" if self.publish or self.data_options.get("backtest") else "validation"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Formats the help: keeps the line breaks of the description, and appends the default values of the options."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.nargs == 0 or action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parses the options of a command. ``--help`` shows the options in ``shown``, and ``--help-all`` shows all."""

    def __init__(self, script: str, description: str, shown: Sequence[str], argv: Sequence[str] | None) -> None:
        super().__init__(
            f"python -m {script}", description=description, formatter_class=HelpFormatter, allow_abbrev=False
        )
        self._shown, self._shows_all = shown, "--help-all" in (sys.argv if argv is None else argv)
        self.add_argument("--help-all", action="help", help="show all options and exit")

    def option(self, flag: str, group: Any = None, **settings: Any) -> None:
        """Add an option with the arguments of ``add_argument``."""
        if flag not in self._shown and not self._shows_all:
            settings["help"] = argparse.SUPPRESS
        (group or self).add_argument(flag, **settings)

    def options(self, title: str, flags: Mapping[str, dict[str, Any]]) -> None:
        """Add a group of options with a title."""
        group = self.add_argument_group(title)
        for flag, settings in flags.items():
            self.option(flag, group, **settings)


def parse_options(
    script: str,
    description: str,
    presets: dict[str, C],
    names: dict[str, str],
    argv: Sequence[str] | None,
    data_flags: dict[str, dict[str, Any]] | None = None,
) -> tuple[Options, C]:
    """Parse the command line; return the options and the preset's config with all overrides.

    Every number of a preset is an option. Exits with a message if options contradict each other.

    Args:
        script: module of the command.
        description: text above the options in the help.
        presets: config by preset; the first one is the default.
        names: model name by preset.
        argv: the arguments; None for the arguments of this process.
        data_flags: the options of the preset "own" with the keyword arguments of ``add_argument``. The first option is
            the path of the data.
    """
    parser = argparse.ArgumentParser(f"python -m {script}", description=description, formatter_class=HelpFormatter)
    default_preset, data_flags = next(iter(presets)), data_flags or {}
    _add_common_options(parser, list(presets))
    if data_flags:
        group = parser.add_argument_group("own data", "The first option of this group selects the preset own.")
        for flag, settings in data_flags.items():
            group.add_argument(flag, **settings)
        minutes_help = "duration of the training in minutes, without reading the data and the evaluation"
        group.add_argument("--minutes", type=_minutes, metavar="N", help=minutes_help)
    numbers = _add_numbers(parser, presets)
    arguments = vars(parser.parse_args(argv))
    if not arguments.get("preview"):
        data = arguments[next(iter(data_flags)).removeprefix("--")] if data_flags else None
        _check_utf8(parser, sys.argv[1:] if argv is None else argv, data)
    fields = {field.name for field in dataclasses.fields(Options)} - {"script", "data_options"}
    common = {name: arguments.pop(name) for name in list(arguments) if name in fields}
    overrides = {name: arguments.pop(name) for name in list(arguments) if name in numbers}
    if data_flags:
        _check_data_options(parser, next(iter(data_flags)), arguments, common, overrides)
    preset = common.setdefault("preset", default_preset)
    if "name" not in common:
        common["name"] = names[preset]
    for name in overrides:
        if preset not in numbers[name]:
            parser.error(f"the preset {preset} has no --{name.replace('_', '-')}")
    _check_numbers(parser, script, common, overrides)
    _check_device(parser, common["device"])
    if common["publish"] and not arguments.get("preview") and (task := TASKS.get(script)):
        _check_task(parser, task, common["store"], common["name"])
    config = dataclasses.replace(presets[preset], **overrides)  # type: ignore[type-var]
    return Options(script, **common, data_options=arguments), config


def _check_utf8(parser: argparse.ArgumentParser, words: Sequence[str], data: Path | Sequence[Path] | None) -> None:
    """Exit with a message if a word of the command or the name of the data is not UTF-8, because the card has both."""
    paths = [data] if isinstance(data, Path) else data or []
    names = [os.path.basename(full(path)) for path in paths for full in (os.path.abspath, os.path.realpath)]
    for text in (*words, *names):
        try:
            text.encode()
        except UnicodeEncodeError:
            parser.error(f"{text!r} is not UTF-8; rename the file or folder")


def _add_common_options(parser: argparse.ArgumentParser, presets: list[str]) -> None:
    parser.add_argument(
        "--preset",
        choices=presets,
        default=argparse.SUPPRESS,
        help=f"network and data, as listed above (default: {presets[0]})",
    )
    parser.add_argument(
        "--name",
        type=_name,
        default=argparse.SUPPRESS,
        help="model name in the store (default: the preset's model name; required for own data)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of all random numbers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda or cuda:N")
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", metavar="N", type=int, default=cores, help="number of CPU threads of PyTorch")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume the last unfinished run of this model with the same options and data",
    )
    parser.add_argument(
        "--no-publish",
        dest="publish",
        action="store_false",
        help="do not publish; measure on the validation data, and do not read the test data",
    )
    parser.add_argument(
        "--runs", metavar="DIR", type=Path, default=Path("runs"), help="folder for logs and checkpoints"
    )
    parser.add_argument("--log-dir", metavar="DIR", type=Path, help="folder for TensorBoard logs; default: none")
    parser.add_argument("--store", metavar="DIR", type=Path, default=STORE, help=STORE_HELP)


def _add_numbers(parser: argparse.ArgumentParser, presets: dict[str, C]) -> dict[str, dict[str, Any]]:
    """Add an option for every number of the presets; return the values of each number, by preset."""
    groups = {"": parser.add_argument_group("hyperparameters", "Each option changes one number of the preset.")}
    values: dict[str, dict[str, Any]] = {}
    help_texts: dict[str, str] = {}
    titles: dict[str, str] = {}
    switches: set[str] = set()
    for preset, config in presets.items():
        for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
            values.setdefault(name, {})[preset] = getattr(config, name)
            text, *marks = getattr(hint, "__metadata__", ("",))
            help_texts.setdefault(name, text)
            if SWITCH in marks:
                switches.add(name)
            titles.setdefault(name, next((mark for mark in marks if mark != SWITCH), ""))
    for name, of_preset in values.items():
        kind = type(next(iter(of_preset.values())))
        if kind in (int, float):
            is_switch = name in switches
            numbers = ", ".join(
                f"{preset} {('no', 'yes')[value] if is_switch else value}" for preset, value in of_preset.items()
            )
            option, text = "--" + name.replace("_", "-"), f"{help_texts[name]} ({numbers})"
            parse, metavar = (_switch, "yes|no") if is_switch else (kind, "N")
            if (title := titles[name]) not in groups:
                groups[title] = parser.add_argument_group(title)
            groups[title].add_argument(option, type=parse, default=argparse.SUPPRESS, help=text, metavar=metavar)
    return values


def _check_numbers(
    parser: argparse.ArgumentParser, script: str, common: dict[str, Any], overrides: dict[str, Any]
) -> None:
    """Exit with a message if a number is out of range."""
    for name, value in {**common, **overrides}.items():
        option = "--" + name.replace("_", "-")
        if name in AT_LEAST_ONE and value < 1 and (name, script) != ("epochs", "training.rnn"):
            parser.error(f"{option} is {value}; it should be at least 1")
        if name in overrides and name not in CHECKED_LATER and not 0 <= value < math.inf:
            parser.error(f"{option} is {value}; it should be finite and not negative")
        if name in BELOW_ONE and value >= 1:
            parser.error(f"{option} is {value}; it should be below 1")
        if name in AT_MOST_ONE and value > 1:
            parser.error(f"{option} is {value}; it should be at most 1")
    if not 0 <= common["seed"] < 2**63:
        parser.error(f"--seed is {common['seed']}; it should be between 0 and 2^63 - 1")


def _check_device(parser: argparse.ArgumentParser, device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        parser.error(f"--device is {device!r}: {str(error).splitlines()[0]}")


def _check_data_options(
    parser: argparse.ArgumentParser,
    flag: str,
    data_options: dict[str, Any],
    common: dict[str, Any],
    overrides: dict[str, Any],
) -> None:
    """Exit with a message if the options for the user's data contradict each other, or if one is missing.

    ``flag`` is the option with the path of the data.
    """
    has_data = data_options[flag.removeprefix("--")] is not None
    if has_data and common.setdefault("preset", "own") != "own":
        parser.error(f"{flag} cannot be combined with --preset {common['preset']}, which has its own data")
    if not has_data and common.get("preset") == "own":
        parser.error(f"the preset own needs {flag}")
    for action in () if has_data else parser._actions:
        given = data_options.get(action.dest) not in (None, action.default)
        if given and not (flag == "--text" and action.dest in ("origin", "teachers")):  # also for public texts
            parser.error(f"{action.option_strings[0]} needs {flag}")
    if data_options.get("json") and not data_options["preview"]:
        parser.error("--json needs --preview")
    if data_options.get("preview"):
        if not has_data:
            parser.error(f"--preview needs {flag}")
        common.setdefault("name", "preview")
    if data_options.get("version") and not data_options["backtest"]:
        parser.error("--version needs --backtest")
    if data_options.get("backtest"):
        if not has_data:
            parser.error(f"--backtest needs {flag}")
        if not common["publish"]:
            parser.error("--backtest cannot be combined with --no-publish. To write only the report, omit --name")
        if "name" not in common:  # without a name, only a report is written
            common |= {"name": "backtest", "publish": False}
    if has_data and "name" not in common:
        parser.error(f"{flag} needs --name, the name of the new model")
    if not has_data and common["minutes"] is not None:
        parser.error(f"--minutes needs {flag}: the other presets have a fixed number of epochs")
    if common["minutes"] is not None and "epochs" in overrides:
        parser.error("--minutes and --epochs cannot be combined")


def _check_task(parser: argparse.ArgumentParser, task: str, models: Path, name: str) -> None:
    """Exit with a message if the network could not be published, because the model has versions for another task."""
    try:
        problem = Store(models).task_problem(name, None, task)
    except store.StoreError as error:
        problem = str(error)
    if problem:
        parser.error(problem)


def _name(text: str) -> str:
    try:
        name: str = TypeAdapter(store.ModelName).validate_python(text)
    except ValidationError:
        allowed = "at most 64 lower-case letters, digits and hyphens, not starting with a hyphen; stats is reserved"
        raise argparse.ArgumentTypeError(f"name {text!r} is not allowed; use {allowed}") from None
    return name


def _switch(text: str) -> int:
    values = {"yes": 1, "no": 0, "1": 1, "0": 0}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected yes or no, not {text!r}")
    return values[text.lower()]


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"minutes must be a number above 0, not {text!r}")
    return minutes


def base_version(
    options: Options, kinds: Sequence[str], default: str = "", advice: str = FROM_SCRATCH
) -> Version | None:
    """Return the published version given by ``--version`` or ``--from``; None for ``--from scratch``.

    NAME stands for the active version of a model, and NAME@VERSION for the given version. If the folder of ``--store``
    does not have the version, the models that are included in the repository are searched.

    With ``--from``, ``options.data_options["origin"]`` becomes NAME@VERSION. So the config of the run contains the
    version, and the run is not resumed from another version that was published or activated in the meantime.

    Args:
        options: the options of the command.
        kinds: the network kinds that the command accepts.
        default: the version without ``--from``.
        advice: end of the message if the version of ``--from`` does not exist; empty if ``scratch`` is not accepted.

    Raises:
        DataError: the version does not exist, is damaged, or its network kind is not one of ``kinds``.
    """
    other, origin = options.data_options.get("version"), options.data_options["origin"] or default
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
        options.data_options["origin"] = f"{version.card.name}@{version.card.version}"
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
