"""Unusual images are read, and invalid images are rejected. Decompression bombs take little time and memory."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.hypothesis_profiles import QUICK_PROFILE
from support.images import image_bytes, png_with_size, save_image
from support.networks import TINY, publish_tiny
from support.responses import CLASSIFY, PNG, assert_harmless, assert_rejected, assert_still_serves
from support.service import Serve

from app.api.request_body import BYTES_PER_VALUE
from app.api.routes.classify import ClassifyInference, ImageFile
from app.engine.batcher import Batcher
from app.engine.executor import INLINE_SIZE
from app.errors import NotAnImage, TooLarge
from app.tasks import image_codecs
from app.tasks.classification import ImageClassifier
from app.tasks.image_codecs import ImageDecoder, overlay_heat_map


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG with these chunks and an IEND chunk."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in (*chunks, (b"IEND", b""))
    )


def header(width: int, height: int, bits: int = 8, colours: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)


def frames(kind: str) -> bytes:
    """Return an animation: one red frame, then two blue frames."""
    first, *rest = (Image.new("RGB", (24, 24), colour) for colour in ("red", "blue", "blue"))
    return save_image(first, kind, save_all=True, append_images=rest, duration=50)


def png_with_16_bits(channels: int) -> bytes:
    """Return a PNG with 16 bits per channel."""
    pixels = np.full((8, 8, channels), 30_000, ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return png(header(8, 8, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels]), (b"IDAT", zlib.compress(rows)))


def palette(alpha: bytes) -> bytes:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return save_image(image, "PNG", transparency=alpha)


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save_image(Image.new("RGB", (40, 20), "green"), "JPEG", exif=exif)


def tiff(*entries: tuple[int, int, int, int], after: int = 0) -> bytes:
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + packed + struct.pack("<I", after) + bytes(100)


DAMAGED = b"Exif\0\0" + tiff((0x0112, 3, 1, 6), (0x8769, 9, 1, 2**32 - 5))  # the offset of the second directory is -5
VALID: dict[str, bytes] = {
    "animated gif": frames("GIF"),
    "animated webp": frames("WEBP"),
    "animated png": frames("PNG"),
    "multi-page tiff": save_image(
        Image.new("RGB", (8, 8)), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]
    ),
    "cmyk jpeg": image_bytes("JPEG", "CMYK"),
    **{f"16 bits, {channels} channels": png_with_16_bits(channels) for channels in (1, 2, 3, 4)},
    "palette with alpha": palette(bytes([0, 128])),
    "palette with a transparent colour": palette(bytes([255, 0])),
    **{f"exif {orientation}": rotated(orientation) for orientation in (0, 1, 2, 5, 6, 8, 9, 65535)},
    "damaged exif": image_bytes("JPEG", size=(40, 20), exif=DAMAGED),
    "progressive jpeg": image_bytes("JPEG", progressive=True),
    "optimised png": image_bytes("PNG", optimize=True),
    "one pixel": image_bytes(size=(1, 1)),
    "a line": image_bytes(size=(10_000, 1)),
    "png and a zip": PNG + b"PK\x03\x04" + bytes(100),
    "jpeg and html": image_bytes("JPEG") + b"<script>alert(1)</script>",
    "gif that is a script": b"GIF89a/*" + save_image(Image.new("P", (10799, 1)), "GIF")[8:],
    "png with a text": png(header(1, 1), (b"tEXt", b"x\0" + b"y" * 10_000), (b"IDAT", zlib.compress(b"\0\0"))),
}


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", bytes(50 * 2**20))
    return file.getvalue()


def png_bomb(kind: bytes) -> bytes:
    """Return a PNG with a chunk of this kind whose decompressed content has 100 MiB."""
    return png(header(1, 1), (kind, b"x\0\0" + zlib.compress(bytes(100 * 2**20))), (b"IDAT", b""))


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(900)  # fmt: skip


INVALID: dict[str, bytes] = {
    "more pixels than a number holds": png_with_size(2**31 - 1, 2**31 - 1),
    "a pixel count that overflows": png_with_size(2**16, 2**16),
    "no width": png(header(0, 5), (b"IDAT", zlib.compress(b"\0"))),
    "no header": png((b"IDAT", zlib.compress(bytes(100)))),
    "two headers": png(header(1, 1), header(20_000, 20_000), (b"IDAT", zlib.compress(bytes(100)))),
    "invalid bit depth": png(header(4, 4, bits=7), (b"IDAT", zlib.compress(bytes(100)))),
    "bmp of no height": bmp(10, 0),
    "bmp of negative width": bmp(-10, 10),
    "bmp that overflows": bmp(2**31 - 1, -(2**31 - 1)),
    "tiff without dimensions": tiff((258, 4, 1, 8)),
    "tiff of no width": tiff((256, 4, 1, 0), (257, 4, 1, 0)),
    "tiff that overflows": tiff((256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1), (258, 4, 1, 8), (262, 4, 1, 1)),
    "tiff whose pages form a cycle": tiff((256, 4, 1, 4), (257, 4, 1, 4), after=8),
    "tiff with a billion values": tiff((256, 4, 2**30, 4), (257, 4, 1, 4)),
    "jpeg of 65,500 squared": image_bytes("JPEG").replace(b"\x08\0\x20\0\x20", b"\x08\xff\xdc\xff\xdc", 1),
    "svg": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>',
    "pdf": b"%PDF-1.4\n" + PNG,
    "html": b"<html>" + PNG,
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "psd": b"8BPS\0\x01" + bytes(100),
    "icon": b"\0\0\1\0\1\0" + bytes(100),
    "heic": b"\0\0\0\x18ftypheic" + bytes(100),
    "webp with a wrong size": b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff" + bytes(50),
    "gif without a picture": b"GIF89a\xff\xff\xff\xff\0\0\0;",
    "gif of 65,535 squared": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\x02\x4c\x01\0;",
}


BOMBS: dict[str, Callable[[], bytes]] = {  # each bomb is built only by its own test
    "zip bomb": zip_bomb,
    "text bomb in a png": lambda: png_bomb(b"zTXt"),
    "profile bomb in a png": lambda: png_bomb(b"iCCP"),
}


@pytest.mark.parametrize("name", VALID)
def test_an_unusual_image_is_classified_and_explained(tiny: httpx.Client, name: str) -> None:
    answer = tiny.post(CLASSIFY, content=VALID[name])
    assert answer.status_code == 200, answer.text
    assert tiny.post(CLASSIFY, files={"file": ("x", VALID[name])}).json()["results"][0]["predictions"] == \
        answer.json()["results"][0]["predictions"]  # fmt: skip
    explained = tiny.post(f"{CLASSIFY}?explain=true", content=VALID[name])
    assert explained.status_code == 200, explained.text
    assert explained.json()["results"][0]["explanation"]


@pytest.mark.parametrize(
    ("bits", "colours", "row", "transparent"),
    [
        (2, 0, "1b", "0001"),
        (4, 0, "05af", "0005"),
        (8, 0, "0005aaff", "0005"),
        (8, 2, "000000 123456 010203 ffffff", "001200340056"),
        (16, 2, "000000000000 123456789abc 010203040506 ffffffffffff", "123456789abc"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_colour_of_a_png_becomes_white(
    bits: int, colours: int, row: str, transparent: str, channels: int
) -> None:
    """The second of four pixels has the transparent colour."""
    data = (b"IDAT", zlib.compress(4 * (b"\0" + bytes.fromhex(row))))
    opaque = png(header(4, 4, bits, colours), data)
    content = png(header(4, 4, bits, colours), (b"tRNS", bytes.fromhex(transparent)), data)
    decoder, heat = ImageDecoder(channels, 4), np.zeros((4, 4), np.float32)
    expected = decoder.parse(opaque)
    assert (expected[:, :, 1] < 200).all()
    expected[:, :, 1] = 255
    assert torch.equal(decoder.parse(content), expected)
    overlay, opaque_overlay = (
        np.array(Image.open(io.BytesIO(overlay_heat_map(decoder.open(file, 16), heat)))) for file in (content, opaque)
    )
    opaque_overlay[:, 1] = 255
    assert np.array_equal(overlay, opaque_overlay)


def test_the_pixel_limit_of_explanations_applies_to_all_images_together(serve: Serve) -> None:
    explain = f"{CLASSIFY}?explain=true"
    with serve(max_pixels=5000) as client:
        two = [("file", ("a.png", image_bytes(size=(60, 60))))] * 2
        message = "the images have 7,200 pixels in all; with explain, the maximum is 5,000"
        assert_rejected(client.post(explain, files=two), 413, "explain", message)
        assert client.post(explain, files=two[:1]).status_code == 200
        assert client.post(CLASSIFY, files=two).status_code == 200


def test_no_explanation_starts_after_the_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    explained, release = [], threading.Event()

    def overlay_when_released(image: Image.Image, heat: np.ndarray) -> bytes:
        explained.append(image.size)
        assert release.wait(60)
        return overlay_heat_map(image, heat)

    monkeypatch.setattr("app.api.routes.classify.overlay_heat_map", overlay_when_released)
    explain, files = f"{CLASSIFY}?explain=true", [("file", ("a.png", PNG))] * 8
    with serve(parse_threads=1) as client:
        assert client.post(explain, files=files, headers={"x-request-timeout": "0.5"}).status_code == 504
        release.set()
        # This request waits for the only thread, and so for all jobs of the first request.
        assert client.post(explain, content=image_bytes(size=(9, 9))).status_code == 200
    assert explained[-1] == (9, 9)
    assert len(explained) <= 2


def test_the_first_frame_of_an_animation_is_classified(tiny: httpx.Client) -> None:
    red = tiny.post(CLASSIFY, content=save_image(Image.new("RGB", (24, 24), "red"), "PNG")).json()["results"]
    assert tiny.post(CLASSIFY, content=frames("PNG")).json()["results"] == red
    assert tiny.post(CLASSIFY, content=frames("GIF")).json()["results"] == red


@pytest.mark.parametrize("name", [*INVALID, *BOMBS])
def test_an_invalid_image_or_decompression_bomb_is_rejected(tiny: httpx.Client, name: str) -> None:
    content = BOMBS[name]() if name in BOMBS else INVALID[name]
    started = time.process_time()  # the service runs in this process
    for explain in ("false", "true"):
        answer = tiny.post(f"{CLASSIFY}?explain={explain}", content=content)
        assert_harmless(answer)
        assert answer.status_code in (413, 415), answer.text
    assert time.process_time() - started < 10
    assert_still_serves(tiny)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> ImageClassifier:
    import torch

    return ImageClassifier(publish_tiny(tmp_path_factory.mktemp("one"), next(iter(TINY))), torch.device("cpu"))


SEEDS = [image_bytes(kind, size=(9, 9)) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]


@QUICK_PROFILE
@given(seed=st.sampled_from(SEEDS), position=st.floats(0, 1), cut=st.integers(0, 20), inserted=st.binary(max_size=12))
def test_a_changed_image_is_parsed_or_rejected_with_a_message(
    classifier: ImageClassifier, seed: bytes, position: float, cut: int, inserted: bytes
) -> None:
    start = int(position * len(seed))
    with contextlib.suppress(NotAnImage, TooLarge):  # any other exception fails the test
        pixels = classifier.parse(seed[:start] + inserted + seed[start + cut :], 10**6)
        assert pixels.shape == (3, 32, 32)


@QUICK_PROFILE
@given(
    channels=st.sampled_from([1, 3]),
    shape=st.sampled_from([(1, 1), (5, 17), (32, 32), (129, 128)]),
    position=st.one_of(st.integers(0, 60), st.integers(0, 50_000)),
    cut=st.integers(0, 20),
    inserted=st.binary(max_size=12),
)
def test_a_small_png_has_the_pixels_and_errors_that_pillow_gives(
    channels: int, shape: tuple[int, int], position: int, cut: int, inserted: bytes
) -> None:
    """Small PNGs without optional chunks have their own reader."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    file = save_image(Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels), "PNG")
    changed = file[:position] + inserted + file[position + cut :]
    data = file[41:-16]
    two_parts = png((b"IHDR", file[16:29]), (b"IDAT", data[:9]), (b"IDAT", data[9:]))
    wrong_checksum = file[:29] + bytes(4) + file[33:]
    contents = (file, changed, two_parts, wrong_checksum)
    decoder = ImageDecoder(channels, max(shape))

    def outcome(content: bytes) -> list[int] | str:
        try:
            values: list[int] = decoder.parse(content, 10**6).flatten().tolist()
            return values
        except NotAnImage as error:
            return str(error)

    outcomes = [outcome(content) for content in contents]
    read = [image_codecs._small_png(content) is not None for content in contents]
    assert (read[0], *read[2:]) == (shape != (129, 128), shape != (129, 128), False)
    with patch.object(image_codecs, "_small_png", return_value=None):
        assert outcomes == [outcome(content) for content in contents]


