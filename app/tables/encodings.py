"""Detect the encoding of a text file, and decode the file."""

from __future__ import annotations

import codecs
import re

from app.tables.messages import TableError, option

MARKS = [(codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")]
MARKS += [(codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")]
SAMPLE = 1 << 16  # number of bytes at the beginning of a file in which zeros are counted
# Letters and signs of Western European texts. Other letters suggest that the encoding is not cp1252.
WESTERN = set("ÄÖÜäöüßÀÂÇÈÉÊËÎÏÔÙÛàâçèéêëîïôùûŒœÆæÑñÁÍÓÚáíóúÃÕãõÅåØøìòÌÒ€£¥°§µ·–—‘’“”„…²³½¼¾×±«»©®º\xa0")


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


def decode(content: bytes, encoding: str | None = None) -> tuple[str, str]:
    """Return the text of a file, and its encoding.

    If ``encoding`` is None, it is detected: UTF-8, UTF-16, UTF-32, or cp1252 if the text is Western European. Three
    accented letters that follow each other show that a text is not Western European.

    Raises:
        TableError: the given encoding is unknown or does not fit, or the encoding cannot be detected.
    """
    mark = detected(content)
    chosen = encoding or mark or "utf-8"
    try:
        return content.decode(chosen), chosen.removesuffix("-sig")
    except LookupError as error:
        raise TableError(f"{option('encoding', chosen)}: Python knows no such encoding") from error
    except UnicodeDecodeError as error:
        place = f"byte 0x{content[error.start]:02x} at byte offset {error.start:,}"
        if encoding or mark:
            raise TableError(f"is not {chosen}: {place}; choose another {option('encoding')}") from error
        text = content.decode("cp1252", "replace")
        if not {character for character in text if character > "\x7f"} <= WESTERN or re.search("[À-ÿ]{3}", text):
            raise TableError(
                f"is not UTF-8: {place}; give its encoding, for example {option('encoding', 'cp1250')}, cp1251, cp437, "
                "mac_roman or shift_jis"
            ) from error
        return text, "cp1252"
