"""Manage the models in the store: activate, roll back, retire, unload, import and export versions.

    quartet models list
    quartet models activate sales 3 --share 10

The commands work without a running service. A running service applies a change of the store within 2 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.cli import add_model, capture
from app.cli.output import write_line
from app.errors import QuartetError
from app.store import LATEST, Card, RolloutRefused, Store, StoreError, VersionNotFound, catalogue
from app.store.store import NUMBER

if TYPE_CHECKING:  # takes seconds to import
    from app.records.comparison import Comparison

# The modules that need torch are imported by the commands that use them, because they take seconds to import.
MAX_COLUMN_WIDTH = 48  # characters; longer cells are cut, except with --json
Row = Sequence[object]
Command = Callable[[argparse.Namespace], int | None]


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
        is_outside = error.filename and not Path(error.filename).resolve().is_relative_to(args.store.resolve())
        place = error.filename if is_outside else "the store cannot be read or written"
        return _fail(f"{place}: {error.strerror or error}")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments. Before Python 3.13, argparse does not find the FILE in ``export NAME --onnx FILE``."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(args, "file", ...) is None:
        args.file, rest = Path(rest[0]), []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="quartet models", description=__doc__, formatter_class=plain)
    shared = argparse.ArgumentParser(add_help=False)
    store_help = "model store; QUARTET_STORE sets another default (default: %(default)s)"
    default_store = os.environ.get("QUARTET_STORE", "models_store")
    shared.add_argument("--store", type=_folder, default=default_store, help=store_help)
    shared.add_argument("--json", action="store_true", help="print JSON instead of a table")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def command(name: str, run: Command, text: str, *positional: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text.replace("%", "%%"), description=f"{text[0].upper()}{text[1:]}.", parents=[shared]
        )
        added.set_defaults(command=run, change=name)
        if "name" in positional:
            added.add_argument("name", metavar="NAME", help="name of the model")
        if "version" in positional:
            added.add_argument("version", metavar="VERSION", type=_version, help="version number")
        return added

    added = command("list", _list, "list the models and their active versions")
    added.add_argument("names", metavar="NAME", nargs="*", help="models to list; by default all")
    command("show", _show, "show one model with all its versions", "name")
    added = command("activate", _change, "make a version the active version, or a canary", "name")
    version_help = "version number, or `latest` to always serve the newest version"
    added.add_argument("version", metavar="VERSION", type=_version_or_latest, help=version_help)
    share_help = "share of the requests, such as 20%%; below 100, the version is a canary"
    added.add_argument("--share", type=_share, default=100, metavar="PERCENT", help=share_help)
    command("rollback", _change, "end the canary, or activate the version that was active before", "name")
    text = "stop serving a version, even to requests with its number, but keep its files"
    added = command("retire", _change, text, "name", "version")
    added.add_argument("--undo", action="store_true", help="serve the retired version again")
    command("unload", _change, "stop serving a model until it is loaded again", "name")
    command("load", _change, "serve an unloaded model again", "name")
    text = "make a model the default of its task, which answers requests that name no model"
    command("default", _default, text, "name")
    command("verify", _verify, "check the hashes, sizes and weights of all versions")
    _add_shadow(command)
    _add_files(command)
    return parser


def _add_shadow(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands for shadows. ``command`` adds one command."""
    text = "send copies of captured requests to a version, whose answers are only compared"
    added = command("shadow", _change, text, "name")
    added.add_argument("version", metavar="VERSION", type=_version_or_off, help="version number, or `off`")
    share_help = "share of the captured requests, such as 20%% (default: all)"
    added.add_argument("--share", type=_share, default=100, metavar="PERCENT", help=share_help)
    capture.add_records(command("compare", _compare, "compare the shadow with the active version", "name"))
    text = "activate the shadow if it is better than the active version with 95 % confidence"
    capture.add_records(command("promote", _promote, text, "name"))


