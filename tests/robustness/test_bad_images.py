"""Unusual images are read, and invalid images are rejected. Decompression bombs take little time and memory."""

from __future__ import annotations

import io
import re
import resource
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
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
from support.images import image_bytes, png_with_size, save_image
from support.processes import memory_mib, reset_memory_peak, serving
from support.responses import CLASSIFY, PNG, assert_harmless, assert_rejected, assert_still_serves
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
    **{f"png {mode}": image_bytes("PNG", mode, (33, 31)) for mode in ("L", "1", "P", "RGBA", "LA")},
    **{
        f"{kind} {mode}": image_bytes(kind, mode, (30, 20))
        for kind, mode in (("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "CMYK"))
    },
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


def large_png(width: int, height: int, colours: int = 6) -> bytes:
    """Return a PNG of one colour, by default with transparency, in the least memory."""
    row = bytes(1 + width * {2: 3, 6: 4}[colours])
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png(header(width, height, 8, colours), (b"IDAT", pixels))


def large_tiff() -> bytes:
    """Return a TIFF of 49 million pixels in a single strip."""
    return save_image(Image.new("L", (7000, 7000)), "TIFF", compression="tiff_adobe_deflate", strip_size=2**30)


BOMBS: dict[str, Callable[[], bytes]] = {  # each bomb is built only by its own test
    "zip bomb": zip_bomb,
    "text bomb in a png": lambda: png_bomb(b"zTXt"),
    "profile bomb in a png": lambda: png_bomb(b"iCCP"),
    "a tiff in one strip": large_tiff,
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


@pytest.mark.parametrize("explain", ["false", "true"])
def test_no_image_is_decoded_after_the_deadline(serve: Serve, explain: str) -> None:
    photo = save_image(Image.new("RGB", (1700, 1700)), "PNG")
    files = [("file", ("a.png", photo))] * 16
    with serve(parse_threads=1) as client:
        client.post(f"{CLASSIFY}?explain={explain}", content=photo)
        started = time.process_time()  # the service runs in this process
        assert client.post(f"{CLASSIFY}?explain={explain}", content=photo).status_code == 200
        one = time.process_time() - started
        late = client.post(f"{CLASSIFY}?explain={explain}", files=files, headers={"x-request-timeout": "0.1"})
        assert late.status_code == 504
        # This request waits for the only thread, and so for all jobs of the previous request.
        assert client.post(f"{CLASSIFY}?explain={explain}", content=photo).status_code == 200
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


MEMORY: list[tuple[Callable[[], bytes], int]] = [
    (lambda: large_png(3000, 3000), 200),
    (lambda: large_png(137, 65_535), 200),
    (lambda: large_png(1, 1_000_000), 413),
    (lambda: save_image(Image.new("RGB", (2000, 2000)), "WEBP"), 413),
    (lambda: save_image(Image.new("RGB", (3000, 3000)), "JPEG", progressive=True, subsampling=0), 413),
]


def test_an_image_takes_at_most_four_bytes_of_memory_for_each_allowed_pixel(tiny_store: Path) -> None:
    with (
        serving(tiny_store, workers=1, max_pixels=9_000_000) as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
    ):
        assert client.post(CLASSIFY, content=image_bytes("JPEG", size=(300, 300))).status_code == 200
        for create, status in MEMORY:
            content, process = create(), service.process.pid
            before = reset_memory_peak(process)
            assert client.post(CLASSIFY, content=content).status_code == status
            assert memory_mib(process, "VmHWM") < before + 4 * 9 + 20


def test_an_image_that_does_not_fit_into_memory_gives_503(tiny_store: Path) -> None:
    content = large_png(7000, 7000)
    with (
        serving(tiny_store, workers=1) as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
    ):
        assert client.post(CLASSIFY, content=image_bytes("JPEG", size=(300, 300))).status_code == 200
        process = service.process.pid
        limit = int((memory_mib(process, "VmSize") + 100) * 2**20)
        resource.prlimit(process, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        answer = client.post(CLASSIFY, content=content)
        assert_rejected(answer, 503, "body", "there is not enough memory for body now")
        assert answer.json()["error"]["code"] == "out_of_memory"
        assert client.post(CLASSIFY, content=image_bytes("JPEG", size=(300, 300))).status_code == 200


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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (5, 17), (32, 32), (128, 128), (129, 128), (300, 200)])
def test_a_png_has_exactly_its_pixels(channels: int, size: tuple[int, int]) -> None:
    """Small PNGs without optional chunks have a faster decoder."""
    mode = "RGB" if channels == 3 else "L"
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
