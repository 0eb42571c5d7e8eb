"""What the process of the service does before it imports torch."""

from __future__ import annotations

import os
import signal


def prepare_process() -> None:
    """Open missing standard streams, let the service be stopped while it imports, and set limits of libraries."""
    # Otherwise a file or connection could get descriptor 0, 1 or 2, and log lines would be written into it.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
    # The first process of a container (process 1) ignores signals without a handler. The server replaces the handler.
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # The service does not need OpenBLAS's threads, and a process with threads cannot fork workers safely.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # oneDNN keeps the compiled operations of each shape of inputs, up to 1,024. Each length of a series has its own.
    # 128 are enough: under mixed load of all shipped networks, two in a second are compiled again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