def _add_files(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that read and write files outside the store. ``command`` adds one command."""
    added = command("import", _import, "verify the version in an archive and add it to the store")
    added.add_argument("file", metavar="FILE", type=Path, help="archive that `export` has written")
    added.add_argument("--renumber", action="store_true", help="give the version the next free number")
    text = "import a trained network from an ONNX file, or from a .pt2 file of torch.export"
    adding = command("add", _add, text)
    add_model.add_arguments(adding)
    for each in (added, adding):
        help_text = "activate the version in any case, or in no case (default: unless it is worse than the active one)"
        each.add_argument("--activate", action=argparse.BooleanOptionalAction, help=help_text)
    added = command("export", _export, "write a version to an archive, or its network to a .pt2 or ONNX file")
    added.add_argument("model", metavar="NAME[@VERSION]", help="such as sales@3; by default the active version")
    added.add_argument("file", metavar="FILE", type=Path, nargs="?", help="new file; by default such as sales-3.zip")
    formats = added.add_mutually_exclusive_group()
    formats.add_argument("--pt2", action="store_true", help="write a `torch.export` program")
    formats.add_argument("--onnx", action="store_true", help="write an ONNX file (needs the extra [onnx])")


def _folder(text: str) -> Path:
    if not text:  # would otherwise be the working directory
        raise argparse.ArgumentTypeError("the path should not be empty")
    return Path(text)


def _version(text: str) -> int:
    if not NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a version; it should be a number such as 3")
    return int(text)


def _share(text: str) -> float:
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share; it should be like 20 or 20%") from None


def _version_or_latest(text: str) -> int | Literal["latest"]:
    return LATEST if text == LATEST else _version(text)


def _version_or_off(text: str) -> int | None:
    return None if text == "off" else _version(text)


def _store(args: argparse.Namespace) -> Store:
    """Return the store, in which a version is active only if the service can load it."""

    def check(version: Any) -> None:
        from app.tasks import check_loading

        check_loading(version)

    return Store(args.store, check)


def _list(args: argparse.Namespace) -> None:
    rows = catalogue.list_models(Store(args.store), sorted(set(args.names)))
    table: list[Row] = [("NAME", "TASK", "ACTIVE", "CANARY", "PREVIOUS", "VERSIONS", "RETIRED")]
    for row in rows:
        task = f"{row['task'] or 'no valid version'}{' (default)' if row['default'] else ''}"
        policy = " (unloaded)" if row["unloaded"] else " (latest)" if row["update_policy"] == LATEST else ""
        canary = f"{row['canary']['version']} at {row['canary']['share']:g} %" if row["canary"] else "-"
        versions, retired = (", ".join(map(str, row[key])) for key in ("versions", "retired"))
        table.append((row["name"], task, f"{row['active'] or '-'}{policy}", canary, row["previous"], versions, retired))
    _print(args, rows, table)
    for row in rows:
        _print_problem(row)


def _print_problem(row: dict[str, Any]) -> None:
    if row["problem"]:
        print(f"{row['name']}: {row['problem']}", file=sys.stderr)


def _show(args: argparse.Namespace) -> None:
    row = catalogue.describe_model(Store(args.store), args.name)
    table: list[Row] = [("VERSION", "ROLE", "MIB", "CREATED", "METRICS")]
    for version in row["versions"]:
        size, created, metrics = "-", "-", f"invalid: {version['problem']}"
        if not version["problem"]:
            size, created = f"{version['bytes'] / 2**20:.1f}", version["created"][:16]
            metrics = ", ".join(f"{key} {value:g}" for key, value in list(version["metrics"].items())[:2])
        table.append((version["version"], version["role"], size, created, metrics))
    if not args.json:
        last = f"; last change: {row['by']}, {row['changed']}" if row["by"] else ""
        write_line(f"{row['name']}: {row['task'] or 'no valid version'}, {row['state']}{last}")
    _print(args, row, table)
    _print_problem(row)


def _report(args: argparse.Namespace, name: str, text: str = "", **more: int) -> None:
    """Print the state of a model after a change, or ``text`` instead. ``more`` is added to the JSON."""
    (row,) = catalogue.list_models(Store(args.store), [name])
    write_line(json.dumps(row | more) if args.json else text or row["state"])
    _print_problem(row)


def _report_new(args: argparse.Namespace, verb: str, card: Card) -> None:
    """Print what a new version replaces. ``verb`` is "added" or "imported"."""
    text = f"{verb} {catalogue.publication(Store(args.store), card.name, card.version)}"
    _report(args, card.name, text, **{verb: card.version})


def _change(args: argparse.Namespace) -> None:
    """Call the method of the store that has the name of the command, and print the new state of the model."""
    values = {name: value for name, value in vars(args).items() if name in ("name", "version", "share", "undo")}
    getattr(_store(args), args.change)(**values)
    _report(args, args.name)


def _comparison(args: argparse.Namespace, store: Store) -> tuple[int, int, Comparison]:
    """Return the active version, the shadow and their comparison. Raises StoreError."""
    from app.records.comparison import compare_versions

    name, roles = args.name, store.roles(args.name)
    if roles.active is None or roles.shadow is None:
        raise RolloutRefused(f"{name} has no shadow; `shadow {name} VERSION` makes a version the shadow")
    active, shadow = roles.active, roles.shadow.version
    try:
        compared = compare_versions(capture.existing(args.records), store.card(name, active).task, name, active, shadow)
    except QuartetError as error:
        raise StoreError(str(error)) from None
    return active, shadow, compared


def _compare(args: argparse.Namespace) -> None:
    def number(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.4g}"

    active, shadow, compared = _comparison(args, Store(args.store))
    table: list[Row] = [("FIGURE", f"VERSION {active}", f"VERSION {shadow}", "DIFFERENCE", "95 % INTERVAL", "REQUESTS")]
    for row in compared.rows:
        bounds = "-" if row.difference is None else " to ".join(number(bound, "+") for bound in row.interval)
        means = number(row.active), number(row.shadow), number(row.difference, "+")
        table.append((row.name, *means, bounds, row.requests))
    _print(args, asdict(compared), table)
    if not args.json:
        write_line(compared.verdict)


def _promote(args: argparse.Namespace) -> None:
    store = _store(args)
    _, number, compared = _comparison(args, store)
    if not compared.is_better:
        raise RolloutRefused(f"{compared.verdict}; `activate {args.name} {number}` activates it anyway")
    store.activate(args.name, number)
    _report(args, args.name, f"{compared.verdict}\n{args.name}@{number} is active")


def _default(args: argparse.Namespace) -> None:
    task = _store(args).make_default(args.name)
    _report(args, args.name, f"{args.name} is the default for the task {task!r}")


def _verify(args: argparse.Namespace) -> int:
    rows = list(catalogue.verify(_store(args)))
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
    from app.importing.limits import allow_bytes
    from app.settings import Settings
    from app.store.archive import import_archive

    store, max_bytes = _store(args), Settings().limits.max_import_bytes
    with store.disk.open(args.file) as file:
        allow_bytes(min(os.fstat(file.fileno()).st_size, max_bytes))
        store.defaults()  # so that an error in the store is not attributed to the archive
        try:
            card = import_archive(store, file, max_bytes, args.renumber, args.activate)
        except RolloutRefused:  # the message names the version
            raise
        except StoreError as error:
            other = "; this is not an archive of `export`; for .pt2 and ONNX files, use `add`"
            hint = other if args.file.suffix.lower() in (".pt2", ".onnx") else ""
            raise StoreError(f"{args.file}: {error}{hint}") from None
    _report_new(args, "imported", card)


def _add(args: argparse.Namespace) -> None:
    card = add_model.run(args)
    _report_new(args, "added", card)


def _export(args: argparse.Namespace) -> None:
    name, at, number = args.model.partition("@")
    store = Store(args.store)  # a version that this service cannot load may be exported
    try:
        version = _version(number) if at else _store(args).active(name)
    except argparse.ArgumentTypeError:
        raise VersionNotFound(f"{args.model!r} should be a name and a version, such as sales@3") from None
    suffix = ".pt2" if args.pt2 else ".onnx" if args.onnx else ".zip"
    path = args.file or Path(f"{name}-{version}{suffix}")
    if path.exists():
        raise RolloutRefused(f"{path} already exists")
    if args.pt2 or args.onnx:
        from app.exporting.files import to_onnx, to_pt2

        chunks: Iterable[bytes] = [(to_pt2 if args.pt2 else to_onnx)(store.verify(name, version))]
    else:
        from app.store.archive import export_version

        chunks = export_version(store, name, version)
    try:
        with path.open("wb") as file:
            file.writelines(chunks)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    size = path.stat().st_size
    write_line(json.dumps({"file": str(path), "bytes": size}) if args.json else f"{path}: {size:,} bytes")


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
    return "-" if value is None else " ".join(str(value).split())


def _cut(cell: str, width: int) -> str:
    return cell.ljust(width) if len(cell) <= width else f"{cell[: width - 1]}…"


if __name__ == "__main__":
    sys.exit(main())
