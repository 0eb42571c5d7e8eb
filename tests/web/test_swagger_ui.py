"""Swagger UI at ``/docs`` in a real browser: *Try it out* and *Execute* succeed for every operation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from support.imported.onnx_models import linear_model
from support.service import IMAGES, ROOT, TEST, serving
from support.waiting import wait_until

from app.settings import Settings

KEY = "k" * 32
HORSE = IMAGES / "cifar10" / "0013-horse.png"
WAIT = 60_000  # milliseconds


@pytest.fixture
def service(tmp_path: Path) -> Iterator[httpx.Client]:
    """Start a service with an admin key on a copy of the included store, because the operations change the store."""
    store = tmp_path / "store"
    shutil.copytree(ROOT / "models_store", store)
    with serving(Settings(store=store, admin_key=KEY, **TEST)) as client:  # type: ignore[arg-type]
        client.headers["authorization"] = f"Bearer {KEY}"
        yield client


@pytest.fixture
def open_docs(browser: Any) -> Iterator[Callable[[httpx.Client], Any]]:
    """Return a function that opens Swagger UI. Fail if it loads anything from other hosts."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, urls = context.new_page(), set()
    page.set_default_timeout(WAIT)
    page.on("request", lambda request: urls.add(request.url))

    def open_docs(client: httpx.Client) -> Any:
        page.goto(f"{client.base_url}/docs")
        return page

    yield open_docs
    context.close()
    assert {urlsplit(url).hostname for url in urls if urlsplit(url).scheme not in ("data", "blob")} == {"127.0.0.1"}


def execute(page: Any, operation: dict[str, Any], files: dict[str, Path]) -> tuple[str, str]:
    """Try an operation out with the mouse. Return the requested URL and the status that the page shows."""
    block = page.locator(f"#operations-{operation['tags'][0].replace(' ', '_')}-{operation['operationId']}")
    block.locator(".opblock-summary-control").dispatch_event("click")
    block.locator(".try-out__btn").dispatch_event("click")  # on a page of this size, a search by role takes 0.2 s
    if file := files.get(operation["operationId"]):
        block.locator("input[type=file]").set_input_files(file)
    block.locator(".btn.execute").dispatch_event("click")
    status = block.locator(".live-responses-table tbody .response-col_status").first.inner_text()
    url = block.locator(".request-url pre").inner_text()
    block.locator(".opblock-summary-control").dispatch_event("click")  # many open operations make the page slow
    return url, status.split()[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_operation_succeeds_with_try_it_out_and_execute(
    open_docs: Callable[[httpx.Client], Any], service: httpx.Client, tmp_path: Path
) -> None:
    page = open_docs(service)
    page.get_by_role("button", name="Authorize").click()
    page.locator("#auth-bearer-value").fill(KEY)
    page.locator(".auth-btn-wrapper").get_by_role("button", name="Apply credentials").click()
    page.locator(".auth-btn-wrapper").get_by_role("button", name="Close").click()
    archive = tmp_path / "version.zip"
    archive.write_bytes(service.get("/v1/admin/models/shakespeare-rnn/export?version=1").content)
    network = tmp_path / "linear.onnx"
    network.write_bytes(linear_model()[0].SerializeToString())
    files = {"classify_images": HORSE, "import_version": archive, "add_model": network}
    before = service.get("/v1/models").json()
    operations = [
        operation for methods in service.get("/openapi.json").json()["paths"].values() for operation in methods.values()
    ]
    failed = []
    for operation in operations:
        url, status = execute(page, operation, files)
        if not status.startswith("2"):
            failed.append((url, status))
        if operation["operationId"] == "add_model":
            wait_until(lambda: service.get("/v1/models/resnet").status_code == 200)
            before = service.get("/v1/models").json()
        if operation["operationId"] == "unload_model":
            service.post("/v2/repository/models/mnist-gan/load").raise_for_status()
            assert service.get("/v1/models").json() == before
        if operation["operationId"] == "roll_back":  # after the rollback, version 1 can be retired
            body = {"version": "latest"}
            service.post("/v1/admin/models/shakespeare-rnn/activate", json=body).raise_for_status()
    assert len(operations) == 39
    assert not failed


@pytest.mark.slow
def test_the_page_shows_real_answers_as_examples(
    open_docs: Callable[[httpx.Client], Any], shipped: httpx.Client
) -> None:
    block = open_docs(shipped).locator("#operations-Tasks-forecast_series")
    block.locator(".opblock-summary-control").click()
    example = block.locator(".responses-table .highlight-code").first.inner_text()
    assert '"model": "series-lstm"' in example
    assert len(block.locator(".body-param__example").inner_text().splitlines()) < 30
    assert '"string"' not in example


def test_a_chosen_file_is_classified(open_docs: Callable[[httpx.Client], Any], shipped: httpx.Client) -> None:
    block = open_docs(shipped).locator("#operations-Tasks-classify_images")
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    assert block.locator(".opblock-section-request-body select").first.input_value() == "multipart/form-data"
    block.locator("input[type=file]").set_input_files(HORSE)
    block.get_by_role("button", name="Execute").click()
    answer = block.locator(".live-responses-table .highlight-code").first.inner_text()
    assert '"filename": "0013-horse.png"' in answer
    assert '"label": "horse"' in answer
