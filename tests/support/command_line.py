"""The command line tools, run in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli import models


def run_models_command(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[int, str, str]:
    """The command line: its status and what it prints."""
    try:
        status = models.main([words[0], "--store", str(folder), *words[1:]])
    except SystemExit as ended:  # argparse's own
        status = int(ended.code or 0)
    return status, *capsys.readouterr()
