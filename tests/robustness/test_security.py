"""Rules of SECURITY.md: security headers, CORS, TLS, no pickle, and closing connections of silent clients."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import pickle
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.responses import Response
from starlette.testclient import TestClient
from support.networks import publish_tiny, rewrite_card
from support.processes import request_live, serving
from support.responses import ADMIN_HEADERS, ADMIN_KEY, CLASSIFY, CONTINUE, SAMPLE
from support.service import ROOT, Serve

from app import key_file, store
from app.api.middleware.cors import cors
from app.api.middleware.trusted_host import host_check
from app.errors import BadValue
from app.settings import Settings, SettingsError
from app.store import Store


def is_allowed(host: str, **settings: Any) -> bool:
    try:
        host_check(Settings(**settings))({"headers": [(b"host", host.encode())]})
    except BadValue:
        return False
    return True


def test_only_local_and_trusted_hosts_are_allowed() -> None:
    local = ("localhost:8000", "10.0.0.7:8000", "[::1]:8000", "[fd00::1]", "quartet-1:80", "LOCALHOST.",
             "quartet.default.svc", "host.docker.internal:8000", "nas.local", "", "a.b", "a.b.c")  # fmt: skip
    for host in local:
        assert is_allowed(host, trusted_hosts="a.b, *.b.c"), host
    for host in ("evil.example", "127.0.0.1.evil.example:80", "b.c", "x.a.b", "evil-b.c", "a.local.b"):
        assert not is_allowed(host, trusted_hosts="a.b, *.b.c"), host


def test_all_hosts_are_allowed_if_a_web_page_cannot_send_requests(tmp_path: Path) -> None:
    for settings in ({"trusted_hosts": "*"}, {"keys_file": tmp_path / "keys"}, {"tls_cert": tmp_path / "cert"}):
        assert is_allowed("evil.example", **settings)
    assert not is_allowed("evil.example", keys_file=tmp_path / "keys", trusted_hosts="a.b")


@pytest.mark.parametrize("hosts", ["https://a.b", "a.*", "a..b"])
def test_a_malformed_trusted_host_is_rejected(hosts: str) -> None:
    with pytest.raises(SettingsError, match="QUARTET_TRUSTED_HOSTS is "):
        host_check(Settings(trusted_hosts=hosts))


@pytest.mark.parametrize(
    "origins",
    ["a.example", "https://a.example/", "https://a.example, ftp://b", "https://*.a.example", "http://a.example:80",
     "https://user@a.example", "https://é.example"],
)  # fmt: skip
def test_an_invalid_origin_is_rejected_by_name(origins: str) -> None:
    with pytest.raises(SettingsError, match="QUARTET_CORS_ORIGINS is "):
        cors(None, Settings(cors_origins=origins))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("configured", "origin", "allowed"),
    [
        ("https://A.Example", "https://a.example", "https://a.example"),
        ("http://[::1]:3000", "http://[::1]:3000", "http://[::1]:3000"),
        ("https://a.example", "http://a.example", None),
        ("https://a.example", "https://a.example:8443", None),
        ("*", "https://a.example", "*"),
    ],
)
def test_only_a_configured_origin_may_read_responses(configured: str, origin: str, allowed: str | None) -> None:
    """The configured origin is compared in the form that browsers send."""
    app = cors(Response(), Settings(cors_origins=configured))
    answer = TestClient(app).get("/", headers={"origin": origin})
    assert answer.headers.get("access-control-allow-origin") == allowed


def test_workers_serve_tls_share_rate_limits_and_stop_despite_silent_clients(
    tiny_store: Path, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    alice = key_file.add(tmp_path / "keys", "alice", "20/hour")
    context = ssl.create_default_context(cafile=str(cert))
    with serving(tiny_store, tls_cert=cert, tls_key=key, keys_file=tmp_path / "keys") as service:
        assert service.url.startswith("https://")
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b""):
            with service.connect() as connection:
                connection.sendall(garbage)
        for _ in range(4):
            connection = service.connect()
            with context.wrap_socket(connection, server_hostname="127.0.0.1") as secured:
                assert request_live(secured)
        headers = {"x-api-key": alice, "connection": "close"}  # new connections reach both workers
        with httpx.Client(base_url=service.url, headers=headers, verify=context, timeout=60) as client:
            statuses = [client.post(SAMPLE, json={"count": 1}).status_code for _ in range(30)]
        assert statuses == [200] * 20 + [429] * 10
        silent = [service.connect() for _ in range(4)]
        assert service.stop() == 0
        for connection in silent:
            connection.close()


def test_invalid_certificate_files_are_rejected_by_name(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    from app.server.http_server import tls_context

    cert, key = certificate
    (tmp_path / "wrong.pem").write_text("s3cr3t")
    for settings in (
        {"tls_cert": cert},
        {"tls_cert": tmp_path / "none", "tls_key": key},
        {"tls_cert": tmp_path / "wrong.pem", "tls_key": key},
        {"tls_cert": cert, "tls_key": tmp_path / "wrong.pem"},
    ):
        with pytest.raises(SettingsError, match="QUARTET_TLS_CERT is ") as rejection:
            tls_context(Settings(**settings))
        assert "s3cr3t" not in str(rejection.value)
    with pytest.raises(SettingsError, match="QUARTET_TLS_CERT must be set too"):
        tls_context(Settings(tls_key=key))


class FolderPickle:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def pickles(tmp_path: Path) -> Iterator[list[bytes]]:
    """Return a plain pickle, and a torch file with a pickle. Check that neither is unpickled."""
    folder, torch_file = tmp_path / "crater", io.BytesIO()
    torch.save({"weight": FolderPickle(folder)}, torch_file)
    yield [pickle.dumps(FolderPickle(folder)), torch_file.getvalue()]
    assert not folder.exists()


def test_a_pickle_sent_to_any_endpoint_is_not_loaded(serve: Serve, pickles: list[bytes]) -> None:
    with serve(admin_key=ADMIN_KEY) as client:
        client.headers.update(ADMIN_HEADERS)
        paths = client.get("/openapi.json").json()["paths"]
        for content in pickles:
            text = base64.b64encode(content).decode()
            tensor = {"name": "prompt", "datatype": "BYTES", "shape": [1]}
            head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(content)}}]}).encode()
            length = {"inference-header-content-length": str(len(head))}
            answers = [
                client.request(method.upper(), path.replace("{name}", name).replace("{file}", "a.png"), content=content)
                for path, methods in paths.items() for method in methods for name in ("tiny-rnn", "tiny-gan")
            ]  # fmt: skip
            answers += [
                client.post("/v2/models/tiny-rnn/infer", content=head + content, headers=length),
                client.post(CLASSIFY, files={"file": ("x.pkl", content, "application/x-pickle")}),
                client.post(CLASSIFY, json={"images": [text]}),
                client.post(CONTINUE, json={"prompt": text, "model": text[:200]}),
            ]
            assert not [answer.text for answer in answers if answer.status_code >= 500 and answer.status_code != 503]
        client.post("/v2/repository/models/tiny-rnn/load")
        assert client.post(SAMPLE, json={"count": 1}).status_code == 200


def test_no_code_loads_pickles() -> None:
    """Only training/ calls torch.load, and with ``weights_only=True``."""
    for folder in ("app", "training", "benchmarks", "deploy"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not re.findall(r"\b(?:import|from) (?:pickle|dill|cloudpickle|joblib|marshal|shelve)\b", text), path
            assert not re.findall(r"from torch import .*\bload\b|allow_pickle=True|weights_only=False", text), path
            loads = re.findall(r"torch\.load\([^\n]*", text)
            assert all("weights_only=True" in line for line in loads), path
            assert not loads or folder == "training", path


def test_a_pickle_in_the_store_is_rejected_as_invalid(tmp_path: Path, pickles: list[bytes]) -> None:
    for number, content in enumerate(pickles, 1):
        version = publish_tiny(tmp_path / "store", "tiny-cnn")
        (version.folder / store.WEIGHTS).write_bytes(content)
        rewrite_card(version.folder, weights_sha256=hashlib.sha256(content).hexdigest())  # as an attacker could do
        with pytest.raises(store.StoreError, match="is not a safetensors file"):
            Store(tmp_path / "store").read("tiny-cnn", number)
        (version.folder / store.CARD).write_bytes(content)
        with pytest.raises(store.StoreError):
            Store(tmp_path / "store").read("tiny-cnn", number)


def test_the_tests_named_in_security_md_exist() -> None:
    names = set(re.findall(r"test_[a-z_*]+\.py", (ROOT / "SECURITY.md").read_text()))
    assert len(names) >= 6
    assert not [name for name in names if not list((ROOT / "tests").rglob(name))]
