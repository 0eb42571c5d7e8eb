"""The service. It serves what ``training/`` has published to ``models_store/``."""

import os

# numpy's own matrix products are not used here, and its threads would make it unsafe to fork workers.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
