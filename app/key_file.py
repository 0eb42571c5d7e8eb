"""The file of API keys. Each line is for one key, and contains the SHA-256 of the key instead of the key itself.

    # name   sha256 of the key      rate limits, if they differ from QUARTET_RATE_LIMIT
    alice    9f86d081884c7d65...    600/minute
    alice    60303ae22b998861...    600/minute;20/second
    batch    fd61a03af4f77d87...

    quartet keys new alice --limit 600/minute     makes a key, prints it once, and adds its line

A name may have several keys, so that a key can be replaced without interruption. Requests with any of these keys are
counted together for each limit that their lines have in common. The service reads the file again when it changes. To
revoke a key, remove its line. The key then stops working within about one second.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from limits import RateLimitItem, parse_many

from app.engine.executor import Executor

log = logging.getLogger("quartet")

PREFIX = "quartet-"  # a fixed prefix, so that secret scanners can recognise leaked keys
KEY_BYTES = 32  # random bytes of a key. They are too many to guess, so a fast hash without salt is enough.
MAX_KEYS = 1000
NAME = r"[a-z0-9][a-z0-9-]{0,63}"
LIMIT_EXAMPLES = "600/minute or 600/minute;20/second"  # for error messages


class KeysError(Exception):
    """The key file is invalid or cannot be read. The message never contains a key."""


@dataclass(frozen=True)
class ApiKey:
    """One line of the key file. If ``limits`` is empty, the rate limits in the settings apply."""

    name: str
    digest: bytes
    limits: tuple[RateLimitItem, ...] = ()


def new_key() -> str:
    """Return a random key of 256 bits."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest(key: str) -> bytes:
    """Return the SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def parse_limits(text: str) -> tuple[RateLimitItem, ...]:
    """Parse rate limits such as ``600/minute`` or ``600/minute;20/second``. Raises ValueError.

    The result is sorted by period, the shortest first. Requests are counted for each limit in this order, until a limit
    rejects the request. A request that the limit per second rejects therefore does not count for the limit per minute.
    """
    limits = tuple(sorted(parse_many(text), key=lambda limit: (limit.get_expiry(), limit.amount))) if text else ()
    if any(limit.amount < 1 or limit.get_expiry() < 1 for limit in limits):
        raise ValueError(f"{text!r} allows no request")
    return limits


def parse_keys(text: str) -> list[ApiKey]:
    """Parse the text of a key file. Raises KeysError."""
    keys: list[ApiKey] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 3 or len(words) < 2:
            raise KeysError(f"line {number} has {len(words)} words; expected name, sha256 and optional limits")
        if not re.fullmatch(NAME, words[0]):
            raise KeysError(f"line {number}: the name should be lower-case letters, digits and '-', 64 at most")
        if not re.fullmatch(r"[0-9a-f]{64}", words[1]):
            raise KeysError(f"line {number}: the second word should be a sha256 of 64 hexadecimal digits")
        if (earlier := line_of.setdefault(words[1], number)) != number:
            raise KeysError(f"line {number} has the same key as line {earlier}")
        try:
            limits = parse_limits(words[2] if len(words) == 3 else "")
        except ValueError:
            raise KeysError(f"line {number}: limits should be like {LIMIT_EXAMPLES}") from None
        keys.append(ApiKey(words[0], bytes.fromhex(words[1]), limits))
    if len(keys) > MAX_KEYS:
        raise KeysError(f"there are {len(keys):,} keys; the maximum is {MAX_KEYS:,}")
    return keys


def read_keys(path: Path) -> list[ApiKey]:
    """Read a key file. Raises KeysError."""
    try:
        return parse_keys(path.read_text("utf-8"))
    except (OSError, UnicodeError) as error:
        raise KeysError(f"it cannot be read: {getattr(error, 'strerror', None) or type(error).__name__}") from None


def _by_digest(keys: list[ApiKey]) -> dict[bytes, ApiKey]:
    return {key.digest: key for key in keys}


class Keyring:
    """Holds the current keys of a key file.

    If the file becomes invalid, the old keys stay in use and an error is logged.

    Raises KeysError if the file is invalid at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_stamp = self._stamp()
        self._keys = _by_digest(read_keys(path))
        self._problem = ""  # why the last read failed; empty if it succeeded

    async def watch(self, disk: Executor, seconds: float) -> None:
        """Read the file at intervals on a thread of ``disk`` if it has changed, until this task is cancelled.

        While its file system does not answer, the old keys stay in use.
        """
        while True:
            await asyncio.sleep(seconds)
            await disk.run(self.reload)

    def find(self, key: str) -> ApiKey | None:
        """Return the entry of ``key``, or None.

        The time of the search may depend on the digest of the key. It tells nothing about the key itself, because
        nobody can choose keys whose digests begin alike.
        """
        return self._keys.get(digest(key))

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            state = os.stat(self._path)
        except OSError:
            return None
        return state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino

    def reload(self) -> None:
        """Read the file now if it has changed or the last read failed."""
        stamp = self._stamp()
        if stamp == self._read_stamp and not self._problem:
            return
        self._read_stamp = stamp
        try:
            self._keys = _by_digest(read_keys(self._path))
            self._problem = ""
            log.info("reloaded the key file: %s keys", len(self._keys))
        except KeysError as error:  # every check tries again, because the cause may pass (too few file handles)
            if str(error) != self._problem:
                log.error("the key file is invalid, the old keys stay in use: %s", error)
            self._problem = str(error)


def add(path: Path, name: str, limits: str = "") -> str:
    """Make a key, append its line to a key file, and return the key. A new file is readable only by its owner.

    Raises:
        KeysError: the file, the name or the limits are wrong.
        OSError, UnicodeError: the file cannot be read or written.
    """
    if not re.fullmatch(NAME, name):
        raise KeysError(f"the name is {name!r}; it should be lower-case letters, digits and '-', 64 at most")
    word = re.sub(r"\s*([/;])\s*", r"\1", limits.strip())  # spaces separate the words of a line
    try:
        if limits and (len(word.split()) != 1 or not parse_limits(word)):
            raise ValueError
    except ValueError:
        raise KeysError(f"the limit is {limits!r}; it should be like {LIMIT_EXAMPLES}") from None
    if path.exists() and not path.is_file():  # such as /dev/null, which would lose the key
        raise KeysError("it is not a regular file")
    key = new_key()
    with os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two processes may add keys at the same time
        before = file.read()
        line = " ".join([name, digest(key).hex(), word]).rstrip() + "\n"
        added = line if before.endswith("\n") or not before else f"\n{line}"
        parse_keys(before + added)
        file.write(added)
        file.flush()
        os.fsync(file.fileno())
    return key
