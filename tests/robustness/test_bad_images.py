"""Unusual images are read, and invalid images are rejected. Decompression bombs take little time and memory."""

from __future__ import annotations

import base64
import io
import re
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from support.hypothesis_profiles import FUZZ
from support.images import image_bytes, save_image
from support.responses import CLASSIFY, PNG, assert_rejected, assert_still_serves
from support.service import IMAGES, Serve
from support.waiting import wait_until

from app.errors import NotAnImage, TooLarge
from app.tasks.image_codecs import ImageDecoder, overlay_heat_map


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG with these chunks and an IEND chunk."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in (*chunks, (b"IEND", b""))
    )


def header(width: int, height: int, bits: int = 8, colours: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)


NO_IMAGE, MAX_PIXELS = "are not an image; allowed formats: PNG, JPEG", "the maximum is 50,000,000 in all"
INVALID = {  # the status and a part of the message for each file in tests/images/invalid
    "postscript.eps": (415, NO_IMAGE),
    "half-a-png.png": (415, "the PNG image is damaged"),
    "half-a-jpeg.jpg": (415, "the JPEG image is damaged"),
    "two-headers.png": (413, MAX_PIXELS),
    "pixel-bomb.png": (413, f"20,000 x 20,000 pixels; {MAX_PIXELS}"),
    "more-pixels-than-a-number-holds.png": (413, MAX_PIXELS),
    "tall-image.png": (413, "1 x 49,999,999 pixels; the maximum of a side is 65,535"),
    "jpeg-with-a-thousand-scans.jpg": (413, "scans; the maximum is 100"),
    "progressive-jpeg.jpg": (413, "the maximum for such a JPEG image is 33,333,333"),
    "webp-of-16-million-pixels.webp": (413, "the maximum for such a WEBP image is 12,500,000"),
    "tiff-whose-pages-form-a-cycle.tiff": (415, ""),
    "tiff-with-a-billion-values.tiff": (415, NO_IMAGE),
    "tiff-with-a-tile-larger-than-it.tiff": (413, "tiles of 899,040,256 pixels; the maximum is 16,777,216"),
    "tiff-with-16-385-strips.tiff": (413, "16,385 strips; the maximum is 16,384"),
    "tiff-with-16-bits.tiff": (415, "more than 8 bits per channel"),
    "text-bomb-in-a-png.png": (415, NO_IMAGE),  # a text of 100 MiB after decompression
}


@pytest.mark.parametrize("path", sorted((IMAGES / "unusual").iterdir()), ids=lambda path: path.name)
def test_an_unusual_image_is_classified_and_explained(tiny: httpx.Client, path: Path) -> None:
    content = path.read_bytes()
    answer = tiny.post(CLASSIFY, content=content)
    assert answer.status_code == 200, answer.text
    explained = tiny.post(f"{CLASSIFY}?explain=true", files={"file": ("x", content)}).json()["results"][0]
    assert explained["predictions"] == answer.json()["results"][0]["predictions"]
    assert explained["explanation"]


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_image_or_decompression_bomb_is_rejected(tiny: httpx.Client, name: str) -> None:
    content, (status, sentence) = (IMAGES / "invalid" / name).read_bytes(), INVALID[name]
    started = time.process_time()  # the service runs in this process
    headers = {"content-type": "image/png"}
    assert_rejected(tiny.post(CLASSIFY, content=content, headers=headers), status, "body", sentence)
    two = [("file", ("good.png", PNG)), ("file", ("a.png", content))]
    assert_rejected(tiny.post(f"{CLASSIFY}?explain=true", files=two), status, "file.1", sentence)
    encoded = {"images": [base64.b64encode(each).decode() for each in (PNG, content)]}
    assert_rejected(tiny.post(CLASSIFY, json=encoded), status, "images.1", sentence)
    assert time.process_time() - started < 10
    assert_still_serves(tiny)


