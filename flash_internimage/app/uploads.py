"""Read the images that users of the page upload."""

from pathlib import Path

import numpy as np

from ..images import UnreadableImage, read_size
from ..inference import read_rgb

# A larger image takes seconds to decode and, with the masks of many objects, gigabytes.
MAX_PIXELS = 40_000_000


def read_upload(path: str) -> np.ndarray:
    """Read an image; errors contain its name instead of the folder of the upload.

    Args:
        path: Uploaded file.

    Returns:
        Array (H, W, 3) of dtype uint8 in RGB.

    Raises:
        UnreadableImage: If the file is not an image, is damaged or has too many pixels.
    """
    try:
        height, width = read_size(path)
        if height * width > MAX_PIXELS:
            raise UnreadableImage(
                f"{path} must have at most {MAX_PIXELS / 1e6:.0f} megapixels, got "
                f"{height * width / 1e6:.0f} ({width} x {height})"
            )
        return read_rgb(path)
    except UnreadableImage as error:
        raise UnreadableImage(str(error).replace(path, Path(path).name)) from error
