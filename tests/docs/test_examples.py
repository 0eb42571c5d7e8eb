"""The console and Python examples of README.md and docs/ have the results that the pages show."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from support.service import ROOT, TEST, serving

from app.cli import models
from app.main import create_app
from app.settings import Settings

ROLLOUT = ROOT / "docs" / "how-to" / "rollout.md"  # its commands change the store and run in order
TUTORIAL = ROOT / "docs" / "tutorial" / "README.md"  # see test_tutorial.py
EXPORT = ROOT / "docs" / "how-to" / "networks" / "export-a-model.md"  # see test_export_page.py
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page != EXPORT]
needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="the examples use curl")


def console(page: Path) -> list[tuple[str, str]]:
    """Return the commands of a page with the output that the page shows."""
    blocks = re.findall(r"^```console\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    commands = [command for block in blocks for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(first.strip(), rest.strip()) for first, _, rest in (command.partition("\n") for command in commands)]


def case_id(page: Path, text: str) -> str:
    return f"{page.relative_to(ROOT)}: {text[:60]}"


CONSOLE = [(page, *example) for page in PAGES if page not in (ROLLOUT, TUTORIAL) for example in console(page)]
PYTHON = [
    (page, code)
    for page in PAGES
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
]


def run(command: str, folder: Path) -> str:
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def nearly_equal(expected: Any, actual: Any, tolerance: float = 1e-6) -> bool:
    """Return whether two JSON values are equal up to rounding. Probabilities may be computed in bfloat16."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        tolerances = {"probability": 0.003}
        return expected.keys() == actual.keys() and all(
            nearly_equal(expected[key], actual[key], tolerances.get(key, tolerance)) for key in expected
        )
    if isinstance(expected, list) and isinstance(actual, list):
        return len(expected) == len(actual) and all(nearly_equal(*pair) for pair in zip(expected, actual, strict=True))
    if isinstance(expected, float) and isinstance(actual, float):
        return actual == pytest.approx(expected, rel=1e-3, abs=tolerance)
    return bool(expected == actual)


@pytest.fixture(scope="module")
def untouched() -> Iterator[httpx.Client]:
    """Start a service with the networks of this repository, in which no other test has loaded further versions."""
    with serving(Settings(store=ROOT / "models_store", **TEST)) as client:
        yield client


@needs_curl
@pytest.mark.parametrize(
    ("page", "command", "expected"), CONSOLE, ids=[case_id(page, command) for page, command, _ in CONSOLE]
)
def test_a_console_example_prints_the_output_on_its_page(
    untouched: httpx.Client, tmp_path: Path, page: Path, command: str, expected: str
) -> None:
    command = command.replace("localhost:8000", untouched.base_url.netloc.decode())
    actual = run(command.replace("-o digits.png", f"-o {tmp_path}/digits.png"), ROOT)
    assert not [path for path in tmp_path.iterdir() if not path.read_bytes().startswith(b"\x89PNG")]
    if expected.startswith("{"):
        assert nearly_equal(json.loads(expected), json.loads(actual)), actual
    else:
        assert actual == expected


@needs_curl
def test_the_version_commands_print_the_output_on_their_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "models_store", tmp_path / "models_store")
    monkeypatch.chdir(tmp_path)
    examples = console(ROLLOUT)
    assert examples
    for command, expected in (example for example in examples if "quartet models" in example[0]):
        assert models.main(shlex.split(command.split("quartet models", 1)[1])) == 0, command
        assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == expected.splitlines()
    key = "k" * 32
    with serving(Settings(store=tmp_path / "models_store", admin_key=key, **TEST)) as client:  # type: ignore[arg-type]
        for command, expected in (example for example in examples if "curl" in example[0]):
            command = command.replace("localhost:8000", client.base_url.netloc.decode()).replace("$KEY", key)
            assert run(command, tmp_path) == expected


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[case_id(page, code.split("\n", 1)[0]) for page, code in PYTHON])
def test_a_python_example_prints_the_values_in_its_comments(
    shipped: httpx.Client, page: Path, code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    exec(code.replace("localhost:8000", shipped.base_url.netloc.decode()), {})
    expected = [line.split("  # ", 1)[1] for line in code.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == expected
    assert expected


def test_every_endpoint_has_a_console_example() -> None:
    commands = " ".join(command for _, command, _ in CONSOLE)
    for names in re.findall(r"for path in ([^;]*);", commands):
        commands += "".join(f" /v2/{name}" for name in names.split())
    paths = [
        path
        for path in create_app(Settings(admin_key=SecretStr("k" * 32))).openapi()["paths"]
        if "/admin/" not in path and "/repository/models/" not in path
    ]
    patterns = {path: re.sub(r"\\{[a-z]+\\}", r"[\\w@.-]*", re.escape(path)) for path in paths}
    assert not [path for path, pattern in patterns.items() if not re.search(pattern + r"(?![\w/])", commands)]
