"""Turn an RGB image into the input of a backbone, and map coordinates between the two."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

Color = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """Resizing and normalization of images; nothing is cropped.

    Attributes:
        size: Shorter side in pixels to which images are resized; None keeps their size.
        max_size: Limit of the longer side, which takes precedence.
        mean: Mean of red, green and blue, from 0 to 255.
        std: Standard deviation of red, green and blue.
    """

    size: int | None = None
    max_size: int | None = None
    mean: Color = tuple(255 * n for n in IMAGENET_DEFAULT_MEAN)  # type: ignore[assignment]
    std: Color = tuple(255 * n for n in IMAGENET_DEFAULT_STD)  # type: ignore[assignment]

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which an image is resized."""
        shorter, longer = sorted((height, width))
        scale = 1.0 if self.size is None else self.size / shorter
        if self.max_size is not None:
            scale = min(scale, self.max_size / longer)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def __call__(self, image: np.ndarray) -> Tensor:
        """Return an image (H, W, 3) uint8 RGB as a tensor of shape (1, 3, H', W'), float32.

        Raises:
            ValueError: If `image` has another shape or dtype.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"image must be (H, W, 3) uint8, got shape {image.shape} of {image.dtype}"
            )
        x = torch.tensor(image).permute(2, 0, 1)[None].float()
        size = self.input_size(*image.shape[:2])
        if size != image.shape[:2]:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (self.mean, self.std))
        return (x - mean) / std


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Return the preprocessing that a model expects.

    Args:
        model: A model of timm, whose `pretrained_cfg` is read, or a detector or segmentor of
            OpenMMLab, whose data preprocessor and config (if it has one, as `cfg`) are read.
    """
    if (preprocessor := getattr(model, "data_preprocessor", None)) is not None:
        mean, std = (_color(getattr(preprocessor, name).flatten().tolist())
                     for name in ("mean", "std"))  # fmt: skip
        size, max_size = _test_scale(getattr(model, "cfg", None) or {})
        return Preprocessing(size, max_size, mean, std)
    settings = getattr(model, "pretrained_cfg", None)
    if settings is None:
        return Preprocessing()
    mean, std = (_color([255 * n for n in settings[name]]) for name in ("mean", "std"))
    return Preprocessing(settings["input_size"][-1], None, mean, std)


def _color(numbers: list[float]) -> Color:
    red, green, blue = numbers
    return red, green, blue


def _test_scale(config: Any) -> tuple[int | None, int | None]:
    """Return the shorter and the longer side of an OpenMMLab config's test images."""
    loader = config.get("test_dataloader") or {}
    for step in (loader.get("dataset") or {}).get("pipeline") or []:
        if step.get("type") == "Resize" and step.get("scale"):
            return min(step["scale"]), max(step["scale"])
    return None, None
