"""The admin key, which administration requests need."""

from __future__ import annotations

import hashlib
import hmac

from fastapi import Request

from app.errors import Unauthorized
from app.settings import Settings, SettingsError

MIN_KEY_LENGTH = 16  # characters


def admin_key(settings: Settings) -> str | None:
    """Return the admin key from the settings or from its file, or None if neither is set.

    Spaces and line breaks at the start and end of the key are removed, as they are from the key in a request.

    Raises:
        SettingsError: the key and the file are both set, the file cannot be read, or the key is too short or is not
            printable ASCII.
    """
    if settings.admin_key and settings.admin_key_file:
        raise SettingsError("QUARTET_ADMIN_KEY and QUARTET_ADMIN_KEY_FILE are both set; set one of them")
    key, source = settings.admin_key.get_secret_value().strip() if settings.admin_key else None, "QUARTET_ADMIN_KEY"
    if path := settings.admin_key_file:
        source = f"QUARTET_ADMIN_KEY_FILE is {str(path)!r}: its content"
        try:
            key = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"QUARTET_ADMIN_KEY_FILE is {str(path)!r}: it cannot be read: {error}") from None
    if key is not None and (len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable()):
        allowed = f"a key has at least {MIN_KEY_LENGTH} characters, all of them printable ASCII"
        raise SettingsError(f"{source} has {len(key)} characters; {allowed}")
    return key


def require_admin_key(request: Request, key: str) -> None:
    """Raise Unauthorized for a request without the admin key as a bearer token."""
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    check_admin_key(sent.strip() if scheme.lower() == "bearer" else "", key)


def check_admin_key(sent: str, key: str) -> None:
    """Raise Unauthorized if the keys differ. The comparison takes the same time for all keys."""
    digests = (hashlib.sha256(each.encode("utf-8", "surrogateescape")).digest() for each in (sent, key))
    if not hmac.compare_digest(*digests):
        raise Unauthorized("this request needs the admin key, as `Authorization: Bearer KEY`")
