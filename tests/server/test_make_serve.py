"""``make serve`` starts a service that classifies real images correctly, and installs one build of PyTorch."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from support.service import IMAGES, ROOT


@pytest.mark.slow
def test_make_serve_prints_an_address_that_answers_and_stops_cleanly() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUARTET_")}
    with subprocess.Popen(
        ["make", "serve", "PORT=0"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            lines = []
            for line in process.stdout:
                lines.append(line)
                if address := re.search(r"serves on (http://[\d.:]+)", line):
                    break
            assert address, "".join(lines)
            with httpx.Client(base_url=address[1], timeout=30) as client:
                assert client.get("/health/ready").json()["failed"] == []
                files = sorted((IMAGES / "cifar10").glob("*.png"))
                parts = [("file", (path.name, path.read_bytes())) for path in files]
                results = client.post("/v1/images/classify", files=parts).json()["results"]
            correct = sum(result["predictions"][0]["label"] in result["filename"] for result in results)
            assert correct >= 6
        finally:
            os.killpg(process.pid, signal.SIGTERM)
        output = process.stdout.read()
        process.wait(30)
    assert "Traceback" not in output
    assert "Error" not in output.replace("Error 143", "")  # make prints this after SIGTERM


@pytest.mark.parametrize(
    ("variables", "arguments", "settings"),
    [
        ({"HOST": "x86_64-linux", "PORT": "9"}, [], "QUARTET_HOST=127.0.0.1 QUARTET_PORT=8000"),
        ({"QUARTET_HOST": "::1", "QUARTET_PORT": "8111"}, [], "QUARTET_HOST=::1 QUARTET_PORT=8111"),
        ({"QUARTET_PORT": "8111"}, ["PORT=0", "HOST=0.0.0.0"], "QUARTET_HOST=0.0.0.0 QUARTET_PORT=0"),
    ],
)
def test_only_arguments_and_settings_choose_the_address(
    variables: dict[str, str], arguments: list[str], settings: str
) -> None:
    ignored = ("QUARTET_HOST", "QUARTET_PORT", "MAKEFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in ignored} | variables
    command = ["make", "--dry-run", "--no-print-directory", "serve", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == f"{settings} exec .venv/bin/python -m app.main"


# If the file no-pip exists, `-m venv` makes .venv/bin/python and then fails, as without Debian's package python3-venv.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
"-m venv .venv")
    mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/uv
    [ ! -e no-pip ] && touch .venv/bin/pip ;;
"-m pip "*) echo "$(basename $0) $*" >> calls; [ -e .venv/bin/pip ] ;;
*) echo "$(basename $0) $*" >> calls ;;
esac
"""

Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that runs make with the fake Python in ``tmp_path``."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "fake").write_text(FAKE_PYTHON)
    (tmp_path / "fake").chmod(0o755)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("TORCH", "MAKEFLAGS")}
        command = ["make", "PYTHON=./fake", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_make_works_after_the_missing_package_of_python_is_installed(tmp_path: Path, make: Make) -> None:
    (tmp_path / "no-pip").touch()
    for _ in range(2):
        result = make(".venv/serve", "TORCH=cpu")
        assert result.returncode != 0
        assert "./fake -m venv failed; on Debian and Ubuntu, install the package python3-venv" in result.stderr
    (tmp_path / "no-pip").unlink()
    assert make(".venv/serve", "TORCH=cpu").returncode == 0


def test_later_targets_install_packages_for_the_same_build_of_pytorch(tmp_path: Path, make: Make) -> None:
    for target in ([".venv/serve", "TORCH=cpu"], [".venv/train"], [".venv/test", "TORCH=cpu"]):
        assert make(*target).returncode == 0
        calls = (tmp_path / "calls").read_text().splitlines()
        install = next(call for call in reversed(calls) if "pip install" in call and "-e" in call)
        assert "uv pip install" in install
        assert "--torch-backend=cpu" in install
    changed = make(".venv/ray", "TORCH=cu128")
    assert changed.returncode != 0
    assert ".venv has another build of PyTorch than TORCH=cu128: run 'make clean' first" in changed.stderr
