"""Upgrade requests, which ask to change the protocol, such as to h2c. The service answers them in HTTP/1.1."""

from __future__ import annotations

import contextlib

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class UpgradeNotPossible(Exception):
    """Raised in a callback of the parser to reject a request that cannot be answered in HTTP/1.1, such as CONNECT."""


class UpgradeIgnoringProtocol(HttpToolsProtocol):
    """uvicorn's httptools protocol, which also reads the bodies of requests with an ``Upgrade`` header.

    Each request of the JDK's HTTP client to an ``http`` URL is an upgrade request to h2c. A server may ignore the
    header (RFC 9110, 7.8). But httptools ends such a request after its head, and would parse the body as the next
    request. So a new parser parses the head a second time, without ``Upgrade``. The first time, the subclass should
    ignore the callbacks for the end of the head and for the end of the request: ``is_upgrade_request`` returns True in
    them.
    """

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            while data:
                data = self._parse_until_upgrade_request(data)
        except httptools.HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)

    def _parse_until_upgrade_request(self, data: bytes) -> bytes:
        """Parse ``data`` up to the end of the first head of an upgrade request. Return the rest of the data."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            (offset,) = upgrade.args
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)  # the old one ignores all data after ``Connection: close``
            with contextlib.suppress(AttributeError):  # httptools < 0.6.3
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn
            self.parser.feed_data(head)
            return data[offset:]
        return b""

    def _head_without_upgrade(self) -> bytes:
        request = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([request, *headers, b"", b""])

    def is_upgrade_request(self) -> bool:
        """Return whether the parser has read the head of an upgrade request.

        Raises:
            UpgradeNotPossible: the request is not HTTP without the change.
        """
        if not self.parser.should_upgrade():
            return False
        if all(name != b"upgrade" for name, _ in self.headers):
            raise UpgradeNotPossible
        return True
