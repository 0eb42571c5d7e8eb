"""Downloads of the public data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.trainings import set_limits

from training.data import datasets


def test_an_incomplete_download_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_DATA_DIR", str(tmp_path))
    set_limits(monkeypatch, check_digests=True)
    monkeypatch.setitem(datasets.URLS, "tinyshakespeare.txt", "http://127.0.0.1:9/nothing-listens-here")
    with pytest.raises(
        datasets.DataError, match=r"could not be downloaded .*; set QUARTET_DATA_DIR to the folder that contains it"
    ):
        datasets.tinyshakespeare()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "tinyshakespeare.txt").write_text("half")
    with pytest.raises(datasets.DataError, match=r"sha256 is .*, expected 86c4e6aa.*: delete the file and run"):
        datasets.tinyshakespeare()
    (tmp_path / "mnist.safetensors").write_bytes(b"half")
    with pytest.raises(datasets.DataError, match="is damaged"):
        datasets.mnist()


def test_a_download_is_verified_and_then_moved_to_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import functools
    import hashlib
    import http.server
    import threading

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "text").write_text("to be or not")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("QUARTET_DATA_DIR", str(tmp_path / "data"))
        set_limits(monkeypatch, check_digests=True)
        monkeypatch.setitem(datasets.URLS, "tinyshakespeare.txt", f"http://127.0.0.1:{server.server_port}/text")
        with pytest.raises(datasets.DataError, match=r'invalid hash value .expected "86c4e6aa'):
            datasets.tinyshakespeare()
        assert list((tmp_path / "data").iterdir()) == []
        digest = hashlib.sha256(b"to be or not").hexdigest()
        monkeypatch.setitem(datasets.SHA256, "tinyshakespeare.txt", digest)
        text = datasets.tinyshakespeare()
        server.shutdown()
        thread.join()
    assert (text.train, text.test, text.sha256) == ("to be or n", "ot", digest)
