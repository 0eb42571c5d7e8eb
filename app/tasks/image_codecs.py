"""Convert image files to pixels, and pixels to image files."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from app.errors import NotAnImage, TooLarge

ORIENTATION = 0x0112  # EXIF tag
TILE = (322, 323)  # TIFF tags of the width and height of a tile
BITS, PHOTOMETRIC = 258, 262  # TIFF tags of the bits per channel, and of the meaning of the values (0: zero is white)
MAX_SCANS = 100  # limit for progressive JPEGs, because each scan decodes the whole image
MAX_SEGMENTS = 10_000  # of a JPEG; reading more of them would take longer than 10 ms
SCAN, END = 0xDA, 0xD9  # JPEG markers (ITU-T T.81) of the start of a scan and the end of the image
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
FRAME = 80  # milliseconds for which an animation shows each image
COLOURS = {1: 0, 3: 2}  # PNG colour type by number of channels
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # signature, length and type of the first chunk
GREY_STEPS = {"L;2": 85, "L;4": 17}  # difference between two neighbouring shades in 8 bits, by raw mode of a PNG
PNG_MODES = {b"\x08\0\0\0\0": "L", b"\x08\x02\0\0\0": "RGB"}  # mode by bit depth, colour type and methods of a PNG
SMALL_IMAGE = 128 * 128  # pixels
SMALL_FILE = 64 * 1024  # bytes; larger files may have so many chunks that reading them blocks the event loop

# Turn off Pillow's limit, which only warns up to twice its value. ``open`` checks QUARTET_MAX_PIXELS instead.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")  # warnings about unusual tags, which are harmless


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
        """Return the pixels uint8 [channels, side, side] of an image file. Raises NotAnImage and TooLarge."""
        return self.decode(self.open(content, max_pixels, param), param)

    def open(self, content: bytes, max_pixels: int, param: str = "file") -> Image.Image:
        """Open an image file and check its size. Only some small PNG files are decoded at once.

        Args:
            content: the bytes of the file.
            max_pixels: largest allowed width times height.
            param: name of the image in error messages.

        Raises:
            NotAnImage: the format is not supported.
            TooLarge: the image or one of its tiles has too many pixels, or a JPEG has too many scans.
        """
        allowed = f"allowed formats: {', '.join(FORMATS)}"
        if not content:
            raise NotAnImage(f"{param} has 0 bytes; {allowed}", param)
        if (small := _small_png(content)) and math.prod(small.size) <= max_pixels:
            return small
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _scale_transparent_colour(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises exceptions of many classes for damaged files
            raise NotAnImage(f"{param}: its {len(content):,} bytes are not an image; {allowed}", param) from error
        width, height = image.size
        if width * height > max_pixels:
            raise TooLarge(f"{param} has {width:,} x {height:,} pixels; the maximum is {max_pixels:,} in all", param)
        tile = _tile(image)
        if tile > max_pixels:
            raise TooLarge(f"{param} has tiles of {tile:,} pixels; the maximum is {max_pixels:,}", param)
        if image.format in ("JPEG", "MPO"):
            if (scans := _scans(content)) > MAX_SCANS:
                raise TooLarge(f"{param} has {scans:,} scans; the maximum is {MAX_SCANS}", param)
            # Otherwise Pillow waits for the GIL after each 64 KiB, which can take 5 ms while other threads compute.
            image.decodermaxblock = len(content)
        return image

    def decode(self, image: Image.Image, param: str = "file") -> Tensor:
        """Return the pixels uint8 [channels, side, side] of an opened image.

        The image is turned upright according to its EXIF orientation, and resized with antialiasing. Transparent parts
        become white. Raises NotAnImage for a damaged file.
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
        """Return an image resized to [side, side] and turned upright.

        Its colour mode is kept if possible, to avoid copies of large images. Images with more than 8 bits per channel
        are first converted to 8 bits, because Pillow resizes some of them wrongly.
        """
        draft_side = 4 * max(self.side, self.resize)
        image.draft(None, (draft_side, draft_side))  # decode a JPEG at reduced size
        image.load()
        turn = _turn(image)
        if (factor := _factor(image)) is not None:
            image = _in_bytes(image, factor)
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode in ("P", "PA"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        transparent = image.info.get("transparency")
        if transparent is not None and image.mode in ("L", "RGB"):  # one colour is transparent
            image = image.convert("LA" if image.mode == "L" else "RGBA")
        if image.size != (self.side, self.side) or self.resize:
            image = image.resize((self.side, self.side), self.resampling, self._box(*image.size))
        return image if turn is None else image.transpose(turn)

    def _box(self, width: int, height: int) -> tuple[float, float, float, float] | None:
        """Return the part of an image that is resized to [side, side], or None for the whole image if ``resize`` is 0.

        Resizing this part has the same effect as resizing the whole image to ``resize`` and then cropping its centre.
        """
        if not self.resize:
            return None
        shorter = min(width, height)
        sizes = [self.resize * size // shorter for size in (width, height)]
        scales = [size / resized for size, resized in zip((width, height), sizes, strict=True)]
        starts = [round((resized - self.side) / 2) * scale for resized, scale in zip(sizes, scales, strict=True)]
        left, top = starts
        right, bottom = (start + self.side * scale for start, scale in zip(starts, scales, strict=True))
        return left, top, min(right, width), min(bottom, height)

    def _flatten(self, image: Image.Image) -> Image.Image:
        """Convert an image to RGB or grey, with white behind transparent parts."""
        if image.mode == "LAB":
            image = image.convert("RGB")  # Pillow cannot convert it to grey directly
        if image.mode in ("RGBA", "LA", "La", "RGBa"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        mode = "RGB" if self.channels == 3 else "L"
        return image if image.mode == mode else image.convert(mode)


def is_simple_image(content: bytes) -> bool:
    """Return whether the cost of opening and decoding a file is limited by its bytes and pixels.

    A TIFF is not simple, because its tiles may be larger than the image. A PNG with compressed texts or colour profiles
    is not simple, because Pillow unpacks them when it opens the file.
    """
    if content.startswith(b"\x89PNG"):
        return not (b"zTXt" in content or b"iTXt" in content or b"iCCP" in content)
    return content.startswith((b"\xff\xd8", b"GIF8", b"BM", b"RIFF"))


def _small_png(content: bytes) -> Image.Image | None:
    """Decode a small PNG (ISO/IEC 15948) with 8 bits per channel and no optional chunks. Return None for other files.

    Pillow takes twice as long for such a file, because it reads the chunks with many calls.
    """
    try:
        width, height, encoding, checksum = struct.unpack_from(">II5sI", content, len(PNG_START))
        is_small = len(content) <= SMALL_FILE and 0 < width * height <= SMALL_IMAGE
        if not (is_small and content.startswith(PNG_START) and encoding in PNG_MODES):
            return None
        if checksum != zlib.crc32(content[12:29]):
            return None
        position, parts = 33, []
        while (chunk := struct.unpack_from(">I4s", content, position)) != (0, b"IEND"):
            length, kind = chunk
            if kind != b"IDAT":
                return None
            position += 12 + length  # the length, the type and the checksum take 12 bytes
            parts.append(content[position - 4 - length : position - 4])
        mode = PNG_MODES[encoding]
        return Image.frombytes(mode, (width, height), b"".join(parts), "zip", mode)
    except (struct.error, ValueError):  # the file is incomplete or damaged
        return None


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
    bands = [(start, values[start : start + BAND + 1]) for start in range(0, len(values), BAND)]
    total = sum(int(np.count_nonzero((band[:-1] == 0xFF) & (band[1:] == SCAN))) for _, band in bands)
    if total <= MAX_SCANS:
        return total
    scans = segments = position = 0
    for start, band in bands:
        kinds = band[1:]  # libjpeg skips the markers below 0xC0 and those of restarts, 0xD0 to 0xD7, without a length
        is_marker = (band[:-1] == 0xFF) & (kinds >= 0xC0) & (kinds & 0xF8 != 0xD0) & (kinds != 0xFF)
        markers = start + np.flatnonzero(is_marker)
        while (at := int(np.searchsorted(markers, position))) < len(markers):
            position = int(markers[at]) + 2
            kind = content[position - 1]
            segments += 1
            if kind == END or segments > MAX_SEGMENTS:
                return scans if kind == END else total
            scans += kind == SCAN
            if position > 2:  # the first marker, of the start of the image, has no segment
                position += max(2, int.from_bytes(content[position : position + 2], "big"))
    return scans


def _tile(image: Image.Image) -> int:
    """Return the number of pixels in a tile of a TIFF, or 0 without tiles. Each tile is decoded as a whole."""
    tags = getattr(image, "tag_v2", {})
    sides = [tags.get(tag) for tag in TILE]
    return math.prod(side for side in sides if isinstance(side, int)) if all(sides) else 0


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that turns a decoded image upright, or None if it is upright already.

    Only the EXIF tag of the orientation is read, because other tags may be damaged.
    """
    return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))


def _factor(image: Image.Image) -> float | None:
    """Return the factor that scales the values of an image with more than 8 bits per channel to 0 to 255.

    Return None for other images.
    """
    if image.mode.startswith("I;16"):
        bits: int = getattr(image, "tag_v2", {}).get(BITS, (16,))[0]  # Pillow does not scale 12-bit values to 16 bits
        return 255 / (2**bits - 1)
    if image.mode not in ("I", "F"):
        return None
    shades = np.asarray(image)
    brightest = float(shades.max(initial=0, where=np.isfinite(shades)))
    if image.mode == "I":
        return 1 / 257 if brightest > 255 else 1.0
    # Resizing with bicubic or Lanczos filters makes edges up to a third brighter than the brightest shade, 1 or 255.
    return 1 / 257 if brightest > 512 else 255.0 if brightest <= 2 else 1.0


def _in_bytes(image: Image.Image, factor: float) -> Image.Image:
    """Convert an image to 8 bits per channel by multiplying it by ``factor``.

    If one shade is transparent, as in some PNGs, the result has an alpha channel. The work is done in bands, because
    intermediate values take four times the memory of the result.
    """
    shades = np.asarray(image)
    result = np.empty(shades.shape, np.uint8)
    rows = max(1, BAND // max(1, shades.shape[1]))
    for top in range(0, len(shades), rows):
        band = np.nan_to_num(shades[top : top + rows].astype(np.float32)) * np.float32(factor)
        result[top : top + rows] = band.clip(0, 255).round()
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # Pillow inverts only TIFFs with up to 8 bits per channel
        np.subtract(255, result, out=result)
    if (transparent := image.info.get("transparency")) is None:
        return Image.fromarray(result)
    alpha = np.uint8(255) * (shades != transparent)
    return Image.merge("LA", (Image.fromarray(result), Image.fromarray(alpha)))


def overlay_heat_map(image: Image.Image, heat: np.ndarray) -> bytes:
    """Return a PNG file that shows a heat map [h, w], 0 to 1, over an opened image, which is turned upright.

    The picture has as many pixels as the image. Working in bands takes the memory of two images instead of four.
    """
    image.load()
    turn = _turn(image)
    if (factor := _factor(image)) is not None:
        image = _in_bytes(image, factor)
    if turn is not None:
        image = image.transpose(turn)
    width, height = image.size
    shades = Image.fromarray((heat * 255).round())  # as floats, so that resized bands match at their borders
    result = Image.new("RGB", image.size)
    rows = max(1, BAND // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        box = (0, top * shades.height / height, shades.width, bottom * shades.height / height)
        resized = np.asarray(shades.resize((width, bottom - top), Image.Resampling.BICUBIC, box))
        shade = Image.fromarray(resized.clip(0, 255).round().astype(np.uint8))
        glow = Image.merge("RGB", [shade.point(HEAT[channel]) for channel in range(3)])
        mask = shade.point([round(0.65 * level) for level in range(256)])
        band = _opaque(image.crop((0, top, width, bottom)))
        result.paste(Image.composite(glow, band, mask), (0, top))
    file = io.BytesIO()
    result.save(file, "PNG")
    return file.getvalue()


def _opaque(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, with white behind transparent parts."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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


def animated(images: np.ndarray, kind: str) -> bytes:
    """Return an endless animation of images [N, channels, height, width] in WebP (``kind`` is ``image/webp``) or PNG.

    Identical images in a row become one longer frame.
    """
    frames = [Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)) for image in images]
    file = io.BytesIO()
    options = {"save_all": True, "append_images": frames[1:], "duration": FRAME, "loop": 0}
    if kind == "image/webp":
        frames[0].save(file, "WEBP", lossless=True, **options)
    else:
        frames[0].save(file, "PNG", **options)
    return file.getvalue()


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
