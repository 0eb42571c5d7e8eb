"""Manage the models in the store: activate, roll back, retire, unload, import and export versions.

    python -m app.models list
    python -m app.models activate sales 3 --share 10

The commands work without a running service. A running service applies a change of the store within 2 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from app.cli import add_model
from app.cli.output import write_line
from app.exporting.files import to_onnx, to_pt2
from app.importing.limits import allow_bytes
from app.settings import Settings
from app.store import RolloutRefused, Store, StoreError, VersionNotFound, archive, catalogue
from app.store.rollout import LATEST, Rollout
from app.tasks import check_loading

MAX_COLUMN_WIDTH = 48  # characters; longer cells are cut, except with --json
Row = Sequence[object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, or 1 with an error message."""
    args = _parse(arguments)
    if not args.store.is_dir():
        return _fail(f"--store is {str(args.store)!r}, which is not a folder")
    try:
        return int(args.command(args) or 0)
    except StoreError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader, such as `head`, has exited
        return 0
    except OSError as error:
        problem = error.filename if _is_outside(error, args) else "the store cannot be read or written"
        return _fail(f"{problem}: {error.strerror or error}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments. Before Python 3.13, argparse does not find the FILE in ``export NAME --onnx FILE``."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(args, "file", ...) is None:
        args.file, rest = Path(rest[0]), []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _is_outside(error: OSError, args: argparse.Namespace) -> bool:
    """Return whether the file of an error is not a file of the store. A file that an argument names never is."""
    if not error.filename:
        return False
    path = Path(error.filename)
    is_argument = path != args.store and path in vars(args).values()
    return is_argument or not path.resolve().is_relative_to(args.store.resolve())


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m app.models", description=__doc__, formatter_class=plain)
    shared = argparse.ArgumentParser(add_help=False)
    store_help = "model store; QUARTET_STORE sets another default (default: %(default)s)"
    shared.add_argument("--store", type=_folder, default=Settings().store, help=store_help)
    shared.add_argument("--json", action="store_true", help="print JSON instead of a table")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def command(name: str, handler: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=_capitalised(text), parents=[shared])
        added.set_defaults(command=handler)
        return added

    def named(name: str, handler: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = command(name, handler, text)
        added.add_argument("name", metavar="NAME", help="name of the model")
        return added

    added = command("list", _list, "list the models and their active versions")
    added.add_argument("names", metavar="NAME", nargs="*", help="models to list; by default all")
    named("show", _show, "show one model with all its versions")
    added = named("activate", _activate, "make a version the active version, or a canary")
    added.add_argument(
        "version",
        metavar="VERSION",
        type=_version_or_latest,
        help="version number, or `latest` to always serve the newest version",
    )
    added.add_argument(
        "--share",
        type=float,
        default=100,
        metavar="PERCENT",
        help="share of the requests; below 100, the version is a canary",
    )
    named("rollback", _roll_back, "end the canary, or activate the previous version again")
    added = named("retire", _retire, "stop serving a version, even to requests with its number, but keep its files")
    added.add_argument("version", metavar="VERSION", type=_version, help="version number")
    added.add_argument("--undo", action="store_true", help="serve the retired version again")
    named("unload", _change_model(Store.unload), "stop serving a model until it is loaded again")
    named("load", _change_model(Store.load), "serve an unloaded model again")
    named("default", _default, "make a model the default of its task, which answers requests that name no model")
    command("verify", _verify, "check the hashes, sizes and weights of all versions")
    added = command("import", _import, "verify the version in an archive and add it to the store")
    added.add_argument("file", metavar="FILE", type=Path, help="archive that `export` has written")
    added.add_argument("--renumber", action="store_true", help="give the version the next free number")
    added = command("add", _add, "import a trained network from an ONNX file, or from a .pt2 file of torch.export")
    add_model.add_arguments(added)
    added = command("export", _export, "write a version to an archive, or its network to a .pt2 or ONNX file")
    added.add_argument("model", metavar="NAME[@VERSION]", help="such as sales@3; by default the active version")
    added.add_argument("file", metavar="FILE", type=Path, nargs="?", help="new file; by default such as sales-3.zip")
    formats = added.add_mutually_exclusive_group()
    formats.add_argument("--pt2", action="store_true", help="write a `torch.export` program")
    formats.add_argument("--onnx", action="store_true", help="write an ONNX file (needs the extra [onnx])")
    return parser


def _folder(text: str) -> Path:
    if not text:  # would otherwise be the working directory
        raise argparse.ArgumentTypeError("the path should not be empty")
    return Path(text)


def _capitalised(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _version(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a version; it should be a number such as 3")
    return int(text)


def _version_or_latest(text: str) -> int | Literal["latest"]:
    return LATEST if text == LATEST else _version(text)


def _list(args: argparse.Namespace) -> None:
    names = sorted(set(args.names))
    rows = [_row(args, name) for name in names] if names else catalogue.list_models(Store(args.store))
    table: list[Row] = [("NAME", "TASK", "ACTIVE", "CANARY", "PREVIOUS", "VERSIONS", "RETIRED")]
    for row in rows:
        task = f"{row['task'] or 'no valid version'}{' (default)' if row['default'] else ''}"
        policy = " (unloaded)" if row["unloaded"] else " (latest)" if row["update_policy"] == LATEST else ""
        versions, retired = (", ".join(map(str, row[key])) for key in ("versions", "retired"))
        table.append(
            (row["name"], task, f"{row['active'] or '-'}{policy}", _canary(row), row["previous"], versions, retired)
        )
    _print(args, rows, table)
    for row in rows:
        _print_problem(row)


def _row(args: argparse.Namespace, name: str) -> dict[str, Any]:
    return catalogue.model_row(Store(args.store), name)


def _print_problem(row: dict[str, Any]) -> None:
    if row["problem"]:
        print(f"{row['name']}: {row['problem']}", file=sys.stderr)


def _canary(row: dict[str, Any]) -> str:
    return f"{row['canary']['version']} at {row['canary']['share']:g} %" if row["canary"] else "-"


def _show(args: argparse.Namespace) -> None:
    row = catalogue.describe_model(Store(args.store), args.name)
    table: list[Row] = [("VERSION", "ROLE", "MIB", "CREATED", "METRICS")]
    for version in row["versions"]:
        if version["problem"]:
            table.append((version["version"], version["role"], "-", "-", f"invalid: {version['problem']}"))
            continue
        metrics = ", ".join(f"{key} {value:g}" for key, value in list(version["metrics"].items())[:2])
        size = f"{version['bytes'] / 2**20:.1f}"
        table.append((version["version"], version["role"], size, version["created"][:16], metrics))
    if not args.json:
        last = f"; last change: {row['by']}, {row['changed']}" if row["by"] else ""
        write_line(f"{row['name']}: {row['task'] or 'no valid version'}, {_status(row['name'], row)}{last}")
    _print(args, row, table)
    _print_problem(row)


def _status(name: str, row: dict[str, Any]) -> str:
    """Describe the rollout of a model in one line."""
    if row["unloaded"]:
        return f"{name} is unloaded"
    if row["active"] is None:
        return "no version is active"
    policy = " (latest)" if row["update_policy"] == LATEST else ""
    canary = (
        f", {name}@{row['canary']['version']} is the canary ({row['canary']['share']:g} %)" if row["canary"] else ""
    )
    return f"{name}@{row['active']} is active{policy}{canary}"


def _activate(args: argparse.Namespace) -> None:
    _report(args, Store(args.store, check_loading).activate(args.name, args.version, args.share))


def _roll_back(args: argparse.Namespace) -> None:
    _report(args, Store(args.store, check_loading).rollback(args.name))


def _change_model(change: Callable[[Store, str], Rollout]) -> Callable[[argparse.Namespace], None]:
    """Return a command that calls ``change`` with the store and the name of a model, and reports the result."""
    return lambda args: _report(args, change(Store(args.store), args.name))


def _retire(args: argparse.Namespace) -> None:
    _report(args, Store(args.store, check_loading).retire(args.name, args.version, args.undo))


def _default(args: argparse.Namespace) -> None:
    Store(args.store, check_loading).make_default(args.name)
    row = _row(args, args.name)
    write_line(json.dumps(row) if args.json else f"{args.name} is the default for the task {row['task']!r}")
    _print_problem(row)


def _report(args: argparse.Namespace, changed: Rollout) -> None:
    row = _row(args, args.name)
    write_line(json.dumps(row) if args.json else f"{_status(args.name, row)}{_retired(changed.retired)}")
    _print_problem(row)


def _retired(numbers: Sequence[int]) -> str:
    return f"; retired: {', '.join(map(str, numbers))}" if numbers else ""


def _verify(args: argparse.Namespace) -> int:
    rows = list(catalogue.verify(Store(args.store, check_loading)))
    failed = [row for row in rows if row["problem"]]
    if args.json:
        write_line(json.dumps(rows, indent=2))
        return bool(failed)
    for row in failed:
        write_line(f"{row['what']}: {row['problem']}")
    versions = sum("@" in row["what"] for row in rows)
    problems = f"{len(failed)} problem{'s' if len(failed) > 1 else ''} found" if failed else "all valid"
    write_line(f"{versions} versions checked: {problems}")
    return bool(failed)


def _import(args: argparse.Namespace) -> None:
    with args.file.open("rb") as file:
        max_bytes = Settings().max_import_bytes
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise archive.BadArchive(f"{args.file} has {size:,} bytes; the maximum is {max_bytes:,}")
        if not file.seekable():
            raise archive.BadArchive(f"{args.file} is a pipe; the archive should be a file on a disk")
        allow_bytes(size)
        Store(args.store).defaults()  # so that an error in the store is not attributed to the archive
        try:
            card = archive.import_archive(Store(args.store, check_loading), file, max_bytes, args.renumber)
        except RolloutRefused:  # the message names the version
            raise
        except StoreError as error:
            other = "; this is not an archive of `export`; for .pt2 and ONNX files, use `add`"
            hint = other if args.file.suffix.lower() in (".pt2", ".onnx") else ""
            raise StoreError(f"{args.file}: {error}{hint}") from None
    row = _row(args, card.name)
    label = f"{card.name}@{card.version}"
    write_line(
        json.dumps(row) if args.json else f"imported {label}; {_status(card.name, row)}{_retired(row['retired'])}"
    )
    _print_problem(row)


def _add(args: argparse.Namespace) -> None:
    card = add_model.run(args)
    row = _row(args, card.name)
    added = row | {"added": card.version}
    write_line(json.dumps(added) if args.json else f"added {card.name}@{card.version}; {_status(card.name, row)}")
    _print_problem(row)


def _export(args: argparse.Namespace) -> None:
    name, at, number = args.model.partition("@")
    try:
        version = _version(number) if at else Store(args.store, check_loading).active(name)
    except argparse.ArgumentTypeError:
        raise VersionNotFound(f"{args.model!r} should be a name and a version, such as sales@3") from None
    suffix = ".pt2" if args.pt2 else ".onnx" if args.onnx else ".zip"
    path = args.file or Path(f"{name}-{version}{suffix}")
    if path.exists():
        raise RolloutRefused(f"{path} already exists")
    chunks = _exported(args, name, version)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as scratch:
            temporary = Path(scratch) / path.name
            with temporary.open("wb") as file:
                file.writelines(chunks)
            temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    size = path.stat().st_size
    write_line(json.dumps({"file": str(path), "bytes": size}) if args.json else f"{path}: {size:,} bytes")


def _exported(args: argparse.Namespace, name: str, version: int) -> Iterable[bytes]:
    """Return the content of the exported file in chunks."""
    if not (args.pt2 or args.onnx):
        return archive.export_version(Store(args.store), name, version)
    return [(to_pt2 if args.pt2 else to_onnx)(Store(args.store).verify(name, version))]


def _print(args: argparse.Namespace, data: object, table: Sequence[Row]) -> None:
    """Print ``data`` as JSON if --json is given, otherwise ``table`` with aligned columns."""
    if args.json:
        write_line(json.dumps(data, indent=2))
        return
    cells = [[_cell(value) for value in row] for row in table]
    widths = [min(MAX_COLUMN_WIDTH, max(map(len, column))) for column in zip(*cells, strict=True)]
    for row in cells:
        fitted = [_cut(cell, width) for cell, width in zip(row[:-1], widths, strict=False)]
        write_line("  ".join([*fitted, row[-1]]).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else " ".join(str(value).split())


def _cut(cell: str, width: int) -> str:
    return cell.ljust(width) if len(cell) <= width else f"{cell[: width - 1]}…"


if __name__ == "__main__":
    sys.exit(main())
