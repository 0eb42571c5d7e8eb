"""Reject requests that address the service by a host name that is not allowed.

This check prevents DNS rebinding. In this attack, the host name of a foreign web page points to an address of this
machine or network. The browser then treats the service as the same origin, and lets the page send requests and read the
responses. The ``Host`` header of these requests still contains the name of the page, so the service can recognise them.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable
from functools import lru_cache

from starlette.types import Scope

from app.errors import BadValue, quote_value
from app.settings import Settings, SettingsError

# Nobody can register names in these domains (RFC 6761, RFC 6762, RFC 8375; Kubernetes).
LOCAL_DOMAINS = (".localhost", ".local", ".internal", ".home.arpa", ".svc")
PATTERN = re.compile(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
CACHED_HOSTS = 256


HostCheck = Callable[[Scope], None]


def _rejection(host: bytes) -> BadValue:
    allowed = "allowed values: IP addresses, local names, the machine's own name and names in QUARTET_TRUSTED_HOSTS"
    return BadValue(f"host is {quote_value(host_name(host))}; {allowed}", "host")


def host_name(host: bytes) -> str:
    """Return the name or address in a ``Host`` header, without the port, in lower case."""
    text = host.decode("latin-1").strip().lower()
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    return name.removesuffix(".")


def is_local(name: str) -> bool:
    """Return whether a host name is local. A local name cannot be the name of a foreign web page."""
    if ("." not in name and ":" not in name) or name.endswith(LOCAL_DOMAINS):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def host_check(settings: Settings) -> HostCheck:
    """Return a function that raises BadValue for a request whose ``Host`` is neither local nor trusted.

    IP addresses, names without a dot, and names in ``LOCAL_DOMAINS`` are local. ``QUARTET_TRUSTED_HOSTS`` has host
    names such as ``a.b``, and patterns such as ``*.a.b`` for all subdomains of ``a.b``. If it is empty, all names are
    allowed in two cases. In the first case, the service requires API keys, which a foreign page does not have. In the
    second case, the service uses TLS, and browsers do not accept its certificate for the name of a foreign page.

    Raises:
        SettingsError: a name is malformed.
    """
    patterns = {pattern.strip().lower() for pattern in settings.trusted_hosts.split(",") if pattern.strip()}
    for pattern in patterns:
        if not PATTERN.fullmatch(pattern):
            raise SettingsError(
                f"QUARTET_TRUSTED_HOSTS is {settings.trusted_hosts!r}: {pattern!r} is not like a.b, *.a.b or *"
            )
    if "*" in patterns or (not patterns and (settings.keys_file or settings.tls_cert)):
        return lambda scope: None
    own = {host_name(name.encode()) for name in (socket.gethostname(), settings.host)}

    @lru_cache(CACHED_HOSTS)
    def is_trusted(host: bytes) -> bool:
        name = host_name(host)
        if is_local(name) or name in patterns | own:
            return True
        return any(pattern.startswith("*.") and name.endswith(pattern[1:]) for pattern in patterns)

    def check(scope: Scope) -> None:
        for name, host in scope["headers"]:
            if name == b"host" and not is_trusted(host):
                raise _rejection(host)

    return check
