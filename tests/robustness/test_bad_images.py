"""Unusual images are read, and invalid images are rejected. Decompression bombs take little time and memory."""

from __future__ import annotations

import base64
import io
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
from support.service import Serve
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


def png_with_16_bits(channels: int) -> bytes:
    """Return a PNG with 16 bits per channel."""
    rows = b"\0" + np.full((8, channels), 30_000, ">u2").tobytes()
    return png(header(8, 8, 16, {1: 0, 4: 6}[channels]), (b"IDAT", zlib.compress(8 * rows)))


def palette(alpha: bytes) -> bytes:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return save_image(image, "PNG", transparency=alpha)


def tiff(*entries: tuple[int, int, int, int], after: int = 0, content: bytes = bytes(100)) -> bytes:
    """Return a TIFF with these tags, whose content starts at byte 1000. ``after`` is the position of a second page."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + packed + struct.pack("<I", after)
    return head.ljust(1000, b"\0") + content


RED, BLUE = (Image.new("RGB", (24, 24), colour) for colour in ("red", "blue"))
DAMAGED = b"Exif\0\0" + tiff((0x0112, 3, 1, 6), (0x8769, 9, 1, 2**32 - 5))  # the offset of the second directory is -5
UNKNOWN_ORIENTATION = Image.Exif()
UNKNOWN_ORIENTATION[0x0112] = 65_535
VALID: dict[str, bytes] = {
    "animated gif": save_image(RED, "GIF", save_all=True, append_images=[BLUE, RED], duration=50),
    "multi-page tiff": save_image(RED, "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "cmyk jpeg": image_bytes("JPEG", "CMYK"),
    **{f"png {mode}": image_bytes("PNG", mode, (33, 31)) for mode in ("1", "LA")},
    "webp with transparency": image_bytes("WEBP", "RGBA", (30, 20)),
    **{f"16 bits, {channels} channels": png_with_16_bits(channels) for channels in (1, 4)},
    "palette with alpha": palette(bytes([0, 128])),
    "unknown orientation": image_bytes("JPEG", exif=UNKNOWN_ORIENTATION),
    "damaged exif": image_bytes("JPEG", size=(40, 20), exif=DAMAGED),
    "a line": image_bytes(size=(10_000, 1)),
    "png and a zip": PNG + b"PK\x03\x04" + bytes(100),
    "gif that is a script": b"GIF89a/*" + save_image(Image.new("P", (10799, 1)), "GIF")[8:],
    "png with a text": png(header(1, 1), (b"tEXt", b"x\0" + b"y" * 10_000), (b"IDAT", zlib.compress(b"\0\0"))),
}


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", bytes(50 * 2**20))
    return file.getvalue()


def text_bomb() -> bytes:
    """Return a PNG with a text that has 100 MiB after decompression."""
    return png(header(1, 1), (b"zTXt", b"x\0\0" + zlib.compress(bytes(100 * 2**20))), (b"IDAT", b""))


def one_tile(side: int) -> bytes:
    """Return a TIFF of 32 x 32 pixels whose only tile has ``side`` x ``side`` pixels."""
    content = zlib.compress(bytes(1000))
    tags = {256: 32, 257: 32, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 1000, 325: len(content)}
    return tiff(*((tag, 4, 1, value) for tag, value in tags.items()), content=content)


def many_strips(count: int) -> bytes:
    """Return a TIFF of 1 x 9 pixels that lists ``count`` strips."""
    tags = {256: 1, 257: 9, 258: 8, 259: 1, 262: 1, 273: 1000, 277: 1, 278: 1, 279: 1000}
    entries = ((tag, 4, count if tag in (273, 279) else 1, value) for tag, value in tags.items())
    return tiff(*entries, content=bytes(4 * count))


def stated_size(width: int, height: int) -> bytes:
    """Return a PNG whose header states ``width`` x ``height`` pixels, but which has less image data."""
    return png(header(width, height), (b"IDAT", zlib.compress(bytes(1000))))


PROGRESSIVE = image_bytes("JPEG", progressive=True).replace(b"\x08\0\x20\0\x20", b"\x08\x17\x70\x17\x70", 1)
WEBP = image_bytes("WEBP")
NO_IMAGE, MAX_PIXELS = "are not an image; allowed formats: PNG, JPEG", "the maximum is 50,000,000 in all"
INVALID: list[tuple[str, Callable[[], bytes] | bytes, int, str]] = [
    ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n", 415, NO_IMAGE),
    ("half a png", PNG[: len(PNG) // 2], 415, "the PNG image is damaged"),
    ("half a jpeg", image_bytes("JPEG")[:1000], 415, "the JPEG image is damaged"),
    ("two headers", png(header(1, 1), header(20_000, 20_000), (b"IDAT", zlib.compress(bytes(100)))), 413, MAX_PIXELS),
    ("a pixel bomb", stated_size(20_000, 20_000), 413, f"20,000 x 20,000 pixels; {MAX_PIXELS}"),
    ("more pixels than a number holds", stated_size(2**31 - 1, 2**31 - 1), 413, MAX_PIXELS),
    ("a tall image", stated_size(1, 49_999_999), 413, "1 x 49,999,999 pixels; the maximum of a side is 65,535"),
    ("a jpeg with a thousand scans", image_bytes("JPEG")[:-2] + b"\xff\xda\0\2" * 1000, 413, "scans; the maximum is 100"),
    ("a progressive jpeg", PROGRESSIVE, 413, "the maximum for such a JPEG image is 33,333,333"),
    ("a webp", WEBP[:26] + struct.pack("<HH", 4000, 4000) + WEBP[30:], 413, "the maximum for such a WEBP image is 12,500,000"),
    ("a tiff whose pages form a cycle", tiff((256, 4, 1, 4), (257, 4, 1, 4), after=8), 415, ""),
    ("a tiff with a billion values", tiff((256, 4, 2**30, 4), (257, 4, 1, 4)), 415, NO_IMAGE),
    ("a tiff with a tile larger than it", one_tile(29_984), 413, "tiles of 899,040,256 pixels; the maximum is 16,777,216"),
    ("a tiff with 16,385 strips", many_strips(16_385), 413, "16,385 strips; the maximum is 16,384"),
    ("a tiff with 16 bits", save_image(Image.new("I;16", (9, 9)), "TIFF"), 415, "more than 8 bits per channel"),
    ("a zip bomb", zip_bomb, 415, NO_IMAGE),
    ("a text bomb in a png", text_bomb, 415, NO_IMAGE),
]  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_an_unusual_image_is_classified_and_explained(tiny: httpx.Client, name: str) -> None:
    answer = tiny.post(CLASSIFY, content=VALID[name])
    assert answer.status_code == 200, answer.text
    explained = tiny.post(f"{CLASSIFY}?explain=true", files={"file": ("x", VALID[name])}).json()["results"][0]
    assert explained["predictions"] == answer.json()["results"][0]["predictions"]
    assert explained["explanation"]


@pytest.mark.parametrize(
    ("content", "status", "sentence"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID]
)
def test_an_invalid_image_or_decompression_bomb_is_rejected(
    tiny: httpx.Client, content: Callable[[], bytes] | bytes, status: int, sentence: str
) -> None:
    content = content if isinstance(content, bytes) else content()
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
