"""The web service. It answers requests with the networks in the model store.

Training scripts and imports add networks to the store.
"""

import os
import signal

# Do not let numpy start threads for matrix products. The service does not need these threads, and a process with
# threads cannot fork workers safely.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Open stdin, stdout and stderr if they are closed. Otherwise a file or connection could get descriptor 0, 1 or 2, and
# log lines would be written into it.
for descriptor in (0, 1, 2):
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor

# The first process of a container (process 1) ignores signals without a handler. Without this handler, a SIGTERM that
# arrives during the import of torch would be lost. The server replaces the handler later.
if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
