"""Image files to pixels, and pixels to image files."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from app.errors import NotAnImage, TooLarge

ORIENTATION = 0x0112  # the EXIF tag ...
TILE = (322, 323)  # the TIFF tags for its width and height
SCANS = 100  # of a progressive JPEG, each of which goes over the whole picture
UPRIGHT = {  # ... and what undoes each of its values
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STOPS = np.array([[0, 0, 90], [130, 0, 150], [230, 50, 40], [255, 170, 0], [255, 255, 150]])  # cold to hot, RGB
HEAT = [np.interp(np.linspace(0, 4, 256), range(5), _STOPS[:, channel]).round().tolist() for channel in range(3)]
BAND = 2**20  # pixels that a heat map is laid over at a time, in rows that are whole
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
FRAME = 80  # milliseconds of an image in an animated file
COLOURS = {1: 0, 3: 2}  # PNG's colour types, by channels

# Pillow's own limit warns at one size and raises at twice that; ours is a setting and stands before the decoding.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")  # a caller's odd tags are nobody's concern


class ImageDecoder:
    """Files of images to pixels [channels, side, side], grey (1) or RGB (3)."""

    def __init__(self, channels: int, side: int) -> None:
        self.channels = channels
        self.side = side

    def parse(self, content: bytes, max_pixels: int = 10**8, param: str = "file") -> Tensor:
        """The bytes of one image -> pixels [channels, side, side], uint8. Raises as ``open`` and ``decode`` do."""
        return self.decode(self.open(content, max_pixels, param), param)

    def open(self, content: bytes, max_pixels: int, param: str = "file") -> Image.Image:
        """The bytes of one image, of which only the head is read. Raises NotAnImage and TooLarge."""
        allowed = f"allowed are {', '.join(FORMATS)}"
        if not content:
            raise NotAnImage(f"{param} has 0 bytes; {allowed}", param)
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except MemoryError:
            raise
        except Exception as error:  # what Pillow raises on a caller's bytes has no common class
            raise NotAnImage(f"{param}: its {len(content):,} bytes are not an image; {allowed}", param) from error
        width, height = image.size
        if width * height > max_pixels:
            raise TooLarge(f"{param} has {width:,} x {height:,} pixels; allowed are {max_pixels:,} in all", param)
        tile = _tile(image)
        if tile > max_pixels:
            raise TooLarge(f"{param} has tiles of {tile:,} pixels; allowed are {max_pixels:,}", param)
        if image.format in ("JPEG", "MPO") and (scans := content.count(b"\xff\xda")) > SCANS:
            raise TooLarge(f"{param} has {scans:,} scans; allowed are {SCANS}", param)
        return image

    def decode(self, image: Image.Image, param: str = "file") -> Tensor:
        """An opened image -> pixels [channels, side, side], uint8.

        EXIF orientation is applied, transparency laid on white, and the whole picture resized with antialiasing.
        Raises NotAnImage.
        """
        try:
            small = self._flatten(self._shrink(image))
        except MemoryError:
            raise
        except Exception as error:
            raise NotAnImage(f"{param}: the {image.format} image is damaged: {error}", param) from error
        pixels = np.frombuffer(small.tobytes(), np.uint8).reshape(self.side, self.side, self.channels)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def _shrink(self, image: Image.Image) -> Image.Image:
        """To [side, side], upright, in the image's own mode where it has shades: nothing large is ever copied.

        But for what has more than 8 bits: shrunk as it is it might look brighter, and some of it is shrunk wrongly.
        """
        image.draft(None, (4 * self.side, 4 * self.side))  # a JPEG is decoded no larger than is of use
        image.load()
        turn = _turn(image)
        if (factor := _factor(image)) is not None:
            image = _in_bytes(image, factor)
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode == "P":
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        transparent = image.info.get("transparency")
        if transparent is not None and image.mode in ("L", "RGB"):  # one colour that stands for nothing
            image = image.convert("LA" if image.mode == "L" else "RGBA")
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return image if turn is None else image.transpose(turn)

    def _flatten(self, image: Image.Image) -> Image.Image:
        """To RGB or grey: transparency on white."""
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        mode = "RGB" if self.channels == 3 else "L"
        return image if image.mode == mode else image.convert(mode)


def is_simple_image(content: bytes) -> bool:
    """Whether an image costs no more than its bytes and its pixels do: no TIFF, whose tiles may be larger than the
    picture, and no PNG with compressed texts or colour profiles, which are unpacked before anything is known of it.
    """
    if content.startswith(b"\x89PNG"):
        return not any(chunk in content for chunk in (b"zTXt", b"iTXt", b"iCCP"))
    return content.startswith((b"\xff\xd8", b"GIF8", b"BM", b"RIFF"))


def _tile(image: Image.Image) -> int:
    """The pixels of a tile of a TIFF, which is unpacked whole; 0 where there are none."""
    tags = getattr(image, "tag_v2", {})
    sides = [tags.get(tag) for tag in TILE]
    return math.prod(side for side in sides if isinstance(side, int)) if all(sides) else 0


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What puts a decoded image upright. Of its EXIF nothing else is looked at, for it may be damaged."""
    return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))


