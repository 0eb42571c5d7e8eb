"""Train networks, and predict with them. The commands of this package are also functions:

    from training import evaluate, fit, predict

    fit("sales", csv="sales.csv", minutes=2)                       # python -m training.lstm --csv sales.csv ...
    rows = predict("sales", "sales.csv", horizon=12)               # python -m training.predict sales sales.csv ...
    metrics = evaluate("cifar10-whitened")                         # python -m training.evaluation.evaluate ...

The functions take the long options of the commands, with underscores: ``no_publish=True`` is ``--no-publish``,
``from_="sales@1"`` is ``--from sales@1``, and ``set={"batch": 16}`` is ``--set batch=16``. They raise ValueError where
a command ends with a message.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# Idle threads of OpenMP must not spin: beside another process, spinning makes a training several times slower. The
# library reads this variable when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def __getattr__(name: str) -> Any:
    """Return a function of ``training.api``, which is imported now, so that ``import training`` imports no torch."""
    if name in ("evaluate", "fit", "predict"):
        return getattr(importlib.import_module("training.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
