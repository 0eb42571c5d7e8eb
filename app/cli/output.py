"""Write the results of the command line tools to standard output."""

from __future__ import annotations

import os
import sys

FILE = "/dev/stdout"  # for error messages


def write_line(text: str) -> None:
    """Write a line to standard output now. Characters that its encoding lacks are written as ``\\u2026``.

    Raises OSError, for example if the disk is full, and BrokenPipeError if the reader, such as ``head``, has exited.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try again at exit and fail
        raise OSError(error.errno, error.strerror, FILE) from None
