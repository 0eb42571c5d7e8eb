"""Determine how much memory the weights of a version will take, without reading them."""

from __future__ import annotations

import json
import math
import stat
from functools import lru_cache
from pathlib import Path

from app.networks import is_imported
from app.store.card import Card
from app.store.store import WEIGHTS

FLOAT32_BYTES = 4  # networks of this project compute in float32, also if their weights are stored in another type
MAX_HEADER_BYTES = 100_000_000  # the limit of the package safetensors
FLOATS = ("F16", "BF16", "F32", "F64")  # dtypes in the header of a safetensors file


def weights_size(store: Path, card: Card) -> int:
    """Return the bytes that the weights of a version will take in memory, or 0 if the file cannot be read.

    Networks of this project are loaded in float32. If the file is not a safetensors file, the result is the size of the
    file.
    """
    path = store / card.name / str(card.version) / WEIGHTS
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            return 0
        return _loaded_bytes(path, status.st_size, status.st_mtime_ns, is_imported(card.kind))
    except OSError:
        return 0


@lru_cache(4096)  # the store is scanned every few seconds, and most files have not changed since the last scan
def _loaded_bytes(path: Path, size: int, changed_ns: int, imported: bool) -> int:
    """Return the size in memory of the tensors in the header of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, MAX_HEADER_BYTES))
    total = 0
    try:
        for key, tensor in json.loads(header).items():
            if key != "__metadata__":
                first, last = tensor["data_offsets"]
                converted = tensor["dtype"] in FLOATS and not imported
                total += FLOAT32_BYTES * math.prod(tensor["shape"]) if converted else last - first
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return size
    return total
