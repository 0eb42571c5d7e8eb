"""Administering versions over HTTP with the admin key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.networks import publish_tiny, rewrite_card
from support.responses import ADMIN_HEADERS, ADMIN_KEY
from support.service import Serve
from support.waiting import wait_until

from app.api.admin_key import admin_key
from app.main import create_app
from app.settings import Settings, SettingsError
from app.store import Store, archive


@pytest.fixture
def admin(serve: Serve, tiny_store: Path) -> Iterator[httpx.Client]:
    """Start a service with an admin key and three versions of tiny-gan; yield a client that sends the key."""
    publish_tiny(tiny_store, "tiny-gan")
    publish_tiny(tiny_store, "tiny-gan")
    with serve(store_poll_seconds=0.02, admin_key=ADMIN_KEY) as client:
        client.headers.update(ADMIN_HEADERS)
        yield client


def served(client: httpx.Client) -> int:
    version: int = client.post("/v1/images/sample", json={"count": 1}).raise_for_status().json()["version"]
    return version


def test_a_version_is_activated_rolled_back_and_retired(admin: httpx.Client) -> None:
    assert served(admin) == 3
    answer = admin.post("/v1/admin/models/tiny-gan/activate", json={"version": 2}).raise_for_status().json()
    assert (answer["active"], answer["previous"], answer["by"]) == (2, 3, "activate 2")
    wait_until(lambda: served(admin) == 2)
    assert admin.post("/v1/admin/models/tiny-gan/rollback").json()["active"] == 3
    wait_until(lambda: served(admin) == 3)
    assert admin.post("/v1/admin/models/tiny-gan/retire", json={"version": 1}).json()["retired"] == [1]
    body = {"count": 1, "model": "tiny-gan@1"}
    wait_until(lambda: admin.post("/v1/images/sample", json=body).status_code == 404)
    error = admin.post("/v1/images/sample", json=body).json()["error"]
    assert error["code"] == "model_retired"
    assert error["message"] == "model 'tiny-gan@1' is retired; served models: tiny-gan@2, tiny-gan@3"
    assert admin.get("/v1/models/tiny-gan").json()["retired"] == [1]


def test_a_version_is_exported_and_imported(admin: httpx.Client, tiny_store: Path, tmp_path: Path) -> None:
    answer = admin.get("/v1/admin/models/tiny-gan/export?version=2")
    assert answer.headers["content-disposition"] == 'attachment; filename="tiny-gan-2.zip"'
    assert answer.content == b"".join(archive.export_version(Store(tiny_store), "tiny-gan", 2))
    active = admin.get("/v1/admin/models/tiny-gan/export")
    assert active.headers["content-disposition"] == 'attachment; filename="tiny-gan-3.zip"'
    assert active.content == b"".join(archive.export_version(Store(tiny_store), "tiny-gan", 3))
    conflict = admin.post("/v1/admin/import", content=answer.content)
    assert conflict.status_code == 409
    assert conflict.json()["error"]["message"].startswith("tiny-gan@2 is already in the store; with `renumber`, ")
    assert admin.post("/v1/admin/import?renumber=true", content=answer.content).json()["imported"] == 4
    wait_until(lambda: served(admin) == 4)
    invalid = admin.post("/v1/admin/import", content=b"PK")
    assert (invalid.status_code, invalid.json()["error"]["code"]) == (400, "invalid_value")


def test_unreadable_defaults_are_no_error_of_the_request(admin: httpx.Client, tiny_store: Path) -> None:
    content = b"".join(archive.export_version(Store(tiny_store), "tiny-gan", 1))
    (tiny_store / "defaults.json").write_text("[]")
    answer = admin.post("/v1/admin/models/tiny-gan/rollback")
    assert (answer.status_code, answer.json()["active"]) == (200, 2)
    assert answer.json()["problem"].startswith("defaults.json: the file: Input should be an object")
    for path in ("import?renumber=true", "add?name=other&task=classify"):
        answer = admin.post(f"/v1/admin/{path}", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
        assert answer.json()["error"]["message"].startswith("defaults.json: the file: Input should be an object")
    assert Store(tiny_store).numbers("tiny-gan") == [1, 2, 3]


def test_a_version_that_the_service_cannot_load_is_refused(admin: httpx.Client, tiny_store: Path) -> None:
    rewrite_card(tiny_store / "tiny-gan" / "2", labels=["a"])
    message, name = "tiny-gan@2: there are 1 labels, expected 0", "tiny-gan"
    refused = admin.post(f"/v1/admin/models/{name}/activate", json={"version": 2})
    assert (refused.status_code, refused.json()["error"]["message"]) == (409, message)
    assert {"what": "tiny-gan@2", "problem": message} in admin.get("/v1/admin/verify").json()["data"]
    content = b"".join(archive.export_version(Store(tiny_store), name, 2))
    refused = admin.post("/v1/admin/import?renumber=true", content=content)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
    assert admin.post(f"/v1/admin/models/{name}/rollback").json()["active"] == 1  # skips version 2
    assert Store(tiny_store).numbers(name) == [1, 2, 3]


def test_a_version_must_be_stated_to_export_a_model_without_an_active_version(
    admin: httpx.Client, tiny_store: Path
) -> None:
    for weights in (tiny_store / "tiny-gan").glob("*/model.safetensors"):
        weights.write_bytes(b"")
    answer = admin.get("/v1/admin/models/tiny-gan/export")
    assert answer.status_code == 409
    assert answer.json()["error"]["message"].startswith("no version of tiny-gan is active; ")
    assert admin.get("/v1/admin/models/..%2Ftiny-gan/export").status_code == 404


def test_only_the_import_limit_applies_to_archives(serve: Serve, tiny_store: Path) -> None:
    with serve(admin_key=ADMIN_KEY, max_import_bytes=100_000, max_buffered_bytes=1_000, max_body_bytes=1_000) as client:
        answer = client.post("/v1/admin/import", content=bytes(200_000), headers=ADMIN_HEADERS)
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            413,
            "the body has 200,000 bytes; the maximum is 100,000",
        )
        content = b"".join(archive.export_version(Store(tiny_store), "tiny-gan", 1))
        assert client.post("/v1/admin/import", content=content, headers=ADMIN_HEADERS).status_code == 409  # it was read


def test_a_head_request_for_an_export_does_not_read_the_version(admin: httpx.Client, tiny_store: Path) -> None:
    (tiny_store / "tiny-gan" / "2" / "large.png").write_bytes(bytes(2**24))
    path = "/v1/admin/models/tiny-gan/export?version=2"
    before = bytes_read()
    answer = admin.head(path)
    assert answer.headers["content-disposition"] == 'attachment; filename="tiny-gan-2.zip"'
    admin.get("/health/live")  # on the same connection, so that the service has finished the first response
    assert bytes_read() - before < 2**23
    admin.get(path)
    assert bytes_read() - before > 2**24


def bytes_read() -> int:
    """Return the number of bytes that this process, and so the service in it, has read."""
    return int(Path("/proc/self/io").read_text().partition("rchar:")[2].split()[0])


def test_the_admin_key_may_be_in_a_file_and_must_be_long(tmp_path: Path, tiny_store: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{ADMIN_KEY}\n")
    app = create_app(Settings(store=tiny_store, threads=1, admin_key_file=file))
    assert "/v1/admin/verify" in app.openapi()["paths"]
    file.write_text("short")
    with pytest.raises(SettingsError, match=r"QUARTET_ADMIN_KEY_FILE is '.*key': its content has 5 characters"):
        create_app(Settings(store=tiny_store, threads=1, admin_key_file=file))
    with pytest.raises(SettingsError, match="both set"):
        create_app(Settings(store=tiny_store, threads=1, admin_key_file=file, admin_key=ADMIN_KEY))  # type: ignore[arg-type]
    with pytest.raises(SettingsError) as rejection:
        create_app(Settings(store=tiny_store, threads=1, admin_key="tooshort".center(16)))  # type: ignore[arg-type]
    assert "tooshort" not in str(rejection.value)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("", None),
        (f" {ADMIN_KEY}\n", ADMIN_KEY),
    ],
)
def test_spaces_around_the_admin_key_are_removed(key: str, expected: str | None) -> None:
    assert admin_key(Settings(admin_key=key)) == expected  # type: ignore[arg-type]
