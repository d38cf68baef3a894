"""Read images as their annotations describe them."""

import os

import numpy as np

from ..images import read_image, to_rgb
from ..inference.sources import read_rgb


def read_as_annotated(path: str | os.PathLike, size: tuple[int, int]) -> np.ndarray:
    """Read an image, rotated by its EXIF data unless its annotations are of the stored image.

    Args:
        path: Path of the image.
        size: (height, width) of the annotated image.

    Returns:
        (H, W, 3) uint8 array in RGB.

    Raises:
        UnreadableImage: If it cannot be read.
    """
    image = read_rgb(path)
    if image.shape[:2] == size:
        return image
    stored = np.array(to_rgb(read_image(path)))
    return stored if stored.shape[:2] == size else image
