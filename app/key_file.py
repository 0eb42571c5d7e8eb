"""Who may use the service: a file with a line for each key, read again when it changes. No key itself is stored.

    # name   sha256 of the key      limits, where they differ from QUARTET_RATE_LIMIT
    alice    9f86d081884c7d65...    600/minute
    alice    60303ae22b998861...    600/minute;20/second
    batch    fd61a03af4f77d87...

    python -m app.keys new alice --limit 600/minute     makes one, prints it once, and adds its line

A name may have several keys, so that callers can change from one to the next; they share what the name is allowed.
A key is taken back by removing its line: within a second nobody gets in with it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from limits import RateLimitItem, parse_many

from app.store.files import file_lock

log = logging.getLogger("quartet")

PREFIX = "quartet-"  # so that a key that lies about is known for one
BYTES = 32  # of chance in a key: too many to guess, so that a plain hash is enough
MOST = 1000  # keys in a file: each is compared with what a caller sends
CHECK_INTERVAL = 1.0  # seconds between two looks at the file
NAME = r"[a-z0-9][a-z0-9-]{0,63}"


class KeysError(Exception):
    """A file of keys that cannot be used: the sentence names the line, and never what may be a key."""


@dataclass(frozen=True)
class ApiKey:
    """One line: whose key it is, its SHA-256, and how many requests it may send; no limits: as the settings say."""

    name: str
    digest: bytes
    limits: tuple[RateLimitItem, ...] = ()


def new_key() -> str:
    """A key of 256 bits of chance."""
    return PREFIX + secrets.token_urlsafe(BYTES)


def digest(key: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def parse_limits(text: str) -> tuple[RateLimitItem, ...]:
    """``600/minute``, or several with ``;`` between, the shortest first. Raises ValueError.

    Each is counted until one refuses: else what is refused for a second would use up the minute.
    """
    limits = tuple(sorted(parse_many(text), key=lambda limit: (limit.get_expiry(), limit.amount))) if text else ()
    if any(limit.amount < 1 or limit.get_expiry() < 1 for limit in limits):
        raise ValueError(f"{text!r} lets nobody in")
    return limits


def parse_keys(text: str) -> list[ApiKey]:
    """The keys of a file's text. Raises KeysError."""
    keys: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 3 or len(words) < 2:
            raise KeysError(f"line {number} has {len(words)} words; expected a name, a sha256, and perhaps limits")
        if not re.fullmatch(NAME, words[0]):
            raise KeysError(f"line {number}: the name should be lower-case letters, digits and '-', 64 at most")
        if not re.fullmatch(r"[0-9a-f]{64}", words[1]):
            raise KeysError(f"line {number}: the second word is no sha256 of 64 hexadecimal digits")
        try:
            limits = parse_limits(words[2] if len(words) == 3 else "")
        except ValueError:
            raise KeysError(f"line {number}: the limits are not like 600/minute or 600/minute;20/second") from None
        keys.append(ApiKey(words[0], bytes.fromhex(words[1]), limits))
    if len({key.digest for key in keys}) < len(keys):
        raise KeysError("the same key stands in two lines")
    if len(keys) > MOST:
        raise KeysError(f"there are {len(keys):,} keys; allowed are {MOST:,}")
    return keys


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a file. Raises KeysError."""
    try:
        return parse_keys(path.read_text("utf-8"))
    except (OSError, UnicodeError) as error:
        raise KeysError(f"it cannot be read: {getattr(error, 'strerror', None) or type(error).__name__}") from None


class Keyring:
    """The keys of a file, as it is now. One that becomes unreadable or wrong changes nothing, and is logged.

    Raises KeysError when it cannot be read at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._stamp()
        self._keys = read_keys(path)
        self._looked = time.monotonic()
        self._unread = ""  # why the file could not be read the last time

    def find(self, key: str) -> ApiKey | None:
        """The line of a key. It takes as long whichever it is, and whether there is one: all are compared whole."""
        self._reload()
        sent, found = digest(key), None
        for known in self._keys:
            if hmac.compare_digest(known.digest, sent):
                found = known
        return found

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            state = os.stat(self._path)
        except OSError:
            return None
        return state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._looked < CHECK_INTERVAL:
            return
        self._looked = now
        stamp = self._stamp()
        if stamp == self._seen and not self._unread:
            return
        self._seen = stamp
        try:
            self._keys = read_keys(self._path)
            self._unread = ""
            log.info("the file of keys was read again: %s keys", len(self._keys))
        except KeysError as error:  # tried again each time: it may have been no more than a want of files
            if str(error) != self._unread:
                log.error("the file of keys is not taken over, the keys from before still count: %s", error)
            self._unread = str(error)


def add(path: Path, name: str, limits: str = "") -> str:
    """Make a key and add its line to a file, which a reader sees with it or without, whole. Gives the key.

    Raises KeysError when the file, the name or the limits are wrong, and OSError when it cannot be written.
    """
    key, path = new_key(), path.resolve()
    with file_lock(path.parent):  # else of two that are made at once one would be lost
        before = path.read_text("utf-8") if path.exists() else ""
        text = before + ("" if before.endswith("\n") or not before else "\n")
        text += " ".join([name, digest(key).hex(), limits]).rstrip() + "\n"
        parse_keys(text)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():  # whoever could read it still can
                state = path.stat()
                os.chmod(scratch, state.st_mode & 0o777)
                with suppress(PermissionError):
                    os.chown(scratch, state.st_uid, state.st_gid)
            os.replace(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise
    return key
