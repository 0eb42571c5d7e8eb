"""The files of the web page, their HTTP headers, and the pictures of models."""

from __future__ import annotations

import hashlib
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import httpx
from support.networks import publish_tiny
from support.service import ROOT, Serve

from app.store import Store

WEB = ROOT / "app" / "web"


def test_the_page_has_an_etag(shipped: httpx.Client) -> None:
    page = shipped.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    not_modified = shipped.get("/", headers={"if-none-match": f'"other", W/{page.headers["etag"]}'})
    assert (not_modified.status_code, not_modified.content, not_modified.headers["etag"]) == (
        304,
        b"",
        page.headers["etag"],
    )


def test_every_file_of_the_page_is_served_and_packaged(shipped: httpx.Client) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["app"]
    for path in filter(Path.is_file, WEB.rglob("*")):
        name = path.relative_to(WEB).as_posix()
        part = shipped.get(f"/web/{name}")
        assert (part.status_code, part.content) == (200, path.read_bytes())
        assert part.headers["content-type"].split(";")[0] == types.get(path.suffix, "image/png")
        assert any(fnmatch(f"web/{name}", pattern) for pattern in packaged)
    for other in ("other.js", "..%2fmain.py", "%2e%2e", "scripts", "scripts%2f..%2findex.html"):
        assert shipped.get(f"/web/{other}").json()["error"]["code"] == "not_found"


def test_the_page_has_no_inline_code_and_no_external_files() -> None:
    page = (WEB / "index.html").read_text()
    assert not re.findall(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)|javascript:", page)
    for path in (path for path in WEB.rglob("*") if path.suffix in (".html", ".css", ".js")):
        assert not re.findall(r"https?://(?!www\.w3\.org/)|[\"'(]//[a-z]", path.read_text()), path.name
    for path in WEB.rglob("*.js"):
        assert not re.findall(r"innerHTML|\beval\(|new Function|document\.write", path.read_text()), path.name


def test_no_list_of_numbers_asks_for_a_keyboard_without_separators() -> None:
    """The decimal keyboard of iPhones has neither a space nor a minus sign."""
    assert not re.findall(r"<textarea[^>]*\sinputmode=", (WEB / "index.html").read_text())


def test_only_pictures_of_a_model_are_served(shipped: httpx.Client) -> None:
    model = shipped.get("/v1/models/mnist-gan").json()
    assert model["pictures"] == ["curves.png", "samples.png"]
    for file in model["pictures"]:
        for name in ("mnist-gan", "mnist-gan@1"):
            picture = shipped.get(f"/v1/models/{name}/pictures/{file}")
            assert picture.headers["content-type"] == "image/png"
            assert picture.content == (ROOT / "models_store" / "mnist-gan" / "1" / file).read_bytes()
        tag = picture.headers["etag"]
        not_modified = shipped.get(f"/v1/models/mnist-gan/pictures/{file}", headers={"if-none-match": tag})
        assert (not_modified.status_code, not_modified.content) == (304, b"")
        assert tag == f'"{hashlib.sha256(picture.content).hexdigest()[:32]}"'  # another picture has another tag
    answer = shipped.get("/v1/models/mnist-gan/pictures/card.json")
    assert answer.status_code == 404
    sentence = "mnist-gan@1 has no picture 'card.json'; pictures: curves.png, samples.png"
    assert answer.json()["error"]["message"] == sentence


def test_without_a_version_number_the_picture_of_the_active_version_is_served(serve: Serve, tmp_path: Path) -> None:
    for number in (1, 2):
        (publish_tiny(tmp_path, "tiny-gan").folder / "curves.png").write_bytes(b"picture %d" % number)
    (tmp_path / "tiny-gan" / "1" / "samples.png").write_bytes(b"samples")
    Store(tmp_path).activate("tiny-gan", 1)
    Store(tmp_path).activate("tiny-gan", 2, share=99.99)
    with serve(store=tmp_path) as client:
        assert client.get("/v1/models/tiny-gan").json()["pictures"] == ["curves.png", "samples.png"]
        for name, content in (("tiny-gan", b"picture 1"), ("tiny-gan@1", b"picture 1"), ("tiny-gan@2", b"picture 2")):
            assert client.get(f"/v1/models/{name}/pictures/curves.png").content == content
        assert client.get("/v1/models/tiny-gan/pictures/samples.png").content == b"samples"
