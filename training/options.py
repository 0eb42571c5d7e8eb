"""The command line of the training scripts."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from app import store
from app.store import rollout
from training.data.datasets import DataError
from training.loops import distributed

C = TypeVar("C")  # the dataclass of a script's numbers


@dataclasses.dataclass(frozen=True)
class Options:
    """What a caller chooses besides the numbers of the preset."""

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
    minutes: float | None = None
    data_options: dict[str, Any] = dataclasses.field(default_factory=dict)  # what only one script asks


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and states the default of each option that takes a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.nargs == 0 else super()._get_help_string(action)


def parse_options(
    script: str,
    description: str,
    presets: dict[str, C],
    names: dict[str, str],
    argv: Sequence[str] | None,
    own: dict[str, dict[str, Any]] | None = None,
) -> tuple[Options, C]:
    """Read the command line. Every number of the presets' dataclasses is an option of its own.

    ``own``: the options by which a script trains on the caller's own data, with the preset "own". The first of them
    says where the data are.
    """
    parser = argparse.ArgumentParser(f"python -m {script}", description=description, formatter_class=HelpFormatter)
    first, own = next(iter(presets)), own or {}
    _add_common_options(parser, list(presets))
    if own:
        data = parser.add_argument_group("your own data")
        for flag, how in own.items():
            data.add_argument(flag, **how)
        data.add_argument("--minutes", type=_minutes, metavar="N", help="fit the epochs to so many minutes")
    told = _add_numbers(parser, presets)
    given = vars(parser.parse_args(argv))
    fields = {field.name for field in dataclasses.fields(Options)} - {"script", "own"}
    common = {name: given.pop(name) for name in list(given) if name in fields}
    numbers = {name: given.pop(name) for name in list(given) if name in told}
    if own:
        _check_data_options(parser, next(iter(own)), given, common, numbers)
    common.setdefault("preset", first)
    if "name" not in common:
        common["name"] = names[common["preset"]]
    for name in numbers:
        if common["preset"] not in told[name]:
            parser.error(f"the preset {common['preset']} has no {name.replace('_', ' ')}")
    if common["preset"] != "own" and distributed.world_size() > 1:
        parser.error("several processes train on your own data only: the presets are for one")
    common["device"] = distributed.local_device(common["device"])
    return Options(script, **common, data_options=given), dataclasses.replace(presets[common["preset"]], **numbers)  # type: ignore[type-var]


def _add_common_options(parser: argparse.ArgumentParser, presets: list[str]) -> None:
    parser.add_argument("--preset", choices=presets, default=argparse.SUPPRESS, help=f"(default: {presets[0]})")
    parser.add_argument(
        "--name", type=_name, default=argparse.SUPPRESS, help="name in the store (default: the preset's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of every step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    cores = max(1, (os.cpu_count() or 1) // distributed.local_world_size())
    parser.add_argument("--threads", type=int, default=cores, help="of torch, on the CPU")
    parser.add_argument("--resume", action="store_true", help="go on with the last unfinished run of this name")
    parser.add_argument("--no-publish", dest="publish", action="store_false", help="leave the store as it is")
    parser.add_argument("--runs", metavar="DIR", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--store", metavar="DIR", type=Path, default=Path("models_store"), help="where to publish")


def _add_numbers(parser: argparse.ArgumentParser, presets: dict[str, C]) -> dict[str, dict[str, Any]]:
    """Make every number of the presets an option; return each number's value in the presets that have the number."""
    group = parser.add_argument_group("hyperparameters", "Each changes one number of the preset.")
    values: dict[str, dict[str, Any]] = {}
    help_texts: dict[str, str] = {}
    for preset, config in presets.items():
        for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
            values.setdefault(name, {})[preset] = getattr(config, name)
            help_texts.setdefault(name, *getattr(hint, "__metadata__", ("",)))
    for name, of_preset in values.items():
        kind = type(next(iter(of_preset.values())))
        if kind in (int, float):
            numbers = ", ".join(f"{preset} {value}" for preset, value in of_preset.items())
            option, text = "--" + name.replace("_", "-"), f"{help_texts[name]} ({numbers})"
            group.add_argument(option, type=kind, default=argparse.SUPPRESS, help=text, metavar="N")
    return values


def _check_data_options(
    parser: argparse.ArgumentParser,
    flag: str,
    own: dict[str, Any],
    common: dict[str, Any],
    numbers: dict[str, Any],
) -> None:
    """Own data, the preset "own", a name and a budget go together, or an error says what is missing."""
    given = own[flag.removeprefix("--")] is not None
    if given and common.setdefault("preset", "own") != "own":
        parser.error(f"{flag} trains on your own data, the preset {common['preset']} on its own")
    if not given and common.get("preset") == "own":
        parser.error(f"the preset own is for your own data: say with {flag} where they are")
    if given and "name" not in common:
        parser.error(f"{flag} needs a --name for what is trained")
    if not given and common["minutes"] is not None:
        parser.error(f"--minutes goes with {flag}: the presets have their epochs")
    if common["minutes"] is not None and "epochs" in numbers:
        parser.error("--minutes chooses the epochs: leave out --epochs")


def _name(text: str) -> str:
    try:
        name: str = TypeAdapter(store.ModelName).validate_python(text)
    except ValidationError:
        allowed = "small letters, digits and hyphens, at most 64, no hyphen first"
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a name; allowed are {allowed}") from None
    return name


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return minutes


def base_version(options: Options, kinds: Sequence[str]) -> store.Version | None:
    """The version that ``--from`` names, NAME or NAME@VERSION, by default the one that serves; None for scratch.

    Raises DataError when it is not there, is not whole, or none of ``kinds``.
    """
    named: str = options.data_options["origin"]
    if named == "scratch":
        return None
    name, _, number = named.partition("@")
    known = list(store.all_versions(options.store)) if options.store.is_dir() else []
    numbers = [own for other, own in known if other == name]
    if not numbers or (number and number not in map(str, numbers)):
        there = ", ".join(dict.fromkeys(other for other, _ in known)) or "nothing"
        raise DataError(f"--from {named}: not in {options.store}, which holds {there}; or begin --from scratch")
    try:
        serves = int(number) if number else rollout.serving(options.store, name, rollout.read(options.store, name))
        version = rollout.check_version(options.store, name, serves or max(numbers))
    except store.StoreError as error:
        raise DataError(f"--from {named}: {error}") from error
    if version.card.kind not in kinds:
        raise DataError(
            f"--from {named}: it is a {version.card.kind}; this training begins with a {' or '.join(kinds)}"
        )
    return version
