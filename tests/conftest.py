"""Fixtures that tests of several files use, such as stores of tiny networks, and the service on a free port."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.fake_device import fake_device  # noqa: F401 - torch must know the device before the first gradient
from support.faults import Fault, Hold, faulty_networks
from support.networks import SECOND_NETWORKS, TINY, publish_tiny
from support.service import ROOT, TEST, Serve, make_settings, serving
from support.waiting import locked

from app.cli import models
from app.settings import OTHER_VARIABLES, PREFIX, Settings

# Other settings of the shell than the device would change the services that the tests start. The modules above read no
# settings when they are imported.
for variable in {name for name in os.environ if name.startswith(PREFIX)} - OTHER_VARIABLES - {"QUARTET_DEVICE"}:
    del os.environ[variable]
os.environ["QUARTET_LIMITS"] = '{"speed_seconds": 0}'  # of imported networks
# Trainings in tests measure less, and read small data sets of noise.
os.environ["QUARTET_TRAINING_LIMITS"] = json.dumps(
    {
        "check_digests": False,
        "speed_seconds": 0,
        "generated_samples": 200,
        "classifier_samples": 200,
        "unseen_images": 60,
        "label_classifier_steps": 10,
    }
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


LONGEST_FILES = ("test_openapi.py", "test_exported_files.py", "test_security.py", "test_version_swaps.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that no core is idle while the last of them runs."""
    items.sort(key=lambda item: (item.path.name not in LONGEST_FILES, "training" not in item.path.parts))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let skipped tests fail, because a missing program should not hide a defect. ``ALLOW_SKIPS=1`` permits them."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("ALLOW_SKIPS") != "1":
        report.outcome, report.longrepr = "failed", f"skipped, and ALLOW_SKIPS is not 1: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Let skipped files fail, as ``pytest_runtest_makereport`` does for tests."""
    report = yield
    if report.skipped and os.environ.get("ALLOW_SKIPS") != "1":
        report.outcome, report.longrepr = "failed", f"skipped, and ALLOW_SKIPS is not 1: {report.longrepr}"
    return report


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """Allow subnormal numbers again after each test. Trainings set them to zero in the whole process.

    Other tests need them, for example tests of JSON with subnormal numbers.
    """
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def published_tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a store with one tiny network for each task. Tests copy it, which is faster than publishing."""
    folder = tmp_path_factory.mktemp("tiny") / "store"
    for name in TINY:
        publish_tiny(folder, name)
    return folder


@pytest.fixture
def tiny_store(published_tiny_store: Path, tmp_path: Path) -> Path:
    """Create a store with one tiny network for each task."""
    return shutil.copytree(published_tiny_store, tmp_path / "store")


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Return a store with three versions of tiny-gan."""
    for _ in range(3):
        publish_tiny(tmp_path, "tiny-gan")
    return tmp_path


@pytest.fixture
def serve(tiny_store: Path) -> Serve:
    """Return a function that starts the service on the tiny store with the given settings."""
    return lambda prepare=None, disk=None, **settings: serving(
        make_settings(**{"store": tiny_store, **TEST, **settings}), prepare, disk
    )


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the files of a TLS certificate for 127.0.0.1 and of its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.fixture
def faults() -> Iterator[dict[str, Fault]]:
    """Return the faults of the tiny networks of each task, in services that the test starts afterwards."""
    with faulty_networks() as faults:
        yield faults


@pytest.fixture
def steps(faults: dict[str, Fault]) -> list[int]:
    """Return a list that gets the number of texts of each step, in services that the test starts afterwards."""
    made: list[int] = []

    def count(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        made.append(len(logits))
        return logits

    faults["continue"] = count
    return made


@pytest.fixture
def held(faults: dict[str, Fault]) -> Iterator[Hold]:
    """Make image generators wait for an event, in services that the test starts afterwards.

    The event is set at the end of the test.
    """
    faults["sample"] = held = Hold()
    yield held
    held.release.set()


@pytest.fixture
def slow(faults: dict[str, Fault]) -> None:
    """Make each text step take at least 5 ms, so that a text of 4,000 characters takes longer than a test's deadline.

    This applies to services that the test starts afterwards. These services need the limit ``inline_seconds=0``.
    """

    def wait(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        time.sleep(0.005)
        return logits

    faults["continue"] = wait


@pytest.fixture(scope="session")
def shipped() -> Iterator[httpx.Client]:
    """Start the service with the networks of this repository."""
    with serving(Settings(store=ROOT / "models_store", **TEST)) as client:
        yield client


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all test processes of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def exported(shared_folder: Path) -> Callable[[str], Path]:
    """Return a function that exports a network of this repository to a file, such as ``mnist-gan-1.onnx``.

    Each file is exported only once, because some exports take many seconds.
    """
    folder = shared_folder / "exported"
    folder.mkdir(exist_ok=True)

    def exported(file: str) -> Path:
        path = folder / file
        with locked(folder / f"{file}.lock"):
            if not path.exists():
                name, _, number = path.stem.rpartition("-")
                version, store = f"{name}@{number}", str(ROOT / "models_store")
                assert models.main(["export", "--store", store, version, str(path), f"--{path.suffix[1:]}"]) == 0
        return path

    return exported


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Start the service with one tiny network for each task, a conditional generator and a second forecaster."""
    folder = tmp_path_factory.mktemp("tiny") / "store"
    for name in (*TINY, *SECOND_NETWORKS):
        publish_tiny(folder, name)
    with serving(Settings(store=folder, **TEST)) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start Chromium under Playwright, or skip the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()
