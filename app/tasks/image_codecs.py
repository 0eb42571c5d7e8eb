"""Convert image files to pixels, and pixels to image files."""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pyspng
import torch
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from app.errors import NotAnImage, OutOfMemory, TooLarge

ORIENTATION = 0x0112  # EXIF tag
TIFF_ROWS_PER_STRIP, TIFF_TILE = 278, (322, 323)  # TIFF tags; the tile's are its width and height
TIFF_OFFSETS = {273: "strips", 324: "tiles"}  # TIFF tags with one value for each strip or tile
MAX_SIDE = 65_535  # pixels, as in JPEG; the memory for resizing and the time for decoding grow with the side, too
MAX_STRIPS = 16_384  # strips or tiles of a TIFF; Pillow holds the GIL for about 10 microseconds for each of them
MAX_STRIP_PIXELS = 2**24  # pixels of a strip or tile of a TIFF, which takes memory in addition to the image
MAX_SCANS = 100  # limit for progressive JPEGs, because each scan decodes the whole image
MAX_SEGMENTS = 10_000  # of a JPEG; reading more of them would take longer than 10 ms
SCAN, END = b"\xff\xda", b"\xff\xd9"  # JPEG markers (ITU-T T.81) of the start of a scan and the end of the image
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # without those that libjpeg skips or that have no length
UPRIGHT = {  # the operation that undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STOPS = np.array([[0, 0, 90], [130, 0, 150], [230, 50, 40], [255, 170, 0], [255, 255, 150]])  # RGB, cold to hot
HEAT = [np.interp(np.linspace(0, 4, 256), range(5), _STOPS[:, channel]).round().tolist() for channel in range(3)]
BAND = 2**20  # pixels (in whole rows) or bytes that are processed at a time
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
COLOURS = {1: 0, 3: 2}  # PNG colour type by number of channels
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # signature, length and type of the first chunk
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk
PLAIN_PNGS = (b"\x08\0\0\0\0", b"\x08\x02\0\0\0")  # bit depth, colour type and methods of grey and RGB images
GREY_STEPS = {"L;2": 85, "L;4": 17}  # difference between two neighbouring shades in 8 bits, by raw mode of a PNG
SMALL_IMAGE = 128 * 128  # pixels
SMALL_FILE = 64 * 1024  # bytes; larger files may have so many chunks that reading them blocks the event loop

# Turn off Pillow's limit, which only warns up to twice its value. ``open`` checks QUARTET_MAX_PIXELS instead.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")  # warnings about unusual tags, which are harmless


OpenedImage = Image.Image | np.ndarray  # a file whose header was read, or the pixels [height, width, channels]


class ImageDecoder:
    """Decodes image files to pixels [channels, side, side], grey (1 channel) or RGB (3 channels).

    If ``resize`` is 0, the whole image is scaled to [side, side]. Otherwise its shorter side is scaled to ``resize``
    pixels, and then the centre [side, side] is cropped.
    """

    def __init__(
        self, channels: int, side: int, resize: int = 0, resampling: Image.Resampling = Image.Resampling.BICUBIC
    ) -> None:
        self.channels = channels
        self.side = side
        self.resize = resize
        self.resampling = resampling

    def parse(self, content: bytes, max_pixels: int = 10**8, param: str = "file") -> Tensor:
        """Return the pixels uint8 [channels, side, side] of an image file. Raises as ``open`` and ``decode``."""
        return self.decode(self.open(content, max_pixels, param), param)

    def open_simple(self, content: bytes, max_pixels: int, param: str) -> OpenedImage | None:
        """Open an image file as ``open`` does, or return None if its bytes and pixels do not limit the cost."""
        if (small := _small_png(content, max_pixels)) is not None:
            return small
        return self.open(content, max_pixels, param) if _is_simple(content) else None

    def open(self, content: bytes, max_pixels: int, param: str = "file") -> OpenedImage:
        """Open an image file and check its size. Only some small PNG files are decoded at once.

        Args:
            content: the bytes of the file.
            max_pixels: largest allowed width times height. Decoding may take 4 bytes of memory for each of them.
            param: name of the image in error messages.

        Raises:
            NotAnImage: the format is not supported.
            TooLarge: the image, or a part of it that is decoded as a whole, has too many pixels or parts.
            OutOfMemory: there is not enough memory now.
        """
        allowed = f"allowed formats: {', '.join(FORMATS)}"
        if not content:
            raise NotAnImage(f"{param} has 0 bytes; {allowed}", param)
        if (small := _small_png(content, max_pixels)) is not None:
            return small
        try:
            _check_strips(content, param)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _scale_transparent_colour(image)
        except TooLarge:
            raise
        except MemoryError:
            raise _out_of_memory(param) from None
        except Exception as error:  # Pillow raises exceptions of many classes for damaged files
            raise NotAnImage(f"{param}: its {len(content):,} bytes are not an image; {allowed}", param) from error
        _check_size(image, max_pixels, param)
        if image.mode in ("I", "F") or (image.format == "TIFF" and image.mode.startswith("I;16")):
            raise NotAnImage(f"{param} has more than 8 bits per channel, which is only supported for PNG", param)
        if image.format in ("JPEG", "MPO"):
            if (scans := _scans(content)) > MAX_SCANS:
                raise TooLarge(f"{param} has {scans:,} scans; the maximum is {MAX_SCANS}", param)
            # Otherwise Pillow waits for the GIL after each 64 KiB, which can take 5 ms while other threads compute.
            image.decodermaxblock = len(content)
        return image

    def decode(self, image: OpenedImage, param: str = "file") -> Tensor:
        """Return the pixels uint8 [channels, side, side] of an opened image.

        The image is turned upright according to its EXIF orientation, and resized with antialiasing. Transparent parts
        become white.

        Raises:
            NotAnImage: the file is damaged.
            OutOfMemory: there is not enough memory now.
        """
        if isinstance(image, np.ndarray):
            if image.shape == (self.side, self.side, self.channels) and not self.resize:  # as most clients send it
                return torch.from_numpy(image.transpose(2, 0, 1).copy())
            image = _as_image(image)
        try:
            small = _flatten(self._shrink(image), "RGB" if self.channels == 3 else "L")
        except MemoryError:
            raise _out_of_memory(param) from None
        except Exception as error:
            raise NotAnImage(f"{param}: the {image.format} image is damaged: {error}", param) from error
        pixels = np.frombuffer(small.tobytes(), np.uint8).reshape(self.side, self.side, self.channels)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def _shrink(self, image: Image.Image) -> Image.Image:
        """Return an image resized to [side, side] and turned upright."""
        draft_side = 4 * max(self.side, self.resize)
        image.draft(None, (draft_side, draft_side))  # decode a JPEG at reduced size
        image.load()
        turn = _turn(image)
        size, box = (self.side, self.side), self._box(*image.size)
        if image.width * image.height > BAND:
            left, top, right, bottom = box
            image = self._resize_rows(image, left, right).resize(size, self.resampling, (0, top, self.side, bottom))
        else:
            image = _in_bytes(image)
            if image.size != size or self.resize:
                image = image.resize(size, self.resampling, box)
        return image if turn is None else image.transpose(turn)

    def _resize_rows(self, image: Image.Image, left: float, right: float) -> Image.Image:
        """Return the columns ``left`` to ``right`` of an image, resized to the width ``side``. The height is kept.

        Pillow resizes the rows first, too. In bands, the converted rows take little memory.
        """
        result: Image.Image | None = None
        for top, band in _bands(image):
            band = _in_bytes(band)
            band = band.convert({"RGBA": "RGBa", "LA": "La"}.get(band.mode, band.mode))  # transparent parts weigh less
            band = band.resize((self.side, band.height), self.resampling, (left, 0, right, band.height))
            result = result or Image.new(band.mode, (self.side, image.height))
            result.paste(band, (0, top))
        assert result is not None
        return result

    def _box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the part of an image that is resized to [side, side]: the whole image if ``resize`` is 0.

        Resizing this part has the same effect as resizing the whole image to ``resize`` and then cropping its centre.
        """
        if not self.resize:
            return 0, 0, width, height
        shorter = min(width, height)
        sizes = [self.resize * size // shorter for size in (width, height)]
        scales = [size / resized for size, resized in zip((width, height), sizes, strict=True)]
        starts = [round((resized - self.side) / 2) * scale for resized, scale in zip(sizes, scales, strict=True)]
        left, top = starts
        right, bottom = (start + self.side * scale for start, scale in zip(starts, scales, strict=True))
        return left, top, min(right, width), min(bottom, height)


def pixel_count(image: OpenedImage) -> int:
    """Return the width times the height of an opened image."""
    return math.prod(image.shape[:2]) if isinstance(image, np.ndarray) else image.width * image.height


def _is_simple(content: bytes) -> bool:
    """Return whether the cost of opening and decoding a file is limited by its bytes and pixels.

    A TIFF is not simple, because its tiles may be larger than the image. A PNG with compressed texts or colour profiles
    is not simple, because Pillow unpacks them when it opens the file.
    """
    if content.startswith(b"\x89PNG"):
        return not (b"zTXt" in content or b"iTXt" in content or b"iCCP" in content)
    return content.startswith((b"\xff\xd8", b"GIF8", b"BM", b"RIFF"))


def _as_image(image: OpenedImage) -> Image.Image:
    if not isinstance(image, np.ndarray):
        return image
    return Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)


def _small_png(content: bytes, max_pixels: int) -> np.ndarray | None:
    """Return the pixels [height, width, channels] of a small PNG with 8 bits per channel and no optional chunks.

    libspng needs less than half of Pillow's time for such a file. Return None for all other files, and for those that
    libspng rejects: Pillow reads them, too, so that all errors are Pillow's.
    """
    if len(content) > SMALL_FILE or not content.startswith(PNG_START) or content[24:29] not in PLAIN_PNGS:
        return None
    width, height = struct.unpack_from(">II", content, 16)
    if width * height > min(SMALL_IMAGE, max_pixels):
        return None
    position = 33
    while content[position + 4 : position + 8] == b"IDAT":
        end = position + 8 + int.from_bytes(content[position : position + 4])
        if int.from_bytes(content[end : end + 4]) != zlib.crc32(content[position + 4 : end]):
            return None  # libspng does not compare the last checksum
        position = end + 4
    if content[position:] != PNG_END:
        return None
    try:
        return np.atleast_3d(pyspng.load(content))
    except RuntimeError:
        return None


def _out_of_memory(param: str) -> OutOfMemory:
    return OutOfMemory(f"there is not enough memory for {param} now", param)


def _check_strips(content: bytes, param: str) -> None:
    """Raise TooLarge if a TIFF or BigTIFF has too many strips or tiles.

    Opening the file would already read the list of all their offsets.
    """
    if content[:2] not in (b"II", b"MM"):
        return
    with suppress(struct.error):  # Pillow names the error of a damaged file
        for tag, values in _tiff_lengths(content):
            if tag in TIFF_OFFSETS and values > MAX_STRIPS:
                raise TooLarge(f"{param} has {values:,} {TIFF_OFFSETS[tag]}; the maximum is {MAX_STRIPS:,}", param)


def _tiff_lengths(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield the tags of a TIFF or BigTIFF, each with the number of its values. Raises struct.error."""
    order, is_big = ("<" if content[:1] == b"I" else ">"), 43 in content[2:4]
    offset, count, entry, size = (8, "Q", "HHQ", 20) if is_big else (4, "H", "HHI", 12)
    (start,) = struct.unpack_from(order + ("Q" if is_big else "I"), content, offset)
    (entries,) = struct.unpack_from(order + count, content, start)
    for i in range(min(entries, len(content) // size)):
        tag, _, values = struct.unpack_from(order + entry, content, start + struct.calcsize(order + count) + i * size)
        yield tag, values


def _check_size(image: Image.Image, max_pixels: int, param: str) -> None:
    """Raise TooLarge if decoding an opened image would take too much time or memory."""
    width, height = image.size
    if width * height > max_pixels:
        raise TooLarge(f"{param} has {width:,} x {height:,} pixels; the maximum is {max_pixels:,} in all", param)
    if max(width, height) > MAX_SIDE:
        raise TooLarge(f"{param} has {width:,} x {height:,} pixels; the maximum of a side is {MAX_SIDE:,}", param)
    most = 4 * max_pixels // _bytes_per_pixel(image)
    if width * height > most:
        raise TooLarge(
            f"{param} has {width:,} x {height:,} pixels; the maximum for such a {image.format} image is {most:,}", param
        )
    if isinstance(image, TiffImageFile):
        kind, pixels = _largest_strip(image)
        if pixels > (most := min(max_pixels, MAX_STRIP_PIXELS)):
            raise TooLarge(f"{param} has {kind} of {pixels:,} pixels; the maximum is {most:,}", param)


def _bytes_per_pixel(image: Image.Image) -> int:
    """Return the memory that Pillow needs to decode an opened image, in bytes per pixel.

    libwebp holds four copies of an image. libjpeg holds the coefficients of a progressive image, two bytes for each.
    """
    if image.info.get("progressive"):
        return max(4, 2 * len(image.getbands()))
    return 16 if image.format == "WEBP" else 4


def _largest_strip(image: TiffImageFile) -> tuple[str, int]:
    """Return "tiles" or "strips", and the number of pixels of each, which are decoded as a whole."""
    tile = [side for tag in TIFF_TILE if isinstance(side := image.tag_v2.get(tag), int)]
    if len(tile) == 2:
        return "tiles", math.prod(tile)
    if not image.tile or image.tile[0][0] != "libtiff":
        return "strips", 0  # not compressed; read row by row
    rows = image.tag_v2.get(TIFF_ROWS_PER_STRIP)
    return "strips", image.width * (min(image.height, rows) if isinstance(rows, int) else image.height)


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the rows of an image in bands, each with the number of its first row. Converting them takes less memory."""
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _scale_transparent_colour(image: ImageFile.ImageFile) -> None:
    """Convert the transparent colour of an opened PNG to 8 bits per channel, because Pillow converts only the pixels.

    Colours with 16 bits per channel keep their high bytes, like the pixels.
    """
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None or not image.tile:
        return
    raw_mode = image.tile[0][3]
    if raw_mode in GREY_STEPS:
        image.info["transparency"] = colour * GREY_STEPS[raw_mode]
    elif raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _scans(content: bytes) -> int:
    """Return the number of scans of a JPEG. A result of at most MAX_SCANS may be too large.

    First, all bytes that equal the marker of a scan are counted. For 2.6 MB, this takes 0.3 ms, while ``bytes.count``
    would take 2.3 ms. If there are too many, only the markers that a decoder reads are counted: not those inside other
    segments, such as comments, nor those behind the image, such as in the video that a phone appends. If a file has
    more than MAX_SEGMENTS segments, all markers count.
    """
    values = np.frombuffer(content, np.uint8)
    bands = [values[start : start + BAND + 1] for start in range(0, len(values), BAND)]
    total = sum(int(np.count_nonzero((band[:-1] == SCAN[0]) & (band[1:] == SCAN[1]))) for band in bands)
    if total <= MAX_SCANS:
        return total
    scans = position = 0
    for _ in range(MAX_SEGMENTS):
        marker = MARKER.search(content, position)
        if marker is None or marker[0] == END:
            return scans
        scans += marker[0] == SCAN
        position = marker.end()
        if position > 2:  # the first marker, of the start of the image, has no segment
            position += max(2, int.from_bytes(content[position : position + 2]))
    return total


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that turns a decoded image upright, or None if it is upright already.

    Only the EXIF tag of the orientation is read, because other tags may be damaged.
    """
    return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))


def _in_bytes(image: Image.Image) -> Image.Image:
    """Convert an image that Pillow cannot resize well: palettes, single bits, 16 bits, and one transparent colour."""
    if image.mode == "I;16":
        return _grey_in_bytes(image)
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.info.get("transparency") is not None and image.mode in ("L", "RGB"):
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    return image


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to the mode "RGB" or "L", with white behind transparent parts."""
    if image.mode == "LAB":
        image = image.convert("RGB")  # Pillow cannot convert it to grey directly
    if image.mode in ("RGBA", "LA", "La", "RGBa"):
        image = image.convert("RGBA") if image.mode != "La" else image.convert("LA").convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _grey_in_bytes(image: Image.Image) -> Image.Image:
    """Convert a grey PNG with 16 bits per channel to 8 bits. If a shade is transparent, add an alpha channel."""
    shades = np.asarray(image)
    grey = Image.fromarray(((shades.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.uint8(255) * (shades != transparent))))


def overlay_heat_map(image: OpenedImage, heat: np.ndarray) -> bytes:
    """Return a PNG file that shows a heat map [h, w], 0 to 1, over an opened image, which is turned upright.

    The picture has as many pixels as the image. Working in bands takes the memory of two images instead of four.
    """
    try:
        return _overlay(_as_image(image), heat)
    except MemoryError:
        raise _out_of_memory("the heat map") from None


def _overlay(image: Image.Image, heat: np.ndarray) -> bytes:
    image.load()
    if (turn := _turn(image)) is not None:
        image = image.transpose(turn)
    height = image.height
    shades = Image.fromarray((heat * 255).round())  # as floats, so that resized bands match at their borders
    result = Image.new("RGB", image.size)
    for top, band in _bands(image):
        box = (0, top * shades.height / height, shades.width, (top + band.height) * shades.height / height)
        resized = np.asarray(shades.resize(band.size, Image.Resampling.BICUBIC, box))
        shade = Image.fromarray(resized.clip(0, 255).round().astype(np.uint8))
        glow = Image.merge("RGB", [shade.point(HEAT[channel]) for channel in range(3)])
        mask = shade.point([round(0.65 * level) for level in range(256)])
        result.paste(Image.composite(glow, _flatten(_in_bytes(band), "RGB"), mask), (0, top))
    file = io.BytesIO()
    result.save(file, "PNG")
    return file.getvalue()


def png(pixels: np.ndarray, level: int = 1) -> bytes:
    """Return a PNG file (ISO/IEC 15948) of pixels uint8 [channels, height, width], grey or RGB.

    For small images, this function is four times as fast as Pillow, which would take longer than the network that
    generates the images.
    """
    channels, height, width = pixels.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # each line begins with its filter type; 0 means none
    lines[:, 1:] = pixels.transpose(1, 2, 0).reshape(height, width * channels)
    head = struct.pack(">IIBBBBB", width, height, 8, COLOURS[channels], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), level)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def image_grid(images: np.ndarray, gap: int = 2, columns: int | None = None) -> np.ndarray:
    """Return a picture [channels, H, W] of images [N, channels, height, width] in a grid, by default nearly square."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    picture = np.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        picture[:, top : top + height, left : left + width] = image
    return picture
