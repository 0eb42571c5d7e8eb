"""API keys: authentication, rate limits, reloading the key file, and no secrets in logs."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import httpx
import pytest
from support.faults import Fault, raising
from support.images import image_bytes
from support.responses import SAMPLE, metric_samples
from support.service import ROOT, Serve
from support.waiting import wait_until

from app import key_file
from app.api.middleware.api_keys import is_public
from app.api.middleware.shared_counters import SharedCounters
from app.cli import keys
from app.main import create_app
from app.settings import Settings, SettingsError
from benchmarks.support.servers import free_port

GOOD = {"count": 1, "seed": 1}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def alice(file: Path) -> str:
    return key_file.add(file, "alice")


def test_every_route_needs_a_key_except_the_public_ones(serve: Serve, file: Path, alice: str) -> None:
    settings = Settings(store=file.parent / "store", threads=1)
    paths = create_app(settings).openapi()["paths"]
    routes = {(method.upper(), path.replace("{name}", "tiny-cnn")) for path in paths for method in paths[path]}
    assert len(routes) >= 9
    routes |= {("GET", path) for path in ("/", "/docs", "/openapi.json", "/static-offline-docs/none.js")}
    with serve(keys_file=file) as client:
        for method, path in sorted(routes):
            assert (client.request(method, path).status_code == 401) is not is_public(path), path
        assert client.get("/health/ready").status_code == 200
        assert client.get("/openapi.json").json()["security"] == [{"bearer": []}, {"key": []}]
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers=bearer(alice)).status_code == 200
        for path in ("/v1/models", "/nothing", "//health/live", "/health/../v1/models", "/v1/images/sample/"):
            assert client.send(httpx.Request("GET", f"{client.base_url}".rstrip("/") + path)).status_code in (401, 404)


def test_a_changed_key_file_takes_effect_without_a_restart(
    serve: Serve, file: Path, alice: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(keys_file=file, key_check_seconds=0.01) as client:

        def has_statuses(*expected: int) -> bool:
            keys = (alice, second)[-len(expected) :]
            return expected == tuple(client.post(SAMPLE, json=GOOD, headers=bearer(key)).status_code for key in keys)

        def replace(content: str) -> None:
            new = file.with_suffix(".new")
            new.write_text(content)
            new.replace(file)

        second = key_file.add(file, "alice")  # a name may have two keys while a key is being replaced
        wait_until(lambda: has_statuses(200, 200))
        lines = file.read_text().splitlines()
        replace(lines[1] + "\n")
        wait_until(lambda: has_statuses(401, 200))
        replace("alice nonsense\n")
        wait_until(lambda: "line 1" in caplog.text)
        assert has_statuses(401, 200)  # an invalid file changes nothing
        file.unlink()
        wait_until(lambda: "it cannot be read" in caplog.text)
        assert has_statuses(401, 200)
        file.write_text("# nobody\n")
        wait_until(lambda: has_statuses(401, 401))


def test_an_unreadable_key_file_is_read_again_later(file: Path, alice: str, caplog: pytest.LogCaptureFixture) -> None:
    """The content of the file does not change. Only reading the file fails at first, for lack of file handles."""
    keyring = key_file.Keyring(file)
    file.write_text("# nobody\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        for _ in range(2):
            keyring.reload()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert keyring.find(alice)
    keyring.reload()
    assert keyring.find(alice) is None
    assert caplog.text.count("key file is invalid") == 1


@pytest.mark.parametrize(
    ("name", "limit", "sentence"),
    [
        *((name, "", f"the name is {name!r}; it should be lower-case letters") for name in ("#alice", "Alice", "")),
        *(
            ("alice", limit, f"the limit is {limit!r}; it should be like 600/minute or 600/minute;20/second")
            for limit in ("600 per minute", "600/minute 20/second", "often", "0/minute", "600/minute#", "\n")
        ),
    ],
)
def test_no_key_is_made_for_an_invalid_name_or_limit(file: Path, name: str, limit: str, sentence: str) -> None:
    with pytest.raises(key_file.KeysError, match=re.escape(sentence)):
        key_file.add(file, name, limit)
    assert not file.exists()


def test_spaces_between_limits_are_removed_and_the_shortest_limit_is_counted_first(file: Path) -> None:
    """In another order, requests that the limit per second rejects would use up the limit per minute."""
    key = key_file.add(file, "alice", " 600/minute; 20 / second")
    assert file.read_text().split()[2:] == ["600/minute;20/second"]
    limits = key_file.Keyring(file).find(key).limits  # type: ignore[union-attr]
    assert [str(limit) for limit in limits] == ["20 per 1 second", "600 per 1 minute"]


def test_a_key_is_added_only_to_a_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # addresses of sockets are short
    with socket.socket(socket.AF_UNIX) as special_file:
        special_file.bind("special")
    with pytest.raises(key_file.KeysError, match="it is not a regular file"):
        key_file.add(Path("special"), "alice")
    assert Path("special").is_socket()


def test_keys_created_concurrently_are_all_stored(file: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda i: key_file.add(file, f"maker-{i}"), range(16)))
    keyring = key_file.Keyring(file)
    assert all(keyring.find(key) for key in keys)


def test_a_key_is_stored_as_its_hash_and_printed_once(file: Path) -> None:
    command = [sys.executable, "-m", "app.keys", "new", "alice", "--limit", "5/minute"]
    environment = {**os.environ, "QUARTET_KEYS_FILE": str(file)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    key = result.stdout.strip()
    assert re.fullmatch(r"quartet-[A-Za-z0-9_-]{43}", key)
    assert key not in result.stderr + file.read_text()
    assert file.read_text() == f"alice {hashlib.sha256(key.encode()).hexdigest()} 5/minute\n"
    assert file.stat().st_mode & 0o077 == 0
    for arguments in (["new", "Al ice"], ["new", "alice", "--limit", "often"]):
        failed = subprocess.run([*command[:3], *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert failed.returncode == 1
        assert "Traceback" not in failed.stderr
    assert file.read_text().count("\n") == 1


def test_a_key_that_cannot_be_printed_is_an_error(file: Path) -> None:
    with (
        open("/dev/full", "w", encoding="utf-8") as full_disk,
        redirect_stdout(full_disk),
        pytest.raises(SystemExit, match=r"not be printed: .*No space left on device.*; remove its line"),
    ):
        keys.main(["new", "alice", "--file", str(file)])
    assert file.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("alice", "line 1 has 1 words"),
        ("Alice " + "0" * 64, "line 1: the name should be"),
        ("alice " + "0" * 63, "line 1: the second word should be a sha256"),
        ("alice " + "A" * 64, "line 1: the second word should be a sha256"),
        ("alice " + "0" * 64 + " 0/minute", "line 1: limits should be like"),
        ("\n#\n" + "a b c d", "line 3 has 4 words"),
        ("a " + "0" * 64 + "\nb " + "0" * 64, "line 2 has the same key as line 1"),
        ("".join(f"a {i:064x}\n" for i in range(1001)), "there are 1,001 keys; the maximum is 1,000"),
        ("\udcff", "it cannot be read"),
    ],
)
def test_an_invalid_key_file_is_rejected_at_startup_with_one_message(tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "keys").write_text(line, errors="surrogateescape")
    with pytest.raises(SettingsError, match=r"QUARTET_KEYS_FILE is '.*': ") as rejection:
        create_app(Settings(store=tmp_path / "store", threads=1, keys_file=tmp_path / "keys"))
    assert sentence in str(rejection.value)
    assert "0" * 63 not in str(rejection.value)


def test_invalid_key_settings_are_rejected_by_name(tmp_path: Path, file: Path, alice: str) -> None:
    (tmp_path / "store").mkdir()
    for settings, sentence in (
        ({"keys_file": tmp_path / "none"}, "QUARTET_KEYS_FILE is .*: it cannot be read: No such file"),
        ({"keys_file": file, "rate_limit": "often"}, "QUARTET_RATE_LIMIT is 'often'"),
        ({"rate_limit": "often"}, "QUARTET_RATE_LIMIT is 'often'"),
        ({"rate_limit": "6/minute"}, "QUARTET_RATE_LIMIT is '6/minute'; it needs QUARTET_KEYS_FILE"),
    ):
        with pytest.raises(SettingsError, match=sentence):
            create_app(Settings(store=tmp_path / "store", threads=1, **settings))
    with pytest.raises(SettingsError, match="QUARTET_RATE_LIMIT_STORAGE is 'disk'"):
        Settings(rate_limit_storage="disk")
    address = "redis://user:s3cr/3t@127.0.0.1:port"
    with pytest.raises(
        SettingsError, match=r"QUARTET_RATE_LIMIT_STORAGE is 'redis://\*\*\*@127.0.0.1:port'"
    ) as rejection:
        create_app(Settings(store=tmp_path / "store", threads=1, keys_file=file, rate_limit_storage=address))
    assert "s3cr" not in str(rejection.value)


def test_a_key_over_its_limit_gets_retry_after_and_other_keys_are_unaffected(serve: Serve, file: Path) -> None:
    alice, bob, carol = (
        key_file.add(file, "alice", "3/hour"),
        key_file.add(file, "bob", "100/hour;2/hour"),
        key_file.add(file, "c"),
    )
    second_alice, other = key_file.add(file, "alice", "3/hour"), key_file.add(file, "other")
    with serve(keys_file=file, rate_limit="4/hour") as client:

        def statuses(key: str, times: int) -> list[int]:
            return [client.post(SAMPLE, json=GOOD, headers=bearer(key)).status_code for _ in range(times)]

        assert statuses(alice, 5) == [200] * 3 + [429] * 2
        assert statuses(second_alice, 1) == [429]  # another key with the same name shares the limit
        assert statuses(bob, 3) == [200] * 2 + [429]
        assert statuses(carol, 5) == [200] * 4 + [429]  # carol has the limit of the settings
        answer = client.post(SAMPLE, json=GOOD, headers=bearer(alice))
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert "alice may send 3 requests per hour" in answer.json()["error"]["message"]
        assert 3500 < int(answer.headers["retry-after"]) <= 3600
        assert list(client.get("/v2", headers=bearer(alice)).json()) == ["error"]
        assert client.get("/health/live", headers=bearer(alice)).status_code == 200
        client.headers.update(bearer(other))
        samples = metric_samples(client)
    assert samples["quartet_rate_limited_total", ("key", "alice")] == 5


COUNT = """
import asyncio, os, sys
from app.api.middleware.shared_counters import SharedCounters

