"""Read image files that may be damaged, pathological or not images at all."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

# Beyond this, resizing the shorter side to a network's input size takes gigabytes, and limiting the
# longer side leaves no pixel of the shorter one.
MAX_ASPECT_RATIO = 200

# Formats that Pillow registers but can only identify, or hands to an external program.
_NO_DECODER = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

_PHOTOMETRIC = 262  # TIFF tag; 0 means "white is zero"


class UnreadableImage(ValueError):
    """Raised if an image cannot be used; the message names the file and the reason."""


def read_image(source: str | os.PathLike | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode an image completely.

    Args:
        source: Path or binary stream.
        name: Name of the image in error messages, `source` by default.

    Returns:
        The decoded image in its own mode.

    Raises:
        UnreadableImage: If `source` is not a regular file, is damaged, is not in a format that
            Pillow reads, exceeds Pillow's limit on pixels (`PIL.Image.MAX_IMAGE_PIXELS`), or has an
            aspect ratio above `MAX_ASPECT_RATIO`. Errors of any type that decoders raise for
            damaged files are converted.
    """
    return _read(source, name)[0]


def read_label_map(source: str | os.PathLike | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode an image whose pixel values are labels.

    Pillow stretches 2-bit and 4-bit grayscale, and PGM files with a maximum other than 255 or
    65535, to the full range of 8 or 16 bits. This function returns the values in the file.

    Args:
        source: Path or binary stream.
        name: Name of the label map in error messages, `source` by default.

    Returns:
        The image, whose pixels are integers, palette indices or unchanged colors.

    Raises:
        UnreadableImage: See :func:`read_image`.
        ValueError: If the format is lossy, or programs disagree on the values it contains.
    """
    image, maximum = _read(source, name)
    if len(image.getbands()) > 1:
        return image  # colors are not stretched
    if image.format in ("JPEG", "MPO", "JPEG2000") or image.info.get("compression") == "jpeg":
        raise ValueError(
            f"label map {name or source} must be lossless, such as PNG, got {image.format}"
        )
    # Pillow inverts such grayscale of up to 8 bits, other programs do not. All of them agree on
    # 1-bit masks.
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF" and image.mode != "1" and tags.get(_PHOTOMETRIC, 0) == 0:
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

    16-bit and 32-bit grayscale is reduced to the eight highest of the bits that its brightest pixel
    needs: 0 to 4095 and 0 to 65535 both become 0 to 255, and values up to 255 are unchanged.
    Pillow's own conversion would turn everything above 255 white. As in `convert("RGB")`,
    transparency is dropped and CMYK is converted without a color profile.

    Raises:
        ValueError: If pixels are negative or floating-point, or Pillow cannot convert the color
            space.
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
    """Scale non-negative integers to uint8 as :func:`to_rgb` does.

    Args:
        pixels: Integer array of any shape.

    Returns:
        uint8 array of the same shape with the eight highest of the bits that the maximum needs.
    """
    bits = max(8, int(pixels.max()).bit_length())
    return (pixels >> (bits - 8)).astype(np.uint8)


def check_rgb(image: Any, name: str = "image") -> None:
    """Check the type and shape of an image.

    Args:
        image: What should be an image.
        name: Name of the image in the error message.

    Raises:
        ValueError: If `image` is not an (H, W, 3) uint8 array with at least one pixel.
    """
    got = type(image).__name__
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return
        got = f"{image.dtype} of shape {image.shape}"
    raise ValueError(f"{name} must be an (H, W, 3) uint8 array, got {got}")


def image_suffixes() -> set[str]:
    """Return the lower-case suffixes of image formats that Pillow can decode, such as `.webp`."""
    known = Image.registered_extensions().items()
    return {suffix for suffix, kind in known if kind in Image.OPEN and kind not in _NO_DECODER}


def read_size(path: str | os.PathLike) -> tuple[int, int]:
    """Return (height, width) from the header of an image, without decoding it.

    Raises:
        UnreadableImage: As for :func:`read_image`, except that pixel data is not checked.
    """
    with _unreadable(path), Image.open(path) as image:
        _check_aspect_ratio(image)
        return image.height, image.width


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, from 1 (as stored) to 8."""
    # Image.getexif() may decode the whole image to look for EXIF data at its end.
    exif = Image.Exif()
    with suppress(Exception):  # malformed data
        exif.load(image.info["exif"])
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def check_image_file(path: str | os.PathLike) -> None:
    """Check an image file before another library decodes it.

    Formats unknown to Pillow are accepted, as the other library may support them.

    Raises:
        UnreadableImage: As for :func:`read_size`, except for unknown formats.
    """
    try:
        read_size(path)
    except UnreadableImage as error:
        if not isinstance(error.__cause__, UnidentifiedImageError):
            raise


def _read(source: str | os.PathLike | BinaryIO, name: str | None) -> tuple[ImageFile, int | None]:
    """Return a decoded image, and the maximum that Pillow stretched to the full range, if any."""
    with _unreadable(source, name), Image.open(source) as image:
        _check_aspect_ratio(image)
        maximum = _stretched_maximum(image)
        image.load()
        return image, maximum


def _stretched_maximum(image: ImageFile) -> int | None:
    if image.mode not in ("L", "I") or not image.tile:  # emptied by load()
        return None
    args: Any
    codec, _, _, args = image.tile[0]
    if codec in ("ppm", "ppm_plain"):
        return args[1]
    raw_mode = args if isinstance(args, str) else args[0]
    return {"L;2": 3, "L;4": 15}.get(str(raw_mode)[:3])


@contextmanager
def _unreadable(source: str | os.PathLike | BinaryIO, name: str | None = None) -> Iterator[None]:
    name = str(source) if name is None else name
    try:
        # Opening a FIFO blocks until it has a writer, and reading a device may never end.
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
