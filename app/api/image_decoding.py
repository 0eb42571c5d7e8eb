"""Decode the image files of a request, one after the other.

Each file is a job of its own. So the work ends at the deadline or when the client disconnects, images of other requests
are decoded in between, and each image counts as progress for ``/health/ready``.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from app.serving.models import Models
from app.tasks.image_codecs import ImageDecoder, OpenedImage, pixel_count

LARGE_PIXELS = 2**24  # larger images, of more than 64 MiB, are decoded one at a time in each process


async def decode_images(
    models: Models, decoder: ImageDecoder, files: Iterable[tuple[bytes, str]], max_pixels: int
) -> list[Tensor]:
    """Return the pixels of image files. Each file has a name for error messages. Call this within a ``Deadline``.

    Raises:
        NotAnImage, TooLarge, OutOfMemory: as in ``ImageDecoder.open`` and ``ImageDecoder.decode``.
        Overloaded: too many requests wait for a thread.
    """

    def open_or_decode(content: bytes, param: str) -> OpenedImage | Tensor:
        image = decoder.open(content, max_pixels, param)
        return image if pixel_count(image) > LARGE_PIXELS else decoder.decode(image, param)

    models.parse_executor.admit()
    items: list[Tensor] = []
    for content, param in files:
        image = await models.parse_executor.run(open_or_decode, content, param)
        if not isinstance(image, Tensor):
            image = await models.large_image_executor.run(decoder.decode, image, param)
        items.append(image)
    return items
