"""Show, export and delete captured requests.

quartet capture list
quartet capture export pets new.csv      # requests with feedback, as training data
quartet capture delete --key alice
quartet capture delete --days 7          # all requests that are older
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.output import write_line
from app.errors import QuartetError
from app.store import Store, StoreError

if TYPE_CHECKING:  # takes seconds to import
    from app.records.database import Database


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        database = existing(options.records)
        if options.command == "list":
            for model, version, count, *times in database.counts():
                first, last = (datetime.fromtimestamp(each, UTC).strftime("%Y-%m-%d %H:%M") for each in times)
                write_line(f"{model}@{version}  {count:,} requests  {first} to {last}")
            for figure in database.figures():
                bounds = " to ".join(f"{bound:.3f}" for bound in figure["interval"])
                text = "{model}@{version}  {name} {mean:.3f}  {count:,} measurements; 95 % interval "
                write_line(text.format(**figure) + bounds)
        elif options.command == "drift":
            card = Store(options.store).card(options.model, Store(options.store).roles(options.model).active or 0)
            found = database.drift(card)
            if not found:
                window = card.reference and f"{card.reference.window} captured images, series or characters"
                raise StoreError(f"{options.model}@{card.version} has no drift; it needs {window or 'a reference'}")
            for feature, value in found.items():
                write_line(f"{feature:12} {value:6.2f}{'  drift' if value > 1 else ''}")
        elif options.command == "export":
            from app.records.training_data import training_data

            count = len({row.id for row in database.truths(options.model)})
            if not count:
                raise StoreError(f"no request of {options.model} has feedback")
            options.file.write_text(training_data(database, options.model), "utf-8")
            write_line(f"{options.file}: {count:,} requests with feedback")
        else:
            conditions = {"request": "id = :value", "key": "key = :value", "days": "time < :value"}
            (name,) = (name for name in conditions if getattr(options, name) is not None)
            value = getattr(options, name)
            value = time.time() - value * 86_400 if name == "days" else value
            write_line(f"deleted {database.delete(conditions[name], value):,} requests")
    except (QuartetError, OSError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def existing(folder: Path) -> Database:
    """Return the records in a folder, or in QUARTET_RECORDS_URL. Raises StoreError if there are none."""
    from app.records.database import FILE, Database

    url = os.environ.get("QUARTET_RECORDS_URL", "")
    if not (url or (folder / FILE).exists()):
        raise StoreError(f"there is no {FILE} in {folder}")
    return Database(folder, url)


def add_records(parser: argparse.ArgumentParser) -> None:
    """Add the option with the folder of the records."""
    text = "folder of the captured requests; QUARTET_RECORDS_FOLDER sets another default (default: %(default)s)"
    default = os.environ.get("QUARTET_RECORDS_FOLDER", "capture")
    parser.add_argument("--records", type=Path, default=default, metavar="FOLDER", help=text)


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="quartet capture", description=__doc__, formatter_class=plain)
    folder = argparse.ArgumentParser(add_help=False)
    add_records(folder)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("list", parents=[folder], help="count the requests and the feedback of each version")
    text = "compare the newest requests with the validation data; above 1, a feature has drifted"
    drift = commands.add_parser("drift", parents=[folder], help=text)
    drift.add_argument("model", metavar="NAME", help="name of the model")
    default_store = os.environ.get("QUARTET_STORE", "models_store")
    drift.add_argument("--store", type=Path, default=default_store, help="model store (default: %(default)s)")
    export = commands.add_parser("export", parents=[folder], help="write the requests with feedback as training data")
    export.add_argument("model", metavar="NAME", help="name of the model")
    export.add_argument("file", metavar="FILE", type=Path, help="new CSV file, or text file for texts")
    delete = commands.add_parser("delete", parents=[folder], help="delete requests with their images and feedback")
    which = delete.add_mutually_exclusive_group(required=True)
    which.add_argument("--request", metavar="ID", help="the request with this id")
    which.add_argument("--key", metavar="NAME", help="all requests with the API key of this name")
    which.add_argument("--days", type=float, metavar="N", help="all requests that are older than N days")
    return parser


if __name__ == "__main__":
    sys.exit(main())
