"""Image files of a data set: missing, unreadable and left out."""

import io
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.fileio import LocalBackend, get, get_file_backend
from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..images import (
    MAX_ASPECT_RATIO,
    UnreadableImage,
    check_image_file,
    read_label_map,
    read_size,
    to_8_bits,
    to_rgb,
)


def is_local(path: str, backend_args: dict | None = None) -> bool:
    """Return whether the engine reads `path` from a disk, not from a server or a database."""
    backend = get_file_backend(path, backend_args=backend_args, enable_singleton=True)
    return isinstance(backend, LocalBackend)


def find_missing(paths: Iterable[str]) -> set[str]:
    """Return the paths that do not exist.

    Every folder is listed once, which is faster than a request per file on network disks.
    """
    listed: dict[str, set[str]] = {}
    missing = set()
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder]:
            missing.add(path)
    return missing


def open_label_map(path: str, backend_args: dict | None = None) -> Image.Image:
    """Decode a label map from wherever the engine reads it.

    Raises:
        UnreadableImage: It cannot be read.
        ValueError: See :func:`flash_internimage.images.read_label_map`.
    """
    if is_local(path, backend_args):
        return read_label_map(path)
    return read_label_map(io.BytesIO(get(path, backend_args=backend_args)), name=path)


class LeftOutFiles:
    """Warn once about each file that is left out of a training.

    Args:
        limit: Number of files per process up to which the training continues.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._paths: set[str] = set()

    def add(self, path: str, reason: object) -> None:
        """Count a file.

        Raises:
            ValueError: It is one too many.
        """
        if path in self._paths:
            return
        self._paths.add(path)
        if len(self._paths) > self.limit:
            raise ValueError(
                f"more than max_left_out={self.limit} images or label maps cannot be used, the "
                f"last: {reason}"
            )
        print_log(
            f"left out: {reason}; {len(self._paths)} so far in process {os.getpid()}",
            logger="current",
            level=logging.WARNING,
        )


class LoadCheckedImage(LoadImageFromFile):
    """Load an image as its annotations describe it.

    Registered under the name of mmcv's LoadImageFromFile in mmdet and mmseg, whose test pipelines
    and inferencers look for that name. It differs for two kinds of files:

    - A photograph whose EXIF data ask for a quarter turn is read turned or as stored, whichever has
      the size of the annotations or the label map.
    - Greyscale of 16 bits keeps its full range, see :func:`flash_internimage.images.to_rgb`.

    Without a path it takes an array, as :class:`LoadCheckedArray` does: mmdet's and mmseg's
    inference functions choose one of the two by the first image, and keep to it in later calls.

    Args:
        kwargs: Arguments of LoadImageFromFile, except for the obsolete `file_client_args`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.file_client_args is not None:
            raise ValueError("file_client_args is obsolete: use backend_args")
        self._has_warned = False

    def transform(self, results: dict) -> dict | None:
        """Add `img`, `img_shape` and `ori_shape` to `results`.

        Raises:
            UnreadableImage: The image cannot be read, or has another size than its annotations say.
            ValueError: There is neither a path nor an array of an image.
        """
        path = results.get("img_path")
        if path is None and "img" in results:
            return self._take_array(results)
        if not isinstance(path, str | Path):
            raise ValueError(_not_an_image(path))
        try:
            if is_local(path, self.backend_args):
                check_image_file(path)
            image = self._read(results)
        except UnreadableImage:
            if self.ignore_empty:
                return None
            raise
        except Exception as error:  # decoders raise exceptions of any kind
            if self.ignore_empty:
                return None
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnreadableImage(f"cannot read image {path}: {reason:.500}") from error
        shape = image.shape[:2]
        declared = results.get("height"), results.get("width")
        if None not in declared and shape != declared:
            # COCO's outlines and run lengths are made for this size.
            raise UnreadableImage(_differing_size(path, shape, declared))
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = shape
        return results

    def _take_array(self, results: dict) -> dict:
        image = results["img"]
        if not isinstance(image, np.ndarray):
            raise ValueError(_not_an_image(image))
        if self.color_type != "unchanged":
            image = _to_bgr(image)
        results["img_path"] = None
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results

    def _read(self, results: dict) -> np.ndarray:
        path = results["img_path"]
        content = get(path, backend_args=self.backend_args)
        header = _open_header(content)
        turn = read_orientation(header) if self.color_type in ("color", "grayscale") else 1
        image = self._decode(content, header, self.color_type)
        if turn == 1 or (size := _annotated_size(results)) is None:
            return image
        as_stored = self._decode(content, header, f"{self.color_type}_ignore_orientation")
        if as_stored.shape[:2] != size:
            return image
        if image.shape[:2] != size:
            return as_stored
        if not self._has_warned:
            self._has_warned = True
            print_log(
                f"image {path} has EXIF orientation {turn}, and the same size turned and as "
                "stored: such images are turned. If their annotations are made for the stored "
                "ones, give the loading transform color_type='color_ignore_orientation'",
                logger="current",
                level=logging.WARNING,
            )
        return image

    def _decode(self, content: bytes, header: Image.Image | None, flag: str) -> np.ndarray:
        """Return (H, W, 3) BGR or (H, W) uint8, or whatever the file has for "unchanged"."""
        if header is None or header.mode[0] not in "IF" or flag == "unchanged":
            image = mmcv.imfrombytes(content, flag=flag, backend=self.imdecode_backend)
            if image is None:
                raise ValueError("it cannot be decoded")
            return image
        if not flag.endswith("_ignore_orientation"):
            header = ImageOps.exif_transpose(header)
        image = np.asarray(to_rgb(header))
        return image[..., 0].copy() if flag.startswith("gray") else image[..., ::-1].copy()


