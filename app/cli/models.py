"""The versions in the store, from the command line: which serve, which are tried, which are retired.

    python -m app.models list
    python -m app.models activate sales 3 --share 10

Works on the store itself, with or without a service that runs on it; one that does follows within 2 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from app.settings import Settings
from app.store import StoreError, archive, catalogue, rollout
from app.store.rollout import NEWEST, Rollout

WIDEST = 48  # characters of a column; what is longer is cut, unless --json is given
Row = Sequence[object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked; gives the exit status: 1, with one sentence, for what cannot be done."""
    chosen = _parser().parse_args(arguments)
    if not chosen.store.is_dir():
        return _complain(f"--store is {str(chosen.store)!r}: there is no such folder")
    try:
        return int(chosen.command(chosen) or 0)
    except StoreError as error:
        return _complain(str(error))
    except BrokenPipeError:  # by `head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        outside = error.filename and not Path(error.filename).is_relative_to(chosen.store)
        return _complain(f"{error.filename if outside else 'the store cannot be written'}: {error.strerror or error}")


def _complain(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m app.models", description=__doc__, formatter_class=plain)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--store", type=Path, default=Settings().store, help="folder of the networks (QUARTET_STORE, now %(default)s)"
    )
    shared.add_argument("--json", action="store_true", help="print JSON instead of a table")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def command(name: str, does: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=_capitalised(text), parents=[shared])
        added.set_defaults(command=does)
        return added

    def named(name: str, does: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = command(name, does, text)
        added.add_argument("name", metavar="NAME", help="a model's name")
        return added

    command("list", _list, "which version of each model serves").add_argument("names", metavar="NAME", nargs="*")
    named("show", _show, "one model with all its versions")
    added = named("activate", _activate, "have a version serve whoever asks for none")
    added.add_argument("version", metavar="VERSION", type=_version_or_newest, help="its number, or `newest`: follow it")
    added.add_argument(
        "--share", type=float, default=100, metavar="PERCENT", help="try it on a share of these requests, as a canary"
    )
    named("rollback", _rollback, "end the canary, or else have the previous version serve again")
    added = named("retire", _retire, "serve a version no longer, not even by its number; its files stay")
    added.add_argument("version", metavar="VERSION", type=_version)
    added.add_argument("--undo", action="store_true", help="serve it by its number again")
    named("unload", _unload, "serve no version of a model until it is loaded again")
    named("load", _load, "serve it again, as was chosen before")
    command("verify", _verify, "read all versions again: hashes, sizes, finite weights")
    added = named("diff", _diff, "two versions side by side: figures, sizes, data, notes")
    for place in ("first", "second"):
        added.add_argument(place, metavar="VERSION", type=_version)
    added = command("import", _import, "add a version from an archive, once all of it is checked")
    added.add_argument("file", metavar="FILE", type=Path)
    added.add_argument("--renumber", action="store_true", help="give it the next free number instead of its own")
    added = command("export", _export, "write a version to an archive")
    added.add_argument("model", metavar="NAME@VERSION")
    added.add_argument("file", metavar="FILE", type=Path, help="a .zip that is not there yet")
    return parser


def _capitalised(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _version(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is no version; it should be a number such as 3")
    return int(text)


def _version_or_newest(text: str) -> int | Literal["newest"]:
    return NEWEST if text == NEWEST else _version(text)


def _list(chosen: argparse.Namespace) -> None:
    for name in chosen.names:
        rollout.numbers(chosen.store, name)  # one that is not there is told
    rows = [row for row in catalogue.list_models(chosen.store) if not chosen.names or row["name"] in chosen.names]
    table: list[Row] = [("NAME", "TASK", "ACTIVE", "CANARY", "PREVIOUS", "VERSIONS", "RETIRED")]
    for row in rows:
        task = f"{row['task'] or 'none is whole'}{' (default)' if row['default'] else ''}"
        follows = " (unloaded)" if row["unloaded"] else " (newest)" if row["follows"] == NEWEST else ""
        versions, retired = (", ".join(map(str, row[key])) for key in ("versions", "retired"))
        table.append(
            (row["name"], task, f"{row['active'] or '-'}{follows}", _canary(row), row["previous"], versions, retired)
        )
    _print(chosen, rows, table)
    for row in rows:
        if row["problem"]:
            print(f"{row['name']}: {row['problem']}", file=sys.stderr)


def _canary(row: dict[str, Any]) -> str:
    return f"{row['canary']['version']} at {row['canary']['share']:g} %" if row["canary"] else "-"


def _show(chosen: argparse.Namespace) -> None:
    row = catalogue.describe_model(chosen.store, chosen.name)
    table: list[Row] = [("VERSION", "ROLE", "MIB", "CREATED", "FIGURES")]
    for version in row["versions"]:
        if version["problem"]:
            table.append((version["version"], version["role"], "-", "-", f"broken: {version['problem']}"))
            continue
        figures = ", ".join(f"{key} {value:g}" for key, value in list(version["metrics"].items())[:2])
        size = f"{version['bytes'] / 2**20:.1f}"
        table.append((version["version"], version["role"], size, version["created"][:16], figures))
    if not chosen.json:
        last = f"; last: {row['by']}, {row['changed']}" if row["by"] else ""
        print(f"{row['name']}: {row['task'] or 'no version is whole'}, {_told(row['name'], row)}{last}")
    _print(chosen, row, table)


def _told(name: str, row: dict[str, Any]) -> str:
    """Which versions serve, in words."""
    if row["unloaded"]:
        return f"{name} is unloaded"
    if row["active"] is None:
        return "no version serves"
    follows = ", the newest" if row["follows"] == NEWEST else ""
    canary = f", {name}@{row['canary']['version']} is tried on {row['canary']['share']:g} %" if row["canary"] else ""
    return f"{name}@{row['active']} serves{follows}{canary}"


def _activate(chosen: argparse.Namespace) -> None:
    _changed(chosen, rollout.activate(chosen.store, chosen.name, chosen.version, chosen.share))


def _rollback(chosen: argparse.Namespace) -> None:
    _changed(chosen, rollout.rollback(chosen.store, chosen.name))


def _retire(chosen: argparse.Namespace) -> None:
    _changed(chosen, rollout.retire(chosen.store, chosen.name, chosen.version, chosen.undo))


def _unload(chosen: argparse.Namespace) -> None:
    _changed(chosen, rollout.unload(chosen.store, chosen.name))


def _load(chosen: argparse.Namespace) -> None:
    _changed(chosen, rollout.load(chosen.store, chosen.name))


def _changed(chosen: argparse.Namespace, changed: Rollout) -> None:
    row = next(row for row in catalogue.list_models(chosen.store) if row["name"] == chosen.name)
    retired = f"; retired: {', '.join(map(str, changed.retired))}" if changed.retired else ""
    print(json.dumps(row) if chosen.json else f"{_told(chosen.name, row)}{retired}")


def _verify(chosen: argparse.Namespace) -> int:
    rows = list(catalogue.verify(chosen.store))
    wrong = [row for row in rows if row["problem"]]
    if chosen.json:
        print(json.dumps(rows, indent=2))
        return bool(wrong)
    for row in wrong:
        print(f"{row['what']}: {row['problem']}")
    versions = sum("@" in row["what"] for row in rows)
    broken = f"{len(wrong)} of what was read {'is' if len(wrong) == 1 else 'are'} broken" if wrong else "all are whole"
    print(f"{versions} versions: {broken}")
    return bool(wrong)


def _diff(chosen: argparse.Namespace) -> None:
    rows = catalogue.diff(chosen.store, chosen.name, chosen.first, chosen.second)
    table: list[Row] = [("", f"{chosen.name}@{chosen.first}", f"{chosen.name}@{chosen.second}", "")]
    table += [(row["what"], row["first"], row["second"], _change(row["first"], row["second"])) for row in rows]
    _print(chosen, rows, table)


def _change(first: Any, second: Any) -> str:
    """How the second of two values differs; empty when it does not."""
    if first == second:
        return ""
    if all(isinstance(value, int | float) for value in (first, second)):
        return f"{second - first:+.6g}"
    return "differs"


def _import(chosen: argparse.Namespace) -> None:
    with chosen.file.open("rb") as file:
        most = Settings().max_import_bytes
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise archive.BadArchive(f"{chosen.file} has {size:,} bytes; allowed are {most:,}")
        card = archive.import_archive(chosen.store, file, most, chosen.renumber)
    row = next(row for row in catalogue.list_models(chosen.store) if row["name"] == card.name)
    label = f"{card.name}@{card.version}"
    print(json.dumps(row) if chosen.json else f"{label} is in the store; {_told(card.name, row)}")


def _export(chosen: argparse.Namespace) -> None:
    name, _, number = chosen.model.partition("@")
    try:
        version = _version(number)
    except argparse.ArgumentTypeError:
        raise rollout.VersionNotFound(f"{chosen.model!r} should be a name and a version, such as sales@3") from None
    if chosen.file.exists():
        raise rollout.RolloutRefused(f"{chosen.file} is there already")
    pieces = archive.export_version(chosen.store, name, version)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=chosen.file.parent) as scratch:
            whole = Path(scratch) / chosen.file.name
            with whole.open("wb") as file:
                file.writelines(pieces)
            whole.replace(chosen.file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(chosen.file)) from None
    size = chosen.file.stat().st_size
    print(json.dumps({"file": str(chosen.file), "bytes": size}) if chosen.json else f"{chosen.file}: {size:,} bytes")


def _print(chosen: argparse.Namespace, data: object, table: Sequence[Row]) -> None:
    """Columns as wide as what stands in them, or the data as JSON."""
    if chosen.json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return
    cells = [[_cell(value) for value in row] for row in table]
    widths = [min(WIDEST, max(map(len, column))) for column in zip(*cells, strict=True)]
    for row in cells:
        fitted = [_cut(cell, width) for cell, width in zip(row[:-1], widths, strict=False)]
        print("  ".join([*fitted, row[-1]]).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else " ".join(str(value).split())


def _cut(cell: str, width: int) -> str:
    return cell.ljust(width) if len(cell) <= width else f"{cell[: width - 1]}…"


if __name__ == "__main__":
    sys.exit(main())