def test_the_largest_number_of_pixels_applies_to_small_pngs() -> None:
    with pytest.raises(TooLarge, match="32 x 32 pixels"):
        ImageDecoder(3, 32).parse(image_bytes(), 32 * 32 - 1)
    assert ImageDecoder(3, 32).parse(image_bytes(), 32 * 32).shape == (3, 32, 32)


def test_a_png_with_thousands_of_chunks_is_left_to_pillow() -> None:
    """Reading them would block the event loop."""
    file = image_bytes()
    many_chunks = file[:33] + (bytes(4) + b"IDAT" + bytes(4)) * 6000 + file[33:]
    assert image_codecs._small_png(many_chunks) is None


def test_few_of_many_small_pngs_are_decoded_on_the_event_loop(classifier: ImageClassifier) -> None:
    file = ImageFile("x.png", save_image(Image.new("RGB", (128, 128)), "PNG"), "file")
    model: Any = SimpleNamespace(predictor=classifier, engine=None)
    with patch.object(image_codecs, "_small_png", wraps=image_codecs._small_png) as small_png:
        inference = ClassifyInference(model, [file] * 60, 1, 10**6)
        assert small_png.call_count * 128 * 128 < 2 * BYTES_PER_VALUE * INLINE_SIZE
        assert inference.parse_size > INLINE_SIZE
        assert len(inference.parse()) == 60


def test_only_images_that_threads_decode_count_as_being_parsed(tiny: httpx.Client) -> None:
    """Each count ends, also for a damaged image. Otherwise all later batches would wait."""
    parsing, counts = Batcher.parsing, list[int]()

    @contextlib.contextmanager
    def recorded(batcher: Batcher[Any, Any]) -> Iterator[None]:
        with parsing(batcher):
            counts.append(batcher._parsing)
            yield
        counts.append(batcher._parsing)

    large = image_bytes("JPEG", size=(600, 400))
    with patch.object(Batcher, "parsing", recorded):
        for content, status, expected in ((large, 200, [1, 0]), (large[:9000], 415, [1]), (image_bytes(), 200, [])):
            counts.clear()
            assert tiny.post(CLASSIFY, content=content).status_code == status
            assert counts == expected
        counts.clear()
        assert tiny.post(CLASSIFY, content=large).status_code == 200
        assert counts == [1, 0]
