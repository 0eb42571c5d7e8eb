"""Rules of SECURITY.md: security headers, CORS, TLS, no pickle, and closing silent connections."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import ssl
import subprocess
import time
import zipfile
from pathlib import Path

import httpx
import pytest
import torch
from support.networks import TINY, publish_tiny
from support.processes import request_live, serving
from support.responses import send_raw
from support.service import ROOT, Serve

from app import key_file, store
from app.api.middleware.cors import cors
from app.main import create_app
from app.observability.middleware import SECURITY_HEADERS
from app.server import http_protocol
from app.settings import Settings, SettingsError

CLASSIFY, CONTINUE = "/v1/images/classify", "/v1/text/continue"
FORECAST, SAMPLE = "/v1/series/forecast", "/v1/images/sample"


def test_every_answer_tells_browsers_what_not_to_do(serve: Serve) -> None:
    with serve() as client:
        answers = [
            client.get("/docs"), client.get("/health/live"), client.get("/nothing"), client.post(SAMPLE, json={}),
            client.post(SAMPLE, json={"count": 0}), client.post(CONTINUE, json={"max_characters": 2, "stream": True}),
        ]  # fmt: skip
        for answer in answers:
            for name, value in SECURITY_HEADERS:
                assert answer.headers.get_list(name.decode()) == [value.decode()], answer.url
        head = send_raw(client, b"HELLO\r\n\r\n").lower()
    assert b"x-content-type-options: nosniff\r\n" in head
    assert not [answer for answer in answers if "server" in answer.headers]


def test_no_other_site_may_call_unless_it_is_named(serve: Serve, tmp_path: Path) -> None:
    ours = {"origin": "https://a.example"}
    asked = {**ours, "access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    with serve() as client:
        for answer in (client.options(SAMPLE, headers=asked), client.post(SAMPLE, json={"count": 1}, headers=ours)):
            assert not [name for name in answer.headers if name.startswith("access-control")]
    (tmp_path / "keys").write_text("")
    with serve(cors_origins="https://a.example, http://localhost:3000", keys_file=tmp_path / "keys") as client:
        before = client.options(SAMPLE, headers=asked)  # carries no key, and needs none
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, "https://a.example")
        refused = client.post(SAMPLE, json={"count": 1}, headers=ours)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"  # so that the page can read it
        assert "retry-after" in refused.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in refused.headers
        other = client.options(SAMPLE, headers={**asked, "origin": "https://b.example"})
        assert (other.status_code, other.headers.get("access-control-allow-origin")) == (400, None)
        assert other.headers["x-request-id"]


@pytest.mark.parametrize("origins", ["a.example", "https://a.example/", "https://a.example, ftp://b"])
def test_a_wrong_origin_is_refused_by_name(origins: str) -> None:
    with pytest.raises(SettingsError, match="QUARTET_CORS_ORIGINS is "):
        cors(None, Settings(cors_origins=origins))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_tls_is_spoken_by_one_process(serve: Serve, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with serve(tls_cert=cert, tls_key=key) as plain:
        trusting = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=str(plain.base_url).replace("http", "https"), verify=trusting) as client:
            assert client.post(SAMPLE, json={"count": 1}).status_code == 200
        with pytest.raises(httpx.HTTPError):
            plain.get("/health/live")


def test_workers_speak_tls_and_count_together_and_silence_does_not_hold_a_stop(
    tiny_store: Path, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    alice = key_file.add(tmp_path / "keys", "alice", "20/hour")
    trusting = ssl.create_default_context(cafile=str(cert))
    with serving(tiny_store, tls_cert=cert, tls_key=key, keys_file=tmp_path / "keys") as service:
        assert service.url.startswith("https://")
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b""):
            with service.connect() as connection:
                connection.sendall(garbage)
        for _ in range(4):
            connection = service.connect()
            with trusting.wrap_socket(connection, server_hostname="127.0.0.1") as secured:
                assert request_live(secured)
        each = {"x-api-key": alice, "connection": "close"}  # so that both workers are asked
        with httpx.Client(base_url=service.url, headers=each, verify=trusting, timeout=60) as client:
            statuses = [client.post(SAMPLE, json={"count": 1}).status_code for _ in range(30)]
        assert statuses == [200] * 20 + [429] * 10
        silent = [service.connect() for _ in range(4)]
        assert service.stop() == 0
        for connection in silent:
            connection.close()


def test_files_that_are_no_certificate_are_refused_by_name(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    from app.server.uvicorn_server import tls_context

    cert, key = certificate
    (tmp_path / "wrong.pem").write_text("s3cr3t")
    for settings in (
        {"tls_cert": cert},
        {"tls_cert": tmp_path / "none", "tls_key": key},
        {"tls_cert": tmp_path / "wrong.pem", "tls_key": key},
        {"tls_cert": cert, "tls_key": tmp_path / "wrong.pem"},
    ):
        with pytest.raises(SettingsError, match="QUARTET_TLS_CERT is ") as refusal:
            tls_context(Settings(**settings))
        assert "s3cr3t" not in str(refusal.value)
    with pytest.raises(SettingsError, match="QUARTET_TLS_CERT must be set too"):
        tls_context(Settings(tls_key=key))


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def crater(tmp_path: Path) -> Path:
    return tmp_path / "crater"


@pytest.fixture
def bombs(crater: Path) -> dict[str, bytes]:
    """A pickle as it is, as torch saves one, and as numpy does."""
    saved, packed = io.BytesIO(), io.BytesIO()
    torch.save({"weight": Bomb(crater)}, saved)
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data.npy", pickle.dumps(Bomb(crater)))
    return {"pickle": pickle.dumps(Bomb(crater)), "torch": saved.getvalue(), "numpy": packed.getvalue()}


def test_the_bomb_is_one(bombs: dict[str, bytes], crater: Path) -> None:
    pickle.loads(bombs["pickle"])
    assert crater.is_dir()


def test_a_pickle_through_any_door_of_the_service_is_only_bytes(
    serve: Serve, bombs: dict[str, bytes], crater: Path
) -> None:
    with serve() as client:
        for content in bombs.values():
            text = base64.b64encode(content).decode()
            answers = [
                client.request(method, path, content=content, headers={"content-type": kind})
                for path in (CLASSIFY, CONTINUE, FORECAST, SAMPLE, "/v1/models", "/health/ready", "/", "/docs")
                for kind in ("application/octet-stream", "application/json", "image/png", "application/x-pickle")
                for method in ("POST", "PUT", "GET")
            ]
            answers += [
                client.post(CLASSIFY, files={"file": ("x.pkl", content, "application/x-pickle")}),
                client.post(CLASSIFY, json={"images": [text]}),
                client.post(CONTINUE, json={"prompt": text, "model": text[:200]}),
                client.post(FORECAST, json={"values": [text]}),
                client.post(SAMPLE, json={"label": text[:200], "count": 1}),
                client.get(f"/v1/models/{text[:100].replace('/', '_')}"),
                client.get("/health/live", headers={"authorization": f"Bearer {text[:1000]}", "cookie": text[:1000]}),
            ]
            assert not [answer.status_code for answer in answers if answer.status_code >= 500]
        assert client.post(SAMPLE, json={"count": 1}).status_code == 200
    assert not crater.exists()


def test_a_pickle_through_every_door_that_the_document_names_is_only_bytes(
    serve: Serve, bombs: dict[str, bytes], crater: Path
) -> None:
    key = "k" * 16
    with serve(admin_key=key) as client:
        paths = client.get("/openapi.json").json()["paths"]
        assert {path.split("/")[1] for path in paths} >= {"v1", "v2", "health", "metrics"}
        for content in bombs.values():
            tensor = {"name": "prompt", "datatype": "BYTES", "shape": [1]}
            head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(content)}}]}).encode()
            answers = [
                client.request(method.upper(), path.replace("{name}", name).replace("{file}", "curves.png"),
                               content=content, headers={"authorization": f"Bearer {key}"})
                for path, methods in paths.items() for method in methods for name in ("tiny-rnn", "tiny-gan")
            ]  # fmt: skip
            answers.append(
                client.post(
                    "/v2/models/tiny-rnn/infer",
                    content=head + content,
                    headers={"inference-header-content-length": str(len(head))},
                )
            )
            assert not [answer.text for answer in answers if answer.status_code >= 500 and answer.status_code != 503]
        client.post("/v2/repository/models/tiny-rnn/load", headers={"authorization": f"Bearer {key}"})
        assert client.post(SAMPLE, json={"count": 1}).status_code == 200
    assert not crater.exists()


def test_nothing_here_reads_a_pickle() -> None:
    """But a training its own state, which may hold tensors only."""
    for folder in ("app", "training", "benchmarks", "deploy"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not re.findall(r"\b(?:import|from) (?:pickle|dill|cloudpickle|joblib|marshal|shelve)\b", text), path
            assert not re.findall(r"from torch import .*\bload\b|allow_pickle=True|weights_only=False", text), path
            loads = re.findall(r"torch\.load\([^\n]*", text)
            assert all("weights_only=True" in line for line in loads), path
            assert not loads or folder == "training", path


def test_a_pickle_in_the_store_is_refused_as_what_it_is_not(
    tmp_path: Path, bombs: dict[str, bytes], crater: Path
) -> None:
    import hashlib

    for kind, content in bombs.items():
        folder = tmp_path / kind
        version = publish_tiny(folder, next(iter(TINY)))
        (version.folder / store.WEIGHTS).write_bytes(content)
        card = json.loads((version.folder / store.CARD).read_text())
        card["weights_sha256"] = hashlib.sha256(content).hexdigest()  # as one who may write there would
        (version.folder / store.CARD).write_text(json.dumps(card))
        with pytest.raises(store.StoreError, match="is not a safetensors file"):
            store.read_version(folder, card["name"], 1)
        (version.folder / store.CARD).write_bytes(content)
        with pytest.raises(store.StoreError):
            store.read_version(folder, card["name"], 1)
    assert not crater.exists()


def test_the_tests_named_in_security_md_exist() -> None:
    names = set(re.findall(r"test_[a-z_*]+\.py", (ROOT / "SECURITY.md").read_text()))
    assert len(names) >= 6
    assert not [name for name in names if not list((ROOT / "tests").rglob(name))]


def test_head_is_get_without_its_body(serve: Serve) -> None:
    with serve() as client:
        for path in ("/health/live", "/health/ready", "/metrics", "/v1/models", "/v1/models/tiny-cnn", "/docs"):
            answer = client.head(path)
            assert (answer.status_code, answer.content) == (200, b""), path
            assert answer.headers["content-type"] == client.get(path).headers["content-type"]
        assert client.head("/v1/models/none").status_code == 404
        assert client.head(SAMPLE).status_code == 405
        metrics = client.get("/metrics").text
        assert 'quartet_requests_total{method="HEAD",route="/health/live",status="200"} 1.0' in metrics


def test_a_torch_that_is_too_old_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for version in ("1.13.1", "2.5.1+cpu", "2.6.0a0"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(SettingsError, match=r"torch is .*; 2\.6 or newer is required"):
            create_app(Settings(store=tmp_path / "store", threads=1))
    for version in ("2.6.0", "2.13.0+cpu", "3.0.0.dev20270101"):
        monkeypatch.setattr(torch, "__version__", version)
        create_app(Settings(store=tmp_path / "store", threads=1))


def test_a_connection_that_says_nothing_more_is_ended(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    with serve(body_seconds=0.2) as client:
        address = (client.base_url.host, client.base_url.port or 0)
        post = b"POST /v1/images/sample HTTP/1.1\r\nHost: x\r\n"
        chunked = post + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"
        words = (b"", b"GET", b"GET /health/live HTTP/1.1\r\nHost: x\r\n", chunked)
        lines = [socket.create_connection(address, 30) for _ in words]
        for line, word in zip(lines, words, strict=True):
            line.sendall(word)
        assert client.get("/health/live").status_code == 200  # nobody else waits for them
        for line in lines:
            while line.recv(65536):
                pass
            line.close()


def test_an_answered_body_that_does_not_end_is_not_waited_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_SECONDS", "DRAIN_SECONDS"):
        monkeypatch.setattr(http_protocol, name, 0.5)
    get = b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"
    with serve() as client:

        def answered(words: bytes) -> None:
            line.sendall(words)
            heard = b""
            while not heard.endswith(b"}"):
                heard += line.recv(65536)
            assert heard.startswith(b"HTTP/1.1 200 ")

        for rest in (b"x", b"xyz"):  # a part of the body, and all of it
            with socket.create_connection((client.base_url.host, client.base_url.port or 0), 4) as line:
                answered(get)
                answered(b"xyz" + get)  # who goes on is served
                line.sendall(rest)
                assert line.recv(65536) == b""


def test_who_does_not_read_is_not_waited_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads slowly is."""
    monkeypatch.setattr("app.server.http_protocol.STALLED_WRITE_SECONDS", 0.3)
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with serve() as client:
        address, length = (client.base_url.host, client.base_url.port or 0), len(client.get("/openapi.json").content)
        asked = 6 * 2**20 // length  # more than the system holds of what nobody reads
        with socket.socket() as idle, socket.socket() as slow:
            for line in (idle, slow):
                line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                line.connect(address)
                line.sendall(ask * asked)
            heard = 0
            while heard < asked * length:  # a little at a time, for longer than the other is waited for
                piece = slow.recv(16384)
                assert piece
                heard += len(piece)
                time.sleep(0.001)
            heard = 0
            with contextlib.suppress(ConnectionResetError):
                while piece := idle.recv(2**20):
                    heard += len(piece)
            assert heard < asked * length
