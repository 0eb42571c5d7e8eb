"""The service. It serves what ``training/`` has published to ``models_store/``."""

import os
import signal

# numpy's own matrix products are not used here, and its threads would make it unsafe to fork workers.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A closed stdin, stdout or stderr would become the descriptor of a file or connection, and messages be written to it.
for descriptor in (0, 1, 2):
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor

# The first process of a container is not ended by a signal that it does not handle: one that comes while torch is
# imported would be lost. A server installs its own handlers.
if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
