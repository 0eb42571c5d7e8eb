"""Responses to HTTP/1.0 clients, which do not know chunked bodies."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class CloseDelimitedCycle(RequestResponseCycle):
    """A request of HTTP/1.0. The end of the connection ends a response without ``content-length``.

    uvicorn would send the body of such a response in chunks, which RFC 9112, 6.1, forbids. uvicorn closes the
    connection after each response to an HTTP/1.0 client.
    """

    ends_with_connection = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.ends_with_connection = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            if self.ends_with_connection:
                self.chunked_encoding = False
        elif self.ends_with_connection:
            self.expected_content_length = len(message.get("body", b""))  # uvicorn compares the two lengths
        await super().send(message)
