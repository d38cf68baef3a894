"""Turn an RGB image into the input of a backbone, and map coordinates between the two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    create_transform,
    resolve_model_data_config,
)
from torch import Tensor
from torchvision.transforms import Normalize, Resize

from ..images import check_rgb
from ..inference import Predictor
from .layers import Model, module_of

Color = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """Bicubic resizing and normalization of images; nothing is cropped.

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
        check_rgb(image)
        height, width = self.input_size(*image.shape[:2])
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float()
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (self.mean, self.std))
        return (x - mean) / std


def preprocessing_of(model: Model) -> Preprocessing:
    """Return the preprocessing that a model expects in a test.

    Args:
        model: A predictor; a model of timm, whose pretrained config is read; or a detector or
            segmentor of OpenMMLab, whose data preprocessor and config (if it has one, as `cfg`) are
            read.
    """
    module = module_of(model)
    colors = getattr(module, "data_preprocessor", None)
    steps: Sequence[Any] = ()
    if isinstance(model, Predictor):
        steps = model.steps
    elif colors is not None:
        steps = _test_pipeline(getattr(module, "cfg", None) or {})
    elif getattr(module, "pretrained_cfg", None) is not None:
        steps = create_transform(**resolve_model_data_config(module), is_training=False).transforms
    settings: dict[str, Any] = {}
    for step in steps:
        if isinstance(step, Normalize):
            settings |= {name: _color(getattr(step, name), 255) for name in ("mean", "std")}
        elif isinstance(step, Resize):
            settings["size"] = step.size if isinstance(step.size, int) else min(step.size)
        elif scale := _scale_of(step):
            settings |= {"size": min(scale), "max_size": max(scale)}
    if colors is not None:
        settings |= {name: _color(getattr(colors, name).flatten()) for name in ("mean", "std")}
    return Preprocessing(**settings)


def _scale_of(step: Any) -> Sequence[int] | None:
    """Return the `scale` of a transform of OpenMMLab, or of its settings."""
    return step.get("scale") if isinstance(step, Mapping) else getattr(step, "scale", None)


def _color(numbers: Any, factor: float = 1) -> Color:
    red, green, blue = (factor * torch.as_tensor(numbers)).tolist()
    return red, green, blue


def _test_pipeline(config: Mapping[str, Any]) -> Sequence[Any]:
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    return dataset.get("pipeline") or ()
