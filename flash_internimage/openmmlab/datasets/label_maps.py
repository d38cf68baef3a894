"""Decoding and validation of label maps."""

import io
from typing import Any

import numpy as np
from mmengine.fileio import get
from PIL import Image

from ...images import read_label_map
from .files import is_local

IGNORED = 255  # mmseg's labels are uint8


def open_label_map(path: str, backend_args: dict | None = None) -> Image.Image:
    """Decode a label map with mmengine's file backend.

    Raises:
        UnreadableImage: If it cannot be read.
        ValueError: See :func:`flash_internimage.images.read_label_map`.
    """
    if is_local(path, backend_args):
        return read_label_map(path)
    return read_label_map(io.BytesIO(get(path, backend_args=backend_args)), name=path)


def read_labels(info: dict[str, Any]) -> np.ndarray:
    """Read the label map of an image as class indices.

    Args:
        info: Entry of a dataset of this module or of mmseg. mmseg's do not contain the number of
            classes: without a `label_map`, all values up to 255 are accepted.

    Returns:
        Class indices, (H, W) in uint8. The ignore index is 255, whatever it is in the file.

    Raises:
        UnreadableImage: If the label map cannot be read.
        ValueError: If it has more than one channel, a lossy format, or values outside the classes.
    """
    image = open_label_map(info["seg_map_path"], info.get("backend_args"))
    if "num_classes" not in info:
        label_map = info["label_map"] or {i: i for i in range(IGNORED - info["reduce_zero_label"])}
        classes = len({*label_map.values()} - {IGNORED})
        info = {**info, "ignore_index": IGNORED, "numbers": len(label_map), "num_classes": classes}
    return decode_labels(image, info)


def decode_labels(image: Image.Image, info: dict[str, Any]) -> np.ndarray:
    """Return the class indices of a decoded label map, see :func:`read_labels`."""
    path = info["seg_map_path"]
    values = np.asarray(image)  # For palette images, these are indices.
    if values.ndim != 2:
        raise ValueError(
            f"label map {path} must have one channel that contains class indices, got an array of "
            f"shape {values.shape}"
        )
    if info["ignore_index"] != IGNORED:
        values = np.where(values == info["ignore_index"], IGNORED, values)
    indices = values.astype(np.uint8)
    labels = _label_table(info)[indices]
    wrong = (labels < 0) | (indices != values)
    if wrong.any():
        first = int(info["reduce_zero_label"])
        ignored = sorted({IGNORED, info["ignore_index"], *range(first)})
        raise ValueError(
            f"label map {path} has invalid values {np.unique(values[wrong])[:10].tolist()}; with "
            f"{info['numbers']} classes and reduce_zero_label={info['reduce_zero_label']}, {first} "
            f"to {first + info['numbers'] - 1} are classes; ignored: {', '.join(map(str, ignored))}"
        )
    return labels.astype(np.uint8)


def _label_table(info: dict[str, Any]) -> np.ndarray:
    """Return the labels of the values 0 to 255, (256,) in int16; -1 marks invalid values."""
    values: np.ndarray = np.arange(256, dtype=np.int16)
    if info["reduce_zero_label"]:
        values = np.where((values == 0) | (values == IGNORED), IGNORED, values - 1)
    labels = values.copy()
    for old, new in (info["label_map"] or {}).items():
        labels[values == old] = new
    return np.where((labels < info["num_classes"]) | (labels == IGNORED), labels, -1)


class Palettes:
    """Compare the palettes of label maps."""

    def __init__(self) -> None:
        self.colors: dict[int, tuple[int, ...]] = {}
        self.others: list[str] = []

    def add(self, image: Image.Image, path: str) -> None:
        """Record the colors of a label map, or its path if they differ from those recorded."""
        if image.mode != "P":
            return
        colors = np.reshape(image.getpalette("RGB") or [], (-1, 3)).tolist()
        indices = np.unique(np.asarray(image)).tolist()
        used = {i: tuple(colors[i]) for i in indices if i < len(colors)}
        if any(self.colors.setdefault(i, color) != color for i, color in used.items()):
            self.others.append(path)


def differing_sizes(info: dict, labels: tuple[int, ...], image: tuple[int, ...]) -> str:
    """Return the error message for a label map that is not of the size of its image."""
    return f"label map {info['seg_map_path']} has (height, width) {labels}, but its image {image}"