class LoadCheckedArray(LoadCheckedImage):
    """Take an image from an array as LoadCheckedImage does from a file.

    Registered under the names of LoadImageFromNDArray and InferencerLoader, which mmdet's and
    mmseg's inference functions use. Greyscale becomes three equal channels, and 16 bits become 8,
    see :func:`flash_internimage.images.to_8_bits`. With `color_type='unchanged'` any array
    is taken. Without an array it loads a path.
    """

    def transform(self, results: dict | str | Path | np.ndarray) -> dict | None:
        """Add or replace `img`, `img_path` (None for an array), `img_shape` and `ori_shape`.

        Args:
            results: Its `img` is (H, W), (H, W, 1) or (H, W, 3) BGR, uint8 or uint16; or it has an
                `img_path`. Inferencers pass the array or the path itself.

        Raises:
            UnreadableImage: See :class:`LoadCheckedImage`.
            ValueError: `img` is something else, has no pixels, or sides that differ too much.
        """
        if not isinstance(results, dict):
            results = {"img" if isinstance(results, np.ndarray) else "img_path": results}
        if "img" in results:
            results["img_path"] = None
        return super().transform(results)


def _not_an_image(given: object) -> str:
    is_array = isinstance(given, np.ndarray)
    return (
        "img must be a path or an array, (H, W), (H, W, 1) or (H, W, 3), of uint8 or uint16, got "
        + (f"{given.shape} {given.dtype}" if is_array else type(given).__name__)
    )


