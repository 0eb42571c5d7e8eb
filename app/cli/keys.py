"""Make API keys on the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from app.cli.output import write_line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="quartet keys", description="Manage the API keys of the service.")
    commands = parser.add_subparsers(required=True, metavar="new")
    text = "make a key, print it, and add its hash to the key file"
    new = commands.add_parser("new", help=text, description=f"{text.capitalize()}.")
    new.add_argument("name", help="name of the client: lower-case letters, digits and '-'")
    new.add_argument("--limit", default="", help="rate limits, such as 600/minute or 600/minute;20/second")
    new.add_argument(
        "--file", default=os.environ.get("QUARTET_KEYS_FILE"), help="key file (default: QUARTET_KEYS_FILE)"
    )
    options = parser.parse_args(arguments)
    if not options.file:
        parser.error("the key file is not set; set QUARTET_KEYS_FILE or pass --file")
    from app.key_file import KeysError, add  # the library of rate limits takes a third of the time of --help

    try:
        key = add(Path(options.file), options.name, options.limit)
    except (KeysError, OSError, UnicodeError) as error:
        sys.exit(f"{options.file}: {error}")
    try:
        write_line(key)
    except OSError as error:
        sys.exit(f"{options.file}: the key was added, but could not be printed: {error}; remove its line")
    print(f"Store the key now: {options.file} contains only its hash.", file=sys.stderr)


if __name__ == "__main__":
    main()