async def count(times):
    for _ in range(times):
        await counts.incr("x", 3600)

counts = SharedCounters(slots=8)
for _ in range(4):
    if not os.fork():
        asyncio.run(count(500))
        os._exit(0)
for _ in range(4):
    assert os.wait()[1] == 0
print(asyncio.run(counts.get("x")))
"""


def test_concurrent_processes_lose_no_count() -> None:
    result = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "2000"


def test_counters_expire_with_their_window_and_free_their_slot() -> None:
    now = [1000.0]
    counts = SharedCounters(8, clock=lambda: now[0])

    async def check() -> None:
        for i in range(8):
            assert await counts.incr(f"k{i}", 60) == 1
        with pytest.raises(OSError, match="full"):
            await counts.incr("one more", 60)
        assert await counts.get_expiry("k3") == pytest.approx(time.time() + 60, abs=5)  # on the system clock
        now[0] = 1059.9
        assert await counts.incr("k3", 60, 2) == 3
        now[0] = 1060.0
        assert await counts.get("k3") == 0
        assert await counts.incr("k3", 60) == 1
        assert await counts.incr("one more", 60) == 1
        assert await counts.get("k3") == 1

    asyncio.run(check())


def test_requests_are_not_limited_while_the_table_of_counters_is_full(
    serve: Serve, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = key_file.add(file, "alice", "1/hour"), key_file.add(file, "bob", "1/hour")
    with serve(keys_file=file, rate_limit_counters=1, rate_limit_retry_seconds=600.0) as client:
        keys = (alice, alice, bob, bob, alice)  # nothing is counted after the first request of bob
        statuses = [client.get("/v1/models", headers=bearer(key)).status_code for key in keys]
    assert statuses == [200, 429, 200, 200, 200]
    assert caplog.text.count("rate limits are not counted for 600 s: OSError") == 1


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """Start a Redis server and yield its address."""
    pytest.importorskip("redis")
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(["redis-server", *options], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        assert any("Ready to accept connections" in line for line in server.stdout)
        yield f"redis://127.0.0.1:{port}"
        server.terminate()
        server.communicate(timeout=30)


def test_services_with_one_redis_share_their_counters(serve: Serve, file: Path, redis: str) -> None:
    key = key_file.add(file, "alice", "3/hour")
    with (
        serve(keys_file=file, rate_limit_storage=redis) as first,
        serve(keys_file=file, rate_limit_storage=redis) as second,
    ):
        statuses = [each.post(SAMPLE, json=GOOD, headers=bearer(key)).status_code for each in (first, second) * 3]
    assert statuses == [200, 200, 200, 429, 429, 429]


def test_requests_are_not_limited_while_redis_is_unreachable(
    serve: Serve, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("redis")
    key, address = key_file.add(file, "alice", "1/hour"), "redis://127.0.0.1:9"
    with serve(keys_file=file, rate_limit_storage=address, rate_limit_retry_seconds=600.0) as client:
        assert [client.post(SAMPLE, json=GOOD, headers=bearer(key)).status_code for _ in range(3)] == [200] * 3
    assert caplog.text.count("limits are not counted") == 1


def test_keys_appear_in_no_log_and_no_response(
    serve: Serve, file: Path, alice: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "quartet-" + "s3cr3t" * 7
    responses = []
    with serve(keys_file=file) as client:
        for key in (alice, secret):
            for headers in (bearer(key), {"x-api-key": key}, {"authorization": f"Basic {key}"}, {}):
                for path in (SAMPLE, f"/v1/models?key={key}", "/metrics", "/nothing"):
                    for body in (GOOD, {"count": 0}, {"key": key}):
                        answer = client.post(path, json=body, headers=headers)
                        responses.append(answer.text.replace(f"'{key}'", "") if "key" in body else answer.text)
                        responses.append(str(answer.headers))
            with httpx.Client(base_url=client.base_url, timeout=60) as other_client:
                other_client.get(
                    "/health/live", headers={"authorization": key, "x-request-id": f"\u00e9{key}".encode()}
                )
    out, err = capfd.readouterr()
    log_text = "\n".join(f"{record.getMessage()} {record.exc_info}" for record in caplog.records
                       if record.name.startswith(("quartet", "uvicorn")))  # fmt: skip
    for key in (alice, secret):
        for text in (out, err, log_text, *responses, repr(Settings(keys_file=file))):
            assert key not in text


@pytest.mark.parametrize("log", ["text", "json"])
def test_request_content_appears_in_no_log(
    serve: Serve, log: str, faults: dict[str, Fault], capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Neither the admin key nor request content is logged, even in the traceback of a failed network."""
    caplog.set_level(logging.DEBUG)
    secret, admin_key = "s3cr3t" * 5, "adm1n" * 5
    image = image_bytes() + secret.encode()
    with serve(log_format=log, admin_key=admin_key) as client:
        for expected in (200, 500):
            answers = [
                client.post("/v1/text/continue", json={"prompt": secret, "max_characters": 2, "stop": secret}),
                client.post("/v1/completions", json={"model": "tiny-rnn", "prompt": secret, "user": secret}),
                client.post("/v1/images/classify", content=image),
                client.post("/v1/images/classify", files={"file": (f"{secret}.png", image)}),
            ]
            assert {answer.status_code for answer in answers} == {expected}
            client.post("/v1/images/sample", json={"label": secret, "model": secret})
            client.post(f"/v1/images/classify?top_k={secret}", content=image)
            for key in (admin_key, secret):
                client.get("/v1/admin/models", headers=bearer(key))
            faults["classify"] = faults["continue"] = raising(ValueError("network error"))
    out, err = capfd.readouterr()
    formatter = logging.Formatter()
    log_text = "\n".join(formatter.format(record) for record in caplog.records if record.name.startswith("quartet"))
    assert "network error" in log_text
    for text in (out, err, log_text):
        assert secret not in text
        assert admin_key not in text