@pytest.mark.parametrize(
    ("bits", "colours", "row", "transparent"),
    [
        (2, 0, "1b", "0001"),
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


def test_no_image_is_decoded_after_the_deadline(serve: Serve) -> None:
    photo = save_image(Image.new("RGB", (1700, 1700)), "PNG")
    files = [("file", ("a.png", photo))] * 16
    with serve(parse_threads=1) as client:
        for path in (CLASSIFY, f"{CLASSIFY}?explain=true"):
            client.post(path, content=photo)
            started = time.process_time()  # the service runs in this process
            assert client.post(path, content=photo).status_code == 200
            one = time.process_time() - started
            assert client.post(path, files=files, headers={"x-request-timeout": "0.1"}).status_code == 504
            # This request waits for the only thread, and so for all jobs of the previous request.
            assert client.post(path, content=photo).status_code == 200
            assert time.process_time() - started < 9 * one


def test_images_of_different_requests_are_decoded_in_turn(serve: Serve) -> None:
    photos = [("file", ("a.png", save_image(Image.new("RGB", (2500, 2500)), "PNG")))] * 16
    finished = []

    def classify(files: list[tuple[str, tuple[str, bytes]]]) -> None:
        assert client.post(CLASSIFY, files=files).status_code == 200
        finished.append(len(files))

    with serve(parse_threads=1) as client, ThreadPoolExecutor(2) as pool:
        started = time.process_time()
        many = pool.submit(classify, photos)
        wait_until(lambda: time.process_time() - started > 0.3)  # the service runs in this process
        pool.submit(classify, photos[:1]).result()
        many.result()
    assert finished == [1, 16]


SEEDS = [image_bytes(kind, size=(9, 9)) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]


@FUZZ
@given(seed=st.sampled_from(SEEDS), position=st.floats(0, 1), change=st.integers(0, 255))
@example(seed=SEEDS[4], position=30.5 / 305, change=1)  # Pillow raises ValueError
@example(seed=SEEDS[5], position=72.5 / 382, change=1)  # Pillow raises TypeError
def test_an_image_with_one_wrong_byte_is_decoded_or_rejected_by_name(seed: bytes, position: float, change: int) -> None:
    """``change`` 0 cuts the file off at the position. Other values change one byte."""
    at = int(position * (len(seed) - 1))
    content = seed[:at] + (bytes([seed[at] ^ change]) + seed[at + 1 :] if change else b"")
    try:
        assert ImageDecoder(3, 32).parse(content, 10**6, "photo").shape == (3, 32, 32)
    except (NotAnImage, TooLarge) as error:  # any other exception fails the test
        problem = error
    else:
        return
    assert problem.param == "photo"
    assert re.match(r"photo(: its [\d,]+ bytes are not an image|: the [A-Z]+ image is damaged| has )", problem.message)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_png_has_exactly_its_pixels(mode: str, channels: int) -> None:
    """Small PNGs without optional chunks have a faster decoder."""
    for size in ((1, 1), (5, 17), (32, 32), (128, 128), (129, 128)):
        file = image_bytes("PNG", mode, size)
        with_text = file[:33] + png((b"tEXt", b"x\0y"))[8:-12] + file[33:]
        pixels = Image.open(io.BytesIO(file)).resize((32, 32), Image.Resampling.BICUBIC)
        expected = np.asarray(pixels).reshape(32, 32, channels).transpose(2, 0, 1)
        for content in (file, with_text):
            assert np.array_equal(ImageDecoder(channels, 32).parse(content).numpy(), expected)


def test_a_png_with_a_wrong_byte_is_rejected() -> None:
    """The pixels end with a checksum. Either decoder must find each wrong byte."""
    file = image_bytes(size=(9, 9))
    for position in range(41, len(file) - 16):  # the compressed pixels
        changed = bytearray(file)
        changed[position] ^= 0xFF
        with pytest.raises(NotAnImage, match="the PNG image is damaged"):
            ImageDecoder(3, 32).parse(bytes(changed))


def test_the_largest_number_of_pixels_applies_to_small_pngs() -> None:
    with pytest.raises(TooLarge, match="32 x 32 pixels"):
        ImageDecoder(3, 32).parse(image_bytes(), 32 * 32 - 1)
    assert ImageDecoder(3, 32).parse(image_bytes(), 32 * 32).shape == (3, 32, 32)
