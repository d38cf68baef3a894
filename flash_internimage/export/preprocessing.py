"""The preprocessing of classifiers as part of the graph."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data.transforms import MaybeToTensor
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, InterpolationMode, Normalize, Resize, ToTensor

# Half the width of each filter of Pillow, in pixels of the result.
_SUPPORT = {InterpolationMode.BILINEAR: 1.0, InterpolationMode.BICUBIC: 2.0}


class ImagePreprocessing(nn.Module):
    """Resize, crop and normalize images of any size, as torchvision does with Pillow's images.

    Both axes are resized by a product with a matrix. The only difference from Pillow is that its
    weights are rounded to 22 bits, which can change a pixel by one of 255 levels.

    Args:
        steps: Transforms of torchvision: Resize, CenterCrop, a conversion to a tensor, Normalize.

    Raises:
        ValueError: If the steps are others.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, steps: Sequence[Any]) -> None:
        super().__init__()
        kinds = ((Resize,), (CenterCrop,), (MaybeToTensor, ToTensor), (Normalize,))
        if len(steps) != len(kinds) or not all(map(isinstance, steps, kinds)):
            names = ", ".join(type(step).__name__ for step in steps)
            raise ValueError(
                "the preprocessing must be Resize, CenterCrop, ToTensor and Normalize to be part "
                f"of the graph, got {names}"
            )
        resize, crop, _, normalize = steps
        if resize.interpolation not in _SUPPORT or resize.max_size is not None:
            raise ValueError(
                f"the interpolation must be bilinear or bicubic, got {resize.interpolation}"
            )
        self.support = _SUPPORT[resize.interpolation]
        self.size, self.crop = resize.size, crop.size
        if min(self._resized(1, 1)) < max(self.crop):
            raise ValueError(f"size must be at least {max(self.crop)}, got {resize.size}")
        self.register_buffer("mean", torch.as_tensor(normalize.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.as_tensor(normalize.std).view(-1, 1, 1))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width after resizing, before the crop."""
        if not isinstance(self.size, int):
            return self.size[0], self.size[-1]
        shorter = torch.sym_min(height, width)
        return self.size * height // shorter, self.size * width // shorter

    def forward(self, images: Tensor) -> Tensor:
        """Preprocess images.

        Args:
            images: (N, H, W, 3) uint8, RGB.

        Returns:
            (N, 3, h, w) float32.
        """
        height, width = images.shape[1:3]
        rows, columns = self._resized(height, width)
        pixels = images.permute(0, 3, 1, 2).float()
        horizontal = self._weights(width, columns, self.crop[1], pixels)
        vertical = self._weights(height, rows, self.crop[0], pixels)
        # Pillow resizes horizontally first, and rounds in between.
        pixels = (pixels @ horizontal.T + 0.5).floor().clamp(0, 255)
        pixels = (vertical @ pixels + 0.5).floor().clamp(0, 255)
        return (pixels / 255 - self.mean) / self.std

    def _weights(self, size: int, resized: int, cropped: int, like: Tensor) -> Tensor:
        """Return the weights (cropped, size) of pixels in the central pixels of the result."""
        # torchvision rounds half to even.
        first = torch.round(torch.scalar_tensor(resized - cropped, dtype=torch.float64) / 2)
        scale = torch.scalar_tensor(size, dtype=torch.float64) / resized
        index = torch.arange(cropped, dtype=torch.float64) + first
        center = ((index + 0.5) * scale)[:, None]
        stretch = scale.clamp(min=1)
        pixel = torch.arange(size, dtype=torch.float64)
        distance = ((pixel + 0.5 - center) / stretch).abs()
        weights = self._filter(distance)
        return (weights / weights.sum(1, keepdim=True)).to(like.dtype)

    def _filter(self, x: Tensor) -> Tensor:
        if self.support == 1:
            return (1 - x).clamp(min=0)
        a = -0.5
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * a
        return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
