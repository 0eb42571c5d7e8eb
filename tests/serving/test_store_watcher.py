"""Scans of the store, at intervals and on demand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.networks import publish_tiny

from app.serving import store_watcher
from app.serving.model import LoadFailure
from app.serving.store_snapshot import StoreSnapshot
from app.serving.store_watcher import StoreWatcher
from app.store import Store

NAME = "tiny-gan"
pytestmark = pytest.mark.anyio


def watcher(
    folder: Path, poll_seconds: float = 60.0, failed: Any = None, on_scan: Callable[[], None] = lambda: None
) -> StoreWatcher:
    return StoreWatcher(Store(folder), poll_seconds, lambda: failed or {}, on_scan)


async def test_a_scan_replaces_the_snapshot_and_logs_only_new_failures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = publish_tiny(tmp_path, NAME).folder
    (folder / "card.json").write_text("{")
    watch = watcher(tmp_path, failed={(NAME, 7): LoadFailure(NAME, 7, "damaged")})
    assert watch.snapshot == StoreSnapshot()
    for _ in range(2):
        await watch.scan()
        assert watch.snapshot.numbers == {NAME: [1]}
        assert watch.snapshot.retry == {(NAME, 7)}
        (message,) = (record.getMessage() for record in caplog.records)  # only the first scan logs a message
        assert message.startswith("tiny-gan@1 is not served: tiny-gan/1/card.json: the file: Invalid JSON")


async def test_a_readable_card_is_kept_by_the_next_scan(tmp_path: Path) -> None:
    publish_tiny(tmp_path, NAME)
    watch = watcher(tmp_path)
    await watch.scan()
    before = watch.snapshot
    await watch.scan()
    assert watch.snapshot is not before
    assert watch.snapshot.cards[NAME, 1] is before.cards[NAME, 1]


async def test_a_refresh_scans_and_calls_back_unless_polling_is_off(tmp_path: Path) -> None:
    publish_tiny(tmp_path, NAME)
    calls: list[int] = []
    for poll_seconds, expected in ((60.0, [1]), (0.0, [1])):
        watch = watcher(tmp_path, poll_seconds, on_scan=lambda: calls.append(1))
        await watch.refresh()
        assert calls == expected
        assert bool(watch.snapshot.numbers) == (poll_seconds > 0)
    await asyncio.wait_for(watch.watch(), 30)  # without polling, watch() returns immediately


async def test_concurrent_callers_share_a_scan_that_starts_after_their_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, release, scans = threading.Event(), threading.Event(), list[int]()

    def scan(*_: object) -> StoreSnapshot:
        scans.append(1)
        started.set()
        assert release.wait(30)
        return StoreSnapshot()

    monkeypatch.setattr(StoreSnapshot, "scan", scan)
    watch = watcher(tmp_path)
    first = asyncio.create_task(watch.refresh())
    assert await asyncio.to_thread(started.wait, 30)
    others = [asyncio.create_task(watch.refresh()) for _ in range(5)]
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(first, *others)
    assert len(scans) == 2  # the first scan had begun before the other calls
    await watch.refresh()
    assert len(scans) == 3


@pytest.mark.parametrize("fails", [False, True])
async def test_a_scan_that_was_cancelled_or_failed_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    started, release, scans = threading.Event(), threading.Event(), list[int]()

    def scan(*_: object) -> StoreSnapshot:
        scans.append(1)
        if len(scans) == 2:
            started.set()
            assert release.wait(30)
            if fails:
                raise OSError(5, "Input/output error")
        return StoreSnapshot(numbers={NAME: [len(scans)]})

    monkeypatch.setattr(StoreSnapshot, "scan", scan)
    watch = watcher(tmp_path)
    callers = [asyncio.create_task(watch.refresh()) for _ in range(3)]  # the first scan begins before the other calls
    assert await asyncio.to_thread(started.wait, 30)
    if not fails:
        callers[1].cancel()
    release.set()
    await asyncio.gather(*callers, return_exceptions=True)
    assert len(scans) == 3
    assert watch.snapshot.numbers == {NAME: [3]}


async def test_a_call_at_the_time_when_a_scan_starts_does_not_share_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_watcher, "time", SimpleNamespace(monotonic=lambda: 5.0))
    scans = list[int]()
    watch = watcher(tmp_path, on_scan=lambda: scans.append(1))
    for _ in range(2):
        await watch.refresh()
    assert len(scans) == 2


async def test_scans_and_checks_run_in_two_named_threads(tmp_path: Path) -> None:
    watch = watcher(tmp_path)
    threads = [await disk.run(threading.current_thread) for disk in (watch._disk, watch._check_disk)]
    assert [thread.name for thread in threads] == ["store", "store-check"]


async def test_a_failed_scan_is_logged_and_the_next_one_succeeds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = watcher(tmp_path / "missing")
    await watch.refresh()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "the store cannot be scanned")
    ]
    publish_tiny(tmp_path / "missing", NAME)
    await watch.refresh()
    assert watch.snapshot.numbers == {NAME: [1]}


async def test_the_store_is_scanned_at_intervals(tmp_path: Path) -> None:
    publish_tiny(tmp_path, NAME)
    scanned = asyncio.Event()
    watch = watcher(tmp_path, 0.001, on_scan=scanned.set)
    watching = asyncio.create_task(watch.watch())
    for _ in range(2):
        await asyncio.wait_for(scanned.wait(), 60)
        scanned.clear()
    watching.cancel()


async def test_the_unloading_of_a_model_is_read_from_its_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (NAME, "tiny-cgan"):
        publish_tiny(tmp_path, name)
    watch = watcher(tmp_path)
    assert await watch.is_unloaded("tiny-cgan") is False
    Store(tmp_path).unload("tiny-cgan")
    assert await watch.is_unloaded("tiny-cgan") is True
    release = threading.Event()
    monkeypatch.setattr(store_watcher, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(store_watcher, "is_unloaded", lambda *_: release.wait(30))
    assert await watch.is_unloaded("tiny-cgan") is None  # the disk does not answer
    release.set()