def _to_bgr(image: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8."""
    if image.dtype.newbyteorder("=") not in (np.uint8, np.uint16) or not (
        image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))
    ):
        raise ValueError(_not_an_image(image))
    shorter, longer = sorted(image.shape[:2])
    if shorter == 0 or longer > MAX_ASPECT_RATIO * shorter:
        raise ValueError(
            f"img must have pixels, and no side longer than {MAX_ASPECT_RATIO} times the other, "
            f"got {image.shape}"
        )
    image = image.reshape(*image.shape[:2], -1)
    return np.broadcast_to(to_8_bits(image), (*image.shape[:2], 3)).copy()


def _open_header(content: bytes) -> Image.Image | None:
    """Open an image without decoding it; None for formats that Pillow does not know."""
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        return None


def read_orientation(image: Image.Image | None) -> int:
    """Return how EXIF data ask to turn or mirror an image, 1 (not at all) to 8."""
    # Image.getexif() would decode the whole image to look for EXIF data at its end.
    exif = Image.Exif()
    with suppress(Exception):  # malformed data
        exif.load(image.info["exif"])
    orientation = exif.get(ExifTags.Base.Orientation)
    return orientation if orientation in range(1, 9) else 1


def _annotated_size(results: dict) -> tuple[int, int] | None:
    """Return the (height, width) that the annotations or the label map of an image are made for."""
    if {"height", "width"} <= results.keys():
        return results["height"], results["width"]
    label_map = results.get("seg_map_path")
    return read_size(label_map) if label_map and is_local(label_map) else None


@TRANSFORMS.register_module()
class LoadReadableImage(LoadCheckedImage):
    """LoadCheckedImage that leaves unreadable images out of a training.

    In training an unreadable image, or one of another size than its annotations say, is left out
    with a warning, and the data set draws another one.
    In tests (`test_mode=True` of this package's data sets) it is an error.

    Args:
        max_left_out: Number of unreadable images per process up to which the training continues.
        kwargs: Arguments of LoadCheckedImage.
    """

    def __init__(self, *args, max_left_out: int = 100, **kwargs):
        super().__init__(*args, **kwargs)
        self.left_out = LeftOutFiles(max_left_out)

    def transform(self, results: dict) -> dict | None:
        """Add `img`, `img_shape` and `ori_shape` to `results`.

        Raises:
            UnreadableImage: In tests, the image cannot be used.
            ValueError: More than `max_left_out` images cannot be used.
        """
        try:
            return super().transform(results)
        except UnreadableImage as error:
            if results.get("test_mode"):
                raise
            self.left_out.add(results["img_path"], error)
            return None


def check_size(path: str, declared: tuple[int, int]) -> None:
    """Check that LoadCheckedImage can read an image in the size of its annotations.

    Args:
        path: Local file.
        declared: (height, width).

    Raises:
        UnreadableImage: The file does not begin as an image of this size does.
    """
    size = read_size(path)
    if size == declared:
        return
    with Image.open(path) as image:
        turned = read_orientation(image) >= 5
    if not turned or size[::-1] != declared:
        raise UnreadableImage(_differing_size(path, size, declared))


def _differing_size(path: str, actual: Iterable[int], declared: Iterable[int]) -> str:
    """Return the message for an image of another size than its annotations say."""
    return (
        f"image {path} has (height, width) {tuple(actual)}, its annotations say {tuple(declared)}"
    )


class ReadableImages:
    """Mixin for data sets of the engine: errors about images are one line that names a file.

    Raises:
        ValueError: A path is of another type.
    """

    def __init__(self, *args, **kwargs):
        for name, kind, accepted in (
            ("ann_file", str | os.PathLike, "a path"),
            ("data_root", str | os.PathLike | None, "a path or None"),
            ("data_prefix", dict, "a dict"),
        ):
            if name in kwargs and not isinstance(kwargs[name], kind):
                raise ValueError(f"{name} must be {accepted}, got {kwargs[name]!r:.200}")
        super().__init__(*args, **kwargs)
        transforms = self.pipeline.transforms
        for i, transform in enumerate(transforms):
            if type(transform) is LoadImageFromFile:
                transforms[i] = LoadCheckedImage()
                transforms[i].__dict__.update(transform.__dict__)

    def __getitem__(self, idx: int) -> dict:
        """Return the image after the pipeline, in training another one if it cannot be used.

        Raises:
            ValueError: No image can be used.
        """
        try:
            return super().__getitem__(idx)
        except Exception as error:
            if type(error) is not Exception or self.test_mode:
                raise
            raise ValueError(
                f"{self.source}: none of {self.max_refetch + 1} images in a row can be used; the "
                "warnings in the log name them"
            ) from error

    @property
    def source(self) -> str:
        """The file or folder that lists the images."""
        return self.ann_file or self.data_prefix["img_path"]
