"""Write small images with label maps, and build the arguments of their datasets."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CLASSES = ("background", "bolt", "nut")
HEIGHT, WIDTH = 12, 16
TRAIN = [{"type": "LoadReadableImage"}, {"type": "LoadCheckedAnnotations"}]
TEST = [
    {"type": "mmseg.LoadImageFromFile"},
    {"type": "mmseg.Resize", "scale": (64, 32), "keep_ratio": True},
    {"type": "LoadCheckedAnnotations"},
]


def label_map(*values: int) -> np.ndarray:
    """Return a label map with these values, each equally often."""
    return np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))


def write_labels(folder: Path, i: int | str, values: np.ndarray) -> None:
    (folder / "labels").mkdir(exist_ok=True)
    Image.fromarray(values).save(folder / "labels" / f"{i}.png")


def pack_rows(values: np.ndarray, bits: int) -> list[bytes]:
    """Pack the rows of an array with a number of bits per value."""
    high_to_low = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = high_to_low.astype(np.uint8).reshape(len(values), -1)
    return [np.packbits(row).tobytes() for row in rows]


def write_grey_png(path: Path, values: np.ndarray, bits: int) -> None:
    """Write grayscale of 2 or 4 bits, which Pillow does not support."""
    height, width = values.shape
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in pack_rows(values, bits)))),
            (b"IEND", b""),
        ):
            file.write(struct.pack(">I", len(content)) + kind + content)
            file.write(struct.pack(">I", zlib.crc32(kind + content)))


def write_grey_tiff(path: Path, values: np.ndarray, bits: int, photometric: int = 1) -> None:
    """Write an uncompressed TIFF; `photometric` is 0 if white is zero, 1 if black is zero."""
    height, width = values.shape
    rows = b"".join(pack_rows(values, bits))
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height}
    tags = sorted({**tags, 273: 8 + 2 + 9 * 12 + 4, 279: len(rows)}.items())
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    path.write_bytes(header + entries + bytes(4) + rows)


def arguments(folder: Path, **kwargs) -> dict[str, Any]:
    return {
        "data_root": str(folder),
        "data_prefix": {"img_path": "images", "seg_map_path": "labels"},
        "metainfo": {"classes": CLASSES},
        "pipeline": TEST if kwargs.get("test_mode") else TRAIN,
        **kwargs,
    }


def reduced(value: int) -> int:
    """Apply reduce_zero_label: 0 is ignored, all other labels are one less."""
    return 255 if value in (0, 255) else value - 1


def both_modes(function):
    return pytest.mark.parametrize("test_mode", [False, True], ids=["train", "test"])(function)
