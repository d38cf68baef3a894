"""Transforms that load images and label maps."""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.fileio import get
from mmengine.registry import TRANSFORMS
from PIL import Image, ImageOps, UnidentifiedImageError

from ...images import (
    MAX_ASPECT_RATIO,
    UnreadableImage,
    check_image_file,
    read_orientation,
    read_size,
    to_8_bits,
    to_rgb,
)
from ..utils import log_warning
from .files import is_local
from .label_maps import differing_sizes, read_labels


class LeftOutFiles:
    """Warn once about each file that is left out of training.

    Args:
        limit: Number of files per process up to which training continues.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._paths: set[str] = set()

    def add(self, path: str, reason: object) -> None:
        """Count a file and warn about it.

        Raises:
            ValueError: If the limit is exceeded.
        """
        if path in self._paths:
            return
        self._paths.add(path)
        if len(self._paths) > self.limit:
            raise ValueError(
                f"more than max_corrupt={self.limit} images or label maps cannot be used, the "
                f"last: {reason}"
            )
        log_warning(f"left out: {reason}; {len(self._paths)} so far in process {os.getpid()}")


class LoadCheckedImage(LoadImageFromFile):
    """Load an image as its annotations describe it.

    Safe loading registers it under the name of mmcv's LoadImageFromFile, which the test
    pipelines of mmdet and mmseg use. It differs from mmcv's in two cases:

    - A photograph with an EXIF orientation is read rotated or as stored, whichever has the size of
      the annotations or the label map, and rotated if both have.
    - 16-bit grayscale keeps its full range, see :func:`flash_internimage.images.to_rgb`.

    Without a path it accepts an array, like :class:`LoadCheckedArray`, because the inference
    functions of mmdet and mmseg choose a loader by the first image and keep it in later calls.

    Args:
        args: Arguments of LoadImageFromFile.
        kwargs: Keyword arguments of LoadImageFromFile, except the obsolete `file_client_args`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.file_client_args is not None:
            raise ValueError("file_client_args is obsolete: use backend_args")
        self._has_warned = False

    def transform(self, results: dict) -> dict | None:
        """Add `img`, `img_shape` and `ori_shape` to `results`.

        Raises:
            UnreadableImage: If the image cannot be read or is not of its annotated size.
            ValueError: If there is neither a path nor the array of an image.
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
        except Exception as error:  # Decoders raise all kinds of exceptions.
            if self.ignore_empty:
                return None
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnreadableImage(f"cannot read image {path}: {reason:.500}") from error
        shape = image.shape[:2]
        declared: tuple[Any, Any] = (results.get("height"), results.get("width"))
        if None not in declared and shape != declared:
            # COCO's polygons and run lengths refer to this size.
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
        turn = 1
        if header is not None and self.color_type in ("color", "grayscale"):
            turn = read_orientation(header)
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
            log_warning(
                f"image {path} has EXIF orientation {turn} and the same size rotated and as "
                "stored: such images are rotated. If their annotations refer to the stored images, "
                "set color_type='color_ignore_orientation' in the loading transform"
            )
        return image

    def _decode(self, content: bytes, header: Image.Image | None, flag: str) -> np.ndarray:
        """Return (H, W, 3) BGR or (H, W) in uint8, or the file's own format for "unchanged"."""
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
    """Load an image from an array, as LoadCheckedImage does from a file.

    Safe loading registers it under the names LoadImageFromNDArray and InferencerLoader, which
    the inference functions of mmdet and mmseg use. Grayscale is repeated in three channels, and 16
    bits are reduced to 8, see :func:`flash_internimage.images.to_8_bits`. With
    `color_type='unchanged'` any array is accepted. Without an array, the image is loaded from a
    path.
    """

    def transform(self, results: dict | str | Path | np.ndarray) -> dict | None:
        """Add or replace `img`, `img_path` (None for an array), `img_shape` and `ori_shape`.

        Args:
            results: A dict with `img`, an array of shape (H, W), (H, W, 1) or (H, W, 3) in BGR and
                of dtype uint8 or uint16, or with `img_path`. Inferencers pass the array or the path
                itself.

        Raises:
            UnreadableImage: See :class:`LoadCheckedImage`.
            ValueError: If `img` is anything else, has no pixels or is too elongated.
        """
        if not isinstance(results, dict):
            results = {"img" if isinstance(results, np.ndarray) else "img_path": results}
        if "img" in results:
            results["img_path"] = None
        return super().transform(results)


