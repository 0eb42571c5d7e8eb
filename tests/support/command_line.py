"""Run the command line tools in the test process."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli import models


def run_models_command(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run ``python -m app.models``; return its exit status, standard output and standard error."""
    try:
        status = models.main([arguments[0], "--store", str(folder), *arguments[1:]])
    except SystemExit as exit_error:  # raised by argparse
        status = int(exit_error.code or 0)
    return status, *capsys.readouterr()
