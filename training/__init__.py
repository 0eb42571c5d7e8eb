"""Training scripts. Each script writes logs and checkpoints to a run folder, and publishes to ``models_store/``."""

import os

# Idle threads of OpenMP must not spin: beside another process, spinning makes a training several times slower. The
# library reads this variable when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
