"""Image files that may be damaged, pathological or no images at all."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

# Resizing the shorter side of such an image to a network's input would take gigabytes, and keeping
# the longer side within bounds would leave no pixel of the shorter one.
MAX_ASPECT_RATIO = 200

# Formats that Pillow registers but can only identify, or passes to another program.
_NO_DECODER = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

_PHOTOMETRIC = 262  # TIFF tag; 0 is "white is zero"


class UnreadableImage(ValueError):
    """An image that cannot be used; the message names the file and the reason."""


def read_image(source: str | os.PathLike | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode an image completely.

    Args:
        source: Path or binary stream.
        name: How the error calls the image; default `source`.

    Raises:
        UnreadableImage: `source` is no regular file, is damaged, is no image in a format that
            Pillow reads, exceeds Pillow's limit on pixels (`PIL.Image.MAX_IMAGE_PIXELS`), or has
            sides that differ by more than `MAX_ASPECT_RATIO`. Decoders raise exceptions of any
            kind for damaged files; all of them end here.
    """
    return _read(source, name)[0]


def read_label_map(source: str | os.PathLike | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode an image whose pixels are numbers, as in a label map.

    Pillow stretches greyscale of 2 or 4 bits, and PGM files with a maximum other than 255 or 65535,
    to the full range of 8 or 16 bits. This function returns the numbers in the file.

    Args:
        source: Path or binary stream.
        name: How errors call the label map; default `source`.

    Returns:
        The image; its pixels are integers, indices of a palette, or colours as they are.

    Raises:
        UnreadableImage: See :func:`read_image`.
        ValueError: The format may change numbers, or programs disagree on the numbers in it.
    """
    image, maximum = _read(source, name)
    if len(image.getbands()) > 1:
        return image  # colours are no numbers
    if image.format in ("JPEG", "MPO", "JPEG2000") or image.info.get("compression") == "jpeg":
        raise ValueError(
            f"label map {name or source} must be lossless, such as PNG, got {image.format}"
        )
    # Pillow inverts such greyscale of up to 8 bits, other programs do not. A mask of single bits is
    # black and white in all of them.
    if image.format == "TIFF" and image.mode != "1" and image.tag_v2.get(_PHOTOMETRIC, 0) == 0:
        raise ValueError(
            f"label map {name or source} must have 0 for black, got a TIFF file with 0 for white"
        )
    if maximum is None:
        return image
    stretched = 255 if image.mode == "L" else 65535
    numbers = np.rint(np.asarray(image) * (maximum / stretched))
    return Image.fromarray(numbers.astype(np.uint8 if maximum <= 255 else np.uint16))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Greyscale of 16 or 32 bits keeps the eight highest of the bits that its brightest pixel needs:
    0 to 4095 and 0 to 65535 both become 0 to 255, and values up to 255 stay as they are. Pillow's
    own conversion would turn everything above 255 white. Transparency is dropped and CMYK is
    converted without a colour profile, as `convert("RGB")` does.

    Raises:
        ValueError: The pixels are negative or floating-point numbers, or in a colour space that
            Pillow cannot convert.
    """
    if image.mode == "F":
        raise ValueError("pixels must be integers, got floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # also I;16 and I;16B
        pixels = np.asarray(image)
        if pixels.min() < 0:
            raise ValueError(f"pixels must not be negative, got {pixels.min()}")
        image = Image.fromarray(to_8_bits(pixels))
    return image.convert("RGB")


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Scale integers of at least 0 to uint8 as :func:`to_rgb` does.

    Returns:
        uint8, the eight highest of the bits that the brightest pixel needs.
    """
    bits = max(8, int(pixels.max()).bit_length())
    return (pixels >> (bits - 8)).astype(np.uint8)


def image_suffixes() -> set[str]:
    """Return the lower-case suffixes of the image files that Pillow decodes, such as `.webp`."""
    known = Image.registered_extensions().items()
    return {suffix for suffix, kind in known if kind in Image.OPEN and kind not in _NO_DECODER}


def read_size(path: str | os.PathLike) -> tuple[int, int]:
    """Return (height, width) from the header of an image, without decoding it.

    Raises:
        UnreadableImage: As for :func:`read_image`, except that pixels are not looked at.
    """
    with _unreadable(path), Image.open(path) as image:
        _check_aspect_ratio(image)
        return image.height, image.width


def check_image_file(path: str | os.PathLike) -> None:
    """Check what must hold before another library decodes an image.

    Formats that Pillow does not know pass: the other library may.

    Raises:
        UnreadableImage: As for :func:`read_size`, except for unknown formats.
    """
    try:
        read_size(path)
    except UnreadableImage as error:
        if not isinstance(error.__cause__, UnidentifiedImageError):
            raise


def _read(source: str | os.PathLike | BinaryIO, name: str | None) -> tuple[Image.Image, int | None]:
    """Return a decoded image, and the number that Pillow stretched to its highest value, if any."""
    with _unreadable(source, name), Image.open(source) as image:
        _check_aspect_ratio(image)
        maximum = _stretched_maximum(image)
        image.load()
        return image, maximum


def _stretched_maximum(image: Image.Image) -> int | None:
    if image.mode not in ("L", "I") or not image.tile:  # load() empties it
        return None
    codec, _, _, args = image.tile[0]
    if codec in ("ppm", "ppm_plain"):
        return args[1]
    raw_mode = args if isinstance(args, str) else args[0]
    return {"L;2": 3, "L;4": 15}.get(str(raw_mode)[:3])


@contextmanager
def _unreadable(source: str | os.PathLike | BinaryIO, name: str | None = None) -> Iterator[None]:
    name = str(source) if name is None else name
    try:
        # Opening a FIFO would wait for its writer, and a device may never end.
        if isinstance(source, (str, os.PathLike)) and not stat.S_ISREG(os.stat(source).st_mode):
            raise UnreadableImage("not a regular file")
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"cannot read image {name}: {reason:.500}") from error


def _check_aspect_ratio(image: Image.Image) -> None:
    shorter, longer = sorted(image.size)
    if longer > MAX_ASPECT_RATIO * shorter:
        raise UnreadableImage(
            f"{image.width} x {image.height} pixels; one side must not be longer than "
            f"{MAX_ASPECT_RATIO} times the other"
        )
