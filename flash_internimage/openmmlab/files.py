"""The files of a data set: which are missing or damaged, and which a training leaves out."""

import logging
import os
from collections.abc import Iterable

from mmengine.logging import print_log
from PIL import Image

DAMAGED = (OSError, SyntaxError, ValueError)  # what Pillow raises for files that are


def find_missing(paths: Iterable[str]) -> set[str]:
    """The paths at which nothing is; as each folder is listed once, network disks are quick too."""
    listed: dict[str, set[str]] = {}
    missing = set()
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder]:
            missing.add(path)
    return missing


def read_size(path: str) -> tuple[int, int] | None:
    """The (height, width) in the header of an image; None if the file does not begin as one."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except DAMAGED:
        return None


class LeftOutFiles:
    """Warns once of each file that a training leaves out, with their number so far."""

    def __init__(self) -> None:
        self._paths: set[str] = set()

    def add(self, path: str, reason: str) -> None:
        if path in self._paths:
            return
        self._paths.add(path)
        print_log(
            f"left out: {reason}; {len(self._paths)} so far in process {os.getpid()}",
            logger="current",
            level=logging.WARNING,
        )
