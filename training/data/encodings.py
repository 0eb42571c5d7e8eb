"""Detect the encoding of a text file by its first bytes."""

from __future__ import annotations

import codecs

MARKS = [(codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")]
MARKS += [(codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")]
SAMPLE = 1 << 16  # number of bytes at the beginning of a file in which zeros are counted


def detected(content: bytes) -> str | None:
    """Return the encoding of a file's content if its first bytes reveal the encoding, otherwise None.

    A byte order mark states the encoding. Without a mark, the encoding is UTF-16 if many bytes at odd positions and no
    bytes at even positions are 0, or the reverse.
    """
    for mark, name in MARKS:
        if content.startswith(mark):
            return name
    sample = content[:SAMPLE]
    if len(content) < 4 or len(content) % 2:
        return None
    odd, even = (sample[at::2].count(0) / len(sample) for at in (1, 0))
    return "utf-16-le" if odd > 0.2 and not even else "utf-16-be" if even > 0.2 and not odd else None
