"""Image files of a data set: missing, unreadable and left out."""

import io
import logging
import os
from collections.abc import Iterable

from mmcv.transforms import LoadImageFromFile
from mmengine.fileio import LocalBackend, get, get_file_backend
from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS
from PIL import Image

from ..images import UnreadableImage, check_image_file, read_image


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


def open_image(path: str, backend_args: dict | None = None) -> Image.Image:
    """Decode an image from wherever the engine reads it.

    Raises:
        UnreadableImage: See :func:`flash_internimage.images.read_image`.
    """
    if is_local(path, backend_args):
        return read_image(path)
    return read_image(io.BytesIO(get(path, backend_args=backend_args)), name=path)


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


@TRANSFORMS.register_module()
class LoadReadableImage(LoadImageFromFile):
    """Load an image with mmcv's LoadImageFromFile; training goes on without unreadable images.

    In training an unreadable image, or one of another size than its annotations say, is left out
    with a warning, and the data set draws another one.
    In tests (`test_mode=True` of this package's data sets) it is an error.

    Args:
        max_left_out: Number of unreadable images per process up to which the training continues.
        kwargs: Arguments of LoadImageFromFile.
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
        path = results["img_path"]
        try:
            if self.file_client_args is None and is_local(path, self.backend_args):
                check_image_file(path)
            loaded = _load(super().transform, results)
            _check_declared_size(loaded)
            return loaded
        except UnreadableImage as error:
            if results.get("test_mode"):
                raise
            self.left_out.add(path, error)
            return None


def _load(transform, results: dict) -> dict:
    try:
        return transform(results)
    except Exception as error:  # decoders raise exceptions of any kind
        path = results["img_path"]
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"cannot read image {path}: {reason:.500}") from error


def _check_declared_size(results: dict) -> None:
    """Check the size in COCO's annotations, for which outlines and run lengths are made."""
    declared = results.get("height"), results.get("width")
    if None not in declared and declared != tuple(results["ori_shape"]):
        raise UnreadableImage(differing_size(results["img_path"], results["ori_shape"], declared))


def differing_size(path: str, actual: Iterable[int], declared: Iterable[int]) -> str:
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

    def prepare_data(self, idx: int) -> dict | None:
        """Run the pipeline for one image.

        Raises:
            UnreadableImage: In tests, the image cannot be read.
        """
        try:
            return super().prepare_data(idx)
        except UnreadableImage:
            raise
        except Exception:
            if self.test_mode:
                # Test pipelines use mmcv's own LoadImageFromFile, which mmdet's and mmseg's
                # inferencers look for. If it is not to blame, the error is that of the pipeline.
                for transform in self.pipeline.transforms:
                    if isinstance(transform, LoadImageFromFile):
                        _load(transform.transform, self.get_data_info(idx))
            raise

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
