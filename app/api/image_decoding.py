"""Decode the image files of a request, one after the other.

Each file is a job of its own. So the work ends at the deadline or when the client disconnects, images of other requests
are decoded in between, and each image counts as progress for ``/health/ready``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from app.serving.models import Models
from app.tasks.image_codecs import ImageDecoder, OpenedImage, pixel_count

LARGE_PIXELS = 2**24  # larger images, of more than 64 MiB, are decoded one at a time in each process
SMALL_BYTES, SMALL_PIXELS = 32 * 1024, 50_000  # files up to these sizes in all may be decoded on the event loop


@dataclass(frozen=True)
class ImageFile:
    """An image file in a request. ``param`` is its name in error messages."""

    name: str | None
    content: bytes
    param: str


def decode_small(decoder: ImageDecoder, files: Sequence[ImageFile], max_pixels: int) -> list[Tensor]:
    """Return the pixels of image files if decoding all of them takes no longer than a thread switch.

    Otherwise return an empty list. Raises NotAnImage and TooLarge.
    """
    if sum(len(file.content) for file in files) > SMALL_BYTES:
        return []
    items, pixels = [], 0
    for file in files:
        image = decoder.open_simple(file.content, max_pixels, file.param)
        if image is None or (pixels := pixels + pixel_count(image)) > SMALL_PIXELS:
            return []
        items.append(decoder.decode(image, file.param))
    return items


async def decode_images(
    models: Models, decoder: ImageDecoder, files: Sequence[ImageFile], max_pixels: int
) -> list[Tensor]:
    """Return the pixels of image files. Call this within ``Deadline``.

    Raises:
        NotAnImage, TooLarge, OutOfMemory: as in ``ImageDecoder.open`` and ``ImageDecoder.decode``.
        Overloaded: too many requests wait for a thread.
    """

    def open_or_decode(content: bytes, param: str) -> OpenedImage | Tensor:
        image = decoder.open(content, max_pixels, param)
        return image if pixel_count(image) > LARGE_PIXELS else decoder.decode(image, param)

    models.parse_executor.admit()
    items: list[Tensor] = []
    for file in files:
        image = await models.parse_executor.run(open_or_decode, file.content, file.param)
        if not isinstance(image, Tensor):
            image = await models.large_image_executor.run(decoder.decode, image, file.param)
        items.append(image)
    return items
