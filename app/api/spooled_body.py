"""Bodies that are too large for memory: written to a file as they come."""

from __future__ import annotations

import asyncio
from typing import IO

from fastapi import Request

from app.api.request import header
from app.errors import CallerGone, TooLarge, TooSlow

TOGETHER = 2**20  # bytes that are written at a time: each time costs a change of threads


async def spooled_body(request: Request, file: IO[bytes], limit: int, seconds: float) -> None:
    """Write the body to a file, and go back to its beginning.

    Raises TooLarge as soon as it is known to be longer than ``limit`` bytes, TooSlow when it pauses for ``seconds``,
    CallerGone, and OSError when there is no room for it.
    """
    announced = header(request, b"content-length")
    if announced.isdigit() and int(announced) > limit:
        raise TooLarge(f"the body has {int(announced):,} bytes; allowed are {limit:,}")
    length, pieces, more = 0, bytearray(), True
    while more:
        try:
            message = await asyncio.wait_for(request.receive(), seconds)
        except TimeoutError:
            raise TooSlow(f"no byte of the body came for {seconds:g} seconds") from None
        if message["type"] == "http.disconnect":
            raise CallerGone("the caller hung up before the body was whole")
        pieces += message.get("body", b"")
        more = message.get("more_body", False)
        if len(pieces) >= TOGETHER or not more:
            length += len(pieces)
            if length > limit:
                raise TooLarge(f"the body has more than {limit:,} bytes, which are allowed")
            await asyncio.to_thread(file.write, bytes(pieces))
            pieces.clear()
    await asyncio.to_thread(file.seek, 0)