def _not_an_image(given: object) -> str:
    got = type(given).__name__
    if isinstance(given, np.ndarray):
        got = f"{given.shape} {given.dtype}"
    return (
        "img must be a path or an array, (H, W), (H, W, 1) or (H, W, 3), of uint8 or uint16, "
        f"got {got}"
    )


def _to_bgr(image: np.ndarray) -> np.ndarray:
    """Convert an array to (H, W, 3) uint8."""
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
    """Open an image without decoding it, or return None if Pillow does not know the format."""
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        return None


def _annotated_size(results: dict) -> tuple[int, int] | None:
    """Return the (height, width) of the annotations or the label map of an image, if known."""
    if {"height", "width"} <= results.keys():
        return results["height"], results["width"]
    label_map = results.get("seg_map_path")
    return read_size(label_map) if label_map and is_local(label_map) else None


@TRANSFORMS.register_module()
class LoadReadableImage(LoadCheckedImage):
    """LoadCheckedImage that leaves unreadable images out of training.

    In training, an image that is unreadable or not of its annotated size is left out with a
    warning, and the dataset draws another one. At test time (`test_mode=True` in the datasets of
    this package) it is an error.

    Args:
        args: Arguments of LoadCheckedImage.
        max_corrupt: Number of such images per process up to which training continues.
        kwargs: Keyword arguments of LoadCheckedImage.
    """

    def __init__(self, *args: Any, max_corrupt: int = 100, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left_out = LeftOutFiles(max_corrupt)

    def transform(self, results: dict) -> dict | None:
        """Add `img`, `img_shape` and `ori_shape` to `results`.

        Raises:
            UnreadableImage: If the image cannot be used at test time.
            ValueError: If more than `max_corrupt` images cannot be used in training.
        """
        try:
            return super().transform(results)
        except UnreadableImage as error:
            if results.get("test_mode"):
                raise
            self.left_out.add(results["img_path"], error)
            return None


def check_size(path: str, declared: tuple[int, int]) -> None:
    """Check by its header that LoadCheckedImage can read an image in its annotated size.

    Args:
        path: Local file.
        declared: Annotated (height, width).

    Raises:
        UnreadableImage: If the header is not that of an image of this size, as stored or rotated.
    """
    size = read_size(path)
    if size == declared:
        return
    with Image.open(path) as image:
        turned = read_orientation(image) >= 5
    if not turned or size[::-1] != declared:
        raise UnreadableImage(_differing_size(path, size, declared))


def _differing_size(path: str | Path, actual: Iterable[int], declared: Iterable[int]) -> str:
    """Return the error message for an image that is not of its annotated size."""
    return (
        f"image {path} has (height, width) {tuple(actual)}, but its annotations {tuple(declared)}"
    )


@TRANSFORMS.register_module()
class LoadCheckedAnnotations(BaseTransform):
    """Load a label map, as mmseg's LoadAnnotations does, and validate it.

    In training, a label map that is unreadable or not of the size of its image is left out with a
    warning, and the dataset draws another image. At test time it is an error, as it is with mmseg's
    own datasets, whose entries do not distinguish training from testing.

    Values outside the classes are always an error, because on a GPU they would fail an assertion
    that names no file. mmseg's own datasets do not provide the number of classes for this check,
    unless they select some of their classes.

    Images without a label map, as in mmseg's inference, are passed on unchanged.

    Args:
        max_corrupt: Number of label maps per process up to which training continues.
    """

    def __init__(self, max_corrupt: int = 100) -> None:
        self.left_out = LeftOutFiles(max_corrupt)

    def transform(self, results: dict) -> dict | None:
        """Add `gt_seg_map` to `results`.

        Args:
            results: Entry of a dataset of this module or of mmseg, with the image's `ori_shape`.

        Raises:
            ValueError: If the label map cannot be used.
        """
        if "seg_map_path" not in results:
            return results
        try:
            labels = read_labels(results)
            shape = tuple(results["ori_shape"])
            if labels.shape != shape:
                raise UnreadableImage(differing_sizes(results, labels.shape, shape))
        except UnreadableImage as error:
            if results.get("test_mode", True):
                raise
            self.left_out.add(results["seg_map_path"], error)
            return None
        results["gt_seg_map"] = labels
        results["seg_fields"].append("gt_seg_map")
        return results
