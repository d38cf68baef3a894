"""Small images with label maps, and the arguments of data sets that read them."""

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
    """A label map with these values, each as often as the others."""
    return np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))


def write_labels(folder: Path, i: int | str, values: np.ndarray) -> None:
    (folder / "labels").mkdir(exist_ok=True)
    Image.fromarray(values).save(folder / "labels" / f"{i}.png")


def arguments(folder: Path, **kwargs) -> dict[str, Any]:
    return {
        "data_root": str(folder),
        "data_prefix": {"img_path": "images", "seg_map_path": "labels"},
        "metainfo": {"classes": CLASSES},
        "pipeline": TEST if kwargs.get("test_mode") else TRAIN,
        **kwargs,
    }


def reduced(value: int) -> int:
    """mmsegmentation's rule in words: zero is ignored, all other labels are one less."""
    return 255 if value in (0, 255) else value - 1


def both_modes(function):
    return pytest.mark.parametrize("test_mode", [False, True], ids=["train", "test"])(function)
