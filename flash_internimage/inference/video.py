"""Read videos and cameras, and write annotated videos."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from ..drawing.layout import pad
from ..files import partial_path
from ..images import UnreadableImage
from .sources import Source

_logger = logging.getLogger(__name__)

# Frames per second of cameras and files that do not state any.
_DEFAULT_FPS = 25.0


class VideoReader:
    """Iterate over the frames of a video or camera, as (H, W, 3) uint8 arrays in RGB.

    Args:
        source: Video or camera.

    Raises:
        UnreadableImage: If it cannot be opened.

    Attributes:
        fps: Frames per second.
        frames: Number of frames as the file states it, 0 if unknown.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        with _quiet():
            path = source.path if isinstance(source.path, int) else str(source.path)
            self._capture = cv2.VideoCapture(path)
        if not self._capture.isOpened():
            kind = "camera" if source.kind == "camera" else "video"
            raise UnreadableImage(f"cannot open {kind} {source.path}")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else _DEFAULT_FPS
        self.frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield all frames.

        Raises:
            UnreadableImage: If there are none.
        """
        count = 0
        while True:
            with _quiet():
                success, frame = self._capture.read()
            if not success:
                break
            count += 1
            yield np.ascontiguousarray(frame[..., ::-1])
        if not count:
            raise UnreadableImage(f"cannot read any frame of {self._source.path}")
        if count < self.frames:
            _logger.warning(
                "%s: %d of %d frames could be read", self._source.path, count, self.frames
            )

    def close(self) -> None:
        """Close the file or camera."""
        self._capture.release()


class VideoWriter:
    """Write pictures to an MP4 file, which appears when the block ends, even by an error.

    All frames have the size of the first one; larger pictures are reduced and smaller ones padded.

    Args:
        path: Destination.
        fps: Frames per second.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._fps = path, fps
        self._partial = partial_path(path, suffix=".mp4")
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, picture: np.ndarray) -> None:
        """Add a frame.

        Args:
            picture: (H, W, 3) uint8 array in RGB.

        Raises:
            OSError: If the file cannot be written.
        """
        if self._writer is None:
            height, width = picture.shape[:2]
            self._size = width + width % 2, height + height % 2  # required by MPEG-4
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._partial), code, self._fps, self._size)
            if not self._writer.isOpened():
                raise OSError(f"cannot write video {self._path}")
        width, height = self._size
        factor = min(width / picture.shape[1], height / picture.shape[0])
        if factor < 1:
            size = int(picture.shape[1] * factor), int(picture.shape[0] * factor)
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        self._writer.write(np.ascontiguousarray(pad(picture, width, height)[..., ::-1]))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is None:
            return
        self._writer.release()
        if self._partial.exists():
            os.replace(self._partial, self._path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep OpenCV from logging; what matters is reported by this module."""
    level = cv2.getLogLevel()
    cv2.setLogLevel(0)
    try:
        yield
    finally:
        cv2.setLogLevel(level)