def _factor(image: Image.Image) -> float | None:
    """What the shades of a decoded image with more than 8 bits are multiplied by to be 0 to 255; None for any other."""
    if image.mode.startswith("I;16"):
        return 1 / 257
    if image.mode not in ("I", "F"):
        return None
    shades = np.asarray(image)
    brightest = float(shades.max(initial=0, where=np.isfinite(shades)))
    return 1 / 257 if brightest > 255 else 255.0 if image.mode == "F" and brightest <= 1 else 1.0


def _in_bytes(image: Image.Image, factor: float) -> Image.Image:
    """Shades of any depth, multiplied -> the same in 8 bits. In rows, for in between they take four times as much."""
    shades = np.asarray(image)
    found = np.empty(shades.shape, np.uint8)
    rows = max(1, BAND // max(1, shades.shape[1]))
    for top in range(0, len(shades), rows):
        band = np.nan_to_num(shades[top : top + rows].astype(np.float32)) * np.float32(factor)
        found[top : top + rows] = band.clip(0, 255).round()
    return Image.fromarray(found)


def overlay_heat_map(image: Image.Image, heat: np.ndarray) -> bytes:
    """An opened image with a heat map [h, w] of 0 to 1 laid over it -> a PNG file of the image's own size, upright.

    Band by band it takes the memory of two pictures, where all at once took that of four.
    """
    image.load()
    turn = _turn(image)
    if (factor := _factor(image)) is not None:
        image = _in_bytes(image, factor)
    if turn is not None:
        image = image.transpose(turn)
    width, height = image.size
    shades = Image.fromarray((heat * 255).round())  # of floats: resized, a band of bytes is not what it is in the whole
    over = Image.new("RGB", image.size)
    rows = max(1, BAND // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        part = (0, top * shades.height / height, shades.width, bottom * shades.height / height)
        resized = np.asarray(shades.resize((width, bottom - top), Image.Resampling.BICUBIC, part))
        shade = Image.fromarray(resized.clip(0, 255).round().astype(np.uint8))
        glow = Image.merge("RGB", [shade.point(HEAT[channel]) for channel in range(3)])
        mask = shade.point([round(0.65 * level) for level in range(256)])
        band = _opaque(image.crop((0, top, width, bottom)))
        over.paste(Image.composite(glow, band, mask), (0, top))
    file = io.BytesIO()
    over.save(file, "PNG")
    return file.getvalue()


def _opaque(picture: Image.Image) -> Image.Image:
    """To RGB, transparency on white."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def png(pixels: np.ndarray, level: int = 1) -> bytes:
    """Pixels [channels, height, width], uint8, grey or RGB -> a PNG file (ISO/IEC 15948).

    Four times as fast as Pillow's for small images, whose encoding costs more than drawing them.
    """
    channels, height, width = pixels.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # each line begins with its filter: none
    lines[:, 1:] = pixels.transpose(1, 2, 0).reshape(height, width * channels)
    head = struct.pack(">IIBBBBB", width, height, 8, COLOURS[channels], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), level)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def animated(images: np.ndarray, kind: str) -> bytes:
    """Images [N, channels, height, width] -> an animated file, ``image/webp`` or else PNG, that goes on for ever.

    Images after one that they are the same as are no frames of their own.
    """
    frames = [Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)) for image in images]
    file = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:], "duration": FRAME, "loop": 0}
    if kind == "image/webp":
        frames[0].save(file, "WEBP", lossless=True, **more)
    else:
        frames[0].save(file, "PNG", **more)
    return file.getvalue()


def sheet(images: np.ndarray, gap: int = 2, columns: int | None = None) -> np.ndarray:
    """Images [N, channels, height, width] -> one picture of them in rows, as nearly square as may be."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    picture = np.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        picture[:, top : top + height, left : left + width] = image
    return picture
