"""A file system that does not answer blocks neither the event loop nor requests that need no file."""

from __future__ import annotations

import asyncio
import builtins
import fcntl
import io
import json
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.disk import WatchedDisk
from support.images import image_bytes
from support.networks import publish_tiny
from support.responses import ADMIN_HEADERS, ADMIN_KEY, assert_still_serves
from support.service import Serve
from support.waiting import wait_until

from app import key_file
from app.store import Store


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Return a key file, and headers with one of its keys."""
    (tmp_path / "secrets").mkdir()
    file = tmp_path / "secrets" / "keys"
    return file, {"x-api-key": key_file.add(file, "alice")}


@contextmanager
def stalled(file: Path) -> Iterator[None]:
    """Replace a file with a pipe without a writer: opening the file blocks until the end of the context."""
    content, pipe = file.read_bytes(), file.with_suffix(".pipe")
    file.unlink()
    os.mkfifo(file)
    try:
        yield
    finally:
        file.rename(pipe)
        file.write_bytes(content)
        handle = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # readers that wait for the pipe can continue
        os.write(handle, content)
        pipe.unlink()
        os.close(handle)


def test_requests_are_answered_while_the_store_and_the_key_file_are_stalled(
    serve: Serve, tiny_store: Path, keys: tuple[Path, dict[str, str]]
) -> None:
    file, headers = keys
    Store(tiny_store).activate("tiny-rnn", 1)
    answers = threading.Event()
    answers.set()
    disk = WatchedDisk(lambda *_: answers.wait(60))
    with serve(disk=disk, keys_file=file, store_poll_seconds=0.01, key_check_seconds=0.01) as client:
        client.headers.update(headers)
        with stalled(file):
            answers.clear()
            for _ in range(3):
                assert client.get("/health/live").status_code == 200
                for path in ("/health/ready", "/v1/models", "/v1/models/tiny-cnn", "/metrics", "/v2/models/stats"):
                    assert client.get(path).status_code == 200, path
                assert client.get("/v2/models/tiny-rnn/ready").status_code == 200
                assert_still_serves(client)
            late = client.post("/v2/repository/index", json={}, headers={"x-request-timeout": "0.1"})
            assert (late.status_code, late.json()) == (504, {"error": "the deadline passed before the store answered"})
            answers.set()
        wait_until(lambda: client.post("/v2/repository/index", json={}).status_code == 200)
        file.write_text("# nobody\n")
        wait_until(lambda: client.get("/v1/models").status_code == 401)


def has_event_loop() -> bool:
    """Return whether an event loop runs in the current thread."""
    try:
        return asyncio.get_running_loop() is not None
    except RuntimeError:
        return False


class LoopAccess:
    """Records each access to a file in some folders by a thread that runs an event loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
        self.folders = tuple(map(str, folders))
        self.calls: list[str] = []
        for module, names in (
            (os, ("stat", "lstat", "open", "listdir", "scandir", "mkdir", "replace", "unlink")),
            (io, ("open",)),
            (builtins, ("open",)),
            (fcntl, ("flock", "lockf")),
        ):
            for name in names:
                monkeypatch.setattr(module, name, self._watched(getattr(module, name)))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **named: Any) -> Any:
            if has_event_loop() and self._is_watched(path):
                self.calls.append("".join(traceback.format_stack(limit=8)))
            return function(path, *arguments, **named)

        return call

    def _is_watched(self, path: Any) -> bool:
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        return str(path).startswith(self.folders)


def test_no_request_accesses_a_file_on_the_event_loop(
    serve: Serve,
    tiny_store: Path,
    keys: tuple[Path, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, headers = keys
    (tiny_store / "tiny-cnn" / "1" / "curves.png").write_bytes(image_bytes())
    publish_tiny(tiny_store, "tiny-cnn")
    with serve(keys_file=file, admin_key=ADMIN_KEY, store_poll_seconds=0.01, key_check_seconds=0.01) as client:
        client.headers.update(headers)
        access = LoopAccess(monkeypatch, tiny_store, file.parent)
        for path, methods in client.get("/openapi.json").json()["paths"].items():
            for method, operation in methods.items():
                own = ADMIN_HEADERS if "admin" in path or "repository" in path else {}
                path = path.replace("{name}", "tiny-cnn").replace("{file}", "curves.png")
                answer = client.request(method, path, headers=own, content=example(operation))
                assert answer.status_code < 500, (path, answer.text)
        for path, body in CHANGES:
            answer = client.post(f"/v1/admin/models/tiny-cnn/{path}", json=body, headers=ADMIN_HEADERS)
            assert answer.status_code == 200, answer.text
            assert Store(tiny_store).rollout("tiny-cnn").by.startswith(path)  # the request has reached the disk
        archive = client.get("/v1/admin/models/tiny-gan/export", headers=ADMIN_HEADERS).content
        answer = client.post("/v1/admin/import?renumber=true", content=archive, headers=ADMIN_HEADERS)
        assert answer.status_code == 200, answer.text
        wait_until(lambda: client.get("/v1/models/tiny-gan").json()["version"] == 2)
        assert client.get("/v1/models/tiny-cnn/pictures/curves.png").content == image_bytes()
        assert_still_serves(client)
        assert not access.calls, access.calls[0]
        assert (tiny_store / "defaults.json").stat()  # checks that the test records accesses
        asyncio.run(noticed(access, tiny_store))


CHANGES: list[tuple[str, dict[str, int] | None]] = [
    ("activate", {"version": 1}),
    ("activate", {"version": 2, "share": 10}),
    ("rollback", None),
    ("retire", {"version": 2}),
]


def example(operation: dict[str, Any]) -> bytes:
    """Return the example body of an operation in the OpenAPI document, or an empty object."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    examples = [each["value"] for each in content.get("examples", {}).values()]
    return json.dumps(content.get("example") or (examples or [{}])[0]).encode()


async def noticed(access: LoopAccess, store: Path) -> None:
    (store / "defaults.json").stat()
    assert len(access.calls) == 1
