"""Find and read the images of a prediction."""

import os
import warnings

import numpy as np
from PIL import Image, ImageOps

from ..images import UnreadableImage, read_image, to_rgb


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Read an image as people see it.

    Photographs are rotated as their EXIF data says, 16-bit grayscale keeps its full range (see
    :func:`flash_internimage.images.to_rgb`), and transparency is dropped.

    Args:
        path: File of any format that Pillow reads.

    Returns:
        Array (H, W, 3) of dtype uint8 in RGB.

    Raises:
        UnreadableImage: If the file is not an image, is damaged, has too many pixels (see
            `PIL.Image.MAX_IMAGE_PIXELS`), or one side is more than 200 times the other.
    """
    with warnings.catch_warnings():
        # Pillow warns from 89 megapixels on, and raises an error from twice that on.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = read_image(path)
    try:
        return np.array(to_rgb(ImageOps.exif_transpose(image)))
    except (ValueError, OSError, MemoryError) as error:
        raise UnreadableImage(f"cannot read image {path}: {error}") from error
